"""How long work shows itself: as a bar on a terminal, as a few quiet lines in a log."""

import logging
import sys
from collections.abc import Callable
from typing import Any, TextIO

import huggingface_hub.utils
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import is_datasets_available
from transformers.utils import logging as transformers_logging

logger = logging.getLogger(__name__)

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


class StepProgress(TrainerCallback):
    """The steps of a Trainer as `Progress`, and nothing else."""

    def __init__(self, desc: str):
        self.desc = desc

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        self.bar = Progress(total=state.max_steps, desc=self.desc, disable=not state.is_world_process_zero)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move it."""
        self.bar.update()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close it."""
        self.bar.close()


class LogLines(TrainerCallback):
    """What a Trainer logs, a line each: `step 200 of 800: loss 5.312, learning_rate 0.0009`."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a line."""
        if not state.is_world_process_zero:
            return
        figures = {name: value for name, value in (logs or {}).items() if name not in ("epoch", "total_flos")}
        figures = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
        ]
        logger.info("step %d of %d: %s", state.global_step, state.max_steps, ", ".join(figures))


def hide_bars_of_libraries() -> None:
    """Keep the bars of transformers, datasets and huggingface_hub out of what is no terminal."""
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
        if is_datasets_available():
            import datasets

            datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
