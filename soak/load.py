"""Load: thousands of training steps and of `generate` calls in one process, threads on one model, the same seed twice.

`python soak/load.py`; ends with exit code 1 and the names of what missed its bar.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from memory import Memory, growth
from same_seed import TINY, tiny_model
from transformers import LogitsProcessor, LogitsProcessorList, PrinterCallback, TrainerCallback

from factorized_gpt2 import FactorizedGPT2
from factorized_gpt2.cli.shell import print_table, run_command
from factorized_gpt2.common.files import read_json
from factorized_gpt2.common.progress import Progress
from factorized_gpt2.runs.fields import LORA_TARGETS
from factorized_gpt2.runs.settings import RunArguments
from factorized_gpt2.settings.parsing import ManualParser
from factorized_gpt2.text.blocks import collate_blocks
from factorized_gpt2.trainer.adapters import DROPOUTS, add_lora
from factorized_gpt2.trainer.progress import StepProgress
from factorized_gpt2.trainer.trainer import FactorizedTrainer

BLOCK_SIZE = 32
LOSS_TOLERANCE = 1e-6  # relative, of a sum that threads may split in another way


@dataclass
class LoadArguments:
    """How much of each."""

    steps: int = field(default=2000, metadata={"help": "Training steps, from scratch and as many of LoRA."})
    calls: int = field(default=2000, metadata={"help": "Calls of generate."})
    threads: int = field(default=8, metadata={"help": "Threads that use one model at once."})
    twice: bool = field(default=True, metadata={"help": "Do what has a seed in two processes."})
    resident: float = field(
        default=4096, metadata={"help": "Bytes a step, or a call, by which resident memory may grow."}
    )
    allocated: float = field(
        default=256, metadata={"help": "Bytes a step, or a call, by which memory in use by malloc may grow."}
    )


@dataclass(frozen=True)
class Check:
    """A figure and its bar."""

    name: str
    figure: str
    bar: str
    holds: bool

    def row(self) -> dict[str, str]:
        """Lay out a row of the table."""
        return {"figure": self.figure, "bar": self.bar, "": "holds" if self.holds else "MISSED", "what": self.name}


def main(argv: list[str]) -> None:
    """Do all of it, print a table, end with code 1 where a bar is missed."""
    arguments = ManualParser(LoadArguments, prog="load.py", description=__doc__).parse(argv)[0]
    checks = []
    for name, is_lora in (("scratch", False), ("LoRA", True)):
        checks += flat(train(arguments.steps, is_lora), f"{arguments.steps} steps, {name}", arguments)
    checks += flat(generate(arguments.calls), f"{arguments.calls} generate calls", arguments)
    checks += use_in_threads(arguments.threads)
    if arguments.twice:
        checks += do_twice()
    print_table([check.row() for check in checks])
    missed = [check.name for check in checks if not check.holds]
    if missed:
        sys.exit(f"missed: {'; '.join(missed)}")


def flat(memory: Memory, name: str, arguments: LoadArguments) -> Iterator[Check]:
    """Compare the growth of memory with its bars."""
    for kind in ("resident", "allocated"):
        samples, bar = getattr(memory, kind), getattr(arguments, kind)
        if samples:
            slope = growth(samples)
            figure = f"{slope:+.0f} B a step, {(samples[-1] - samples[len(samples) // 2]) / 1e6:+.2f} MB"
            yield Check(f"{name}: {kind} memory, second half", figure, f"< {bar:.0f} B a step", slope < bar)


class _Watch(TrainerCallback):
    def __init__(self, memory: Memory):
        self.memory = memory

    def on_step_end(self, *args, **kwargs) -> None:
        self.memory.look()


def train(steps: int, is_lora: bool) -> Memory:
    """Train a tiny model, with forty evaluations and checkpoints on the way."""
    model, memory = tiny_model(), Memory()
    if is_lora:
        model = add_lora(model, 4, 8, 0.1, LORA_TARGETS)
    ids = np.random.default_rng(0).integers(TINY["vocab_size"], size=(400, BLOCK_SIZE), dtype=np.int32)
    blocks = Dataset.from_dict({"input_ids": ids}).with_format("numpy")
    often = max(10, steps // 40)
    with tempfile.TemporaryDirectory() as folder:
        trainer = FactorizedTrainer(
            model=model,
            args=RunArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=4,
                eval_strategy="steps",
                eval_steps=often,
                save_strategy="steps",
                save_steps=often,
                save_total_limit=2,
                load_best_model_at_end=True,
                metric_for_best_model="eval_loss",
                logging_steps=10,
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=blocks,
            eval_dataset=blocks.select(range(20)),
            data_collator=collate_blocks,
            callbacks=[_Watch(memory), StepProgress("Training")],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return memory


class OwnNoise(LogitsProcessor):
    """Sampling by a generator of its own: the largest of logits plus Gumbel noise is a draw from their softmax.

    `do_sample` would draw from the process's one generator, from which threads take turns.
    """

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Add the noise."""
        return scores - torch.empty_like(scores).exponential_(generator=self._generator).log()


