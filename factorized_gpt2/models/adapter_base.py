"""The base of an adapter, found also where the adapter and its base were moved together.

PEFT keeps the name of an adapter's base as it was given. A whole path is found from every folder, but not after a
move; so the way from the adapter to its base is kept beside it. PEFT reads adapters through one public method, which
here takes that way where the whole path leads nowhere any more.
"""

import os
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers.utils import CONFIG_NAME

from ..common.files import read_json, write_json

WAY_NAME = "base_model.json"
_BASE, _WAY = "base_model_name_or_path", "from_here"  # the first is PEFT's name


def whole_path(name_or_path: str) -> str:
    """Name a model so that it is found from every folder: a local one by its whole path, others by their Hub id."""
    return str(Path(name_or_path).absolute()) if Path(name_or_path).exists() else name_or_path


def way_to_base(base: str, folder: Path) -> str | None:
    """Say how one comes from an adapter's folder to its base.

    Args:
        base: As `whole_path` names it.
        folder: Where the adapter will be; need not exist yet.

    Returns:
        A path relative to the folder, with slashes; `None` for a model on the Hub or on another drive.
    """
    if not os.path.isdir(base):
        return None
    try:
        return Path(os.path.relpath(os.path.realpath(base), os.path.realpath(folder))).as_posix()
    except ValueError:  # of Windows, from one drive to another
        return None


def write_way(temporary: Path, base: str, way: str) -> None:
    """Keep the way beside an adapter that is written into the folder `temporary`."""
    write_json(temporary / WAY_NAME, {_BASE: base, _WAY: way})


def moved_base(folder: Path, base: str) -> str | None:
    """Find the base of an adapter that was moved along with it.

    Args:
        folder: Of the adapter.
        base: What the adapter names.

    Returns:
        The whole path of the base; `None` where the named one is still there, where the adapter names another than
        when the way was written, and where the way leads to no model.

    Raises:
        UserError: The file that keeps the way cannot be read.
    """
    if os.path.exists(base) or not (folder / WAY_NAME).is_file():
        return None
    kept = read_json(folder / WAY_NAME)
    if kept.get(_BASE) != base or not isinstance(kept.get(_WAY), str):
        return None
    found = os.path.normpath(os.path.join(os.path.realpath(folder), kept[_WAY]))
    return found if os.path.isfile(os.path.join(found, CONFIG_NAME)) else None


def find_moved_bases(module: ModuleType) -> None:
    """Have PEFT take the way to a moved base. Of other adapters, what PEFT reads stays as it is.

    Args:
        module: `peft.config`.
    """
    read = module.PeftConfigMixin.from_json_file.__func__
    if read.__module__ == __name__:
        return

    def from_json_file(cls: type, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Load a configuration from a JSON file, with its base where that is now."""
        config = read(cls, path_json_file, **kwargs)
        base = config.get(_BASE)
        found = moved_base(Path(path_json_file).parent, base) if isinstance(base, str) else None
        return config if found is None else config | {_BASE: found}

    module.PeftConfigMixin.from_json_file = classmethod(from_json_file)
