"""Results to pictures: loss against rank and size, and what a rank leaves out. `curves` draws the training.

Only what draws imports matplotlib.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compress.methods import METHODS, VARIANCE
from ..runs.families import FAMILIES
from .drawing import LOSS_LABEL, RANK_LABEL, RANK_MARKERS, STYLES, plain, saved_axes
from .studies import Entry, Study, distinctions, front

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_VARIANTS: tuple[dict[str, Any], ...] = (
    {"markersize": 6},
    {"markersize": 9, "linewidth": 0.8},
    {"markersize": 4, "linewidth": 2.5},
)
_CLOSE = 0.05  # share of an axis within which two ticks would overlap
_ASIDE = 0.03  # octaves between lines that have bars, which would cover one another
_SAME_SIZE = 0.01  # share of a model that its files add at most


def plot_loss_against_rank(studies: Sequence[Study], path: Path) -> None:
    """Plot validation loss against k, a line a family, the baseline as a level, a panel a study.

    Args:
        studies: Those without a rank, and the models whose size is told in bits, are left out.
        path: Image to write; `.png` and `.svg` both come of it.
    """
    drawn = [study for study in studies if any(map(has_rank, study.others))]
    with saved_axes(path, len(drawn), columns=2) as panels:
        for axes, study in zip(panels, drawn, strict=True):
            entries = [entry for entry in study.others if has_rank(entry)]
            lines = list(_lines(entries))
            has_bars = any(len(entry.runs) > 1 for entry in entries)
            for number, (label, style, rows) in enumerate(lines):
                aside = 2 ** (_ASIDE * (number - (len(lines) - 1) / 2)) if has_bars else 1
                places = [aside * (entry.run.n_embd_wte or 0) for entry in rows]
                _draw_entries(axes, places, rows, label=label, **style)
            draw_level(axes, study.baseline)
            ranks = sorted({entry.run.n_embd_wte or 0 for entry in entries})
            axes.set_xscale("log", base=2)
            beside = 2 ** (0.2 + 0.05 * math.log2(ranks[-1] / ranks[0]))
            axes.set_xlim(ranks[0] / beside, ranks[-1] * beside)  # even where every loss has diverged
            axes.set_xticks(ranks, labels=map(str, ranks), rotation=45 if len(ranks) > 8 else 0)
            axes.set_xlabel(RANK_LABEL)
            axes.set_ylabel(LOSS_LABEL)
            axes.set_title(plain(study.label), fontsize=10)


def has_rank(entry: Entry) -> bool:
    """Tell whether a model's size is told by its rank."""
    by_bytes = tuple(f"{method.name}-" for method in METHODS.values() if method.by == "bytes")
    return entry.run.n_embd_wte is not None and not entry.run.family.startswith(by_bytes)


def plot_loss_against_size(studies: Sequence[Study], path: Path) -> None:
    """Plot validation loss against megabytes in memory and on disk, with the models that no other beats on both.

    Args:
        studies: A row of panels each; one panel is for both sizes where they are the same.
        path: Image to write; `.png` and `.svg` both come of it.
    """
    measures = {"bytes": "parameters in memory [MB]", "disk_bytes": "files of weights on disk [MB]"}
    entries = [entry for study in studies for entry in study.entries]
    pairs = [(entry.mean("bytes") or 0, entry.mean("disk_bytes")) for entry in entries]
    if all(disk is None for _, disk in pairs):
        del measures["disk_bytes"]
    elif all(disk is not None and abs(disk - size) < _SAME_SIZE * size for size, disk in pairs):
        measures = {"disk_bytes": "weights, in memory and on disk [MB]"}
    wanted = [(study, measure) for study in studies for measure in measures]
    with saved_axes(path, len(wanted), columns=2) as panels:
        for axes, (study, measure) in zip(panels, wanted, strict=True):
            sized = [entry for entry in study.entries if entry.mean(measure) is not None]
            _draw_sizes(axes, sized, measure, has_bits=measure == list(measures)[-1])
            axes.set_xlabel(measures[measure])
            axes.set_ylabel(LOSS_LABEL)
            axes.set_title(plain(study.label), fontsize=10)