def _request(model: FactorizedGPT2, number: int) -> torch.Tensor:
    """Generate for one of many requests: prompts, batches, lengths and ways to choose all differ."""
    generator = torch.Generator().manual_seed(number)
    batch, prompt = 1 + number % 4, 1 + number % 19
    ids = torch.randint(2, TINY["vocab_size"], (batch, prompt), generator=generator)
    ways = ({}, {"logits_processor": LogitsProcessorList([OwnNoise(number)])}, {"num_beams": 2})
    options = {"max_new_tokens": 2 + number % 11, "pad_token_id": 1, "do_sample": False}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options, **ways[number % 3])


def generate(calls: int) -> Memory:
    """Call `generate` again and again."""
    model, memory = tiny_model().eval(), Memory()
    for number in Progress(range(calls), desc="Generating"):
        _request(model, number)
        memory.look()
    return memory


def _loss(model: FactorizedGPT2, number: int, is_training: bool) -> torch.Tensor:
    """Compute a loss, and in training the norms of its gradients by all weights."""
    ids = torch.randint(2, TINY["vocab_size"], (3, 20), generator=torch.Generator().manual_seed(number))
    if not is_training:
        with torch.no_grad():
            return model(ids, labels=ids).loss[None]
    loss = model(ids, labels=ids).loss
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.stack([loss.detach(), *(gradient.norm() for gradient in gradients)])


def use_in_threads(threads: int) -> Iterator[Check]:
    """Compare what many threads get from one model at once with what one gets."""
    # Dropout would draw from the process's one generator.
    model = tiny_model(**dict.fromkeys(DROPOUTS, 0.0))
    kinds: dict[str, tuple[bool, Callable]] = {
        "generate, greedy, sampled, by beams": (False, partial(_request, model)),
        "loss": (False, partial(_loss, model, is_training=False)),
        "loss and gradients in training": (True, partial(_loss, model, is_training=True)),
    }
    for name, (is_training, function) in kinds.items():
        model.train(is_training)
        numbers = range(6 * threads)
        expected = [function(number) for number in numbers]
        with ThreadPoolExecutor(threads) as pool:
            found = list(Progress(pool.map(function, numbers), desc=f"{threads} threads", total=len(numbers)))
        if is_training or name == "loss":
            pairs = zip(found, expected, strict=True)
            worst = max(((one - other).abs() / other.abs().clamp(min=1e-3)).max().item() for one, other in pairs)
            figure, bar, holds = f"differ by {worst:.1e}", f"<= {LOSS_TOLERANCE:.0e}", worst <= LOSS_TOLERANCE
        else:
            same = sum(map(torch.equal, found, expected))
            figure, bar, holds = f"{same} equal", f"{len(numbers)}", same == len(numbers)
        yield Check(f"{threads} threads and one: {name}", figure, bar, holds)


def do_twice() -> Iterator[Check]:
    """Do everything that has a seed in two processes, and compare what they made."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"{number}.json" for number in (1, 2)]
        with ThreadPoolExecutor() as pool:
            made = list(Progress(pool.map(_make, outputs), desc="The same seed twice", total=2))
    one, other = made
    for name, digest in one.items():
        yield Check(f"two processes: {name}", f"{digest[:12]} {other[name][:12]}", "equal", digest == other[name])


def _make(output: Path) -> dict[str, str]:
    """Run `same_seed.py` in a process of its own, with an order of sets of its own."""
    command = [sys.executable, str(Path(__file__).with_name("same_seed.py")), str(output)]
    environment = os.environ | {"PYTHONHASHSEED": output.stem}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        sys.exit(f"same_seed.py ended badly: {finished.stderr.strip().splitlines()[-1]}")
    return read_json(output)


if __name__ == "__main__":
    sys.exit(run_command(main))
