"""A training step of a 12-layer GPT-2: stock `GPT2LMHeadModel` and this package's models, under the same `Trainer`.

`python benchmarks/training.py`; with `--nanogpt DIR`, a checkout of nanoGPT, also that, in a plain loop of its own.
"""

import contextlib
import copy
import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate.state import PartialState
from datasets import Dataset
from side_by_side import machine, measure_in_turns, now, print_table, ratios, seconds_cell
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback
from transformers import TrainingArguments as StockArguments

from factorized_gpt2 import FactorizedGPT2, FactorizedGPT2Config
from factorized_gpt2.adapters import add_lora
from factorized_gpt2.arguments import LORA_TARGETS, RunArguments
from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.data import collate_blocks
from factorized_gpt2.errors import UserError
from factorized_gpt2.parsing import ManualParser
from factorized_gpt2.trainer import FactorizedTrainer


@dataclass
class TrainingArguments:
    """The models and the batch."""

    ranks: list[int] = field(default_factory=lambda: [64, 128, 256, 512], metadata={"help": "k."})
    n_layer: int = field(default=12, metadata={"help": "Blocks."})
    width: int = field(default=768, metadata={"help": "d."})
    vocab_size: int = field(default=50257, metadata={"help": "V."})
    block_size: int = field(default=512, metadata={"help": "Tokens a block."})
    batch_size: int = field(default=1, metadata={"help": "Blocks a step."})
    dtype: str = field(
        default="float32", metadata={"help": "Autocast.", "choices": ["float32", "bfloat16", "float16"]}
    )
    compile: bool = field(default=False, metadata={"help": "Compile: blocks of ours, the whole of the others."})
    dropout: float = field(default=0.1, metadata={"help": "Of all dropouts."})
    lora: bool = field(default=True, metadata={"help": "Measure LoRA of rank 32 too."})
    steps: int = field(default=2, metadata={"help": "Steps a timed run."})
    rounds: int = field(default=5, metadata={"help": "Timed runs."})
    nanogpt: str | None = field(default=None, metadata={"help": "A folder with nanoGPT's model.py."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the seconds of every timed run."})


def main(argv: list[str]) -> None:
    """Time steps in turn and print a table; under accelerate launch, all processes together."""
    arguments = ManualParser(TrainingArguments, prog="training.py", description=__doc__).parse(argv)[0]
    seconds = _measure(arguments)
    if PartialState().is_main_process:
        _report(arguments, seconds)


def _report(arguments: TrainingArguments, seconds: dict[str, list[float]]) -> None:
    if arguments.output_file:
        Path(arguments.output_file).write_text(json.dumps(seconds), encoding="utf-8")
    print(
        f"{machine('accelerate', 'peft')}; {arguments.n_layer} layers, d = {arguments.width}, V = "
        f"{arguments.vocab_size}, {arguments.batch_size} x {arguments.block_size} tokens, {arguments.dtype}"
        f"{', compiled' if arguments.compile else ''}\n",
        flush=True,
    )
    rows = []
    for name, measured in seconds.items():
        tokens = PartialState().num_processes * arguments.batch_size * arguments.block_size
        row = {"model": name, "ms a step": seconds_cell(measured)}
        row |= {"tokens a second": f"{tokens / statistics.median(measured):.0f}"}
        row |= {f"{other} / this": ratios(seconds[other], measured) for other in _REFERENCES if other in seconds}
        rows.append(row)
    print_table(rows)


def _measure(arguments: TrainingArguments) -> dict[str, list[float]]:
    steps: dict[str, Callable[[], float]] = {}
    if arguments.nanogpt:
        steps["nanoGPT"] = _nanogpt(arguments)
    steps["stock"] = _trainer_steps(GPT2LMHeadModel(GPT2Config(**_shape(arguments))), Trainer, arguments)
    for rank in (None, *arguments.ranks):
        name = f"k = {rank}" if rank else "unfactorized"
        model = FactorizedGPT2(FactorizedGPT2Config(n_embd_wte=rank, **_shape(arguments)))
        steps[name] = _trainer_steps(model, FactorizedTrainer, arguments)
        if rank and arguments.lora:
            adapted = add_lora(copy.deepcopy(model), 32, 64, 0.1, LORA_TARGETS)
            steps[f"{name}, LoRA"] = _trainer_steps(adapted, FactorizedTrainer, arguments)
    return measure_in_turns(steps, arguments.rounds)


_REFERENCES = ("nanoGPT", "stock", "unfactorized")


def _shape(arguments: TrainingArguments) -> dict:
    return {
        "n_layer": arguments.n_layer,
        "n_head": arguments.width // 64,
        "n_embd": arguments.width,
        "vocab_size": arguments.vocab_size,
        "n_positions": arguments.block_size,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), arguments.dropout),
    }


