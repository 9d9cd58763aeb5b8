"""Which baseline a run belongs to, and which runs are one another's but for the seed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runs.results import Results

_SHAPE = ("n_layer", "n_head", "n_embd")
_UNTOLD = ("seed", "output_dir", "run_name", "baseline")  # in what runs of other seeds differ
_BY_CONTENT = ("tokenizer", "train_file", "validation_file")
_FOLDERS = ("compressed", "teacher")
NOT_TREATMENT = frozenset((*_UNTOLD, *_BY_CONTENT, *_FOLDERS, "n_embd_wte"))
"""Settings that do not say what was done to a model: where it is, what it came from, and its size."""


def baselines_of(row: Results, baselines: Sequence[Results]) -> list[Results]:
    """List the baselines that a run may have come from: those of its start, or of its shape, that read the same text.

    Where there are several, the one in the folder that the run names counts alone.
    """
    if row.family == "baseline":
        return [row]
    its = [baseline for baseline in baselines if _is_of(row, baseline) and _read_the_same(row, baseline)]
    if len(its) > 1 and row.baseline:
        its = [one for one in its if _same(row.baseline, one.settings.get("output_dir"))]
    return its


def kind_of(row: Results, with_folders: bool = True, with_rank: bool = True) -> str:
    """Write down all that a run is told but its seed, for comparison: texts by their content where that is known.

    Args:
        row: The run.
        with_folders: Whether the whole path of a compressed start counts, and not the folder's name alone.
        with_rank: Whether k counts.
    """
    settings = {name: value for name, value in row.settings.items() if name not in _UNTOLD}
    content = {name: value for name, value in row.content.items() if name in _BY_CONTENT or name.startswith("dataset")}
    settings = {name: value for name, value in settings.items() if name not in content}
    if not with_folders:
        settings |= {name: Path(str(settings[name])).name for name in _FOLDERS if settings.get(name)}
    if not with_rank:
        settings.pop("n_embd_wte", None)
    size = [row.family, row.n_embd_wte, row.bits_per_weight] if with_rank else []
    return json.dumps([settings, content, *size], sort_keys=True, default=str)


def origin_of(row: Results) -> str:
    """Write down where a run comes from and what text it was measured on, where its baseline is not at hand."""
    start = _start(row) or [row.settings.get(name) for name in _SHAPE]
    text = row.content.get("validation_file") or row.text("validation").name
    return json.dumps([start, text, row.settings.get("max_eval_samples")], default=str)


def has_random_start(row: Results) -> bool:
    """Tell whether a run started from no weights."""
    return _start(row) is None


def _start(row: Results) -> str | None:
    started = row.content.get("made_from") or row.content.get("start") or row.start_fingerprint
    return started or row.baseline or row.settings.get("compressed")


def _is_of(row: Results, baseline: Results) -> bool:
    """Tell whether a run was made from a baseline, or had a random start and is of its shape."""
    if row.start_fingerprint is None and not row.content.get("start"):
        return all(row.settings.get(name) == baseline.settings.get(name) for name in _SHAPE)
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
