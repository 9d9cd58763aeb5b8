"""What stands in the place of files: pointers that Git LFS leaves where it did not fetch, and pipes and devices."""

from collections.abc import Iterable
from pathlib import Path

from .errors import UserError

_START = b"version https://git-lfs.github.com/spec/"


def refuse_pointers(paths: Iterable[Path]) -> None:
    """Refuse pointers in the place of files, and what is read without an end; what is not there is passed over.

    Raises:
        UserError: Naming the file, and the command that fetches it if it is a pointer.
    """
    for path in paths:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is a pipe, a device or the like: name a file.")
        if path.is_file() and _starts_as_pointer(path):
            raise UserError(
                f"{path} is only a pointer of Git LFS, not the file itself: run `git lfs pull` "
                "in its repository, or download it again."
            )


def _starts_as_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_START)) == _START