def _batches(arguments: TrainingArguments) -> Dataset:
    count = arguments.batch_size * (arguments.steps + 1) * PartialState().num_processes
    blocks = np.random.default_rng(0).integers(
        arguments.vocab_size, size=(count, arguments.block_size), dtype=np.int32
    )
    return Dataset.from_dict({"input_ids": blocks}).with_format("numpy")


class _Clock(TrainerCallback):
    """Seconds of every optimizer step with its micro-batches, data loading and Trainer's own work included."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *args, **kwargs) -> None:
        self.ends.append(now())


def _trainer_steps(
    model: nn.Module, trainer_class: type[Trainer], arguments: TrainingArguments
) -> Callable[[], float]:
    on_cpu = not torch.cuda.is_available()
    settings = {
        "max_steps": arguments.steps + 1,
        "per_device_train_batch_size": arguments.batch_size,
        "learning_rate": 1e-5,
        "optim": "adamw_torch_fused",
        "bf16": arguments.dtype == "bfloat16",
        "fp16": arguments.dtype == "float16",
        "torch_compile": arguments.compile,
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    arguments_class = RunArguments if trainer_class is FactorizedTrainer else StockArguments
    data = _batches(arguments)

    def run() -> float:
        clock = _Clock()
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_class(
                model=model,
                args=arguments_class(output_dir=folder, **settings),
                train_dataset=data,
                data_collator=collate_blocks,
                callbacks=[clock],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return (clock.ends[-1] - clock.ends[0]) / arguments.steps  # the first step sets up the optimizer

    return run


def _nanogpt(arguments: TrainingArguments) -> Callable[[], float]:
    """Steps of nanoGPT's own model and optimizer, in a loop like its `train.py`'s."""
    path = Path(arguments.nanogpt) / "model.py"
    if not path.is_file():
        raise UserError(f"There is no {path}.")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    nanogpt = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = nanogpt  # its dataclass looks there for its own module
    with contextlib.redirect_stdout(sys.stderr):
        spec.loader.exec_module(nanogpt)
        shape = {name: _shape(arguments)[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
        config = nanogpt.GPTConfig(block_size=arguments.block_size, dropout=arguments.dropout, bias=True, **shape)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = nanogpt.GPT(config).to(device)
        optimizer = model.configure_optimizers(0.0, 1e-5, (0.9, 0.95), device)
    if arguments.compile:
        model = torch.compile(model)
    half = arguments.dtype != "float32"
    autocast = torch.autocast(device, getattr(torch, arguments.dtype)) if half else contextlib.nullcontext()
    scaler = torch.amp.GradScaler(device, enabled=arguments.dtype == "float16")
    batches = list(_batches(arguments).iter(arguments.batch_size))

    def step(batch: dict) -> None:
        ids = torch.from_numpy(batch["input_ids"]).long().to(device)
        with autocast:
            _, loss = model(ids[:, :-1], ids[:, 1:])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def run() -> float:
        step(batches[0])
        began = now()
        for batch in batches[1:]:
            step(batch)
        return (now() - began) / arguments.steps

    return run


if __name__ == "__main__":
    sys.exit(run_command(main))
