"""Being told to stop, by Ctrl-C or SIGTERM: at once, or while a model trains as soon as its state is saved."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

REPEAT_SECONDS = 2.0  # a signal that comes again within them is the same one, passed on by a launcher as well
CONSULT_SECONDS = 1.0  # about how often several processes ask each other whether one of them was told to stop

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def leave(number: int) -> NoReturn:
    """Unwind the program, so that what is half done is cleared away: exit code 130 for SIGINT, 143 for SIGTERM."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


@contextmanager
def leaving_cleanly() -> Iterator[None]:
    """Let SIGTERM, which would end the process where it stands, unwind the program as Ctrl-C does."""
    with _handling([signal.SIGTERM], lambda number, frame: leave(number)):
        yield


class PostponedStop:
    """While it is entered, the first signal is only taken down; another, later one leaves at once.

    Attributes:
        received: The signal's number; `None` while there is none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._handlers = _handling(_SIGNALS, self._take_down)

    def __enter__(self) -> "PostponedStop":
        self._handlers.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._handlers.__exit__(None, None, None)
        if self.received is not None and raised[0] is None:
            leave(self.received)

    def _take_down(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = number, now
            if os.environ.get("LOCAL_RANK", "0") == "0":
                # Not by way of a stream, which the signal may have interrupted.
                os.write(2, b"\nSaving after this step, then leaving; once more leaves at once.\n")
        elif now - self._since > REPEAT_SECONDS:
            leave(number)


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
                *(name, state.global_step, " without overwrite_output_dir" if args.overwrite_output_dir else ""),
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
        known = [float(self._stop.received == number) for number in _SIGNALS] + [now - self._consulted]
        sums = self._accelerator.reduce(torch.tensor(known, device=self._accelerator.device), "sum").tolist()
        self._asked = next((number for number, count in zip(_SIGNALS, sums[:-1], strict=True) if count), None)
        # From sums, which are the same everywhere, all get the same step to meet at next.
        seconds_a_step = sums[-1] / self._accelerator.num_processes / self._interval
        self._interval = max(1, min(2 * self._interval, int(CONSULT_SECONDS / max(seconds_a_step, 1e-6))))
        self._next_step, self._consulted = step + self._interval, now


@contextmanager
def _handling(numbers: Sequence[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle signals, as far as a thread can and those that are ignored stay so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    handled = [number for number in numbers if before[number] not in (signal.SIG_IGN, None)]
    for number in handled:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])
