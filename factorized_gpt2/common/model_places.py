"""Where a model or tokenizer is: in a folder, or on the Hub."""

import os
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers.utils import CONFIG_NAME

from .errors import UserError

_MODEL_ROOT = "model_weights"  # where this package keeps models unless told otherwise


def refuse_missing_folder(name_or_path: str) -> None:
    """Refuse a name that can only mean a folder which is not there, instead of asking the Hub for it.

    That is a path, or a name in a folder that exists or is where models are kept by default. What was fetched from the
    Hub before may have such a name.

    Raises:
        UserError: Naming the folder that is missing.
    """
    if os.path.exists(name_or_path):
        return
    path = Path(name_or_path)
    is_path = path.is_absolute() or name_or_path.startswith((".", "~")) or len(path.parts) > 2
    is_in_folder = len(path.parts) == 2 and (path.parts[0] == _MODEL_ROOT or os.path.isdir(path.parent))
    if is_path or (is_in_folder and not _was_fetched(name_or_path)):
        raise UserError(f"The folder {name_or_path} does not exist: make that model first, or name another.")


def _was_fetched(repo_id: str) -> bool:
    try:
        return try_to_load_from_cache(repo_id, CONFIG_NAME) is not None
    except HFValidationError:
        return False
