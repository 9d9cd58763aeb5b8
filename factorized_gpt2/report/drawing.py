"""What all pictures share: a figure as PNG and SVG, a legend beside it, and styles that are told apart in grey."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import blaming, one_line
from ..common.files import replacing_file
from ..compress.methods import METHODS
from ..runs.families import FAMILIES, REFINED, TREATMENTS, UNKNOWN_METHOD

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RANK_LABEL = "rank k of the token embedding"
LOSS_LABEL = "validation loss [nats / token]"
RANK_MARKERS = "osD^vPX*<>phd8H"

_PANEL = (5.2, 3.6)  # inches
_ALONE = (6.4, 4.4)
_LEGEND_WIDTH = 13.0  # letters of the legend in an inch of picture

_MADE = {  # marker and colour of a way to make a model
    "lowrank-scratch": ("s", "0.45"),
    "evaluation": ("1", "0.3"),
    **{
        method.name + refined: (marker, method.color)
        for method in METHODS.values()
        for refined, marker in zip(("", REFINED), method.markers, strict=True)
    },
    UNKNOWN_METHOD: ("P", "tab:purple"),
    "lora": ("+", "0.3"),
    "finetune": ("x", "0.3"),
}
_TREATED: dict[str, dict[str, Any]] = {  # what was done to it then: hollow, full, half
    "nofinetune": {"linestyle": ":", "markerfacecolor": "white"},
    "lora": {"linestyle": "-"},
    "finetune": {"linestyle": "-.", "fillstyle": "left", "markerfacecoloralt": "white"},
}
_SCRATCH = {"linestyle": "--"}


def _style(family: str) -> dict[str, Any]:
    made, _, treatment = family.rpartition("-")
    if treatment in TREATMENTS and made in _MADE:
        marker, color = _MADE[made]
        return {"marker": marker, "color": color, **_TREATED[treatment]}
    marker, color = _MADE[family]
    treated = _TREATED.get("nofinetune" if family == "evaluation" else family, _SCRATCH)
    return {"marker": marker, "color": color, "linestyle": treated["linestyle"]}


STYLES = {family: _style(family) for family in FAMILIES if family != "baseline"}
"""How the line of a family is drawn: the marker says how it was made, filling and dash what was done then."""


def plain(name: object) -> str:
    """Keep a name from being taken for mathematics."""
    return one_line(name).replace("$", r"\$")


@contextmanager
def saved_axes(path: Path, panels: int = 1, columns: int = 1, legend_title: str | None = None) -> Iterator[list[Axes]]:
    """Yield axes to draw on; add a legend below all of them and save their figure when the block ends well.

    Args:
        path: Image to write; `.png` and `.svg` both come of it.
        panels: How many axes.
        columns: How many stand beside one another at most.
        legend_title: Above the legend, where there is one.
    """
    with blaming("Plots are drawn with the package matplotlib", ImportError):
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    width, height = _ALONE if panels == 1 else (_PANEL[0] * columns, _PANEL[1] * rows)
    # Not through pyplot, which has a backend and figures that are to be closed.
    figure = Figure(figsize=(width, height), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in every:
        axes.grid(alpha=0.3)
    for axes in every[panels:]:
        axes.remove()
    yield every[:panels]
    labelled: dict[str, Any] = {}
    for axes in every[:panels]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labelled.setdefault(label, handle)
    if labelled:
        beside = _beside(list(labelled), width)
        lines = math.ceil(len(labelled) / beside) + (legend_title is not None)
        figure.set_size_inches(width, height + 0.22 * lines)  # beside the panels, not at their cost
        figure.legend(
            labelled.values(), labelled.keys(), loc="outside lower center", ncols=beside, frameon=False,
            title=legend_title, title_fontsize=9, fontsize=9,
        )  # fmt: skip
    with replacing_file(path.with_suffix(".png")) as temporary:
        figure.savefig(temporary, dpi=150)
    # Without a date and random names, the same results give the same file.
    with replacing_file(path.with_suffix(".svg")) as temporary, rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(temporary, metadata={"Date": None})


def _beside(labels: Sequence[str], width: float) -> int:
    """Say how many entries of a legend fit beside one another."""
    return max(1, min(len(labels), int(_LEGEND_WIDTH * width / (max(map(len, labels)) + 6))))
