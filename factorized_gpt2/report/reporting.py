"""Result files to a report: a table, pictures, and where they come from."""

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..common.errors import UserError, one_line
from ..common.files import filling_folder
from ..common.markdown import escaped
from ..runs.families import FAMILIES
from ..runs.results import RESULTS_NAME, Results, megabytes
from .plots import (
    plot_loss_against_rank,
    plot_loss_against_size,
    plot_spectrum,
    plot_training_curves,
)


def read_results(root: Path, missing_ok: bool = False) -> list[Results]:
    """Read every `results.json` in the run folders of `root`, ordered by family and rank.

    Raises:
        UserError: There is none, unless `missing_ok`; or one that is no result.
    """
    found = (Results.read(path.parent) for path in sorted(root.glob(f"*/{RESULTS_NAME}")))
    results = [row for row in found if row is not None]  # one that has just been replaced is not there for a moment
    if not results and not missing_ok:
        raise UserError(f"No results under {root}: no run has finished there.")
    order = {family: place for place, family in enumerate(FAMILIES)}  # what a later version adds comes last
    return sorted(results, key=lambda row: (order.get(row.family, len(order)), row.n_embd_wte or 0))


def results_table(results: Sequence[Results], style: str = "simple") -> str:
    """Lay out results as a table, one row a run; the gap is to the loss of the baseline that it belongs to.

    Args:
        results: In the order of the rows.
        style: A format of `tabulate`, such as "github" for Markdown.
    """
    baselines = [row for row in results if row.family == "baseline"]
    gaps = [_gap(row, baselines) for row in results]
    rows = [
        {
            "run": escaped(row.run_name) if style == "github" else one_line(row.run_name),
            "k": row.n_embd_wte or "-",
            "loss": f"{row.eval_loss:.4f}",
            "perplexity": f"{row.perplexity:.2f}",
            "gap": "" if gap is None else f"{gap:+.4f}",
            "parameters": f"{row.parameters:,}",
            "MB": megabytes(row.bytes),
            "trained": f"{row.trained_parameters:,}",
            "best step": "-" if row.best_step is None else f"{row.best_step:,}",
            "tokens/s": f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else "-",
        }
        for row, gap in zip(results, gaps, strict=True)
    ]
    return tabulate(
        rows,
        headers="keys",
        tablefmt=style,
        disable_numparse=True,
        colalign=("left",) + ("right",) * (len(rows[0]) - 1),
    )


def results_rows(results: Sequence[Results]) -> list[dict[str, Any]]:
    """Lay out results for programs to read: every figure of a run but its curves, and the gap of its loss."""
    baselines = [row for row in results if row.family == "baseline"]
    left_out = ("settings", "content", "words", "training_curve", "validation_curve", "spectrum", "eval_loss")
    return [
        {name: value for name, value in vars(row).items() if name not in left_out}
        | {"loss": row.eval_loss, "gap": _gap(row, baselines), "folder": row.settings.get("output_dir")}
        for row in results
    ]


def _gap(row: Results, baselines: Sequence[Results]) -> float | None:
    """Compare a run's loss with that of its own baseline, on the same text; `None` where it cannot be told which."""
    if row.family == "baseline":
        return 0.0
    its = [baseline for baseline in baselines if _is_of(row, baseline) and _read_the_same(row, baseline)]
    if len(its) > 1:  # the one in the folder that the run names
        its = [baseline for baseline in its if row.baseline and _same(row.baseline, baseline.settings["output_dir"])]
    return row.eval_loss - its[0].eval_loss if len(its) == 1 else None


def _is_of(row: Results, baseline: Results) -> bool:
    """Tell whether a run was made from a baseline, or had a random start and is of its shape."""
    if row.start_fingerprint is None and not row.content.get("start"):
        shape = ("n_layer", "n_head", "n_embd")
        return all(row.settings.get(name) == baseline.settings.get(name) for name in shape)
    if row.settings.get("compressed"):
        return row.content.get("made_from") == baseline.content.get("model", "")
    known = [(row.content.get("start"), baseline.content.get("model")), (row.start_fingerprint, baseline.fingerprint)]
    made_from, left = next((pair for pair in known if all(pair)), ("", ""))  # earlier versions did not write all down
    return made_from == left


def _read_the_same(row: Results, baseline: Results) -> bool:
    """Tell whether two runs were evaluated on the same text, as far as is known."""
    text, other = (one.content.get("validation_file") for one in (row, baseline))
    names = ("max_eval_samples",) if text or other else ("max_eval_samples", "dataset_name", "dataset_config_name")
    return (not (text and other) or text == other) and all(
        row.settings.get(name) == baseline.settings.get(name) for name in names
    )


def _same(folder: Any, other: Any) -> bool:
    return Path(str(folder)).absolute() == Path(str(other)).absolute()


_LEGEND = (
    "Loss in nats a token over the validation text; gap: to the baseline's loss; MB: of the parameters; trained: "
    "parameters that the optimizer changed; tokens/s: while training, evaluations left out."
)


