"""The loss without logits against the loss of logits, `cross_entropy(linear(hidden, weight).float())`.

Errors against float64, memory and time of loss and backward: `python benchmarks/loss.py`.
"""

import gc
import multiprocessing
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from side_by_side import DEVICE, PeakMemory, machine, measure_in_turns, print_table, ratios, seconds_cell, timed
from torch.nn import functional

from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.network.blockwise_loss import BACKENDS, sum_cross_entropy
from factorized_gpt2.settings.parsing import ManualParser


@dataclass
class LossArguments:
    """The size of the problem."""

    ranks: list[int] = field(default_factory=lambda: [64, 128, 256, 512, 768], metadata={"help": "k."})
    rows: int = field(default=4096, metadata={"help": "N, tokens."})
    vocab_size: int = field(default=50257, metadata={"help": "V."})
    width: int = field(default=768, metadata={"help": "d of the unfactorized head."})
    dtypes: list[str] = field(
        default_factory=lambda: ["float32", "bfloat16"],
        metadata={"help": "Of the inputs; memory and time are measured with the first."},
    )
    rounds: int = field(default=5, metadata={"help": "Timed runs."})
    backend: str = field(default="blockwise", metadata={"help": "Of the loss.", "choices": list(BACKENDS)})
    device: str = field(default=DEVICE, metadata={"help": "Where to run."})


@dataclass(frozen=True)
class Problem:
    """Inputs of a head, and its loss in two ways."""

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    backend: str

    @classmethod
    def make(cls, arguments: LossArguments, rank: int, dtype: str, trained: bool) -> "Problem":
        """Draw a head whose logits spread as a trained model's do, with a standard deviation of 3."""
        generator = torch.Generator(arguments.device).manual_seed(0)
        drawn = {"generator": generator, "device": arguments.device}
        hidden = torch.randn(arguments.rows, rank, **drawn)
        weight = torch.randn(arguments.vocab_size, rank, **drawn) * 3 / rank**0.5
        labels = torch.randint(arguments.vocab_size, (arguments.rows,), **drawn)
        dtype = getattr(torch, dtype)
        hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(trained)
        return cls(hidden, weight, labels, arguments.backend)

    def blockwise(self) -> torch.Tensor:
        """Take the loss without logits, and its gradients."""
        return self.backward(sum_cross_entropy(self.hidden, self.weight, self.labels, backend=self.backend))

    def materialised(self) -> torch.Tensor:
        """Take the loss of logits, and its gradients."""
        logits = functional.linear(self.hidden, self.weight)
        return self.backward(functional.cross_entropy(logits.float(), self.labels, reduction="sum"))

    def errors(self, loss: torch.Tensor, exact: tuple[float, list[torch.Tensor]]) -> dict[str, float]:
        """Compare a loss and the gradients that it left with `exact`, relative; of what takes no gradient, none."""
        errors = {"loss": abs(loss.item() / exact[0] - 1)}
        for name, tensor, truth in zip(("hidden", "weight"), (self.hidden, self.weight), exact[1], strict=True):
            if tensor.requires_grad:
                errors[f"gradient of {name}"] = ((tensor.grad.double() - truth).norm() / truth.norm()).item()
        return errors

    def exact(self) -> tuple[float, list[torch.Tensor]]:
        """Take loss and gradients in float64, some rows at a time."""
        hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (self.hidden, self.weight))
        total = 0.0
        for rows in torch.arange(len(hidden), device=hidden.device).split(256):
            loss = functional.cross_entropy(hidden[rows] @ weight.T, self.labels[rows], reduction="sum")
            loss.backward()
            total += loss.item()
        return total, [hidden.grad, weight.grad]

    def backward(self, loss: torch.Tensor) -> torch.Tensor:
        """Take a loss's gradients, in place of those that are there."""
        self.hidden.grad = self.weight.grad = None
        loss.backward()
        return loss.detach()


def main(argv: list[str]) -> None:
    """Print three tables."""
    arguments = ManualParser(LossArguments, prog="loss.py", description=__doc__).parse(argv)[0]
    print(f"{machine()}; N = {arguments.rows}, V = {arguments.vocab_size}\n\nErrors, relative, against float64:\n")
    print_table(list(_errors(arguments)))
    print(f"\nMemory of loss and backward beyond the inputs, {arguments.dtypes[0]}:\n")
    print_table(list(_memory(arguments)))
    print(f"\nTime of loss and backward, {arguments.dtypes[0]}:\n")
    print_table(list(_times(arguments)))


def _errors(arguments: LossArguments) -> Iterator[dict]:
    for rank in arguments.ranks:
        for dtype in arguments.dtypes:
            problem = Problem.make(arguments, rank, dtype, trained=True)
            exact = problem.exact()
            row = {"k": rank, "dtype": dtype}
            for way in ("materialised", "blockwise"):
                errors = problem.errors(getattr(problem, way)(), exact)
                row |= {f"{what}, {way}": f"{error:.1e}" for what, error in errors.items()}
            yield row


def _memory(arguments: LossArguments) -> Iterator[dict]:
    context = multiprocessing.get_context("spawn")  # a process for each figure: none inherits freed memory
    for rank in arguments.ranks:
        for trained in (False, True):
            sizes = []
            for way in ("materialised", "blockwise"):
                with context.Pool(1) as pool:
                    sizes.append(pool.apply(_peak, (arguments, rank, trained, way)))
            yield {
                "k": rank,
                "head": "trained" if trained else "frozen",
                "materialised, MB": f"{sizes[0] / 1e6:.0f}",
                "blockwise, MB": f"{sizes[1] / 1e6:.0f}",
                "ratio": f"{sizes[1] / sizes[0]:.3f}",
            }


def _peak(arguments: LossArguments, rank: int, trained: bool, way: str) -> int:
    problem = Problem.make(arguments, rank, arguments.dtypes[0], trained)
    few = Problem(problem.hidden[:2].detach().requires_grad_(), problem.weight, problem.labels[:2], problem.backend)
    getattr(few, way)()  # what libraries set up at their first use is not the loss's
    few.weight.grad = None
    gc.collect()
    with PeakMemory(arguments.device) as peak:
        getattr(problem, way)()
    return peak.bytes


def _times(arguments: LossArguments) -> Iterator[dict]:
    whole = Problem.make(arguments, arguments.width, arguments.dtypes[0], trained=True)
    for rank in arguments.ranks:
        for trained in (False, True):
            problem = Problem.make(arguments, rank, arguments.dtypes[0], trained)
            ways = {"materialised": timed(problem.materialised), "blockwise": timed(problem.blockwise)}
            if rank < arguments.width:
                ways["whole"] = timed(whole.materialised)
            seconds = measure_in_turns(ways, arguments.rounds)
            yield {
                "k": rank,
                "head": "trained" if trained else "frozen",
                "materialised, ms": seconds_cell(seconds["materialised"]),
                "blockwise, ms": seconds_cell(seconds["blockwise"]),
                "blockwise / materialised": ratios(seconds["blockwise"], seconds["materialised"]),
                f"d = {arguments.width} materialised / blockwise": ratios(seconds["whole"], seconds["blockwise"])
                if "whole" in seconds
                else "",
            }


if __name__ == "__main__":
    sys.exit(run_command(main))
