"""The record in a compressed model's folder: of what the model was made, and what it was measured to cost."""

import math
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.files import read_json, write_json

RECORD_NAME = "compression.json"


def compression_record(folder: str | None) -> dict[str, Any]:
    """Read the record in a compressed model's folder; empty where there is none, or no folder is named.

    Raises:
        UserError: It cannot be read.
    """
    path = Path(folder or "") / RECORD_NAME
    return read_json(path) if folder and path.exists() else {}


def teacher_of(teacher: str | None, baseline: str | None, compressed: str | None) -> str | None:
    """Name the model that a run is distilled from: the one asked for, or else what its start was made from.

    Args:
        teacher: Setting of that name.
        baseline: Setting of that name.
        compressed: Setting of that name, whose record names its own baseline.

    Returns:
        `None` where the record does not say.

    Raises:
        UserError: The record cannot be read.
    """
    recorded = compression_record(compressed).get("baseline")
    return teacher or baseline or (recorded if isinstance(recorded, str) else None)


def note_measurement(folder: Path, text: str, size: int, increase: float) -> None:
    """Write into a compressed model's record what it was measured to cost.

    Args:
        folder: The model's.
        text: Fingerprint of the text.
        size: Bytes of the model's parameters.
        increase: Its loss beyond the baseline's, in nats a token. One that is not finite is not written.

    Raises:
        UserError: The record cannot be read or written.
    """
    record = read_json(folder / RECORD_NAME)
    noted, found = _measurements(record), {"bytes": size, "increase": increase}
    if math.isfinite(increase) and noted.get(text) != found:
        write_json(folder / RECORD_NAME, record | {"measurements": noted | {text: found}})


def noted_measurement(folder: Path, text: str) -> tuple[int, float] | None:
    """Read what `note_measurement` wrote of a text: bytes, and nats a token; `None` where it wrote nothing.

    Raises:
        UserError: The record cannot be read.
    """
    found = _measurements(read_json(folder / RECORD_NAME)).get(text)
    figures = [found.get(name) for name in ("bytes", "increase")] if isinstance(found, dict) else []
    if not figures or not all(isinstance(figure, int | float) for figure in figures):
        return None
    return int(figures[0]), float(figures[1])


def _measurements(record: dict[str, Any]) -> dict[str, Any]:
    noted = record.get("measurements")
    return noted if isinstance(noted, dict) else {}


def compressed_folder(root: Path, rank: int, label: str = "pca", is_refined: bool = False) -> Path:
    """Name the folder of a compressed model in the folder of all."""
    return root / f"gpt_{label}{'' if is_refined else '_nofinetune'}_k{rank}"


def recorded_spectrum(folder: str) -> list[float] | None:
    """Read from the record of the compressed model that a run starts from what each rank keeps."""
    spectrum = compression_record(folder).get("spectrum")
    if not (spectrum is None or (isinstance(spectrum, list) and all(isinstance(share, float) for share in spectrum))):
        raise UserError(
            f"The spectrum in {Path(folder) / RECORD_NAME} is not a list of numbers between 0 and 1: compress the "
            f"model again."
        )
    return spectrum
