"""`report.py`: make a table and plots of the results of runs."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from ..report.reporting import read_results, write_report
from ..report.tables import legend, results_rows, results_table
from ..settings.outputs import JsonArguments
from ..settings.parsing import ManualParser
from ..settings.setting_values import OUTPUT_FOLDER, READ
from .shell import run_command, write_result


@dataclass
class ReportArguments:
    """Where the results are, and where the report goes."""

    results: Annotated[str, READ] = field(
        default="model_weights", metadata={"help": "Folder that holds the run folders, each with a results.json."}
    )
    output_dir: Annotated[str, OUTPUT_FOLDER] | None = field(
        default=None,
        metadata={"help": "Folder to write the report into. Default: report/ in the folder of the results."},
    )


def report(argv: list[str]) -> None:
    """Read the results, print the table, write the report."""
    arguments, output = ManualParser(
        (ReportArguments, JsonArguments),
        prog="report.py",
        description="Make a table and plots of finished runs, from the results.json of each.",
        examples=("report.py --results model_weights",),
    ).parse(argv)
    root = Path(arguments.results)
    results = read_results(root)
    print(f"{results_table(results)}\n\n{legend(results)}")
    write_result(output.json, "report", results_rows(results))
    print(f"\nReport: {write_report(results, Path(arguments.output_dir or root / 'report'))}")


def main() -> None:
    """Entry point of the console command and of `report.py`."""
    sys.exit(run_command(report))
