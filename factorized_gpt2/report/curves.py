"""The course of training as pictures: loss against tokens, a panel a family."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..runs.families import FAMILIES
from .drawing import RANK_MARKERS, STYLES, plain, saved_axes
from .plots import draw_level, has_rank
from .studies import Entry, Study, distinctions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FROM_SCRATCH = ("baseline", "lowrank-scratch")
_DASHES = ("-", "--", ":", "-.")
_COLUMNS = 3
_LIGHTEST = 0.85  # of a map of colours whose end is hard to see on white


def plot_training_curves(studies: Sequence[Study], path: Path) -> None:
    """Plot validation loss (marked) and training loss (thin) against tokens, a panel for each family that trains.

    Args:
        studies: Runs without curves are left out.
        path: Image to write; `.png` and `.svg` both come of it.
    """
    wanted = [(study, *panel) for study in studies for panel in _panels(study)]
    sizes = sorted({_size(entry) for _, _, entries in wanted for entry in entries} - {""}, key=_figure)
    with saved_axes(path, len(wanted), _COLUMNS, legend_title="validation loss (thin: training loss)") as panels:
        from matplotlib import colormaps

        shade = colormaps["viridis"]
        styles: dict[str, dict[str, Any]] = {
            size: {
                "color": shade(_LIGHTEST * number / len(sizes)),
                "marker": RANK_MARKERS[number % len(RANK_MARKERS)],
            }
            for number, size in enumerate(sizes)
        }
        styles[""] = {"color": "black", "marker": "x"}
        for axes, (study, title, entries) in zip(panels, wanted, strict=True):
            told = distinctions(entries)
            dashes = dict(zip(dict.fromkeys(told), _DASHES * len(told), strict=False))
            for entry, distinction in zip(entries, told, strict=True):
                size = _size(entry)
                label = ", ".join(filter(None, [size or "not factorized", distinction]))
                _draw_curves(axes, entry, label, {**styles[size], "linestyle": dashes[distinction]})
            level = None if entries[0].run.family in _FROM_SCRATCH else study.baseline
            draw_level(axes, level)
            _limit(axes, entries, level)
            axes.set_title("\n".join(filter(None, [plain(study.label), title])), fontsize=10)
            axes.set_xlabel("training tokens [millions]")
            axes.set_ylabel("loss [nats / token]")


def _panels(study: Study) -> list[tuple[str, list[Entry]]]:
    """List titles and entries of the panels of a study."""
    trained = [entry for entry in study.entries if all(row.has_curve for row in entry.runs)]
    panels = {"from a random start": [entry for entry in trained if entry.run.family in _FROM_SCRATCH]}
    for family in STYLES:
        if family not in _FROM_SCRATCH:
            panels[FAMILIES[family]] = [entry for entry in trained if entry.run.family == family]
    return [(title, entries) for title, entries in panels.items() if entries]


def _size(entry: Entry) -> str:
    if entry.run.bits_per_weight is not None:
        return f"{entry.run.bits_per_weight:.3g} bits"
    return f"k = {entry.run.n_embd_wte}" if has_rank(entry) else ""


def _figure(size: str) -> tuple[bool, float]:
    return size.startswith("k"), float(size.removeprefix("k = ").removesuffix(" bits"))


def _draw_curves(axes: Axes, entry: Entry, label: str, style: dict[str, Any]) -> None:
    """Draw the means over the seeds, and for the validation loss the band that they span."""
    tokens = (entry.run.tokens_per_step or 0) / 1e6
    training = _spread([row.training_curve for row in entry.runs])
    validation = _spread([row.validation_curve for row in entry.runs])
    if training:
        thin: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.4, "zorder": 1, "label": None if validation else label}
        steps, means, *_ = zip(*training, strict=True)
        axes.plot([step * tokens for step in steps], means, color=style["color"], **thin)
    if validation:
        steps, means, lowest, highest = zip(*validation, strict=True)
        places = [step * tokens for step in steps]
        axes.plot(places, means, markersize=4, label=label, **style)
        if len(entry.runs) > 1:
            axes.fill_between(places, lowest, highest, color=style["color"], alpha=0.2, linewidth=0)


def _spread(curves: Sequence[Sequence[Sequence[float]]]) -> list[tuple[float, float, float, float]]:
    """Say at every step that all curves have: the step, the mean, the lowest and the highest loss."""
    known = [{step: math.nan if loss is None else loss for step, loss in curve} for curve in curves]
    shared = [step for step in known[0] if all(step in curve for curve in known)]
    at_steps = [(step, [curve[step] for curve in known]) for step in shared]
    return [(step, fmean(losses), min(losses), max(losses)) for step, losses in at_steps]


def _limit(axes: Axes, entries: Sequence[Entry], baseline: Entry | None) -> None:
    """Let the validation losses fill the height; the first training losses, far above, would press them together."""
    rows = [row for entry in entries for row in entry.runs]
    validation = _finite(loss for row in rows for _, loss in row.validation_curve)
    if not validation:
        return
    training = _finite(loss for row in rows for _, loss in row.training_curve)
    level = _finite([] if baseline is None else [baseline.loss])
    margin = 0.05 * (max(validation) - min(validation)) + 0.02
    axes.set_ylim(min(validation + training + level) - margin, max(validation + level) + margin)


def _finite(losses: Iterable[float | None]) -> list[float]:
    return [loss for loss in losses if loss is not None and math.isfinite(loss)]
