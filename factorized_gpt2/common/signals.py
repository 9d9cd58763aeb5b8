"""Being told to stop, by Ctrl-C or SIGTERM: at once, or once what is at work has been saved."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

REPEAT_SECONDS = 2.0  # a signal that comes again within them is the same one, passed on by a launcher as well
STOPPING = (signal.SIGINT, signal.SIGTERM)


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
        self._handlers = _handling(STOPPING, self._take_down)

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
