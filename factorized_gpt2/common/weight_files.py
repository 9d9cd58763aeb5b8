"""Files that a model is loaded from."""

from pathlib import Path


def weight_files(folder: Path) -> list[Path]:
    """List the files of weights in a folder, as transformers chooses them: pickles only for want of others."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
