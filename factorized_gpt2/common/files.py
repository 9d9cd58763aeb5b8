"""Writing files and folders so that they are there whole or not at all, whenever the writer or the power is cut off.

What is written goes under a temporary name beside its place, is flushed to the disk and then renamed. A writer that is
killed leaves at most such a temporary name, which `leftovers.sweep` clears away. Nothing is lost that others put where
this package writes: it replaces files by their names, no folder that stands in a file's place, and no other files in a
folder.
"""

import errno
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import UserError
from .leftovers import marked_beside, remove
from .lfs_pointers import refuse_pointers

logger = logging.getLogger(__name__)

_REFUSALS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST),  # a file where a folder belongs, and the other way round
)
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # of some network drives
_UNSAID = (OSError, RuntimeError, SafetensorError)  # what a full disk can be behind
_FULL_BYTES = 1 << 20  # a disk with less room than this counts as full


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it there when the block ends well, else remove it.

    Raises:
        UserError: The file cannot be written, as on a full disk, or where a folder has its name.
    """
    _refuse_folder(path)
    temporary = marked_beside(path, "partial", path.suffix)
    with _writing(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        put_in_place(temporary, path)


@contextmanager
def replacing_folder(path: Path, ours: Sequence[str] = ()) -> Iterator[Path]:
    """Yield an empty folder beside `path`; put it in the place of `path` when the block ends well, else remove it.

    Args:
        path: A folder, if it is there at all.
        ours: Patterns of names in it that go when they are not written anew; those of folders end with a slash. What
            has other names stays.

    Raises:
        UserError: The folder cannot be written, as on a full disk, or where a file has its name.
    """
    _refuse_file(path)
    temporary = marked_beside(path, "partial")
    with _writing(path, temporary):
        temporary.mkdir(parents=True)
        yield temporary
        put_in_place(temporary, path, ours)


@contextmanager
def filling_folder(path: Path, last: str) -> Iterator[Path]:
    """Yield an empty folder in `path`; move its files to `path` when the block ends well, else remove them.

    Args:
        path: Other files in it stay.
        last: The file without which the others do not count, which is moved after them.

    Raises:
        UserError: The files cannot be written, as on a full disk.
    """
    temporary = marked_beside(path / last, "partial")
    with _writing(path, temporary):
        temporary.mkdir(parents=True)
        yield temporary
        _flush(temporary)
        files = [file for file in temporary.rglob("*") if file.is_file()]  # a tokenizer can have a folder of its own
        places = {file: path / file.relative_to(temporary) for file in files}
        for place in places.values():  # before the first is moved
            _refuse_folder(place)
        for file in sorted(files, key=lambda file: file == temporary / last):
            places[file].parent.mkdir(exist_ok=True)
            os.replace(file, places[file])
        _flush_names(path)


def put_in_place(temporary: Path, path: Path, ours: Sequence[str] = ()) -> None:
    """Flush a file or folder to the disk, and rename it to `path`, in the place of what may be there.

    Args:
        temporary: Beside `path`.
        path: Of the same kind, if it is there at all.
        ours: As `replacing_folder` has it.

    Raises:
        UserError: A folder stands where a file is to go, or a file where a folder is.
    """
    if temporary.is_dir():
        _refuse_file(path)
    elif temporary.is_file():
        _refuse_folder(path)
    _flush(temporary)
    if path.is_dir():
        _keep_others(path, temporary, ours)
        old = marked_beside(path, "old")
        path.rename(old)
        try:
            temporary.rename(path)
        finally:
            if not path.exists():
                old.rename(path)
        remove_folder(old)
    else:
        os.replace(temporary, path)
    _flush_names(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder so that it is gone at once and never half there."""
    trash = marked_beside(path, "partial")
    path.rename(trash)
    remove(trash)


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder, but a file must be written there: move the folder away.")


def _refuse_file(path: Path) -> None:
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{path} is a file, but a folder must be written there: move the file away.")


def _keep_others(folder: Path, successor: Path, ours: Sequence[str]) -> None:
    """Give what others put into a folder to its successor as well, so that it has its name at every moment."""
    for path in sorted(folder.iterdir()):
        is_folder = path.is_dir() and not path.is_symlink()
        place = successor / path.name
        if any(fnmatchcase(f"{path.name}/" if is_folder else path.name, pattern) for pattern in ours):
            continue
        if is_folder and not place.exists():
            shutil.copytree(path, place, symlinks=True, copy_function=_link)
        elif is_folder and not place.is_dir():
            _refuse_folder(path)
        elif is_folder:
            _keep_others(path, place, ())
        elif not place.exists():
            _link(path, place)
    _flush_names(successor)


def _link(source: str | Path, place: str | Path) -> None:
    try:
        os.link(source, place, follow_symlinks=False)
    except OSError:  # no second names on this drive
        shutil.copy2(source, place, follow_symlinks=False)


@contextmanager
def explaining_refusals(path: Path) -> Iterator[None]:
    """Turn what a full disk or the like makes of writing `path` into an error that says so.

    Raises:
        UserError: Naming `path`. Errors of other kinds pass as they are.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = refusal(error)
        # Libraries tell of a full disk in words of their own, or in none.
        is_full = isinstance(error, _UNSAID) and _free_bytes(path.parent) < _FULL_BYTES
        if reason is None and (is_full or "No space left" in str(error)):
            reason = os.strerror(errno.ENOSPC)
        if reason is None:
            raise
        raise UserError(f"{path} cannot be written: {reason}. Fix that, then give the same command again.") from error


def refusal(error: Exception) -> str | None:
    """Say in a line why the system refused to read or write; `None` for errors of another kind."""
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno in _REFUSALS else None


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """See that there is room for what will be written.

    Args:
        folder: Need not exist yet.
        needed: Bytes, at least.
        purpose: What needs them.

    Raises:
        UserError: There is less.
    """
    free = _free_bytes(folder)
    if free < needed:
        raise UserError(
            f"{folder} has {free / 1e9:.2f} GB of room, and {purpose} needs {needed / 1e9:.2f} GB: make room, or "
            "choose another folder."
        )


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    with replacing_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def without_nan(value: Any) -> Any:
    """Put `None`, JSON's null, in the place of numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: The file cannot be read, or is not a JSON object.
    """
    refuse_pointers([path])
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_without_repetition,
        )
        json.dumps(content, ensure_ascii=False).encode()  # which half a surrogate pair does not survive
    except (OSError, ValueError, RecursionError) as error:  # the last of brackets in brackets in brackets
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that JSON knows.")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large a number.")
    return number


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice.")
    return content


@contextmanager
def _writing(path: Path, temporary: Path) -> Iterator[None]:
    try:
        with explaining_refusals(path):
            yield
    finally:
        remove(temporary)


def _free_bytes(folder: Path) -> int:
    """Measure the room where a folder is, or will be."""
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free


def _flush(path: Path) -> None:
    """Have the system put a file, or all that a folder holds, on the disk."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("r+b") as opened:
                _sync(opened.fileno())
        else:
            _flush_names(file)
    if path.is_dir():
        _flush_names(path)


def _flush_names(folder: Path) -> None:
    """Have the system put on the disk which names a folder holds; Windows has no way to."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        _warn_of_sync(os.strerror(error.errno))


@cache  # once is enough
def _warn_of_sync(reason: str) -> None:
    logger.warning("This drive cannot flush files to the disk (%s); a power cut may lose recent files.", reason)
