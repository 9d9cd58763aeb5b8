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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate.state import PartialState
from side_by_side import DEVICE, PeakMemory, machine, measure_in_turns, now, print_table, ratios, seconds_cell
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback
from transformers import TrainingArguments as StockArguments

from factorized_gpt2 import FactorizedGPT2, FactorizedGPT2Config
from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.runs.fields import LORA_TARGETS
from factorized_gpt2.runs.settings import RunArguments
from factorized_gpt2.settings.parsing import ManualParser
from factorized_gpt2.text.blocks import collate_blocks
from factorized_gpt2.trainer.adapters import add_lora
from factorized_gpt2.trainer.trainer import FactorizedTrainer


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
    compile_backend: str = field(default="inductor", metadata={"help": "By what."})
    device: str = field(default=DEVICE, metadata={"help": "Where to run.", "choices": ["cpu", "cuda"]})
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
        f"{machine('accelerate', 'peft', device=arguments.device)}; {arguments.n_layer} layers, d = "
        f"{arguments.width}, V = {arguments.vocab_size}, {arguments.batch_size} x {arguments.block_size} tokens, "
        f"{arguments.dtype}{', compiled' if arguments.compile else ''}\n",
        flush=True,
    )
    print_table(rows(arguments, seconds))


def rows(arguments: TrainingArguments, seconds: dict[str, list[float]]) -> list[dict[str, str]]:
    """Lay out the seconds of every timed run's steps, by model."""
    tokens = PartialState().num_processes * arguments.batch_size * arguments.block_size
    return [
        {
            "model": name,
            "ms a step": seconds_cell(measured),
            "tokens a second": f"{tokens / statistics.median(measured):.0f}",
            **{f"{other} / this": ratios(seconds[other], measured) for other in _REFERENCES if other in seconds},
        }
        for name, measured in seconds.items()
    ]


def _measure(arguments: TrainingArguments) -> dict[str, list[float]]:
    steps: dict[str, Callable[[], float]] = {}
    if arguments.nanogpt:
        steps["nanoGPT"] = _nanogpt(arguments)
    steps |= {name: TrainerSteps(model, arguments) for name, model in models(arguments)}
    return measure_in_turns(steps, arguments.rounds)


def models(arguments: TrainingArguments) -> Iterator[tuple[str, nn.Module]]:
    """Make the models, randomly initialised, each with its name."""
    yield "stock", GPT2LMHeadModel(GPT2Config(**_shape(arguments)))
    for rank in (None, *arguments.ranks):
        name = f"k = {rank}" if rank else "unfactorized"
        model = FactorizedGPT2(FactorizedGPT2Config(n_embd_wte=rank, **_shape(arguments)))
        yield name, model
        if rank and arguments.lora:
            yield f"{name}, LoRA", add_lora(copy.deepcopy(model), LORA_RANK, 64, 0.1, LORA_TARGETS)


LORA_RANK = 32
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


def _blocks(arguments: TrainingArguments) -> np.ndarray:
    count = arguments.batch_size * (arguments.steps + 1) * PartialState().num_processes
    return np.random.default_rng(0).integers(arguments.vocab_size, size=(count, arguments.block_size), dtype=np.int32)


class _Clock(TrainerCallback):
    """Seconds of every optimizer step with its micro-batches, data loading and Trainer's own work included."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *args, **kwargs) -> None:
        self.ends.append(now())


class TrainerSteps:
    """Steps of a model under its `Trainer`: this package's own, or transformers' for a stock model.

    Attributes:
        peak_bytes: The most memory that the first call held, the model's own included; `None` before it.
    """

    def __init__(self, model: nn.Module, arguments: TrainingArguments):
        self._model, self._steps, self._device = model, arguments.steps, arguments.device
        self._rows = [{"input_ids": block} for block in _blocks(arguments)]
        on_cpu = arguments.device == "cpu"
        self._settings = {
            "max_steps": arguments.steps + 1,
            "per_device_train_batch_size": arguments.batch_size,
            "learning_rate": 1e-5,
            "optim": "adamw_torch_fused",
            "bf16": arguments.dtype == "bfloat16",
            "fp16": arguments.dtype == "float16",
            "torch_compile": arguments.compile,
            "torch_compile_backend": arguments.compile_backend if arguments.compile else None,
            "tf32": False,  # or it would be on, beside bfloat16, for all that follows in the process
            "use_cpu": on_cpu,
            "dataloader_pin_memory": not on_cpu,
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
        }
        self.peak_bytes: int | None = None

    def __call__(self) -> float:
        """Train for the steps, and one before them that sets up the optimizer; return the seconds of one."""
        stock = isinstance(self._model, GPT2LMHeadModel)
        trainer_class, arguments_class = (Trainer, StockArguments) if stock else (FactorizedTrainer, RunArguments)
        clock = _Clock()
        weights = self._model.parameters()
        held = sum(weight.nbytes for weight in weights if weight.device.type == self._device)
        # Watching a CPU's memory takes time, so that timed runs go without.
        watch = PeakMemory(self._device) if self.peak_bytes is None else contextlib.nullcontext()
        with tempfile.TemporaryDirectory() as folder, watch:
            trainer = trainer_class(
                model=self._model,
                args=arguments_class(output_dir=folder, **self._settings),
                train_dataset=self._rows,
                data_collator=collate_blocks,
                callbacks=[clock],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        if self.peak_bytes is None:
            self.peak_bytes = held + watch.bytes
        return (clock.ends[-1] - clock.ends[0]) / self._steps


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
        device = arguments.device
        model = nanogpt.GPT(config).to(device)
        optimizer = model.configure_optimizers(0.0, 1e-5, (0.9, 0.95), device)
    if arguments.compile:
        model = torch.compile(model, backend=arguments.compile_backend)
    half = arguments.dtype != "float32"
    autocast = torch.autocast(device, getattr(torch, arguments.dtype)) if half else contextlib.nullcontext()
    scaler = torch.amp.GradScaler(device, enabled=arguments.dtype == "float16")
    batches = torch.from_numpy(_blocks(arguments)).long().split(arguments.batch_size)

    def step(batch: torch.Tensor) -> None:
        ids = batch.to(device)
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
