"""What a stranger's files may hold, and how to see that none of it came to pass."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch

from factorized_gpt2.cli.shell import run_command

DEEP = "[" * 100_000 + "]" * 100_000
HUGE = "9" * 5_000  # more digits than Python makes a number of


class Touch:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def save_torch(path: Path, marker: Path) -> None:
    torch.save({"weight": Touch(marker)}, path)


def save_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": Touch(marker)}))


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def code_that_touches(marker: Path) -> str:
    return (
        f"import os\nos.mkdir({str(marker)!r})\nfrom transformers import *\nclass C(GPT2Config): model_type = 'own'\n"
    )


def outcome(command: Callable[[list[str]], None], words: list, capsys) -> tuple[int, str]:
    """Run a command; return its exit code and its last line, having seen that no traceback came with it."""
    capsys.readouterr()
    code = run_command(command, [str(word) for word in words])
    lines = capsys.readouterr().err.strip().splitlines() or [""]
    assert "Traceback" not in "".join(lines)
    if code == 2:
        assert lines[-1].startswith("error: ")
        assert lines[-1].isprintable()
    return code, lines[-1]


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def holding(folder: Path, text: str) -> list[Path]:
    """List the files that hold a text, byte for byte, in their content or in their name; git's own left out."""
    files = [path for path in tree(folder) if path.is_file() and ".git" not in path.parts]
    return [path for path in files if text.encode() in path.read_bytes() or text in path.name]
