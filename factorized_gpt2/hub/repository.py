"""Publish what `compress.py` and `train_hf.py` leave behind, as repositories of the Hub.

A repository loads with transformers alone: the code of the network goes along, and `config.json` names it. All of it
arrives in one commit, or nothing does.

A command that publishes must not let the Trainer see `push_to_hub`, or it makes a repository of its own and pushes
checkpoints to it. `check_access` finds a mistyped name or a login that is missing before any work.
"""

import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, RepoUrl, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from transformers import GPT2Tokenizer, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.tokenization_utils_base import (
    ADDED_TOKENS_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
)
from transformers.utils import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE, CONFIG_NAME, GENERATION_CONFIG_NAME

from ..common.errors import UserError
from ..common.files import read_json
from ..models.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..models.loading import CODE_KEYS, load_complete
from ..models.record import RECORD_NAME
from ..models.sizes import model_size, stored_bytes
from ..network.classification_factorized_gpt2 import FactorizedGPT2ForSequenceClassification
from ..network.configuration_factorized_causal_lm import FactorizedCausalLMConfig
from ..network.configuration_factorized_gpt2 import FactorizedGPT2Config
from ..network.modeling_factorized_causal_lm import FactorizedCausalLM
from ..network.modeling_factorized_gpt2 import FactorizedGPT2, FactorizedGPT2Model
from ..runs.results import RESULTS_NAME
from ..text.tokenizer_files import portable_config
from .model_card import History, Measurement, adapter_card, model_card

AUTO_CLASSES: dict[str, dict[str, type]] = {  # by model_type
    FactorizedGPT2Config.model_type: {
        "AutoConfig": FactorizedGPT2Config,
        "AutoModel": FactorizedGPT2Model,
        "AutoModelForCausalLM": FactorizedGPT2,
        "AutoModelForSequenceClassification": FactorizedGPT2ForSequenceClassification,
    },
    FactorizedCausalLMConfig.model_type: {
        "AutoConfig": FactorizedCausalLMConfig,
        "AutoModelForCausalLM": FactorizedCausalLM,
    },
}

_TOKENIZER_FILES = (
    *(TOKENIZER_CONFIG_FILE, FULL_TOKENIZER_FILE, SPECIAL_TOKENS_MAP_FILE, ADDED_TOKENS_FILE, CHAT_TEMPLATE_FILE),
    *GPT2Tokenizer.vocab_files_names.values(),
)
_WEIGHTS = "model*.safetensors"
_OF_THIS_MACHINE = ("words", "is_local", "local_files_only", "_name_or_path")  # keys of JSON files


