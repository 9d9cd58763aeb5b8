"""Results to pictures, for print: axes labelled, told apart in grey, as PNG and as SVG.

Only what draws imports matplotlib.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import blaming, one_line
from ..common.files import replacing_file
from ..runs.families import FAMILIES
from ..runs.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLES = {  # told apart in grey by marker and dash
    "lowrank-scratch": {"marker": "s", "linestyle": "--", "color": "0.45"},
    "evaluation": {"marker": "1", "linestyle": ":", "color": "0.3"},
    "lora": {"marker": "+", "linestyle": "-", "color": "0.3"},
    "finetune": {"marker": "x", "linestyle": "-.", "color": "0.3"},
    "pca-nofinetune": {"marker": "^", "linestyle": ":", "color": "tab:orange"},
    "pca-lora": {"marker": "o", "linestyle": "-", "color": "tab:blue"},
    "pca-finetune": {"marker": "D", "linestyle": "-.", "color": "tab:green"},
    "weighted-nofinetune": {"marker": "<", "linestyle": ":", "color": "tab:olive"},
    "weighted-lora": {"marker": "h", "linestyle": "-", "color": "tab:olive"},
    "weighted-finetune": {"marker": "8", "linestyle": "-.", "color": "tab:olive"},
    "joint-nofinetune": {"marker": ">", "linestyle": ":", "color": "tab:pink"},
    "joint-lora": {"marker": "H", "linestyle": "-", "color": "tab:pink"},
    "joint-finetune": {"marker": "2", "linestyle": "-.", "color": "tab:pink"},
    "tokenwise-nofinetune": {"marker": "d", "linestyle": ":", "color": "tab:cyan"},
    "tokenwise-lora": {"marker": "p", "linestyle": "-", "color": "tab:cyan"},
    "tokenwise-finetune": {"marker": "3", "linestyle": "-.", "color": "tab:cyan"},
    "coded-nofinetune": {"marker": "|", "linestyle": ":", "color": "tab:gray"},
    "coded-lora": {"marker": "4", "linestyle": "-", "color": "tab:gray"},
    "coded-finetune": {"marker": "*", "linestyle": "-.", "color": "tab:gray"},
    "compressed-nofinetune": {"marker": "v", "linestyle": ":", "color": "tab:red"},
    "compressed-lora": {"marker": "P", "linestyle": "-", "color": "tab:purple"},
    "compressed-finetune": {"marker": "X", "linestyle": "-.", "color": "tab:brown"},
}
_RANK_MARKERS = "osD^vPX*"

RANK_LABEL = "rank k of the token embedding"
LOSS_LABEL = "validation loss [nats / token]"


def plot_loss_against_rank(results: Sequence[Results], path: Path) -> None:
    """Plot validation loss against k, a line a family, the baseline as a level.

    Args:
        results: In order of k within a family.
        path: Image to write; `.png` and `.svg` both come of it.
    """
    with _saved_axes(path) as (axes,):
        ranks = sorted({row.n_embd_wte for row in results if row.n_embd_wte})
        for label, style, rows in _lines([row for row in results if row.n_embd_wte]):
            points = [(row.n_embd_wte, row.eval_loss) for row in rows]
            axes.plot(*zip(*points, strict=True), label=label, **style)
        _draw_baseline(axes, results)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, labels=map(str, ranks))
        axes.set_xlabel(RANK_LABEL)
        axes.set_ylabel(LOSS_LABEL)
        axes.legend(frameon=False)


def plot_loss_against_size(results: Sequence[Results], path: Path) -> None:
    """Plot validation loss against megabytes of parameters, with the models that no other beats on both.

    Args:
        results: Any number of runs.
        path: Image to write; `.png` and `.svg` both come of it.
    """
    with _saved_axes(path) as (axes,):
        front = _pareto_front([(row.bytes / 1e6, row.eval_loss) for row in results])
        axes.plot(*zip(*front, strict=True), color="0.8", linewidth=6, zorder=0, label="no model is better on both")
        for label, style, rows in _lines(results):
            points = [(row.bytes / 1e6, row.eval_loss) for row in rows]
            axes.plot(*zip(*points, strict=True), label=label, **style)
            for row, point in zip(rows, points, strict=True):
                if row.n_embd_wte and row.family.endswith("-nofinetune"):
                    axes.annotate(
                        f"k = {row.n_embd_wte}", point, xytext=(4, 6), textcoords="offset points", fontsize=8
                    )
        for row, which in _baselines(results):
            axes.plot(row.bytes / 1e6, row.eval_loss, "k*", markersize=11, linestyle="", label=f"baseline{which}")
        axes.margins(0.1)
        axes.set_xlabel("parameters [MB]")
        axes.set_ylabel(LOSS_LABEL)
        axes.legend(frameon=False)


def plot_training_curves(results: Sequence[Results], path: Path) -> None:
    """Plot validation loss (marked) and training loss (thin) against tokens, a panel for each family that trains.

    Args:
        results: Runs with curves; those without are left out.
        path: Image to write; `.png` and `.svg` both come of it.
    """
    trained = [row for row in results if row.has_curve]
    panels = {"from a random start": [row for row in trained if row.family in ("baseline", "lowrank-scratch")]}
    for family in _STYLES:
        if family != "lowrank-scratch":
            panels[FAMILIES[family]] = [row for row in trained if row.family == family]
    panels = {title: rows for title, rows in panels.items() if rows}
    ranks = sorted({row.n_embd_wte for row in trained if row.n_embd_wte})
    with _saved_axes(path, panels=max(1, len(panels))) as all_axes:
        from matplotlib import colormaps

        shades = {rank: colormaps["viridis"](index / len(ranks)) for index, rank in enumerate(ranks)}
        for axes, (title, rows) in zip(all_axes, panels.items(), strict=False):
            for row in rows:
                rank = row.n_embd_wte
                color = shades[rank] if rank else "black"
                marker = _RANK_MARKERS[ranks.index(rank) % len(_RANK_MARKERS)] if rank else "x"
                tokens = (row.tokens_per_step or 0) / 1e6
                label = f"k = {rank}" if rank else "not factorized"
                if row.training_curve:
                    steps, losses = zip(*row.training_curve, strict=True)
                    thin: dict[str, Any] = {
                        "linewidth": 0.8,
                        "alpha": 0.5,
                        "label": None if row.validation_curve else label,
                    }
                    axes.plot([step * tokens for step in steps], losses, color=color, **thin)
                if row.validation_curve:
                    steps, losses = zip(*row.validation_curve, strict=True)
                    axes.plot(
                        [step * tokens for step in steps],
                        losses,
                        color=color,
                        marker=marker,
                        markersize=4,
                        label=label,
                    )
            measured = [loss for row in rows for _, loss in row.validation_curve if math.isfinite(loss or math.nan)]
            if measured:  # the first training losses, far above, would press the rest together
                axes.set_ylim(top=max(measured) + 0.05 * (max(measured) - min(measured)) + 0.1)
            if title != "from a random start":
                _draw_baseline(axes, results)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("training tokens [millions]")
            axes.set_ylabel("loss [nats / token]")
            axes.legend(frameon=False, title="validation (thin: training)", title_fontsize=8, fontsize=8)


def plot_spectrum(
    shares: Sequence[float],
    ranks: Sequence[int],
    method: str,
    path: Path,
    others: Sequence[tuple[Sequence[float], Sequence[int]]] = (),
) -> None:
    """Plot what each rank leaves out of the quantity that a method maximises.

    Args:
        shares: Kept at rank 1, 2, ..., in [0, 1].
        ranks: Those to mark; those beyond the shares are left out.
        method: The method's name: `pca` keeps a share of the variance, the others of their objective.
        path: Image to write; `.png` and `.svg` both come of it.
        others: Shares and ranks of further baselines, each drawn as a line of its own.
    """
    with _saved_axes(path) as (axes,):
        dashes = itertools.cycle(("-", "--", ":", "-."))
        for (kept, marked), dash in zip([(shares, ranks), *others], dashes, strict=False):
            left_out = [1 - share for share in kept if share < 1 - 1e-6]  # the scale is logarithmic
            of_width = f"d = {len(kept)}" if others else None
            axes.plot(range(1, len(left_out) + 1), left_out, dash, color="black", linewidth=1.2, label=of_width)
            known = [rank for rank in marked if rank <= len(kept)]
            for rank, marker in zip(known, itertools.cycle(_RANK_MARKERS), strict=False):
                label = f"k = {rank}: {kept[rank - 1]:.3f} kept"
                axes.plot(rank, max(1 - kept[rank - 1], 1e-6), marker, label=label)
        axes.set_yscale("log")
        axes.set_xlabel(RANK_LABEL)
        axes.set_ylabel(f"share of the {'variance' if method == 'pca' else 'objective'} left out")
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False)


def plot_loss_against_bytes(
    points: Sequence[tuple[int, float, str]], baseline_bytes: int, labelled: Sequence[str], label: str, path: Path
) -> None:
    """Plot how much loss compressed models add, against their size.

    Args:
        points: Bytes, loss beyond the baseline's in nats a token, and name of each model.
        baseline_bytes: The baseline's size.
        labelled: Names of those whose points are labelled.
        label: How the models were compressed.
        path: Image to write; `.png` and `.svg` both come of it.
    """
    with _saved_axes(path) as (axes,):
        # On a logarithmic scale, a model that loses nothing stands at the lower edge.
        drawn = [(size / 1e6, max(increase, 1e-4), name) for size, increase, name in sorted(points)]
        axes.plot([size for size, _, _ in drawn], [increase for _, increase, _ in drawn], "o-", label=label)
        for size, increase, name in drawn:
            if name in labelled:
                axes.annotate(name, (size, increase), xytext=(6, 6), textcoords="offset points", fontsize=8)
        axes.axvline(baseline_bytes / 1e6, color="black", linewidth=1, label="size of the baseline")
        axes.set_yscale("log")
        axes.margins(0.1)
        axes.set_xlabel("parameters [MB]")
        axes.set_ylabel("loss beyond the baseline's [nats / token]")
        axes.legend(frameon=False)


def _lines(results: Sequence[Results]) -> Iterator[tuple[str, dict, list[Results]]]:
    """Yield a label, a style and the runs of every line: a family, or the part of it that starts from one baseline."""
    several = len({row.baseline for row in results} - {None}) > 1
    for family, style in _STYLES.items():
        rows = [row for row in results if row.family == family]
        for number, baseline in enumerate(dict.fromkeys(row.baseline for row in rows)):
            whence = f", from {_plain(baseline)}" if several and baseline else ""
            hollow = {"markerfacecolor": "white"} if number % 2 else {}
            yield FAMILIES[family] + whence, style | hollow, [row for row in rows if row.baseline == baseline]


def _baselines(results: Sequence[Results]) -> list[tuple[Results, str]]:
    """List the baselines, each with what tells it from the others where there are several."""
    rows = [row for row in results if row.family == "baseline"]
    return [(row, f" {_plain(row.settings.get('output_dir'))}" if len(rows) > 1 else "") for row in rows]


def _plain(name: object) -> str:
    """Keep a name from being taken for mathematics, and from filling the picture."""
    return one_line(name)[-40:].replace("$", r"\$")


def _draw_baseline(axes: Axes, results: Sequence[Results]) -> None:
    for row, which in _baselines(results):
        axes.axhline(row.eval_loss, color="black", linewidth=1, label=f"baseline{which} (not factorized)")


def _pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep the points (size, loss) that no other point beats on both, by size."""
    front: list[tuple[float, float]] = []
    for size, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((size, loss))
    return front


@contextmanager
def _saved_axes(path: Path, panels: int = 1) -> Iterator[list[Axes]]:
    """Yield axes to draw on; save their figure when the block ends well."""
    with blaming("Plots are drawn with the package matplotlib", ImportError):
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    # Not through pyplot, which has a backend and figures that are to be closed.
    figure = Figure(figsize=(6.4 if panels == 1 else 4.8 * panels, 4.2), layout="constrained")
    (row,) = figure.subplots(ncols=panels, squeeze=False)
    for axes in row:
        axes.grid(alpha=0.3)
    yield list(row)
    with replacing_file(path.with_suffix(".png")) as temporary:
        figure.savefig(temporary, dpi=150)
    # Without a date and random names, the same results give the same file.
    with replacing_file(path.with_suffix(".svg")) as temporary, rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(temporary, metadata={"Date": None})
