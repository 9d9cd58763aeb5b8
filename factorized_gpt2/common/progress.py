"""How long work shows itself: as a bar on a terminal, as a few quiet lines in a log."""

import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

import huggingface_hub.utils
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

SECONDS_BETWEEN_LINES = 60


class Progress(tqdm):
    """A bar on a terminal that is gone when the work is done. Elsewhere a line a minute, none before the first."""

    def __init__(self, *args: Any, **kwargs: Any):
        if not sys.stderr.isatty():
            kwargs |= dict.fromkeys(("mininterval", "maxinterval", "delay"), SECONDS_BETWEEN_LINES)
            kwargs["bar_format"] = "{desc}: {n_fmt} of {total_fmt}, {remaining} left"
        super().__init__(*args, leave=False, **kwargs)

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        """Return what shows a state: in place of the one before on a terminal, else below it."""
        if file.isatty():
            return tqdm.status_printer(file)

        def print_line(line: str) -> None:
            if line:
                print(line, file=file, flush=True)

        return print_line


def hide_bars_of_libraries() -> None:
    """Keep the bars of transformers, datasets and huggingface_hub out of what is no terminal."""
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
        if "datasets" in sys.modules:
            sys.modules["datasets"].disable_progress_bars()
        else:  # which takes long to import, and is not always needed
            os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        huggingface_hub.utils.disable_progress_bars()
