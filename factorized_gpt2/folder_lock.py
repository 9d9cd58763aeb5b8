"""One at a time in a folder: a lock of the operating system's, which dies with the process that holds it."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import UserError
from .files import sweep

logger = logging.getLogger(__name__)


@contextmanager
def run_alone(output_dir: Path) -> Iterator[None]:
    """Hold the folder of a run, and clear away what a killed run left half-written there.

    Raises:
        UserError: Another process holds it, or it cannot be written.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{output_dir} is a file: choose another folder.")
    folder = output_dir.absolute()
    # The whole folder may be replaced, so the lock is beside it, unless what is above it is someone else's.
    is_inside = folder.parent.is_dir() and not os.access(folder.parent, os.W_OK)
    lock = folder / ".lock" if is_inside else folder.with_name(f".{folder.name}.lock")
    with _held(lock, f"Another process is at work in {output_dir}: wait for its end, or choose another --output_dir."):
        sweep(output_dir)
        yield


@contextmanager
def compress_alone(root: Path, wait: bool = False) -> Iterator[None]:
    """Hold the folder that compressed models are written into, and clear away what was left half-written there.

    Args:
        root: Holds the models' folders and `pca_factorized/`.
        wait: Whether to wait for a process that holds it.

    Raises:
        UserError: Another process holds it, unless `wait`; or it cannot be written.
    """
    refusal = f"Another process writes compressed models into {root}: wait for its end, or choose another folder."
    with _held(root.absolute() / ".compress.lock", refusal, wait):
        sweep(root)
        sweep(root / "pca_factorized")
        yield


@contextmanager
def _held(path: Path, refusal: str, wait: bool = False) -> Iterator[None]:
    is_new = not path.parent.exists()
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise UserError(refusal) from None
            logger.info("Waiting for another process that writes into %s", path.parent)
            lock.acquire()
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written: {error.strerror}.") from error
    try:
        yield
    finally:
        # While it is held: who opened it before finds that it is gone, and looks again.
        path.unlink(missing_ok=True)
        lock.release()
        if is_new:
            with suppress(OSError):  # not empty, as it should be
                path.parent.rmdir()
