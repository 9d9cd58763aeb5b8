"""Files that hold weights: which of a folder are read, and whether they are there at all."""

from collections.abc import Iterable
from pathlib import Path

from .errors import UserError

_POINTER_START = b"version https://git-lfs.github.com/spec/"


def weight_files(folder: Path) -> list[Path]:
    """List the files that a model in a folder is loaded from, as transformers chooses them: pickles come last."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def refuse_pointers(paths: Iterable[Path]) -> None:
    """Refuse what Git LFS leaves in the place of files that it did not fetch; pass over what is not there.

    Raises:
        UserError: Naming the file and the command that fetches it.
    """
    for path in paths:
        if path.is_file() and _starts_as_pointer(path):
            raise UserError(
                f"{path} is not the file itself but the pointer that Git LFS keeps in its place: run `git lfs pull` "
                "in its repository, or download it again."
            )


def _starts_as_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_POINTER_START)) == _POINTER_START
