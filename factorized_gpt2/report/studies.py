"""Runs to studies: a baseline with all that is compared with it, the seeds of a run as one entry."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from ..common.errors import one_line
from ..runs.families import run_name
from ..runs.results import Results, megabytes
from .lineage import NOT_TREATMENT, baselines_of, has_random_start, kind_of, origin_of

LABEL_LENGTH = 40  # of a name in a label


@dataclass(frozen=True, eq=False)
class Entry:
    """Runs that differ in nothing but their seed, or their baseline's: a row of a table, a point of a picture.

    Attributes:
        runs: At least one.
        gaps: Loss of each beyond its baseline's, nats a token; `None` where it cannot be told which that is.
    """

    runs: tuple[Results, ...]
    gaps: tuple[float | None, ...]

    @property
    def run(self) -> Results:
        """The first, whose settings are those of all."""
        return self.runs[0]

    @property
    def name(self) -> str:
        """The run's own, or where the seeds have several, the protocol's."""
        row, names = self.run, {row.run_name for row in self.runs}
        if len(names) == 1:
            return row.run_name
        return run_name(row.family, row.n_embd_wte, row.settings.get("lora_rank") or 0, row.bits_per_weight)

    @property
    def loss(self) -> float:
        """Mean over the seeds."""
        return fmean(row.eval_loss for row in self.runs)

    @property
    def losses(self) -> tuple[float, float]:
        """The lowest and the highest of the seeds."""
        losses = [row.eval_loss for row in self.runs]
        return min(losses), max(losses)

    @property
    def gap(self) -> float | None:
        """Mean over the seeds."""
        return None if None in self.gaps else fmean(gap for gap in self.gaps if gap is not None)

    @property
    def disk_bytes(self) -> float:
        """Mean over the seeds: of the weight files or, where they were not counted, of the parameters."""
        return fmean(row.bytes if row.disk_bytes is None else row.disk_bytes for row in self.runs)

    def mean(self, name: str) -> float | None:
        """Average a figure of the runs over the seeds; `None` where one of them has none."""
        values = [getattr(row, name) for row in self.runs]
        return None if None in values else fmean(values)


@dataclass(frozen=True)
class Study:
    """What is compared: runs measured on one text, a baseline and what was made of it or beside it.

    Attributes:
        label: What tells it from the others, on one line; empty where it is the only one.
        baseline: `None` where it is not at hand.
        others: In the order of the results.
    """

    label: str
    baseline: Entry | None
    others: tuple[Entry, ...]

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All of them, the baseline first."""
        return (*filter(None, [self.baseline]), *self.others)

    @cached_property
    def best(self) -> set[Entry]:
        """Those that have a lower loss than all others of at most their megabytes on disk."""
        if len(self.entries) < 2:
            return set()
        return {self.entries[number] for number in front([(_size(one), one.loss) for one in self.entries])}


def _size(entry: Entry) -> float:
    return float(megabytes(entry.disk_bytes))  # as tables show it: headers of files are no difference


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """List the places of the points (size, loss) that no other point beats on both, by size."""
    found: list[int] = []
    known = [number for number, point in enumerate(points) if all(map(math.isfinite, point))]
    for number in sorted(known, key=lambda number: points[number]):
        if not found or points[number][1] < points[found[-1]][1]:
            found.append(number)
    return found


def distinctions(entries: Sequence[Entry]) -> list[str]:
    """Say of entries of a family in what they differ beside their size; empty strings where sizes alone do."""
    sizes = [(entry.run.n_embd_wte, entry.run.bits_per_weight) for entry in entries]
    settings = [entry.run.settings for entry in entries]
    others = {name: f"{name} = {{}}" for name in sorted({name for one in settings for name in one} - NOT_TREATMENT)}
    labels = [""] * len(entries)
    for words in ({}, _TREATED_BY, others | _TREATED_BY):
        differing = [name for name in words if _differs(name, sizes, settings)]
        labels = [", ".join(words[name].format(_figure(one.get(name))) for name in differing) for one in settings]
        if len(set(zip(sizes, labels, strict=True))) == len(entries):
            break
    return labels


def _differs(name: str, sizes: Sequence[object], settings: Sequence[dict[str, Any]]) -> bool:
    """Tell whether a setting differs between runs of one size."""
    pairs = {(size, str(one.get(name))) for size, one in zip(sizes, settings, strict=True)}
    return len(pairs) > len(set(sizes))


