"""A budget of seconds that several parts share, and a folder that holds what they found, whatever becomes of them."""

import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from side_by_side import markdown_table, measure_in_turns

from factorized_gpt2.common.errors import first_line

TABLES, REPORT, FAILURES = "gpu.json", "gpu.md", "failures.txt"

T = TypeVar("T")


class BenchRun:
    """What is measured within a budget; every table is printed and on disk as soon as it is there.

    Args:
        folder: For `gpu.md`, with everything that was printed, `gpu.json`, with the same as data, and, if something
            fails, `failures.txt`, with the tracebacks. Made if need be.
        seconds: The budget, from now on.
        origin: Where the figures come from.
        clock: Seconds.
    """

    def __init__(self, folder: Path, seconds: float, origin: str, clock: Callable[[], float] = time.monotonic):
        self._folder, self._clock = folder, clock
        self._end = self._deadline = clock() + seconds
        self._began = clock()
        self._found: dict[str, Any] = {"origin": origin, "tables": {}, "wanted": [], "left_out": [], "failed": []}
        folder.mkdir(parents=True, exist_ok=True)
        for name in (TABLES, REPORT, FAILURES):
            (folder / name).unlink(missing_ok=True)
        self.say(origin)

    @property
    def left(self) -> float:
        """Seconds until the part at work has to end."""
        return self._deadline - self._clock()

    def has_time(self, needed: float = 0.0) -> bool:
        """Tell whether the part at work has more than `needed` seconds left."""
        return self.left > needed

    @contextmanager
    def part(self, title: str, share: float) -> Iterator[None]:
        """Give a part its share of what is left of the budget; note its error, should it end with one.

        Args:
            title: What it measures.
            share: Between 0 and 1.
        """
        began = self._clock()
        self._deadline = began + share * max(0.0, self._end - began)
        self.say(f"\n## {title}\n\n{began - self._began:.0f} s gone; {self.left:.0f} s for this part.")
        try:
            yield
        except Exception as error:
            self._note_failure(title, error)
        self._deadline = self._end
        release_memory()

    def attempt(self, what: str, function: Callable[[], T]) -> T | None:
        """Call a function; return what it does or, if it fails, note the error and return `None`."""
        try:
            return function()
        except Exception as error:
            self._note_failure(what, error)
        release_memory()  # which the error's frames held
        return None

    def in_turns(self, what: str, functions: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
        """Measure as `measure_in_turns` does, without what fails or has no time; say which that is.

        Args:
            what: They all are.
            functions: By name.
            rounds: How often.
        """
        failed = set()

        def attempt(name: str, function: Callable[[], float]) -> float | None:
            figure = self.attempt(f"{what}, {name}", function)
            if figure is None:
                failed.add(name)
            return figure

        measured = measure_in_turns(functions, rounds, attempt, self.has_time)
        for name in functions:
            if name not in measured and name not in failed:
                self.leave_out(f"{what}, {name}")
        return measured

    def leave_out(self, what: str) -> None:
        """Say, once, what is not measured."""
        if what not in self._found["left_out"]:
            self._found["left_out"].append(what)
            self.say(f"\nLeft out: {what}.")

    def table(self, title: str, rows: list[dict[str, Any]]) -> None:
        """Print rows of equal keys as a table, and keep them."""
        if rows:
            self._found["tables"][title] = rows
            self.say(f"\n{title}:\n\n{markdown_table(rows)}")

    def wanted(self, what: str, bound: str, figure: float) -> None:
        """Set a figure beside what was wanted.

        Args:
            what: Whose figure.
            bound: Such as ">= 1.9".
            figure: As measured.
        """
        relation, limit = bound.split()
        is_met = figure >= float(limit) if relation == ">=" else figure <= float(limit)
        row = {"what": what, "wanted": bound, "measured": f"{figure:.4g}", "": "met" if is_met else "missed"}
        self._found["wanted"].append(row)
        self.say(f"\n{what}: {figure:.4g}, wanted {bound}: {row['']}.")

    def keep(self, name: str, content: Any) -> None:
        """Write JSON of a part's own into the folder."""
        (self._folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")

    def say(self, text: str) -> None:
        """Print text, and keep it."""
        print(text, flush=True)
        with (self._folder / REPORT).open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        self.keep(TABLES, self._found)

    def end(self) -> None:
        """Say what was met, left out and failed."""
        self.say(f"\n## Summary\n\n{self._clock() - self._began:.0f} s gone.")
        if self._found["wanted"]:
            self.say("\n" + markdown_table(self._found["wanted"]))
        for word, name in (("Left out", "left_out"), ("Failed", "failed")):
            self.say(f"\n{word}: {'; '.join(self._found[name]) or 'nothing'}.")

    def _note_failure(self, what: str, error: Exception) -> None:
        line = f"{what}: {type(error).__name__}: {first_line(error)}"
        self._found["failed"].append(line)
        with (self._folder / FAILURES).open("a", encoding="utf-8") as file:
            file.write(f"== {line}\n{''.join(traceback.format_exception(error))}\n")
        self.say(f"\nFailed: {line}")


def release_memory() -> None:
    """Give back what nothing holds any more, so that peaks are those of what comes next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
