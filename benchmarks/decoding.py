"""Milliseconds a token of greedy decoding, batch 1: factorized against not, `generate` against a bare loop, and more.

`python benchmarks/decoding.py`: eager and compiled, merged LoRA, bfloat16, an int8 trunk; side by side in one run.
"""

import copy
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from side_by_side import DEVICE, machine, measure_in_turns, now, print_table, ratios, seconds_cell
from torch import nn
from transformers import DynamicCache, StaticCache

from factorized_gpt2 import FactorizedGPT2, FactorizedGPT2Config
from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.runs.fields import LORA_TARGETS
from factorized_gpt2.settings.parsing import ManualParser
from factorized_gpt2.trainer.adapters import add_lora, merge


@dataclass
class DecodingArguments:
    """The models and the text."""

    ranks: list[int] = field(default_factory=lambda: [64, 128, 256, 512], metadata={"help": "k."})
    n_layer: int = field(default=12, metadata={"help": "Blocks."})
    width: int = field(default=768, metadata={"help": "d."})
    vocab_size: int = field(default=50257, metadata={"help": "V."})
    prompt: int = field(default=32, metadata={"help": "Tokens before the first new one."})
    tokens: int = field(default=32, metadata={"help": "New tokens a timed run."})
    batch: int = field(default=1, metadata={"help": "Texts that are decoded together."})
    rounds: int = field(default=11, metadata={"help": "Timed runs."})
    tables: list[str] = field(
        default_factory=lambda: ["ranks", "ways"],
        metadata={"help": "ranks: k against unfactorized, in several forms. ways: generate, LoRA, static cache."},
    )
    compile: bool = field(default=True, metadata={"help": "Measure compiled decoding too (two minutes to compile)."})
    compile_backend: str = field(default="inductor", metadata={"help": "By what."})
    device: str = field(default=DEVICE, metadata={"help": "Where to run.", "choices": ["cpu", "cuda"]})


Decoder = Callable[[], float]


@torch.no_grad()
def main(argv: list[str]) -> None:
    """Print a table of ranks, and one of ways to decode."""
    arguments = ManualParser(DecodingArguments, prog="decoding.py", description=__doc__).parse(argv)[0]
    print(
        f"{machine('peft', device=arguments.device)}; prompt {arguments.prompt}, {arguments.tokens} new tokens\n",
        flush=True,
    )
    models = {rank: new_model(arguments, rank) for rank in (None, *arguments.ranks)}
    if "ranks" in arguments.tables:
        _print_ranks(arguments, models)
    if "ways" in arguments.tables:
        _print_ways(arguments, models)


def _print_ranks(arguments: DecodingArguments, models: dict[int | None, FactorizedGPT2]) -> None:
    forms = {
        "float32": models,
        "bfloat16": {rank: new_model(arguments, rank).bfloat16() for rank in models},
    }
    if arguments.device == "cpu":
        forms["int8 trunk"] = {rank: _with_int8_trunk(new_model(arguments, rank)) for rank in models}
    decoders = {(form, rank): loop(arguments, model) for form in forms for rank, model in forms[form].items()}
    if arguments.compile:
        forms["float32, compiled"] = models
        for rank, model in models.items():
            decoders["float32, compiled", rank] = compiled(arguments, model)
    seconds = measure_in_turns(decoders, arguments.rounds)
    rows = []
    for rank in models:
        row = {"k": rank or "-"}
        for form in forms:
            row[f"{form}, ms"] = seconds_cell(seconds[form, rank])
            if rank:
                row[f"unfactorized / this, {form}"] = ratios(seconds[form, None], seconds[form, rank])
        rows.append(row)
    print_table(rows)


def _print_ways(arguments: DecodingArguments, models: dict[int | None, FactorizedGPT2]) -> None:
    print("\nAgainst the bare loop, float32:\n")
    rows = []
    for rank, model in models.items():
        merged = merge(add_lora(new_model(arguments, rank), 32, 64, 0.1, LORA_TARGETS))
        ways = {
            "bare": loop(arguments, model),
            "generate": _generate(arguments, model),
            "never adapted": loop(arguments, model, anew=True),
            "merged": loop(arguments, merged, anew=True),
            "static": _static(arguments, model, model),
        }
        seconds = measure_in_turns(ways, arguments.rounds)
        rows.append(
            {
                "k": rank or "-",
                "bare loop, ms": seconds_cell(seconds["bare"]),
                "generate / bare": ratios(seconds["generate"], seconds["bare"]),
                "merged LoRA / never adapted": ratios(seconds["merged"], seconds["never adapted"]),
                "static cache / dynamic": ratios(seconds["static"], seconds["bare"]),
            }
        )
    print_table(rows)


