"""Thousands of bad inputs, each to a command: it ends with exit code 0 or 2, in time, and leaves nothing half done.

`python soak/bad_inputs.py --cases 2000`
"""

import itertools
import logging
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}

import datasets
from attempts import Case, judge
from bad_cases import cases
from hypothesis import HealthCheck, Phase, given, seed, settings
from material import make_material

from factorized_gpt2.cli.shell import print_table, run_command
from factorized_gpt2.settings.parsing import ManualParser

HEADROOM = 6 << 30  # bytes of address space that cases may ask for
ADDRESS_SPACE = Path("/proc/self/statm")  # where the system says how much there is, in pages, first of all


def try_cases(material: Path, count: int, each: Callable[[Case], None], random_seed: int = 0) -> None:
    """Call `each` with different cases, the same ones for the same seed."""
    seen: set[tuple] = set()
    options = {
        "deadline": None,
        "database": None,
        "phases": [Phase.generate],
        "suppress_health_check": list(HealthCheck),
    }
    for draws in itertools.count():  # for one series of draws repeats itself
        if len(seen) == count:
            return

        @seed(random_seed + draws)
        @settings(max_examples=count, **options)
        @given(cases(material))
        def try_one(case: Case) -> None:
            identity = (case.command, case.words, *sorted(case.files.items()))
            if identity not in seen and len(seen) < count:
                seen.add(identity)
                each(case)

        try_one()


@dataclass
class SoakArguments:
    """How long to try."""

    cases: int = field(default=2000, metadata={"help": "Bad inputs to try."})
    random_seed: int = field(default=0, metadata={"help": "Of the draws."})


class _Record:
    """What came of the cases."""

    def __init__(self, material: Path):
        self.material, self.counts, self.slowest, self.began = material, Counter(), 0.0, time.perf_counter()

    def try_one(self, case: Case) -> None:
        """Try a case and write down what came of it; a defect is shown at once."""
        began = time.perf_counter()
        outcome, wrong = judge(self.material, case)
        self.slowest = max(self.slowest, time.perf_counter() - began)
        self.counts[case.kind, "defects" if wrong else "refused" if outcome.code else "done"] += 1
        if wrong:
            sys.stderr.write("\n".join(["", repr(case), *wrong, ""]))
        if self.counts.total() % 100 == 0:
            sys.stderr.write(f"{self}\n")

    def __str__(self) -> str:
        cases, seconds = self.counts.total(), time.perf_counter() - self.began
        return (
            f"{cases:,} cases, {self.defects} defects, {seconds:.0f} s, {cases / seconds:.1f} cases a second, "
            f"the slowest in {self.slowest:.1f} s"
        )

    @property
    def defects(self) -> int:
        """How many cases were not met as promised."""
        return sum(number for (_, how), number in self.counts.items() if how == "defects")

    def rows(self) -> list[dict[str, str]]:
        """Lay out a table, a row for each kind of case."""
        kinds = sorted({kind for kind, _ in self.counts})
        return [{how: str(self.counts[kind, how]) for how in _HOW} | {"bad": kind} for kind in kinds]


_HOW = ("refused", "done", "defects")


def main(argv: list[str]) -> None:
    """Try cases, say what came of them, and fail where one was not met as promised."""
    (arguments,) = ManualParser(SoakArguments, prog="soak/bad_inputs.py", description=__doc__).parse(argv)
    logging.getLogger().addHandler(logging.NullHandler())  # so that a command's log is not taken for its errors
    if ADDRESS_SPACE.exists():
        used = int(ADDRESS_SPACE.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory(prefix="bad_inputs") as root:
        datasets.config.HF_DATASETS_CACHE = Path(root) / "cache"
        material = Path(root) / "material"
        material.mkdir()
        make_material(material)
        record = _Record(material)
        try_cases(material, arguments.cases, record.try_one, arguments.random_seed)
    print_table(record.rows())
    sys.stdout.write(f"{record}\n")
    sys.exit(1 if record.defects else 0)


if __name__ == "__main__":
    sys.exit(run_command(main))
