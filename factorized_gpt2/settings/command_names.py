"""The commands, by the names under which a checkout and an installed package have them."""

import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple


class Command(NamedTuple):
    """A command: its script in a checkout, its name once installed, and its purpose."""

    script: str
    installed: str
    purpose: str


COMMANDS = (
    Command("compress.py", "factorized-gpt2-compress", "make a trained model smaller, to one size or several"),
    Command("train_hf.py", "factorized-gpt2-train", "train a model, or heal a compressed one"),
    Command("evaluate_models.py", "factorized-gpt2-evaluate", "measure loss and size of models on a text"),
    Command("import_checkpoint.py", "factorized-gpt2-import", "convert a nanoGPT checkpoint to a model folder"),
    Command("run_experiments.py", "factorized-gpt2-experiments", "run a list of experiments and report on them"),
    Command("report.py", "factorized-gpt2-report", "make a table and plots of finished runs"),
    Command("make demo", "factorized-gpt2-demo", "do all of this with a small GPT-2, offline, in minutes"),
)


_PACKAGE, _INSTALLED = "factorized_gpt2", "factorized-gpt2-"


def runs_a_command() -> bool:
    """Tell whether this process was started as one of the commands: installed, of the checkout, or by `python -m`."""
    script = Path(sys.argv[0] if sys.argv else "")
    if script.name == "-m":  # as it stands there while the package of the module is imported
        return any(
            word == "-m" and (module == _PACKAGE or module.startswith(f"{_PACKAGE}.cli."))
            for word, module in pairwise(sys.orig_argv)
        )
    checkout = Path(__file__).parents[2]
    is_own = script.name in {command.script for command in COMMANDS} and script.absolute().parent == checkout
    return is_own or script.name.startswith(_INSTALLED)


def as_called(text: str) -> str:
    """Name the commands in a help text as this process was called: by script, or as installed."""
    if not Path(sys.argv[0]).name.startswith(_INSTALLED):
        return text
    for command in COMMANDS:
        text = text.replace(f"python {command.script}", command.installed).replace(command.script, command.installed)
    return text


def listing() -> str:
    """Lay out the commands, a line each."""
    lines = [f"  {command.installed:29}{command.script:22}{command.purpose}" for command in COMMANDS]
    return "\n".join(["Commands, with the script that does the same in a checkout. Each has --help.", "", *lines])