def write_report(results: Sequence[Results], folder: Path) -> Path:
    """Write `report.md`, `report.html` and their pictures.

    Args:
        results: At least one.
        folder: Made if need be; other files in it stay, and where it has no report yet none of its names is taken.

    Returns:
        The Markdown file.

    Raises:
        UserError: There cannot be such a folder, or it has files of others under these names.
    """
    _refuse_others(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"No report can be written into {folder}: {error.strerror}.") from error
    with filling_folder(folder, last="report.md") as temporary:
        pictures = _draw(results, temporary)
        origin = _origin(results)
        markdown = [_TITLE, results_table(results, "github"), _LEGEND]
        markdown += [f"![{title}]({name}.png)" for name, title in pictures.items()]
        markdown += [_ORIGIN, _origin_table(origin)]
        page = ["<!doctype html>", '<meta charset="utf-8">', "<title>Results</title>", _STYLE, "<h1>Results</h1>"]
        page += [results_table(results, "html"), f"<p>{html.escape(_LEGEND)}</p>"]
        page += [f'<img src="{name}.svg" alt="{html.escape(title)}">' for name, title in pictures.items()]
        page += ["<h2>Where they come from</h2>", tabulate(origin, tablefmt="html", disable_numparse=True)]
        for name, text in (("report.md", "\n\n".join(markdown)), ("report.html", "\n".join(page))):
            (temporary / name).write_text(text + "\n", encoding="utf-8")
    return folder / "report.md"


_TITLE, _ORIGIN = "# Results", "## Where they come from"
_PICTURES = ("loss_against_rank", "loss_against_size", "training_curves", "spectrum")


def _refuse_others(folder: Path) -> None:
    """Refuse a folder that has files of a report's names, and no report of this package beside them."""
    report = folder / "report.md"
    names = [report.name, "report.html", *(f"{name}.{kind}" for name in _PICTURES for kind in ("png", "svg"))]
    there = [name for name in names if os.path.lexists(folder / name)]
    if not there:
        return
    try:
        text = report.read_text(encoding="utf-8") if report.is_file() else ""
    except (OSError, ValueError):
        text = ""
    if not text.startswith(_TITLE) or _ORIGIN not in text:
        raise UserError(
            f"{folder / there[0]} is of no report that was made before: move it away, or choose another --output_dir."
        )


def _origin_table(origin: Sequence[tuple[str, str]]) -> str:
    rows = [(escaped(name), escaped(value)) for name, value in origin]
    return tabulate(rows, ["", ""], "github", disable_numparse=True)


_STYLE = (
    "<style>body{font-family:sans-serif;max-width:70em;margin:2em auto}table{border-collapse:collapse}"
    "td,th{padding:.2em .7em;border-bottom:1px solid #ccc}img{max-width:100%}</style>"
)


def _draw(results: Sequence[Results], folder: Path) -> dict[str, str]:
    """Draw what there are results for; return titles by file name."""
    pictures = {}
    if any(row.n_embd_wte for row in results):
        pictures["loss_against_rank"] = "Validation loss against the rank k, by family"
        plot_loss_against_rank(results, folder / "loss_against_rank")
        pictures["loss_against_size"] = "Validation loss against megabytes"
        plot_loss_against_size(results, folder / "loss_against_size")
    if any(row.has_curve for row in results):
        pictures["training_curves"] = "Training and validation loss against tokens"
        plot_training_curves(results, folder / "training_curves")
    spectra: dict[tuple[float, ...], set[int]] = {}  # with the ranks to mark, one for each baseline
    for row in results:
        if row.spectrum and row.n_embd_wte and row.family.startswith("pca-"):
            spectra.setdefault(tuple(row.spectrum), set()).add(row.n_embd_wte)
    if spectra:
        pictures["spectrum"] = "Variance of the token embedding that each rank leaves out"
        first, *others = [(shares, sorted(ranks)) for shares, ranks in spectra.items()]
        plot_spectrum(*first, "pca", folder / "spectrum", others)
    return pictures


def _text(row: Results, split: str) -> str | None:
    """Name the text of a run: its files, or where it has none its dataset."""
    text = row.text(split)
    return ", ".join(text.files) or text.dataset_name


def _origin(results: Sequence[Results]) -> list[tuple[str, str]]:
    """Say what the runs had in common; where they differ, every value."""

    def common(values: Sequence[Any]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values if value is not None)) or "-"

    def setting(name: str, of: Sequence[Results] = results, unset: str | None = None) -> str:
        return common([unset if row.settings.get(name) is None else row.settings[name] for row in of])

    trained = [row for row in results if row.trained_parameters]
    scratch = [row for row in trained if row.start_fingerprint is None and row.settings.get("n_layer")]
    return [
        ("layers, heads, width d", " / ".join(setting(name, scratch) for name in ("n_layer", "n_head", "n_embd"))),
        ("block", f"{setting('block_size')} tokens"),
        ("blocks a step", setting("effective_batch_size", trained)),
        ("steps", setting("max_steps", trained)),
        ("learning rate", setting("learning_rate", trained)),
        ("training text", common([_text(row, "train") for row in trained])),
        ("validation text", common([_text(row, "validation") for row in results])),
        ("blocks evaluated", setting("max_eval_samples", unset="all")),
        ("seed", setting("seed")),
        ("device", common([row.device for row in results])),
        ("processes", common([row.processes for row in results])),
        ("seconds in all", f"{sum(row.seconds or 0 for row in results):,.0f}"),
        ("largest peak memory", f"{max(row.peak_memory_bytes or 0 for row in results) / 1e9:.2f} GB"),
        ("code", common([row.git_commit for row in results])),
        *((name, common([row.versions.get(name) for row in results])) for name in results[0].versions),
    ]
