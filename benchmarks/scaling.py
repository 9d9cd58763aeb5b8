"""What several processes cost and bring: arithmetic for GPUs, measured for CPUs. `python benchmarks/scaling.py`.

The first two tables count bytes and operations of a step at the protocol's size. With `--rounds N` steps are then
timed in one process and in two that share them, one thread each.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from side_by_side import machine, print_table, ratios
from tqdm.auto import tqdm

from factorized_gpt2 import FactorizedGPT2, FactorizedGPT2Config
from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.runs.fields import LORA_TARGETS
from factorized_gpt2.settings.parsing import ManualParser
from factorized_gpt2.trainer.adapters import add_lora

HERE = Path(__file__).resolve().parent
TWO_PROCESSES = HERE.parent / "configs/accelerate/two_cpu_processes.yaml"

GRADIENT_BYTES = 4  # DistributedDataParallel sums float32 gradients, under autocast too
STATE_BYTES = 16  # float32 weight, gradient and AdamW's two moments


@dataclass
class ScalingArguments:
    """The model, the batch and the machines."""

    ranks: list[int] = field(default_factory=lambda: [64, 128, 256, 512], metadata={"help": "k."})
    n_layer: int = field(default=12, metadata={"help": "Blocks."})
    width: int = field(default=768, metadata={"help": "d."})
    vocab_size: int = field(default=50257, metadata={"help": "V."})
    block_size: int = field(default=2048, metadata={"help": "Tokens a block."})
    lora_rank: int = field(default=32, metadata={"help": "Of the adapters."})
    gpus: list[int] = field(default_factory=lambda: [2, 8, 64], metadata={"help": "How many GPUs."})
    blocks: int = field(default=16, metadata={"help": "Blocks a step, or one for each GPU if there are more GPUs."})
    flops: float = field(default=30e12, metadata={"help": "Operations a second that a GPU is taken to sustain."})
    bandwidth: float = field(
        default=10e9, metadata={"help": "Bytes a second between neighbours of the ring, in each direction."}
    )
    rounds: int = field(default=0, metadata={"help": "Timed runs in one process and in two. 0: arithmetic alone."})
    timed_block_size: int = field(default=128, metadata={"help": "Tokens a block of the timed steps."})
    timed_layers: int = field(default=12, metadata={"help": "Blocks of the timed models."})


def main(argv: list[str]) -> None:
    """Print the tables."""
    arguments = ManualParser(ScalingArguments, prog="scaling.py", description=__doc__).parse(argv)[0]
    loads = {
        f"{'not factorized' if rank is None else f'k = {rank}'}{', LoRA' if lora else ''}": load(arguments, rank, lora)
        for rank in (None, *arguments.ranks)
        for lora in (False, True)
        if rank or not lora
    }
    print_table([_bytes_row(name, asked, arguments) for name, asked in loads.items()])
    print()
    print_table([_time_row(name, asked, arguments) for name, asked in loads.items()])
    if arguments.rounds:
        _measure(arguments)


@dataclass(frozen=True)
class Load:
    """What training asks of machines.

    Attributes:
        parameters: All of them, adapters included.
        trained: Those with a gradient.
        flops: Operations a token, forward and backward.
    """

    parameters: int
    trained: int
    flops: float


def load(arguments: ScalingArguments, rank: int | None, lora: bool) -> Load:
    """Count parameters of the model itself; 2 operations a weight forward, as many for each gradient backward.

    A frozen matrix needs the gradient of its input only. Causal attention: 6 L T d a token, both directions.
    """
    shape = {"n_layer": arguments.n_layer, "n_embd": arguments.width, "n_head": max(1, arguments.width // 64)}
    config = FactorizedGPT2Config(
        n_embd_wte=rank, vocab_size=arguments.vocab_size, n_positions=arguments.block_size, **shape
    )
    with torch.device("meta"):
        model = FactorizedGPT2(config)
        plain = model.num_parameters()
        if lora:
            model = add_lora(model, arguments.lora_rank, 2 * arguments.lora_rank, 0.1, LORA_TARGETS)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    multiplied = plain - arguments.block_size * arguments.width  # the tied vocabulary once: looking up is free
    attention = 6 * arguments.n_layer * arguments.block_size * arguments.width
    if lora:
        return Load(plain + trained, trained, 4 * multiplied + 6 * trained + attention)
    return Load(plain, trained, 6 * multiplied + attention)


def _bytes_row(name: str, load: Load, arguments: ScalingArguments) -> dict[str, str]:
    state = GRADIENT_BYTES * (load.parameters - load.trained) + STATE_BYTES * load.trained
    row = {
        "": name,
        "trained": f"{load.trained / 1e6:.1f} M",
        "MFLOP a token": f"{load.flops / 1e6:.0f}",
        "weights and optimizer, GB": f"{state / 1e9:.2f}",
    }
    for gpus in arguments.gpus:
        row[f"all-reduced, MB, {gpus} GPUs"] = f"{_reduced_bytes(load, gpus) / 1e6:.0f}"
    # Sharded, every weight is gathered forward and backward, and gradients are scattered.
    gpus = arguments.gpus[-1]
    sharded = (gpus - 1) / gpus * (2 * 2 * load.parameters + GRADIENT_BYTES * load.trained)
    row[f"sharded, MB, {gpus} GPUs"] = f"{sharded / 1e6:.0f}"
    return row


def _reduced_bytes(load: Load, gpus: int) -> float:
    """Bytes that a GPU sends (and receives) in a ring all-reduce of the gradients."""
    return 2 * (gpus - 1) / gpus * GRADIENT_BYTES * load.trained


def _time_row(name: str, load: Load, arguments: ScalingArguments) -> dict[str, str]:
    row = {"": name}
    for gpus in arguments.gpus:
        blocks = max(arguments.blocks, gpus)
        compute = load.flops * blocks * arguments.block_size / gpus / arguments.flops
        reduce = _reduced_bytes(load, gpus) / arguments.bandwidth
        row[f"{gpus} GPUs: compute + reduce, ms"] = f"{1000 * compute:.0f} + {1000 * reduce:.0f}"
    return row


def _measure(arguments: ScalingArguments) -> None:
    """Time the same step in one process and in two, in turn."""
    seconds: dict[int, list[dict[str, list[float]]]] = {1: [], 2: []}
    for _ in tqdm(range(arguments.rounds), desc="Rounds", leave=False):
        for processes, measured in seconds.items():
            measured.append(_timed(arguments, processes))
    print(
        f"\n{machine('accelerate', 'peft')}, one of them a process; {arguments.timed_layers} layers, d = "
        f"{arguments.width}, V = {arguments.vocab_size}, {arguments.timed_block_size} tokens a process and step\n"
    )
    rows = []
    for name in seconds[1][0]:
        one, two = ([min(measured[name]) for measured in seconds[processes]] for processes in (1, 2))
        rows.append(
            {
                "": name,
                "1 process, tokens/s": f"{arguments.timed_block_size / min(one):.0f}",
                "2 processes, tokens/s": f"{2 * arguments.timed_block_size / min(two):.0f}",
                "time a step, 1 / 2": ratios(one, two),
            }
        )
    print_table(rows)


def _timed(arguments: ScalingArguments, processes: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "seconds.json"
        words = ["--config_file", str(TWO_PROCESSES), "--num_processes", str(processes), "--main_process_port", "0"]
        words += [str(HERE / "training.py"), "--output_file", str(output), "--rounds", "1"]
        words += ["--n_layer", str(arguments.timed_layers), "--block_size", str(arguments.timed_block_size)]
        words += ["--width", str(arguments.width), "--vocab_size", str(arguments.vocab_size)]
        words += ["--ranks", *map(str, arguments.ranks)]
        command = [sys.executable, "-m", "accelerate.commands.launch", *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise UserError(f"The timed run ended badly: {finished.stderr.strip().splitlines()[-1]}")
        return json.loads(output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(run_command(main))
