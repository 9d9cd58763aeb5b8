"""Commands in processes of their own, witnessed in what they do to files, and ended by a signal at some moment.

Processes are forked from a server that has imported everything, so that they are at work at once.
"""

import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import datasets

from factorized_gpt2.cli.compress import compress
from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.cli.train import train

COMMANDS: dict[str, Callable[[list[str]], None]] = {"train": train, "compress": compress}

DOOMED = "! "  # marks, among the changes, the one at which the signal came
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "open"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_DRAWN = re.compile(r"\b[0-9a-f]{8}\b|\d+\.tmp|tmp\w{8}")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])


@dataclass(frozen=True)
class Doom:
    """When a process ends, and by which signal.

    Attributes:
        signal: Its number.
        change: Regular expression of changes to files, as `Witness` words them. `None`: the moment is one in time.
        count: How many changes like that there are; the last of them no longer happens.
        seconds: After the start of the process, where there is no `change`.
    """

    signal: int
    change: str | None = None
    count: int = 1
    seconds: float = 0.0


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Its exit code; negative for the signal that killed it.
        log: What it said.
        changes: What it did to files, in order.
        seconds: How long it took.
    """

    code: int
    log: str
    changes: list[str]
    seconds: float


def run(command: str, words: list[str], folder: Path, doom: Doom | None = None) -> Ended:
    """Run a command to its end in a folder, where it caches texts too; what it says and does is taken down beside."""
    log, changes = _beside(folder)
    for path in (log, changes):
        path.unlink(missing_ok=True)
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        forkserver.ensure_running()  # once; it imports what it finds on that path alone
    process = _context.Process(target=_live, args=(command, words, folder, doom))
    process.start()  # returns once the server has forked it
    began = time.perf_counter()
    if doom is not None and doom.change is None:
        process.join(doom.seconds)
        if process.is_alive():
            os.kill(process.pid, doom.signal)
    process.join()
    said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    done = changes.read_text(encoding="utf-8").splitlines() if changes.exists() else []
    return Ended(process.exitcode, said, done, time.perf_counter() - began)


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f"{folder.name}.log"), folder.with_name(f"{folder.name}.changes")


def _live(command: str, words: list[str], folder: Path, doom: Doom | None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which whoever runs this in the background ignores
    os.chdir(folder)
    log = os.open(_beside(folder)[0], os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    sys.addaudithook(Witness(folder, doom))
    sys.exit(run_command(COMMANDS[command], words))


class Witness:
    """Audit hook that takes down, before they happen, changes to files in a folder, and sends the doom's signal.

    A change reads like `os.rename run/.results.json.########.partial.json run/results.json`.
    """

    def __init__(self, folder: Path, doom: Doom | None):
        self._folder, self._doom, self._left = f"{folder}/", doom, doom.count if doom else 0
        self._log = _beside(folder)[1].open("w", encoding="utf-8", buffering=1)  # as long as the process

    def __call__(self, event: str, args: tuple) -> None:
        if event not in _CHANGES or (event == "open" and not args[2] & _WRITING):
            return
        named = args[: 2 if event == "os.rename" else 1]
        paths = [os.path.abspath(path) for path in named if isinstance(path, str | os.PathLike)]
        if not paths or not all(path.startswith(self._folder) for path in paths):
            return
        change = _DRAWN.sub("########", " ".join([event, *(path.removeprefix(self._folder) for path in paths)]))
        if self._left and self._doom.change and re.search(self._doom.change, change):
            self._left -= 1
            if not self._left:
                self._log.write(f"{DOOMED}{change}\n")
                os.kill(os.getpid(), self._doom.signal)
                return
        self._log.write(f"{change}\n")