def _draw_sizes(axes: Axes, entries: Sequence[Entry], measure: str, has_bits: bool) -> None:
    """Draw one panel; label the ranks above it and, where asked to, the bits at the points."""
    megabytes = {entry: (entry.mean(measure) or 0) / 1e6 for entry in entries}
    points = [(megabytes[entry], entry.loss) for entry in entries]
    best = [points[number] for number in front(points)]
    if best:
        axes.plot(*zip(*best, strict=True), color="0.85", linewidth=7, zorder=0, label="no model is better on both")
    for label, style, rows in _lines([entry for entry in entries if entry.run.family != "baseline"]):
        _draw_entries(axes, [megabytes[entry] for entry in rows], rows, label=label, **style)
    for entry in entries:
        if entry.run.family == "baseline":
            style = {"color": "black", "marker": "*", "markersize": 11, "linestyle": ""}
            _draw_entries(axes, [megabytes[entry]], [entry], label="baseline", **style)
    by_bits = {entry.run.bits_per_weight: entry for entry in sorted(entries, key=lambda entry: -entry.loss)}
    labelled = {
        bits: entry for bits, entry in by_bits.items() if has_bits and bits is not None and math.isfinite(entry.loss)
    }
    axes.margins(x=0.18 if labelled else 0.08, y=0.1)
    _label_ranks(axes, {megabytes[entry]: entry.run.n_embd_wte or 0 for entry in entries if has_rank(entry)})
    for bits, entry in labelled.items():
        side, aside = ("left", 4) if bits == max(labelled) else ("right", -4)  # where the line comes from is no room
        axes.annotate(
            f"{bits:.2g} bits", (megabytes[entry], entry.loss), xytext=(aside, -3), textcoords="offset points",
            ha=side, va="top", fontsize=8, bbox={"boxstyle": "square,pad=0", "color": "white", "alpha": 0.7},
        )  # fmt: skip


def _label_ranks(axes: Axes, ranks: dict[float, int]) -> None:
    """Write k above the sizes of the models that have it, where there is room."""
    low, high = axes.get_xlim()
    shown: list[float] = []
    for size in sorted(ranks):
        if not shown or size - shown[-1] > _CLOSE * (high - low):
            shown.append(size)
    if shown:
        above = axes.secondary_xaxis("top")
        above.set_xticks(shown, labels=[str(ranks[size]) for size in shown], fontsize=8)
        above.set_xlabel("rank k", fontsize=8)


def plot_spectra(spectra: Sequence[tuple[str, Sequence[Sequence[float]], Sequence[int]]], path: Path) -> None:
    """Plot what each rank leaves out of the variance of several baselines' embeddings.

    Args:
        spectra: A panel each: its title; shares kept at rank 1, 2, ..., in [0, 1], of every seed; the ranks to mark.
        path: Image to write; `.png` and `.svg` both come of it.
    """
    every = sorted({rank for _, _, ranks in spectra for rank in ranks})
    markers = dict(zip(every, itertools.cycle(RANK_MARKERS), strict=False))
    with saved_axes(path, len(spectra), columns=2) as panels:
        for axes, (title, shares, ranks) in zip(panels, spectra, strict=True):
            marked = {rank: markers[rank] for rank in ranks}
            _draw_spectrum(axes, shares, marked, "variance", with_shares=len(spectra) == 1)
            axes.set_title(plain(title), fontsize=10)


