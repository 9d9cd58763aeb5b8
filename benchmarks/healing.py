"""From how many tokens of healing on is a way ahead of another? From the records of runs alone.

`python benchmarks/healing.py --results docs/results/full`: a row for each run that trained LoRA from a compressed
baseline, with its loss over the baseline's on the way. Seeds are averaged.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from side_by_side import print_table

from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.report.reporting import read_results
from factorized_gpt2.report.studies import Entry, Study, studies_of
from factorized_gpt2.runs.results import Results
from factorized_gpt2.settings.parsing import ManualParser

MILLION = 1e6
NEVER = "not reached"
Curve = Sequence[tuple[float, float]]


@dataclass
class HealingArguments:
    """Where the records are, and when to look."""

    results: list[str] = field(
        metadata={"help": "Folders of run folders, or of seeds' folders of these.", "nargs": "+"}
    )
    tokens: list[float] = field(
        default_factory=lambda: [0.5, 1.0, 2.0, 4.0], metadata={"help": "Millions of training tokens."}
    )
    rivals: list[str] = field(
        default_factory=lambda: ["tokenwise-nofinetune", "tokenwise-refined-nofinetune", "lowrank-scratch"],
        metadata={"help": "Families whose final loss at the same rank is to be reached."},
    )


def main(argv: list[str]) -> None:
    """Print a table for each baseline."""
    arguments = ManualParser(HealingArguments, prog="healing.py", description=__doc__).parse(argv)[0]
    results = [result for folder in arguments.results for result in read_results(Path(folder))]
    for study in studies_of(results):
        rows = table(study, arguments.tokens, arguments.rivals)
        if rows:
            print(f"\n{study.label or 'Loss over the baseline, nats a token, after so many tokens of healing'}:\n")
            print_table(rows)


def table(study: Study, millions: Sequence[float], rivals: Sequence[str]) -> list[dict[str, str]]:
    """Lay out the healing of every run of LoRA whose start was measured."""
    finals = {(entry.run.family, _size(entry)): entry for entry in study.others}
    rows = []
    for entry in study.others:
        family = entry.run.family
        start = finals.get((family.replace("-lora", "-nofinetune"), _size(entry)))
        if entry.gap is None or not family.endswith("-lora") or start is None:
            continue
        baseline = entry.loss - entry.gap  # of its own seeds
        curve = [(0.0, start.loss), *mean_curve(entry)]
        row = {"run": entry.name, "before": f"{start.loss - baseline:+.3f}"}
        for tokens in millions:
            loss = at(curve, tokens * MILLION)
            row[f"{tokens:g} M"] = "" if loss is None else f"{loss - baseline:+.3f}"
        row["at the end"] = f"{entry.gap:+.3f}"
        for rival in rivals:
            other = finals.get((rival, _size(entry)))
            row[f"reaches {rival}"] = "" if other is None or rival == start.run.family else _when(curve, other.loss)
        rows.append(row)
    return rows


def mean_curve(entry: Entry) -> list[tuple[float, float]]:
    """Return tokens and validation loss on the way, the mean of the seeds."""
    curves = zip(*(validation_curve(run) for run in entry.runs), strict=True)
    return [(fmean(tokens), fmean(losses)) for tokens, losses in (zip(*points, strict=True) for points in curves)]


def validation_curve(run: Results) -> list[tuple[float, float]]:
    """Return tokens seen and validation loss of a run."""
    tokens = run.best_tokens / run.best_step
    return [(step * tokens, loss) for step, loss in run.validation_curve]


def at(curve: Curve, tokens: float) -> float | None:
    """Read a loss off a curve, between its points linearly; `None` beyond its end."""
    for (left, before), (right, after) in pairwise(curve):
        if left <= tokens <= right:
            return before + (after - before) * (tokens - left) / (right - left)
    return None


def reached(curve: Curve, loss: float) -> float | None:
    """Tell from how many tokens on a curve is at a loss or below it; `None` if never."""
    for (left, before), (right, after) in pairwise(curve):
        if before <= loss:
            return left
        if after <= loss:
            return left + (right - left) * (before - loss) / (before - after)
    return None


def _when(curve: Curve, loss: float) -> str:
    tokens = reached(curve, loss)
    return NEVER if tokens is None else f"{tokens / MILLION:.2f} M"


def _size(entry: Entry) -> tuple[int | None, float | None]:
    bits = entry.run.bits_per_weight
    return (None, bits) if bits else (entry.run.n_embd_wte, None)


if __name__ == "__main__":
    sys.exit(run_command(main))
