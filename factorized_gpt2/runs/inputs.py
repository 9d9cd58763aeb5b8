"""Fingerprints of the files that a run reads. They need no torch, because a grid asks for them before it runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.fingerprints import files_fingerprint, model_content, tokenizer_content
from ..models.record import teacher_of


def input_fingerprints(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the fingerprints of what a run with these settings reads: start, teacher, tokenizer and texts.

    Datasets of the Hub, and whatever cannot be identified, are left out.

    Args:
        settings: Those of `Run.settings`, or a record of them.

    Raises:
        UserError: The record of a compressed model cannot be read.
    """
    start = settings.get("compressed") or settings.get("baseline")
    tokenizer = settings.get("tokenizer") or start
    names = {"start": start, "teacher": teacher_asked(settings)}
    found = {kind: model_content(name) for kind, name in names.items() if name}
    found["tokenizer"] = tokenizer_content(tokenizer) if tokenizer else None
    found["train_file"] = files_fingerprint(settings.get("train_file") or ()) if settings.get("do_train") else None
    found["validation_file"] = files_fingerprint(settings.get("validation_file") or ())
    dataset = Path(settings.get("dataset_name") or "")
    if settings.get("dataset_name") and dataset.is_dir():
        found["dataset_files"] = files_fingerprint(sorted(path for path in dataset.rglob("[!.]*") if path.is_file()))
    return {kind: content for kind, content in found.items() if content is not None}


def teacher_asked(settings: Mapping[str, Any]) -> str | None:
    """Return the teacher of a run with these settings; `None` for a run without one."""
    if not (settings.get("do_train") and settings.get("distillation_weight")):
        return None
    return teacher_of(*(settings.get(name) for name in ("teacher", "baseline", "compressed")))
