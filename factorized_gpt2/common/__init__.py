"""What every room needs: the one-line error, files written whole or not at all, locks, fingerprints, progress.

Read `errors` first, then `files` and `leftovers`, which decide what may be written and removed.
"""

from .lazy import exporting

__all__ = ["UserError", "blaming", "read_json", "replacing_folder", "write_json"]
__getattr__ = exporting(
    __name__, {"errors": ["UserError", "blaming"], "files": ["read_json", "replacing_folder", "write_json"]}
)
