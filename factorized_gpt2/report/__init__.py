"""Results to a table and pictures. Read `reporting`, then `plots`."""

from ..common.lazy import exporting

__all__ = ["write_report"]
__getattr__ = exporting(__name__, {"reporting": ["write_report"]})
