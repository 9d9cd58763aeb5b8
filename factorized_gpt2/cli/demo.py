"""`make demo`: train, compress and heal a small GPT-2 in minutes, without network or GPU."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from ..settings.parsing import ManualParser
from ..settings.setting_values import COUNT, OUTPUT_FOLDER
from .shell import run_command


@dataclass
class DemoArguments:
    """Where the demo writes, and how long it trains."""

    output_dir: Annotated[str, OUTPUT_FOLDER] = field(
        default="demo_output", metadata={"help": "Folder for everything the demo makes: text, models, table and plot."}
    )
    max_steps: Annotated[int, COUNT] | None = field(
        default=None,
        metadata={
            "help": "Train every model for only this many steps, for a shorter demo. Default: as its config says."
        },
    )


def demo(argv: list[str]) -> None:
    """Train a baseline, compress and heal it, train models from scratch; show table, plot and sample sentences."""
    arguments = ManualParser(
        DemoArguments,
        prog="factorized-gpt2-demo",
        description="Train, compress, heal and compare a small GPT-2 on a CPU, without a network.\n"
        "The text is the documentation that comes with Python.",
    ).parse(argv)[0]
    # What follows takes seconds to import.
    from .demonstration import demonstrate

    demonstrate(Path(arguments.output_dir), arguments.max_steps)


def main() -> None:
    """Entry point of the console command that `make demo` calls."""
    sys.exit(run_command(demo))
