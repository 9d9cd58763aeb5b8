"""Temporary names that this package alone makes, and clearing away what a killed writer left under one."""

import itertools
import os
import re
import shutil
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import psutil

# Nobody else names a file like this. The process that made it is told by its id and by the second it started in,
# because ids come again: in a container they are the same at every start.
_MARKED = re.compile(
    r"\.(?P<name>.+)\.fgpt2-(?P<pid>[0-9a-f]{8})-(?P<start>[0-9a-f]{8})-[0-9a-f]+\.(?P<kind>partial|old)(\.\w+)?"
)
_SECONDS = 2  # by which two readings of one start may differ
_numbers = itertools.count()


def marked_beside(path: Path, kind: str, suffix: str = "") -> Path:
    """Make up a temporary name beside `path` that no one else uses.

    Args:
        path: What is written or removed.
        kind: `partial` for what may be thrown away, `old` for what may have to be put back.
        suffix: Ending of the name, where a library looks at it.
    """
    pid = os.getpid()
    return path.with_name(f".{path.name}.fgpt2-{pid:08x}-{_started(pid):08x}-{next(_numbers):x}.{kind}{suffix}")


def marked_for_all(name: str) -> str:
    """Make up a temporary name that several processes share; the sweep takes it for that of a dead process."""
    return f".{name}.fgpt2-{0:08x}-{0:08x}-0.partial"


def sweep(folder: Path, *names: str) -> None:
    """Clear away what killed writers left in a folder, and put back what one of them was about to replace.

    Only for one who writes there alone. What a process that still runs is writing stays all the same.

    Args:
        folder: Judged before to be one that this package writes into.
        *names: Patterns of what was to be written there. None: anything.
    """
    for path in folder.glob(".*.fgpt2-*"):
        match = _MARKED.fullmatch(path.name)
        if match is None or not any(fnmatchcase(match["name"], name) for name in names or "*"):
            continue
        if _runs(int(match["pid"], 16), int(match["start"], 16)):
            continue
        original = folder / match["name"]
        if match["kind"] == "old" and not original.exists():
            path.rename(original)
        else:
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as that can be done."""
    with suppress(OSError):  # such as of a folder that may not be looked into
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _runs(pid: int, start: int) -> bool:
    try:
        return pid > 0 and abs(int(psutil.Process(pid).create_time()) - start) <= _SECONDS
    except psutil.NoSuchProcess:
        return False
    except (psutil.AccessDenied, OSError):
        return True  # of someone else, and it cannot be told since when: it stays


@cache
def _started(pid: int) -> int:
    return int(psutil.Process(pid).create_time())
