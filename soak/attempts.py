"""One bad input after the other: given to a command in this process, and how that must end."""

import faulthandler
import hashlib
import io
import os
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import torch
from material import COMMANDS

from factorized_gpt2.cli.shell import run_command

SECONDS = 60  # for one command on one tiny input


@dataclass(frozen=True)
class Case:
    """A command and what is bad about its inputs.

    Attributes:
        kind: What was changed.
        command: A name in `COMMANDS`.
        words: Further words for it.
        files: New contents of files; `None` removes one.
    """

    kind: str
    command: str
    words: tuple[str, ...] = ()
    files: dict[str, bytes | None] = field(default_factory=dict)

    def __repr__(self) -> str:
        files = {name: content if content is None else content[:3000] for name, content in self.files.items()}
        return f"{self.kind}: {self.command} {self.words} {files}"[:6000]


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: Its exit code; `None` when it did not return.
        error: What it wrote to stderr.
        failure: Why it did not return: a traceback, or where it hung.
    """

    code: int | None
    error: str
    failure: str = ""


class _Hung(BaseException):
    pass


def attempt(command: Callable[[list[str]], None], words: list[str], seconds: int = SECONDS) -> Outcome:
    """Run a command in this process, and stop it when it takes too long."""

    def stop(*_) -> None:
        raise _Hung

    environment, error, code, failure = dict(os.environ), io.StringIO(), None, ""
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(3 * seconds, exit=True)  # where no signal gets through
    try:
        with redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")), redirect_stderr(error):
            code = run_command(command, words)
    except (Exception, _Hung, SystemExit):
        failure = traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
        os.environ.clear()
        os.environ.update(environment)  # where TrainingArguments leave traces
        torch.use_deterministic_algorithms(False)
    return Outcome(code, error.getvalue(), failure)


def complaints(outcome: Outcome, before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Say what is wrong with how a command ended, its files before and after given; an empty list when nothing is."""
    if outcome.failure:
        return [outcome.failure]
    wrong = [] if outcome.code in (0, 2) else [f"exit code {outcome.code}"]
    lines = outcome.error.strip().splitlines()
    if outcome.code == 2:
        if len(lines) != 1 or not lines[0].startswith("error: ") or not lines[0].isprintable():
            wrong.append(f"not one line: {lines}")
        has_begun = lines[0].startswith("error: Training went wrong") if lines else False
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        wrong += [f"{name} was left behind" for name in sorted(changed) if not has_begun]
    wrong += [f"{name} is temporary" for name in sorted(after.keys() - before.keys()) if "/." in f"/{name}"]
    return wrong


def contents(folder: Path) -> dict[str, str]:
    """List everything in a folder, files with a digest of what they hold."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


@contextmanager
def prepared(material: Path, case: Case) -> Iterator[Path]:
    """Work in a copy of the material that is as bad as the case says."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="bad_input") as root:
        folder = shutil.copytree(material, Path(root) / "outer/inner")  # for paths that lead upwards
        for name, content in case.files.items():
            if content is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(content)
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(home)


def judge(material: Path, case: Case) -> tuple[Outcome, list[str]]:
    """Run a case; return how it ended, and what is wrong with that."""
    command, words = COMMANDS[case.command]
    with prepared(material, case) as folder:
        before = contents(folder)
        outcome = attempt(command, [*words, *case.words])
        return outcome, complaints(outcome, before, contents(folder))
