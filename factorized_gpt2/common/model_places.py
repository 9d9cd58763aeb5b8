"""Where a model or tokenizer is: in a folder, or on the Hub."""

import os
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError
from transformers.utils import CONFIG_NAME

from .errors import UserError, first_line

_MODEL_ROOT = "model_weights"  # where this package keeps models unless told otherwise
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")  # of a repository without a model


def refuse_missing(name_or_path: str) -> None:
    """Refuse at once a folder that is not there, rather than ask the Hub for it, or ask it again and again.

    A name can only mean a folder if it is a path, or stands in a folder that exists or is where models are kept by
    default. What was fetched from the Hub before may have any name. For others the Hub is asked once, without waiting
    and trying again, as loading would.

    Raises:
        UserError: Naming the folder that is missing, and what keeps the Hub from being asked; or a file in its place.
    """
    if os.path.exists(name_or_path):
        if not os.path.isdir(name_or_path):
            raise UserError(
                f"{name_or_path} is a file, not the folder of a model or tokenizer: name the folder that it is in, or "
                "make one of a checkpoint with import_checkpoint.py."
            )
        return
    path = Path(name_or_path)
    is_path = path.is_absolute() or name_or_path.startswith((".", "~")) or len(path.parts) > 2
    is_in_folder = len(path.parts) == 2 and (path.parts[0] == _MODEL_ROOT or os.path.isdir(path.parent))
    try:
        was_fetched = not is_path and any(
            try_to_load_from_cache(name_or_path, file) for file in (CONFIG_NAME, *_TOKENIZER_FILES)
        )
    except HFValidationError:  # no name of a repository, as loading will say
        return
    if was_fetched:
        return
    if is_path or is_in_folder:
        raise UserError(
            f"The folder {name_or_path} does not exist: train or compress that model first, or name another."
        )
    _ask_the_hub(name_or_path)


def _ask_the_hub(repo_id: str) -> None:
    if constants.is_offline_mode():
        raise UserError(
            f"There is no folder {repo_id}, and no copy of a model of that name from the Hub, which is not asked "
            "because HF_HUB_OFFLINE is set."
        )
    try:
        get_hf_file_metadata(hf_hub_url(repo_id, CONFIG_NAME), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (RepositoryNotFoundError, EntryNotFoundError, GatedRepoError, HFValidationError):
        return  # an answer, which loading gets too, and tells
    except Exception as error:  # of the Hub, the HTTP client, the operating system, the encryption
        raise UserError(
            f"There is no folder {repo_id}, and the Hub cannot be asked for a model of that name: {first_line(error)}"
        ) from error
