"""One at a time in a folder: a lock of the operating system's, which dies with the process that holds it."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import UserError
from .leftovers import sweep

logger = logging.getLogger(__name__)


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)  # of some network drives
_COMPRESSED = ("gpt_*", "spectrum_*", "loss_against_bytes_*")  # what is written beside other things of the user's


@contextmanager
def run_alone(output_dir: Path) -> Iterator[bool]:
    """Hold the folder of a run; yield whether no other process can hold it, so that it may be swept once judged.

    Raises:
        UserError: Another process holds it, or it cannot be written.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{output_dir} is a file: choose another folder.")
    folder = output_dir.absolute()
    # The whole folder may be replaced, so the lock is beside it, unless what is above it is someone else's.
    is_inside = not folder.name or (folder.parent.is_dir() and not os.access(folder.parent, os.W_OK))
    lock = folder / ".lock" if is_inside else folder.with_name(f".{folder.name}.lock")
    refusal = f"Another process is using {output_dir}: wait until it ends, or choose another --output_dir."
    with _held(lock, refusal) as is_alone:
        yield is_alone


@contextmanager
def compress_alone(root: Path, wait: bool = False, names: tuple[str, ...] = _COMPRESSED) -> Iterator[None]:
    """Hold the folder that models are written into, and clear away what was left half-written there.

    Args:
        root: Holds the models' folders and `pca_factorized/`, and may hold anything else.
        wait: Whether to wait for a process that holds it.
        names: Patterns of what is written into `root` itself; leftovers of other names stay.

    Raises:
        UserError: Another process holds it, unless `wait`; or it cannot be written.
    """
    refusal = (
        f"Another process is writing compressed models into {root}: wait until it ends, or choose another folder."
    )
    with _held(root.absolute() / ".compress.lock", refusal, wait) as is_alone:
        if is_alone:
            sweep(root, *names)
            sweep(root / "pca_factorized", "wte_pca_*", "scale_mats_pca_*")
        yield


@contextmanager
def _held(path: Path, refusal: str, wait: bool = False) -> Iterator[bool]:
    is_new = not path.parent.exists()
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_alone = _acquired(lock, refusal, wait)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written: {error.strerror}.") from error
    try:
        yield is_alone
    finally:
        # While it is held: who opened it before finds that it is gone, and looks again.
        path.unlink(missing_ok=True)
        lock.release()
        if is_new:
            with suppress(OSError):  # not empty, as it should be
                path.parent.rmdir()


def _acquired(lock: FileLock, refusal: str, wait: bool) -> bool:
    folder = Path(lock.lock_file).parent
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise UserError(refusal) from None
            logger.info("Waiting until another process has finished writing into %s", folder)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        number = getattr(error, "errno", errno.ENOSYS)
        if number not in _NO_LOCKS:
            raise
        reason = os.strerror(number)
        logger.warning("%s does not support locks (%s): make sure that no other process writes there.", folder, reason)
        return False
    return True
