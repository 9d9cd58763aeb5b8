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


def machine(*libraries: str) -> str:
    """Describe where a table comes from: processor or GPU, threads, versions."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", *libraries))
    return f"{where}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {versions}"


def measure_in_turns(functions: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call every function once to warm up, then all of them in turn, `rounds` times; collect what they return."""
    for function in functions.values():
        function()
    measured = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            measured[name].append(function())
    return measured


def timed(function: Callable[[], object]) -> Callable[[], float]:
    """Make a function return how many seconds it takes."""

    def stopwatch() -> float:
        began = now()
        function()
        return now() - began

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


def print_table(rows: list[dict[str, object]]) -> None:
    """Print rows as a Markdown table."""
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True), flush=True)


class PeakMemory:
    """The most memory that this process, or its GPU, held while a `with` block ran, in bytes over that at its start.

    On a CPU resident memory is read every millisecond from a thread of its own.
    """

    def __enter__(self):
        """Start to watch."""
        self._on_gpu = torch.cuda.is_available()
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
