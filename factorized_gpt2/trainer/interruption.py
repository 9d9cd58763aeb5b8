"""A Trainer that is told to stop leaves as soon as its state is saved."""

import logging
import signal
import time

import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from ..common.signals import STOPPING, PostponedStop, leave

logger = logging.getLogger(__name__)

CONSULT_SECONDS = 1.0  # about how often several processes ask each other whether one of them was told to stop


class StopWhenSaved(TrainerCallback):
    """Has a Trainer that was told to stop finish its step, evaluate if that is due, save, and leave.

    Several processes save together, so they agree on the step: one that was told tells the others, when all sum up
    what they know. They do so about once a second, since on a GPU it waits for the device.

    Args:
        stop: What this process was told.
        accelerator: By which processes sum up.
    """

    def __init__(self, stop: PostponedStop, accelerator: Accelerator):
        self._stop, self._accelerator = stop, accelerator
        self._asked: int | None = None
        self._next_step, self._interval = 0, 1
        self._consulted = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Have a checkpoint saved if the run is to stop."""
        if self._accelerator.num_processes == 1 or state.global_step >= self._next_step:
            control.should_save |= self._is_asked(state.global_step)

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        """Have a checkpoint saved if the run was told to stop during an evaluation, which may have taken long."""
        control.should_save |= self._is_asked(state.global_step)

    def on_save(self, args, state, control, **kwargs) -> None:
        """Leave if the run is to stop."""
        if self._is_asked(state.global_step):
            name = signal.Signals(self._asked).name
            logger.warning(
                "Stopped by %s, with step %d saved: the same command%s goes on from there.",
                *(name, state.global_step, " without overwrite" if args.overwrite else ""),
            )
            leave(self._asked)

    def _is_asked(self, step: int) -> bool:
        if self._accelerator.num_processes == 1:
            self._asked = self._stop.received
        elif self._asked is None:
            self._consult(step)
        return self._asked is not None

    def _consult(self, step: int) -> None:
        now = time.monotonic()
        known = [float(self._stop.received == number) for number in STOPPING] + [now - self._consulted]
        sums = self._accelerator.reduce(torch.tensor(known, device=self._accelerator.device), "sum").tolist()
        self._asked = next((number for number, count in zip(STOPPING, sums[:-1], strict=True) if count), None)
        # From sums, which are the same everywhere, all get the same step to meet at next.
        seconds_a_step = sums[-1] / self._accelerator.num_processes / self._interval
        self._interval = max(1, min(2 * self._interval, int(CONSULT_SECONDS / max(seconds_a_step, 1e-6))))
        self._next_step, self._consulted = step + self._interval, now
