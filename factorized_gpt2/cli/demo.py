"""`make demo`: the whole path on text that every Python carries, in minutes, without network or GPU."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from ..settings.parsing import ManualParser
from ..settings.setting_values import COUNT, OUTPUT_FOLDER
from .shell import run_command


@dataclass
class DemoArguments:
    """Where the demo works."""

    output_dir: Annotated[str, OUTPUT_FOLDER] = field(
        default="demo_output", metadata={"help": "Folder for corpus, models, table and plot."}
    )
    max_steps: Annotated[int, COUNT] | None = field(
        default=None, metadata={"help": "Steps of every run, for a shorter demo."}
    )


def demo(argv: list[str]) -> None:
    """Corpus, baseline, compression, scratch models, LoRA; then the table, the plot and a sentence."""
    arguments = ManualParser(
        DemoArguments,
        prog="factorized-gpt2-demo",
        description="Run the whole path on a small GPT-2, offline, on a CPU.",
    ).parse(argv)[0]
    # What follows takes seconds to import.
    from .demonstration import demonstrate

    demonstrate(Path(arguments.output_dir), arguments.max_steps)


def main() -> None:
    """Entry point of the console command that `make demo` calls."""
    sys.exit(run_command(demo))
