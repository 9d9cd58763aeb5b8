"""The output folder of a run: which run it belongs to, whether that is finished, and saving the model in it."""

import logging
import re
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from ..common.errors import UserError
from ..common.files import filling_folder, read_json, remove_folder, write_json
from ..common.fingerprints import weights_fingerprint
from ..common.run_record import SETTINGS_NAME, run_id
from ..common.weight_files import weight_files
from ..models.foreign_models import positions_of
from ..models.record import RECORD_NAME, compressed_folder
from ..models.verification import verify_saved
from ..text.tokenizer_files import save_tokenizer
from ..trainer.checkpoints import refuse_others
from .identity import Differences, differences, identity
from .results import RESULTS_NAME, Results
from .settings import Run, RunArguments

logger = logging.getLogger(__name__)

ADAPTER_NAME = "adapter"
BASE_NAME = "base_model"
_CHECKPOINT = re.compile(r"(damaged-)?checkpoint-\d+")


def check_folder(run: Run) -> Results | None:
    """Check that a run may use its output folder.

    Returns:
        The results, if this run has finished there before.

    Raises:
        UserError: The folder contains something other than a run, a run with other settings or another starting model,
            or weights that its results do not belong to, and `overwrite` is not set.
    """
    output_dir = Path(run.training.output_dir)
    settings_path = output_dir / SETTINGS_NAME
    if not settings_path.exists():
        _refuse_foreign(run)
        return None
    if run.training.overwrite:
        if run.training.should_save:
            _remove_results(output_dir)
        return None
    found = _differences_of(run)
    if run.training.process_index == 0:
        _log_differences(found, output_dir)
    results = Results.read(output_dir)
    if results is not None and results.fingerprint not in (None, weights_fingerprint(str(output_dir))):
        raise UserError(
            f"{output_dir} is finished, but its weights were changed or removed since: choose another --output_dir, "
            "or run it again with --overwrite."
        )
    return results


def _differences_of(run: Run, with_dataset: bool = False) -> Differences:
    output_dir = Path(run.training.output_dir)
    found = differences(read_json(output_dir / SETTINGS_NAME), run, with_dataset)
    if found.material:
        raise UserError(
            f"{output_dir} holds a run with other settings ({', '.join(found.material[:5])}); choose another "
            "--output_dir, or replace it with --overwrite."
        )
    return found


def _log_differences(found: Differences, output_dir: Path) -> None:
    if found.harmless:
        names = ", ".join(found.harmless[:5]) + (" and more" if len(found.harmless) > 5 else "")
        logger.info("%s was started with another %s, which does not change the result.", output_dir, names)
    if found.unknown:
        names = ", ".join(found.unknown)
        logger.warning(
            "%s has no record of the content of %s: make sure that nothing was edited since.", output_dir, names
        )


def _refuse_foreign(run: Run) -> None:
    output_dir = Path(run.training.output_dir)
    start = compressed_folder(output_dir.parent, run.model.n_embd_wte) if run.model.baseline else run.model.compressed
    if start is not None and Path(start) == output_dir and not run.training.do_train:
        return  # a compressed model, recorded where it is
    names = sorted(path.name for path in output_dir.glob("[!.]*"))
    if names:
        raise UserError(
            f"{output_dir} holds {names[0]} and is not the folder of a run: choose another --output_dir, or empty "
            f"this one."
        )


def _remove_results(output_dir: Path) -> None:
    """Remove results, configs and checkpoints of a run, so that it is neither finished nor loadable nor resumed.

    `write_identity` then replaces the record of whose folder it is.

    Raises:
        UserError: A checkpoint contains a file that no run wrote.
    """
    checkpoints = [path for path in output_dir.iterdir() if path.is_dir() and _CHECKPOINT.fullmatch(path.name)]
    for path in checkpoints:
        refuse_others(path)
    (output_dir / RESULTS_NAME).unlink(missing_ok=True)
    if not (output_dir / RECORD_NAME).exists():
        (output_dir / CONFIG_NAME).unlink(missing_ok=True)
    (output_dir / ADAPTER_NAME / ADAPTER_CONFIG).unlink(missing_ok=True)
    for path in checkpoints:
        remove_folder(path)


def least_bytes(model: torch.nn.Module, training: RunArguments) -> int:
    """Return a lower bound of the bytes that a run writes: the model, the kept checkpoints and the next one.

    Args:
        model: The model to train, with its adapters.
        training: Its settings of saving and of the optimizer.
    """
    whole = sum(parameter.nbytes for parameter in model.parameters())
    if not training.do_train or training.save_strategy == "no":
        return whole
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    moments = 2 if training.optim in ("adamw_torch", "adamw_torch_fused") else 0
    return whole + trained * (1 + moments)


def write_identity(run: Run) -> None:
    """Record in the output folder which run it belongs to, before anything else is written there.

    Raises:
        UserError: It belongs to another run. This can show only now, because the dataset is known only now.
    """
    output_dir, same = Path(run.training.output_dir), None
    if (output_dir / SETTINGS_NAME).exists() and not run.training.overwrite:
        _differences_of(run, with_dataset=True)
        same = run_id(output_dir)  # even if a setting has changed that does not change the result
    write_json(output_dir / SETTINGS_NAME, identity(run) | ({} if same is None else {"id": same}))


def save_model(
    output_dir: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probe: torch.Tensor,
    expected: torch.Tensor,
) -> int:
    """Save the plain model with its tokenizer, after checking that the saved model equals the trained one.

    Every file is written under a temporary name first and then moved to its place.

    Args:
        output_dir: The run's folder.
        model: The model, in float32 or as it was loaded.
        tokenizer: The tokenizer to save with it.
        probe: (B, T) int64 token ids to compare the models on.
        expected: (B, T, V) float32, the logits of the trained model at these tokens.

    Returns:
        Bytes of the weight files.

    Raises:
        UserError: The trained model's logits are NaN or infinite.
        RuntimeError: The reloaded model's logits differ.
    """
    with filling_folder(output_dir, last=CONFIG_NAME) as temporary:  # without its config, no model is loaded
        model.save_pretrained(temporary)
        save_tokenizer(tokenizer, temporary, positions_of(model.config))
        difference = verify_saved(Path(temporary), probe, expected, model.device, name=output_dir)
    logger.info("Saved and reloaded %s: logits differ by at most %.1e", output_dir, difference)
    return sum(path.stat().st_size for path in weight_files(output_dir))
