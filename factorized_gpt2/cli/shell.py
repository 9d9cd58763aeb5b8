"""What every command shares: logging, and errors that read as one line."""

import io
import logging
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..common.errors import UserError, one_line, own_message
from ..common.files import refusal, without_nan, write_json
from ..common.progress import hide_bars_of_libraries
from ..common.signals import leaving_cleanly
from ..runs.provenance import versions
from ..settings.flags import take_debug

# Packages that not every installation has, and the extra of this package that brings them.
_EXTRAS = {
    **dict.fromkeys(("datasets", "scipy", "sklearn"), "compress"),
    **dict.fromkeys(("accelerate", "peft"), "train"),
    "wandb": "train",
    "matplotlib": "report",
}
MESSAGE_LENGTH = 1000  # characters of an error that quotes what was given


def run_command(command: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Run a command and turn its outcome into an exit code.

    Args:
        command: Takes the command-line arguments, without the program's name.
        argv: These arguments; by default those of the process.

    Returns:
        0 when it ends well; 2 after a `UserError`, or when the system refuses to read or write, as on a full disk; 130
        after Ctrl-C. The error's message goes to stderr as one line, of launched processes from the first alone; with
        `--debug` from each, after the traceback. Other errors are defects, and pass as they are.

    Raises:
        SystemExit: With 143, after SIGTERM.
    """
    debug, rest = take_debug(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    hide_bars_of_libraries()
    is_main = os.environ.get("LOCAL_RANK", "0") == "0"
    logging.getLogger("factorized_gpt2").setLevel(logging.INFO if is_main else logging.ERROR)
    try:
        with leaving_cleanly():
            command(rest)
    except UserError as error:
        if debug:
            traceback.print_exception(error)
        if is_main or debug:
            _tell(own_message(error))
        return 2
    except ModuleNotFoundError as error:
        package = _missing_package(error)
        if package is None or debug:
            raise
        _tell(
            f"This needs the package {package}, which is not installed: "
            f"pip install 'factorized-gpt2[{_EXTRAS[package]}]'."
        )
        return 2
    except OSError as error:
        reason = refusal(error)
        if reason is None or debug:
            raise
        where = f"{error.filename}"[-MESSAGE_LENGTH // 2 :] + ": " if error.filename else ""
        _tell(f"{where}{reason}. Fix that, then give the same command again.")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _missing_package(error: BaseException | None) -> str | None:
    """Find the package of an extra whose absence is behind an error; transformers raises it anew without a name."""
    while error is not None:
        name = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and name in _EXTRAS:
            return name
        error = error.__cause__
    return None


def keep_stdout_for_results() -> None:
    """Import what tells on stdout, on being imported, that W&B is offline."""
    if os.environ.get("WANDB_MODE") == "offline":
        with redirect_stdout(io.StringIO()):
            import transformers.integrations.integration_utils  # noqa: F401


def _tell(message: str) -> None:
    print(f"error: {one_line(message)[:MESSAGE_LENGTH]}", file=sys.stderr)


def write_result(path: str | None, command: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write a command's table for programs to read, if a file is named.

    Args:
        path: Of the file; `None` for none.
        command: Which it is, as in "compress".
        rows: Numbers as numbers, unrounded; those that are not finite become null.
        **more: What belongs to the whole table.
    """
    if path is not None:
        content = {"command": command, **more, "rows": rows, "versions": versions()}
        write_json(Path(path), without_nan(content))


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows of equal keys, the last column being a name and the others figures that are formatted already."""
    alignment = ("right",) * (len(rows[0]) - 1) + ("left",)
    print(tabulate(rows, headers="keys", disable_numparse=True, colalign=alignment))
