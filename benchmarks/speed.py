"""Seconds and memory of the factorization alone at GPT-2's size, four ranks: `python benchmarks/speed.py`.

A random matrix and random calibration samples, tokens drawn by Zipf's law, stand for GPT-2's; each method runs in a
process of its own, so that the peak of memory is its own.
"""

import multiprocessing
import resource
import sys
import time
from dataclasses import dataclass, field

import numpy as np
from side_by_side import machine, measure_in_turns, print_table, ratios, seconds_cell, timed
from tabulate import tabulate

from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.compress.calibration import DRAWS
from factorized_gpt2.compress.data_aware import VocabularyUse
from factorized_gpt2.compress.methods import BY_RANK, METHODS
from factorized_gpt2.compress.pca import factorize_ranks
from factorized_gpt2.compress.row_fit import Side
from factorized_gpt2.settings.parsing import ManualParser


@dataclass
class SpeedArguments:
    """The size of the problem."""

    vocab_size: int = field(default=50257, metadata={"help": "V."})
    width: int = field(default=768, metadata={"help": "d."})
    ranks: list[int] = field(default_factory=lambda: [64, 128, 256, 512], metadata={"help": "k."})
    tokens: int = field(default=16384, metadata={"help": "Calibration tokens."})
    rounds: int = field(default=5, metadata={"help": "Timed runs of the comparison of decompositions."})


def main(argv: list[str]) -> None:
    """Run every method in its own process and print a table."""
    arguments = ManualParser(SpeedArguments, prog="speed.py", description=__doc__).parse(argv)[0]
    context = multiprocessing.get_context("spawn")
    rows = []
    for method in BY_RANK:
        with context.Pool(1) as pool:
            rows.append({"method": method} | pool.apply(_measure, (method, arguments)))
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f"))
    _print_sharing(arguments)


def _print_sharing(arguments: SpeedArguments) -> None:
    """Compare one decomposition for all ranks with one for each."""
    weight = random_weight(arguments.vocab_size, arguments.width, np.random.default_rng(0))
    ways = {
        "one": timed(lambda: factorize_ranks(weight, arguments.ranks)),
        "each": timed(lambda: [factorize_ranks(weight, [rank]) for rank in arguments.ranks]),
    }
    seconds = measure_in_turns(ways, arguments.rounds)
    print(f"\n{machine('scikit-learn')}; PCA at {len(arguments.ranks)} ranks:\n")
    print_table(
        [
            {
                "one for all, ms": seconds_cell(seconds["one"]),
                "one for each, ms": seconds_cell(seconds["each"]),
                "one for all / one for each": ratios(seconds["one"], seconds["each"]),
            }
        ]
    )


def random_weight(vocab_size: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a matrix whose spectrum falls, (V, d) float32."""
    weight = rng.standard_normal((vocab_size, width), np.float32)
    return weight * np.geomspace(1, 0.1, width, dtype=np.float32)


def _measure(method: str, arguments: SpeedArguments) -> dict[str, float]:
    rng = np.random.default_rng(0)
    weight = random_weight(arguments.vocab_size, arguments.width, rng)
    use = _random_use(arguments, rng)
    before = _peak_memory()
    began = time.perf_counter()
    METHODS[method].fit(weight, None, use).factors(arguments.ranks)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak memory, GB": _peak_memory(), "of it before, GB": before}


def _random_use(arguments: SpeedArguments, rng: np.random.Generator) -> VocabularyUse:
    frequencies = 1 / np.arange(1, arguments.vocab_size + 1)
    frequencies /= frequencies.sum()
    gradients, hidden = rng.standard_normal((2, arguments.tokens, arguments.width), np.float32)
    positions = np.arange(arguments.tokens)
    ids = rng.choice(arguments.vocab_size, arguments.tokens, p=frequencies)
    draws = rng.choice(arguments.vocab_size, arguments.tokens * DRAWS, p=frequencies)
    variances = np.full(len(draws), 0.8 / DRAWS, np.float32)
    return VocabularyUse(
        token_counts=(frequencies * 1e7).astype(np.int64),
        input_side=Side(gradients, ids, positions, np.ones(len(ids), np.float32)),
        output_side=Side(hidden, draws, np.repeat(positions, DRAWS), variances),
    )


def _peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    sys.exit(run_command(main))
