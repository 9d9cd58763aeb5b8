"""Results to a table and pictures. Read `reporting`, then `studies`, `tables` and `plots`.

`reporting` writes a report; `studies` puts runs beside their baselines, which `lineage` finds, and seeds together;
`tables` lays them out; `plots` and `curves` draw them, in the styles of `drawing`.
"""

from ..common.lazy import exporting

__all__ = ["write_report"]
__getattr__ = exporting(__name__, {"reporting": ["write_report"]})
