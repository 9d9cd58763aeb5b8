"""Everything that is to be known of a GPU, in one process and within a budget of seconds, most valuable first.

`python benchmarks/gpu.py --seconds 540 --output_dir OUT`: the loss alone, training steps, decoding, and the thirteen
experiments with as many steps as the rest of the budget allows. `--device cpu --small True` rehearses all of it.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bench_run import BenchRun
from gpu_experiments import thirteen_experiments
from gpu_parts import FULL, SMALL, Plan, decoding_steps, loss_alone, training_steps
from side_by_side import machine

from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.settings.parsing import ManualParser


@dataclass
class GpuArguments:
    """What to measure, where, and for how long."""

    seconds: float = field(default=540.0, metadata={"help": "Budget; what does not fit is left out."})
    output_dir: str = field(default="gpu_output", metadata={"help": "Folder for tables and results, small files all."})
    bundle: str = field(
        default=".gpu-bundle", metadata={"help": "Folder with train.bin, validation.bin and tokenizer/."}
    )
    parts: list[str] = field(
        default_factory=lambda: ["loss", "training", "decoding", "experiments"],
        metadata={"help": "In this order: loss, training, decoding, experiments."},
    )
    steps: int | None = field(
        default=None,
        metadata={"help": "Of the experiments from scratch; of LoRA half. None: as many as there is time for."},
    )
    learning_rate: float = field(default=1.0, metadata={"help": "Factor on the experiments' learning rates."})
    device: str = field(default="cuda", metadata={"help": "Where to run.", "choices": ["cuda", "cpu"]})
    small: bool = field(default=False, metadata={"help": "Two narrow layers and few rows, to rehearse."})


@dataclass(frozen=True)
class Part:
    """One of the measurements.

    Attributes:
        title: What is measured.
        run: Measures it.
        weight: Its share of the budget, beside the other parts' weights.
    """

    title: str
    run: Callable[[BenchRun, Plan], None]
    weight: float


PARTS = {
    "loss": Part("Head and loss alone", loss_alone, 10),
    "training": Part("A training step", training_steps, 30),
    "decoding": Part("Decoding", decoding_steps, 14),
    "experiments": Part("The thirteen experiments", thirteen_experiments, 46),
}


def main(argv: list[str]) -> None:
    """Run the parts one after the other; what one leaves of its share goes to those after it."""
    arguments = ManualParser(GpuArguments, prog="gpu.py", description=__doc__).parse(argv)[0]
    if unknown := [name for name in arguments.parts if name not in PARTS]:
        raise UserError(f"There is no part {unknown[0]!r}; there are {', '.join(PARTS)}.")
    if not arguments.seconds > 0:
        raise UserError(f"seconds must be positive, got {arguments.seconds}.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("There is no CUDA here, and nothing was measured; --device cpu --small True rehearses it.")
    sizes = SMALL if arguments.small else FULL
    plan = Plan(sizes, arguments.device, Path(arguments.bundle), arguments.steps, arguments.learning_rate)
    origin = machine("accelerate", "peft", device=arguments.device)
    bench_run = BenchRun(Path(arguments.output_dir), arguments.seconds, origin)
    parts = [PARTS[name] for name in arguments.parts]
    # One process compiles for many models, each of which may need a graph of its own.
    with torch._dynamo.config.patch(recompile_limit=64):
        _run(parts, bench_run, plan)
    bench_run.end()


def _run(parts: list[Part], bench_run: BenchRun, plan: Plan) -> None:
    for number, part in enumerate(parts):
        share = part.weight / sum(other.weight for other in parts[number:])
        with bench_run.part(part.title, share):
            part.run(bench_run, plan)


if __name__ == "__main__":
    sys.exit(run_command(main))