def publish(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    measured: Measurement | None = None,
) -> str:
    """Publish a model folder: weights, configuration, code, tokenizer, records, plots and a model card.

    What is there already and has not changed is not sent again, so that publishing once more after a failure, or for
    good measure, costs little and leaves no second commit.

    Args:
        folder: What `compress.py` made for a rank, or the output folder of a run.
        repo_id: USER/NAME; made if there is no such repository. Without USER/ it is the token's owner's.
        private: Whether others cannot see it. `None`: as the account has it for new repositories.
        token: Of the Hub. `None`: `HF_TOKEN`, or the stored login.
        revision: A branch instead of `main`; made if need be.
        license: As the Hub names it, such as "mit". `None`: that of the model it was made from, if the Hub knows it.
        base_model: Hub id of the model that it was made from. `None`: what the records name, if that is on the Hub.
        measured: Its loss, for the card, where no `results.json` in the folder holds it.

    Returns:
        The address of the repository.

    Raises:
        UserError: The folder holds no complete model of this package; there is no token, or it may not do this; a
            public repository is there where a private one was asked for; the Hub cannot be reached or refuses.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(f"{folder} is no model folder: it has no {CONFIG_NAME}.")
    model, history = load_complete(str(folder)), History.read(folder)
    if not isinstance(model, FactorizedGPT2 | FactorizedCausalLM):
        raise UserError(f"{folder} holds a {model.config.model_type!r} model; this publishes the package's own only.")
    size = model_size(model)
    with _hub(f"{folder} was not published to {repo_id}", token, repo_id, base_model) as api:
        url = _make_repository(api, repo_id, private, revision)
        base_model, base_license = _base(api, base_model, history.base)
        plots = _plots(folder)
        card = model_card(
            url.repo_id,
            model.config,
            (size.parameters, stored_bytes(folder) if model.config.is_coded else size.bytes),
            history,
            measured,
            base_model,
            license or base_license,
            [path.name for path in plots],
            revision,
        )
        with TemporaryDirectory() as temporary:
            stored = _as_transformers_loads_it(folder, model, Path(temporary))
            code = code_files(model.config.model_type)
            files = _model_files(folder, stored, model) | {path.name: path for path in [*code, *plots]}
            return _commit(api, url, files, card, revision)


def publish_adapter(
    folder: Path,
    repo_id: str,
    base_model: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    license: str | None = None,
) -> str:
    """Publish a LoRA adapter alone, on top of a compressed model that is on the Hub.

    Args:
        folder: The `adapter/` folder of a run.
        repo_id: As in `publish`.
        base_model: Hub id of the compressed model that it adapts, published before.
        private: As in `publish`.
        token: As in `publish`.
        revision: As in `publish`.
        license: As the Hub names it. `None`: the base's.

    Returns:
        The address of the repository.

    Raises:
        UserError: As `publish`; the folder holds no adapter, or the base is not on the Hub.
    """
    folder = Path(folder)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no adapter folder: it has no {name}.")
    lora, history = read_json(folder / ADAPTER_CONFIG), History.read(folder.parent)
    with _hub(f"{folder} was not published to {repo_id}", token, repo_id, base_model) as api:
        found, base_license = _base(api, None, base_model)
        if found is None:
            raise UserError(f"{base_model} is not on the Hub; publish the model that {folder} adapts first.")
        url = _make_repository(api, repo_id, private, revision)
        merged = folder.parent / CONFIG_NAME
        decoder = read_json(merged).get("base_config") if merged.is_file() else None
        kind = decoder and decoder.get("model_type")
        card = adapter_card(url.repo_id, found, lora, history, license or base_license, revision, kind)
        config = _as_json(lora | {"base_model_name_or_path": found})
        return _commit(api, url, {ADAPTER_CONFIG: config, ADAPTER_WEIGHTS: folder / ADAPTER_WEIGHTS}, card, revision)


def code_files(model_type: str) -> list[Path]:
    """List the files that define a network: what transformers will fetch for the classes of `auto_map`."""
    starts = {Path(inspect.getfile(made)) for made in AUTO_CLASSES[model_type].values()}
    return sorted(starts.union(*(map(Path, get_relative_import_files(start)) for start in starts)))


def _as_transformers_loads_it(folder: Path, model: PreTrainedModel, temporary: Path) -> Path:
    """Return the folder; where transformers alone would not load the model from there, another that has it saved."""
    if model.name_or_path and list(folder.glob(_WEIGHTS)):
        return folder
    model.save_pretrained(temporary)
    return temporary


def _model_files(folder: Path, stored: Path, model: PreTrainedModel) -> dict[str, Path | bytes]:
    """Collect weights, configuration, tokenizer and records by their names in the repository.

    Args:
        folder: Of the model.
        stored: Where its weights and configuration are taken from.
        model: It.
    """
    classes = AUTO_CLASSES[model.config.model_type].items()
    auto_map = {auto: f"{Path(inspect.getfile(made)).stem}.{made.__name__}" for auto, made in classes}
    files: dict[str, Path | bytes] = {path.name: path for path in sorted(stored.glob(f"{_WEIGHTS}*"))}
    files[CONFIG_NAME] = _as_json(_without_code(read_json(stored / CONFIG_NAME)) | {"auto_map": auto_map})
    for name in (GENERATION_CONFIG_NAME, *_TOKENIZER_FILES):
        if (folder / name).is_file():
            files[name] = folder / name
    files |= {f"{CHAT_TEMPLATE_DIR}/{path.name}": path for path in (folder / CHAT_TEMPLATE_DIR).glob("*.jinja")}
    if TOKENIZER_CONFIG_FILE in files:
        files[TOKENIZER_CONFIG_FILE] = _as_json(
            portable_config(_without_code(read_json(folder / TOKENIZER_CONFIG_FILE)))
        )
    for name in (RECORD_NAME, RESULTS_NAME):
        if (folder / name).is_file():
            files[name] = _as_json(_without_paths(read_json(folder / name)))
    return files


def _plots(folder: Path) -> list[Path]:
    """List the pictures that `compress.py` leaves beside a model's folder, and those in it."""
    label = re.fullmatch(r"gpt_(\w+?)(_nofinetune)?(_k\d+|_b[\d.]+(_k\d+)?)", folder.name)
    beside = [folder.parent / f"{kind}_{label[1]}.png" for kind in ("loss_against_bytes", "spectrum")] if label else []
    return [*sorted(folder.glob("*.png")), *(path for path in beside if path.is_file())]