def new_model(arguments: DecodingArguments, rank: int | None) -> FactorizedGPT2:
    """Make a model of rank k, or unfactorized, in evaluation mode, with room for the prompt and the new tokens."""
    torch.manual_seed(0)
    config = FactorizedGPT2Config(
        n_embd_wte=rank,
        n_layer=arguments.n_layer,
        n_head=arguments.width // 64,
        n_embd=arguments.width,
        vocab_size=arguments.vocab_size,
        n_positions=arguments.prompt + arguments.tokens + 1,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return FactorizedGPT2(config).eval().to(arguments.device)


def _with_int8_trunk(model: FactorizedGPT2) -> FactorizedGPT2:
    """Quantize the linear layers of the blocks, weights to int8 ahead and activations as they come."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model.transformer.h = torch.ao.quantization.quantize_dynamic(model.transformer.h, {nn.Linear}, torch.qint8)
    return model


def _prompt(arguments: DecodingArguments) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(arguments.vocab_size, (arguments.batch, arguments.prompt), generator=generator)
    return ids.to(arguments.device)


def loop(arguments: DecodingArguments, model: FactorizedGPT2, anew: bool = False) -> Decoder:
    """Decode in the plainest loop there is, the cache growing.

    With `anew` every run takes a new copy of the model: where weights happen to lie in memory is worth 3 % to them.
    """
    prompt = _prompt(arguments)

    def run() -> float:
        decoder = copy.deepcopy(model) if anew else model
        cache = DynamicCache(config=model.config)
        outputs = decoder(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        began = now()
        for _ in range(arguments.tokens):
            token = outputs.logits[:, -1].argmax(-1, keepdim=True)
            outputs = decoder(token, past_key_values=cache, use_cache=True)
        outputs.logits[:, -1].argmax(-1)
        return (now() - began) / arguments.tokens

    return run


def _generate(arguments: DecodingArguments, model: FactorizedGPT2) -> Decoder:
    """Let `generate` decode; the time of the prompt and of setting up is that of a call for one token."""
    prompt = _prompt(arguments)

    def run() -> float:
        began = now()
        model.generate(prompt, max_new_tokens=1, do_sample=False)
        between = now()
        model.generate(prompt, max_new_tokens=arguments.tokens + 1, do_sample=False)
        return (now() - between - (between - began)) / arguments.tokens

    return run


def _static(
    arguments: DecodingArguments, model: FactorizedGPT2, forward: Callable[..., object], settings: dict | None = None
) -> Decoder:
    """Decode with a cache of fixed size, the same in every run: what is compiled for one knows its address."""
    prompt = _prompt(arguments)
    length = arguments.prompt + arguments.tokens
    cache = StaticCache(config=model.config, max_cache_len=length)

    def run() -> float:
        cache.reset()
        outputs = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        with torch._inductor.config.patch(settings or {}):
            began = now()
            for position in range(arguments.prompt, length):
                token = outputs.logits[:, -1].argmax(-1, keepdim=True)
                positions = torch.tensor([[position]], device=arguments.device)
                outputs = forward(token, past_key_values=cache, use_cache=True, position_ids=positions)
            outputs.logits[:, -1].argmax(-1)
            return (now() - began) / arguments.tokens

    return run


def compiled(arguments: DecodingArguments, model: FactorizedGPT2) -> Decoder:
    """Decode with a static cache and a forward pass compiled as one graph; on a CPU with its weights packed ahead."""
    if arguments.compile_backend != "inductor":
        forward = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=arguments.compile_backend)
        return _static(arguments, model, forward)
    if arguments.device == "cuda":
        return _static(
            arguments, model, torch.compile(model.forward, fullgraph=True, dynamic=False, mode="reduce-overhead")
        )
    forward = torch.compile(model.forward, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")
    return _static(arguments, model, forward, {"freezing": True})


if __name__ == "__main__":
    sys.exit(run_command(main))
