"""Timing of several things in turn, so that a drift of the machine's speed meets them all alike."""

import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from importlib.metadata import version

import psutil
import torch
from tabulate import tabulate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def machine(*libraries: str, device: str = DEVICE) -> str:
    """Describe where a table comes from: processor or GPU, threads, versions."""
    where = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", *libraries))
    return f"{where}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {versions}"


def call(name: str, function: Callable[[], float]) -> float | None:
    """Call a function, and let its errors pass."""
    return function()


def measure_in_turns(
    functions: dict[str, Callable[[], float]],
    rounds: int,
    attempt: Callable[[str, Callable[[], float]], float | None] = call,
    has_time: Callable[[], bool] = lambda: True,
) -> dict[str, list[float]]:
    """Call every function once to warm up, then all of them in turn, `rounds` times; collect what they return.

    Args:
        functions: By name.
        rounds: How often.
        attempt: Calls a function; `None` for one that failed, which is then left out.
        has_time: Asked before every function's first call and before every round but the first.

    Returns:
        What they returned, of all that did not fail, as often of each.
    """
    working = {}
    for name, function in functions.items():
        if has_time() and attempt(name, function) is not None:
            working[name] = function
    measured: dict[str, list[float]] = {name: [] for name in working}
    for turn in range(rounds):
        if turn and not has_time():
            break
        for name, function in list(working.items()):
            figure = attempt(name, function)
            if figure is None:
                del working[name], measured[name]
            else:
                measured[name].append(figure)
    return measured


def timed(function: Callable[[], object], calls: int = 1) -> Callable[[], float]:
    """Make a function return how many seconds it takes, on average over `calls` in a row."""

    def stopwatch() -> float:
        began = now()
        for _ in range(calls):
            function()
        return (now() - began) / calls

    return stopwatch


def now() -> float:
    """Read a clock in seconds, when the GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def ratios(numerator: list[float], denominator: list[float]) -> str:
    """Write the median of the ratios of pairs, and their range."""
    pairs = [above / below for above, below in zip(numerator, denominator, strict=True)]
    return f"{statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})"


def seconds_cell(seconds: list[float]) -> str:
    """Write a median in milliseconds."""
    return f"{1000 * statistics.median(seconds):.4g}"


def markdown_table(rows: list[dict[str, object]]) -> str:
    """Lay out rows as a Markdown table."""
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def print_table(rows: list[dict[str, object]]) -> None:
    """Print rows as a Markdown table."""
    print(markdown_table(rows), flush=True)


class PeakMemory:
    """The most memory that this process, or its GPU, held while a `with` block ran, in bytes over that at its start.

    On a CPU resident memory is read every millisecond from a thread of its own.

    Args:
        device: Whose memory: "cpu" or "cuda".
    """

    def __init__(self, device: str = DEVICE):
        self._on_gpu = device == "cuda"

    def __enter__(self):
        """Start to watch."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        self._process, self._done = psutil.Process(), threading.Event()
        self._before = self._highest = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self._highest = max(self._highest, self._process.memory_info().rss)

    def __exit__(self, *_):
        """Stop, and keep the result in `bytes`."""
        if self._on_gpu:
            self.bytes = torch.cuda.max_memory_allocated() - self._before
            return
        self._done.set()
        self._thread.join()
        self.bytes = max(self._highest, self._process.memory_info().rss) - self._before