def _without_code(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in CODE_KEYS}


def _as_json(content: dict[str, Any]) -> bytes:
    def kept(found: dict[str, Any]) -> dict[str, Any]:
        return {
            name: kept(value) if isinstance(value, dict) else value
            for name, value in found.items()
            if name not in _OF_THIS_MACHINE
        }

    return (json.dumps(kept(content), indent=2, sort_keys=True) + "\n").encode()


def _without_paths(value: Any) -> Any:
    """Keep no more of absolute paths than their last part."""
    if isinstance(value, dict):
        return {name: _without_paths(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"(?<![^\s,=])/[^,]*", lambda path: Path(path[0]).name, value)  # several are joined by commas


def _make_repository(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> RepoUrl:
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    # The Hub does not look at `private` where the repository exists.
    if private and not api.model_info(url.repo_id).private:
        raise UserError(f"{url.repo_id} exists and is public; make it private on the Hub, or choose another name.")
    if revision:
        api.create_branch(url.repo_id, branch=revision, exist_ok=True)
    return url


def _base(api: HfApi, named: str | None, recorded: str | None) -> tuple[str | None, str | None]:
    """Find the model that something was made from on the Hub: its id and licence, `None` for what is not known."""
    if named is None and (recorded is None or Path(recorded).exists()):
        return None, None
    try:
        info = api.model_info(named or recorded)
    except HFValidationError:  # a folder that is gone
        return None, None
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403, 404):
            raise
        return named, None
    return info.id, info.card_data.get("license") if info.card_data else None


def _commit(api: HfApi, url: RepoUrl, files: dict[str, Path | bytes], card: ModelCard, revision: str | None) -> str:
    files = files | {"README.md": str(card).encode()}
    operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
    api.create_commit(url.repo_id, operations, commit_message=f"Publish {url.repo_name}", revision=revision)
    return f"{url}/tree/{revision}" if revision else str(url)


def check_access(token: str | None, *repo_ids: str | None) -> str:
    """Check what can be checked without the Hub, and so before long work: names, and that there is a token.

    Args:
        token: As in `publish`.
        *repo_ids: Names of repositories; `None` passes.

    Returns:
        The token.

    Raises:
        UserError: A name that none can have; no token.
    """
    for repo_id in repo_ids:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise UserError(f"{repo_id!r} is no name for the Hub, such as USER/NAME: {error}") from error
    token = token or get_token()
    if token is None:
        raise UserError("There is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN.")
    return token


@contextmanager
def _hub(task: str, token: str | None, *repo_ids: str | None) -> Iterator[HfApi]:
    """Check names and token, yield a client, and tell in one line what went wrong with it, but never the token."""
    try:
        token = check_access(token, *repo_ids)
        yield HfApi(token=token)
    except UserError:
        raise
    except Exception as error:  # of huggingface_hub, its HTTP client and its uploader, each with their own kinds
        reason = " ".join(_reason(error).split()).rstrip(".")
        reason = reason.replace(token, "***") if token else reason
        # Not `from error`: what a server sends back may hold the token, and a traceback would show it.
        raise UserError(f"{task}: {reason}. Nothing local was lost: mend that, run the same command again.") from None


def _reason(error: BaseException) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    cause = error  # a failed upload is wrapped
    while cause.__cause__ is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    if not isinstance(cause, HfHubHTTPError):
        return f"{type(error).__name__}: {error}"
    status, said = cause.response.status_code, cause.server_message or cause.response.reason_phrase
    return f"the Hub answers {status}, {said}" + _WAYS_OUT.get(status, "")


_WAYS_OUT = {
    401: "; the token is not valid: log in with `hf auth login`, or set HF_TOKEN",
    403: "; the token may not write there: give it that right, or choose a name of your own",
}
