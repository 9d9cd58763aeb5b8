"""How far a Trainer is: a bar, or what it logs as lines."""

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..common.progress import Progress

logger = logging.getLogger(__name__)


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
        said = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
        ]
        logger.info("step %d of %d: %s", state.global_step, state.max_steps, ", ".join(said))
