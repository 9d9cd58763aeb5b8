"""The walk-through does what it says: every step is run, in order, and shows what stands below it."""

import re
import shlex
from pathlib import Path

import pytest

from factorized_gpt2.cli.compress import compress
from factorized_gpt2.cli.evaluate import evaluate
from factorized_gpt2.cli.train import train

PAGE = Path(__file__).resolve().parents[2] / "docs" / "walkthrough.md"
STEPS = re.findall(r"```(python|bash)\n(.*?)```\n\n```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = {"compress.py": compress, "evaluate_models.py": evaluate, "train_hf.py": train}
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


def run(kind: str, step: str, namespace: dict) -> None:
    if kind == "python":
        exec(compile(step, PAGE.name, "exec"), namespace)
    else:
        _, script, *words = shlex.split(step.replace("\\\n", ""))
        COMMANDS[script](words)


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


def wording(text: str) -> str:
    """Leave figures out, and with them how wide a table's columns are."""
    return re.sub(r"[-\s]+", " ", NUMBER.sub("#", text)).strip()


def test_every_step_shows_what_the_page_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    assert len(STEPS) >= 8
    for kind, step, expected in STEPS:
        capsys.readouterr()
        run(kind, step, namespace)
        shown = capsys.readouterr().out
        assert wording(shown) == wording(expected), step
        # Another Python has other documentation, another processor other roundings.
        assert numbers(shown) == pytest.approx(numbers(expected), rel=0.15, abs=0.2), step
