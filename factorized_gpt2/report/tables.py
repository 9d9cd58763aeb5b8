"""Results to tables: for a terminal, a page, and programs."""

import html
from collections.abc import Callable, Sequence
from typing import Any

from tabulate import tabulate

from ..common.errors import one_line
from ..common.markdown import escaped
from ..runs.results import Results, megabytes
from .studies import Entry, Study, studies_of

BEST = "yes"

LEGEND = (
    "Loss in nats a token over the validation text; gap: to the baseline's loss; MB: of the parameters in memory; MB "
    "on disk: of the files of weights; best at size: no model of at most so many MB on disk has a lower loss; "
    "trained: parameters that the optimizer changed; tokens/s: while training, evaluations left out."
)
SEEDS_LEGEND = (
    "A row of several seeds, or of baselines of several seeds, has the means of its runs, and the lowest and the "
    "highest loss."
)


_HEADINGS: dict[str, Callable[[str], str]] = {
    "github": lambda label: f"### {escaped(label)}",
    "html": lambda label: f"<h3>{html.escape(label)}</h3>",
}


def results_table(results: Sequence[Results], style: str = "simple") -> str:
    """Lay out results as tables, one for each baseline, one row a run or the seeds of one.

    Args:
        results: In the order of the rows.
        style: A format of `tabulate`, such as "github" for Markdown.
    """
    heading = _HEADINGS.get(style, lambda label: f"{label}:")
    parts = []
    for study in studies_of(results):
        parts += [heading(study.label)] if study.label else []
        parts.append(_table(study, style))
    return "\n\n".join(parts)


def legend(results: Sequence[Results]) -> str:
    """Say what the columns mean."""
    several = any(len(entry.runs) > 1 for study in studies_of(results) for entry in study.entries)
    return f"{LEGEND} {SEEDS_LEGEND}" if several else LEGEND


def results_rows(results: Sequence[Results]) -> list[dict[str, Any]]:
    """Lay out results for programs to read: every figure of a run but its curves, and the gap of its loss."""
    left_out = ("settings", "content", "words", "training_curve", "validation_curve", "spectrum", "eval_loss")
    return [
        {name: value for name, value in vars(row).items() if name not in left_out}
        | {"loss": row.eval_loss, "gap": gap, "best": entry in study.best, "study": study.label or None}
        | {"seed": row.settings.get("seed"), "folder": row.settings.get("output_dir")}
        for study in studies_of(results)
        for entry in study.entries
        for row, gap in zip(entry.runs, entry.gaps, strict=True)
    ]


def _table(study: Study, style: str) -> str:
    has_seeds = any(len(entry.runs) > 1 for entry in study.entries)
    has_bits = any(entry.run.bits_per_weight for entry in study.entries)
    rows = [_row(entry, BEST if entry in study.best else "", style) for entry in study.entries]
    hidden = {*(() if has_seeds else ("seeds", "lowest", "highest")), *(() if has_bits else ("bits",))}
    shown = [{name: cell for name, cell in row.items() if name not in hidden} for row in rows]
    return tabulate(
        shown,
        headers="keys",
        tablefmt=style,
        disable_numparse=True,
        colalign=("left",) + ("right",) * (len(shown[0]) - 1),
    )


def _row(entry: Entry, mark: str, style: str) -> dict[str, str]:
    row, (lowest, highest), disk_bytes = entry.run, entry.losses, entry.mean("disk_bytes")
    return {
        "run": escaped(entry.name) if style == "github" else one_line(entry.name),
        "k": str(row.n_embd_wte or "-"),
        "bits": "-" if row.bits_per_weight is None else f"{row.bits_per_weight:g}",
        "loss": f"{entry.loss:.4f}",
        "seeds": str(len(entry.runs)),
        "lowest": f"{lowest:.4f}",
        "highest": f"{highest:.4f}",
        "perplexity": f"{entry.mean('perplexity'):.2f}",
        "gap": "" if entry.gap is None else f"{entry.gap:+.4f}",
        "parameters": _count(entry.mean("parameters")),
        "MB": megabytes(entry.mean("bytes") or 0),
        "MB on disk": "-" if disk_bytes is None else megabytes(disk_bytes),
        "best at size": mark,
        "trained": _count(entry.mean("trained_parameters")),
        "best step": _count(entry.mean("best_step")),
        "tokens/s": _count(entry.mean("tokens_per_second") or None),
    }


def _count(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:,.0f}"
