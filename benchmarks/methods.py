"""Every method at four ranks: loss on held-out text, share of PCA's loss gap closed, bytes, seconds.

`python benchmarks/methods.py --text books --data_dir DATA --seeds 0 1`; without --text, on Python's documentation.
"""

import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field

from baselines import BaselineArguments, Bench, benches
from tabulate import tabulate

from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.compress.methods import BY_RANK, DEFAULT
from factorized_gpt2.models.sizes import model_size
from factorized_gpt2.settings.parsing import ManualParser


@dataclass
class MethodsArguments(BaselineArguments):
    """What to compare, and on which baseline."""

    refine_steps: list[int] = field(default_factory=lambda: [100, 200], metadata={"help": "Steps, one row each."})
    refine_from: list[str] = field(default_factory=lambda: ["tokenwise"], metadata={"help": "Methods to refine from."})


def main(argv: list[str]) -> None:
    """Measure on every seed's baseline, then print one table."""
    arguments = ManualParser(MethodsArguments, prog="methods.py", description=__doc__).parse(argv)[0]
    ways = [(method, 0) for method in BY_RANK]
    ways += [(method, steps) for method in arguments.refine_from for steps in arguments.refine_steps]
    rows = defaultdict(list)
    for bench in benches(arguments):
        baseline = bench.loss(bench.baseline.model)
        print(f"seed {bench.seed}: baseline {baseline:.4f}", flush=True)
        for way in ways:
            _measure(bench, *way, baseline, rows)
    print_table(rows)


def _measure(bench: Bench, method: str, steps: int, baseline: float, rows: dict) -> None:
    compressor = bench.compressor(method, refine_steps=steps)
    for rank in bench.ranks():
        began = time.perf_counter()
        model, _ = compressor.make(rank)
        seconds = time.perf_counter() - began
        loss = bench.loss(model)
        pca = loss if (method, steps) == (DEFAULT, 0) else rows[rank, DEFAULT, 0][-1]["loss"]
        closed = (pca - loss) / (pca - baseline)
        rows[rank, method, steps].append(
            {"loss": loss, "closed": closed, "bytes": model_size(model).bytes, "seconds": seconds}
        )
        print(f"k = {rank}, {method}, {steps} steps: {loss:.4f}, {closed:.1%}, {seconds:.1f} s", flush=True)


def print_table(rows: dict) -> None:
    """Print a row for each method: mean loss over seeds, and what share of PCA's gap it closes, with the range."""
    table: dict[str, dict[str, str]] = {}
    for (rank, method, steps), measured in rows.items():
        name = method + (f", refined {steps}" if steps else "")
        loss = statistics.mean(row["loss"] for row in measured)
        least, most = (f"{bound(row['closed'] for row in measured):.0%}" for bound in (min, max))
        row = table.setdefault(name, {"method": name})
        row[f"k = {rank}"] = f"{loss:.3f} ({least if least == most else f'{least} to {most}'})"
        row.pop("seconds", None)  # of the last rank, in the last column
        row["seconds"] = f"{statistics.mean(row['seconds'] for row in measured):.1f}"
    print(tabulate(table.values(), headers="keys", tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    sys.exit(run_command(main))
