"""Runs: from settings to a folder with a model and its results, and grids of them.

Read `fields`, `flags`, `settings`, `start`, `run`; then `folder` and `identity`, which decide whether a run goes on,
is finished or is another; `grid` lists the experiments.
"""

from ..common.lazy import exporting

__all__ = ["Results", "Run", "run_experiment"]
__getattr__ = exporting(__name__, {"settings": ["Run"], "run": ["run_experiment"], "results": ["Results"]})