def _figure(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else shortened(value)


_TREATED_BY = {
    "lora_rank": "r = {}",
    "max_steps": "{} steps",
    "learning_rate": "learning rate {}",
    "distillation_weight": "distilled by {}",
}


def studies_of(results: Sequence[Results]) -> list[Study]:
    """Put every run beside its baseline, and runs of other seeds together.

    Two runs are of other seeds where their settings differ in `seed`, `output_dir` and `run_name` alone, texts of the
    same content counting as the same; so are two that were made from such baselines in the same way.

    Returns:
        Studies in the order of their baselines; last those without one.
    """
    baselines = [row for row in results if row.family == "baseline"]
    groups = _by_seed(baselines, kind_of, lambda row: row.settings.get("seed"))
    members: list[list[Results]] = [[] for _ in groups]
    orphans: dict[str, list[Results]] = {}
    for row in results:
        if row.family == "baseline":
            continue
        place = _place(row, groups, baselines)
        (orphans.setdefault(origin_of(row), []) if place is None else members[place]).append(row)
    found = [_study(group, rows) for group, rows in zip(groups, members, strict=True)]
    found += [_study([], rows) for rows in orphans.values()]
    if len(found) == 1:
        return found
    labels = _unique(_labels([study.baseline.run for study in found if study.baseline]) + _names(orphans.values()))
    return [Study(label, study.baseline, study.others) for label, study in zip(labels, found, strict=True)]


def _place(row: Results, groups: Sequence[list[Results]], baselines: Sequence[Results]) -> int | None:
    """Find the group of a run's baseline; `None` where there is none, or it cannot be told which."""
    its = baselines_of(row, baselines)
    places = [number for number, group in enumerate(groups) if any(one in its for one in group)]
    if len(places) > 1 and has_random_start(row):  # the one that differs in the rank alone
        told = kind_of(row, with_rank=False)
        places = [place for place in places if kind_of(groups[place][0], with_rank=False) == told]
    return places[0] if len(places) == 1 else None


def _study(baselines: Sequence[Results], rows: Sequence[Results]) -> Study:
    def kind(row: Results) -> str:
        return kind_of(row, with_folders=len(baselines) < 2)

    def seeds(row: Results) -> Any:
        start = row.content.get("made_from") or row.content.get("start") or row.start_fingerprint
        return row.settings.get("seed"), start

    def gap(row: Results) -> float | None:
        its = [] if not baselines else baselines_of(row, baselines)
        return row.eval_loss - fmean(one.eval_loss for one in its) if its else None

    others = [Entry(tuple(group), tuple(map(gap, group))) for group in _by_seed(rows, kind, seeds)]
    baseline = Entry(tuple(baselines), (0.0,) * len(baselines)) if baselines else None
    return Study("", baseline, tuple(others))


def _by_seed(
    rows: Iterable[Results], kind: Callable[[Results], str], seed: Callable[[Results], Any]
) -> list[list[Results]]:
    """Group runs of one kind; a seed that is there already begins another group."""
    groups: list[tuple[str, list[Results]]] = []
    for row in rows:
        told = kind(row)
        for other, group in groups:
            if other == told and seed(row) not in map(seed, group):
                group.append(row)
                break
        else:
            groups.append((told, [row]))
    return [group for _, group in groups]


def shortened(name: object) -> str:
    """Write a name on one line, and of a long one its end."""
    text = one_line(name)
    return text if len(text) <= LABEL_LENGTH else f"…{text[1 - LABEL_LENGTH :]}"


_FACTS: Sequence[tuple[str, Callable[[Results], object]]] = (  # that tell baselines apart, the plainest first
    ("d = {}", lambda row: row.settings.get("n_embd")),
    ("{} layers", lambda row: row.settings.get("n_layer")),
    ("trained on {}", lambda row: row.text("train").name),
    ("measured on {}", lambda row: row.text("validation").name),
    ("{} steps", lambda row: row.settings.get("max_steps")),
    ("learning rate {}", lambda row: row.settings.get("learning_rate")),
)


def _labels(baselines: Sequence[Results]) -> list[str]:
    """Say of every baseline in what it differs from the others, and in which folder it is where that does not tell."""
    differing = [(words, of) for words, of in _FACTS if len({str(of(row)) for row in baselines}) > 1]
    labels = [
        ", ".join(words.format(_figure(of(row))) for words, of in differing if of(row) not in (None, ""))
        for row in baselines
    ]
    if len(set(labels)) == len(labels) and all(labels):
        return labels
    folders = [f"baseline {shortened(row.settings.get('output_dir') or row.run_name)}" for row in baselines]
    return [", ".join(filter(None, pair)) for pair in zip(labels, folders, strict=True)]


def _names(orphans: Iterable[Sequence[Results]]) -> list[str]:
    """Say of runs without a baseline what they came from."""
    labels = []
    for row, *_ in orphans:
        start = row.baseline or row.settings.get("compressed")
        if has_random_start(row):
            width = row.settings.get("n_embd")
            made = f"from scratch, d = {width}" if width else "from scratch"
        else:
            made = f"from {shortened(start)}"
        labels.append(f"{made}, no baseline with this text here")
    return labels


def _unique(labels: Sequence[str]) -> list[str]:
    """Number labels that are the same."""
    return [
        label if labels.count(label) == 1 else f"{label} ({labels[: place + 1].count(label)})"
        for place, label in enumerate(labels)
    ]
