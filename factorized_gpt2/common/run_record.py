"""The file in a run's folder that says which run it is: the checkpoints in the folder belong to that run."""

from pathlib import Path

from .files import read_json

SETTINGS_NAME = "run.json"


def run_id(output_dir: Path) -> str | None:
    """Read which run a folder was first written down for; `None` where no run was, or by an earlier version.

    Raises:
        UserError: The record cannot be read.
    """
    path = output_dir / SETTINGS_NAME
    found = read_json(path).get("id") if path.is_file() else None
    return found if isinstance(found, str) else None