def plot_spectrum(shares: Sequence[float], ranks: Sequence[int], method: str, path: Path) -> None:
    """Plot what each rank leaves out of the quantity that a method maximises.

    Args:
        shares: Kept at rank 1, 2, ..., in [0, 1].
        ranks: Those to mark; those beyond the shares are left out.
        method: The method's name: `pca` keeps a share of the variance, the others of their objective.
        path: Image to write; `.png` and `.svg` both come of it.
    """
    with saved_axes(path) as (axes,):
        marked = dict(zip(ranks, itertools.cycle(RANK_MARKERS), strict=False))
        quantity = "variance" if METHODS[method].share is VARIANCE else "objective"
        _draw_spectrum(axes, [shares], marked, quantity, with_shares=True)


def _draw_spectrum(
    axes: Axes, spectra: Sequence[Sequence[float]], markers: dict[int, str], quantity: str, with_shares: bool
) -> None:
    for shares in spectra:
        left_out = [1 - share for share in shares if share < 1 - 1e-6]  # the scale is logarithmic
        axes.plot(range(1, len(left_out) + 1), left_out, "-", color="black", linewidth=1.2)
    first = spectra[0]
    for number, (rank, marker) in enumerate(markers.items()):
        if rank <= len(first):
            label = f"k = {rank}: {first[rank - 1]:.3f} kept" if with_shares else f"k = {rank}"
            axes.plot(
                rank, max(1 - first[rank - 1], 1e-6), marker, color=f"C{number}" if with_shares else "0.3", label=label
            )
    axes.set_yscale("log")
    axes.set_xlabel(RANK_LABEL)
    axes.set_ylabel(f"share of the {quantity} left out")


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
    with saved_axes(path) as (axes,):
        # On a logarithmic scale, a model that loses nothing stands at the lower edge.
        drawn = [(size / 1e6, max(increase, 1e-4), name) for size, increase, name in sorted(points)]
        axes.plot([size for size, _, _ in drawn], [increase for _, increase, _ in drawn], "o-", label=label)
        for size, increase, name in drawn:
            if name in labelled:
                axes.annotate(name, (size, increase), xytext=(6, 6), textcoords="offset points", fontsize=8)
        axes.axvline(baseline_bytes / 1e6, color="black", linewidth=1, label="size of the baseline")
        axes.set_yscale("log")
        axes.margins(0.1)
        axes.set_xlabel("weights [MB]")  # in memory, or coded, as they are on disk
        axes.set_ylabel("loss beyond the baseline's [nats / token]")


def draw_level(axes: Axes, baseline: Entry | None) -> None:
    """Draw the baseline's loss as a level, and where it has several seeds the band that they span."""
    if baseline is None:
        return
    axes.axhline(baseline.loss, color="black", linewidth=1, label="baseline (not factorized)")
    if len(baseline.runs) > 1:
        axes.axhspan(*baseline.losses, color="black", alpha=0.12, linewidth=0)


def _lines(entries: Sequence[Entry]) -> Iterator[tuple[str, dict[str, Any], list[Entry]]]:
    """Yield a label, a style and the entries of every line: a family, or the part of it that was treated alike."""
    for family, style in STYLES.items():
        its = [entry for entry in entries if entry.run.family == family]
        told = distinctions(its)
        for distinction, variant in zip(dict.fromkeys(told), itertools.cycle(_VARIANTS), strict=False):
            label = FAMILIES[family] + (f", {distinction}" if distinction else "")
            rows = [entry for entry, of in zip(its, told, strict=True) if of == distinction]
            yield label, style | variant, rows


def _draw_entries(axes: Axes, places: Sequence[float], entries: Sequence[Entry], **style: Any) -> None:
    """Draw the mean losses of entries, and bars from the lowest to the highest where there are several seeds."""
    axes.plot(places, [entry.loss for entry in entries], **style)
    for place, entry in zip(places, entries, strict=True):
        if len(entry.runs) > 1:
            lowest, highest = entry.losses
            reach = [[entry.loss - lowest], [highest - entry.loss]]
            axes.errorbar(place, entry.loss, reach, color=style["color"], capsize=3, linestyle="", linewidth=1)
