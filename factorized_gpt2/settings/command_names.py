"""The commands, by the names under which a checkout and an installed package have them."""

import sys
from pathlib import Path
from typing import NamedTuple


class Command(NamedTuple):
    """A command: what does it in a checkout, its name once installed, and what it is for."""

    script: str
    installed: str
    purpose: str


COMMANDS = (
    Command("compress.py", "factorized-gpt2-compress", "make a trained GPT-2 smaller, at one rank or several"),
    Command("train_hf.py", "factorized-gpt2-train", "train, heal with LoRA or evaluate one model"),
    Command("evaluate_models.py", "factorized-gpt2-evaluate", "measure models on one text"),
    Command("import_checkpoint.py", "factorized-gpt2-import", "make a model folder of a checkpoint of nanoGPT"),
    Command("run_experiments.py", "factorized-gpt2-experiments", "do a grid of runs, and report on them"),
    Command("report.py", "factorized-gpt2-report", "make a table and pictures of finished runs"),
    Command("make demo", "factorized-gpt2-demo", "go through all of it on a small GPT-2, offline, in minutes"),
)


def as_called(text: str) -> str:
    """Name the commands in a help text as this process was called: by script, or as installed."""
    if not Path(sys.argv[0]).name.startswith("factorized-gpt2-"):
        return text
    for command in COMMANDS:
        text = text.replace(f"python {command.script}", command.installed).replace(command.script, command.installed)
    return text


def listing() -> str:
    """Lay out the commands, a line each."""
    lines = [f"  {command.installed:29}{command.script:22}{command.purpose}" for command in COMMANDS]
    return "\n".join(["Commands, and what does the same in a checkout; each has --help:", "", *lines])
