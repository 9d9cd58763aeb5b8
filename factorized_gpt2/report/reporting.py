"""Result files to a report: a table, pictures, and where they come from."""

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..common.errors import UserError
from ..common.files import filling_folder
from ..common.markdown import escaped
from ..runs.families import FAMILIES
from ..runs.results import RESULTS_NAME, Results
from .curves import plot_training_curves
from .plots import has_rank, plot_loss_against_rank, plot_loss_against_size, plot_spectra
from .studies import Study, studies_of
from .tables import legend, results_table


def read_results(root: Path, missing_ok: bool = False) -> list[Results]:
    """Read every `results.json` in the run folders of `root`, ordered by family, rank and bits.

    Raises:
        UserError: There is none, unless `missing_ok`; or one that is no result.
    """
    found = (Results.read(path.parent) for path in sorted(root.glob(f"*/{RESULTS_NAME}")))
    results = [row for row in found if row is not None]  # one that has just been replaced is not there for a moment
    if not results and not missing_ok:
        raise UserError(f"No results under {root}: no run has finished there.")
    order = {family: place for place, family in enumerate(FAMILIES)}  # what a later version adds comes last
    return sorted(
        results,
        key=lambda row: (order.get(row.family, len(order)), row.n_embd_wte or 0, row.bits_per_weight or 0),
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
        markdown = [_TITLE, results_table(results, "github"), legend(results)]
        markdown += [f"![{title}]({name}.png)" for name, title in pictures.items()]
        markdown += [_ORIGIN, _origin_table(origin)]
        page = ["<!doctype html>", '<meta charset="utf-8">', "<title>Results</title>", _STYLE, "<h1>Results</h1>"]
        page += [results_table(results, "html"), f"<p>{html.escape(legend(results))}</p>"]
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
    studies, pictures = studies_of(results), {}
    if any(has_rank(entry) for study in studies for entry in study.others):
        pictures["loss_against_rank"] = "Validation loss against the rank k, by family"
        plot_loss_against_rank(studies, folder / "loss_against_rank")
    if any(row.n_embd_wte for row in results):
        pictures["loss_against_size"] = "Validation loss against megabytes in memory and on disk"
        plot_loss_against_size(studies, folder / "loss_against_size")
    if any(row.has_curve for row in results):
        pictures["training_curves"] = "Training and validation loss against tokens"
        plot_training_curves(studies, folder / "training_curves")
    spectra = [(study.label, *_spectra(study)) for study in studies if _spectra(study)[0]]
    if spectra:
        pictures["spectrum"] = "Variance of the token embedding that each rank leaves out"
        plot_spectra(spectra, folder / "spectrum")
    return pictures


def _spectra(study: Study) -> tuple[list[Sequence[float]], list[int]]:
    """Collect what PCA keeps, of every seed, with the ranks to mark."""
    by_pca = [row for entry in study.others for row in entry.runs if row.family.startswith("pca-") and row.n_embd_wte]
    spectra = dict.fromkeys(tuple(row.spectrum) for row in by_pca if row.spectrum)
    return list(spectra), sorted({row.n_embd_wte or 0 for row in by_pca if row.spectrum})


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
