"""The folder of a compressed model: its name, and the record in it of what it was made of."""

from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.files import read_json

RECORD_NAME = "compression.json"


def compressed_folder(root: Path, rank: int, label: str = "pca", is_refined: bool = False) -> Path:
    """Name the folder of a compressed model in the folder of all."""
    return root / f"gpt_{label}{'' if is_refined else '_nofinetune'}_k{rank}"


def compressed_from(folder: str) -> str:
    """Read from a compressed model's record which baseline it was made from."""
    name = compression_record(folder).get("baseline")
    if not isinstance(name, str):
        raise UserError(f"{folder} does not say what it was compressed from: name a teacher.")
    return name


def recorded_spectrum(folder: str) -> list[float] | None:
    """Read from the record of the compressed model that a run starts from what each rank keeps."""
    spectrum = compression_record(folder).get("spectrum")
    if not (spectrum is None or (isinstance(spectrum, list) and all(isinstance(share, float) for share in spectrum))):
        raise UserError(f"The spectrum in {Path(folder) / RECORD_NAME} is no list of shares; compress once more.")
    return spectrum


def compression_record(folder: str) -> dict[str, Any]:
    """Read the record in a folder; empty where there is none, or no folder is named."""
    path = Path(folder) / RECORD_NAME
    return read_json(path) if folder and path.exists() else {}
