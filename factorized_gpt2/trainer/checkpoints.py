"""Checkpoints that are whole: written beside their place, sealed with a list of their files, checked before use."""

import logging
import shutil
import zlib
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, sort_checkpoints

from ..common.errors import UserError
from ..common.files import explaining_refusals, put_in_place, read_json, remove_folder, write_json
from ..common.leftovers import marked_for_all
from ..common.run_record import run_id
from ..models.adapter_folder import ADAPTER_CONFIG, complete_adapter
from ..models.foreign_models import positions_of
from ..text.tokenizer_files import make_portable

logger = logging.getLogger(__name__)

SEAL_NAME = "files.json"
STAGING_NAME = marked_for_all("checkpoint")  # all processes write into it


def seal(folder: Path, run: str | None = None) -> None:
    """Write down of every file in a checkpoint how long it is and its CRC-32, and the `run_id` that it is of."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / SEAL_NAME]
    listed = {path.relative_to(folder).as_posix(): [path.stat().st_size, _checksum(path)] for path in files}
    write_json(folder / SEAL_NAME, {"files": listed, **({} if run is None else {"run": run})})


def damage(folder: Path) -> str | None:
    """Compare a checkpoint with its list of files, and its run with that of the folder that it is in.

    Returns:
        What is wrong; `None` if it is whole, and of this run as far as is known.
    """
    if not (folder / SEAL_NAME).is_file():
        return f"it has no {SEAL_NAME}"
    try:
        sealed = read_json(folder / SEAL_NAME)
        here = run_id(folder.parent)
        if sealed.get("run", here) != here and here is not None:
            return "it is of another run"
        for name, (size, checksum) in sealed["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if _checksum(path) != checksum:
                return f"{name} is not what was written"
    except (OSError, UserError, LookupError, TypeError, ValueError) as error:
        return f"it cannot be read: {error}"
    return None


def not_sealed(folder: Path) -> list[str]:
    """List the files in a checkpoint that it was not sealed with, and so are of others; none where it has no seal."""
    try:
        sealed = {SEAL_NAME, *read_json(folder / SEAL_NAME)["files"]}
    except (UserError, LookupError, TypeError):
        return []
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in files if name not in sealed)


def refuse_others(folder: Path) -> None:
    """Refuse to remove a checkpoint in which there is more than was sealed.

    Raises:
        UserError: Naming a file.
    """
    if others := not_sealed(folder):
        raise UserError(f"{folder} holds {others[0]}, which was not written by the run: move it away.")


def last_whole_checkpoint(output_dir: Path) -> Path | None:
    """Find the last checkpoint of a run that is whole; set those after it aside, as `damaged-checkpoint-N`."""
    damaged = False
    while (found := get_last_checkpoint(output_dir)) is not None:
        checkpoint = Path(found)
        problem = damage(checkpoint)
        if problem is None:
            logger.info("Going on from %s", checkpoint)
            return checkpoint
        damaged = True
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        if aside.exists():
            refuse_others(aside)
            remove_folder(aside)
        checkpoint.rename(aside)
        logger.warning("%s is damaged (%s): it is set aside as %s.", checkpoint, problem, aside.name)
    if damaged:
        logger.warning("%s has no whole checkpoint: the run starts anew.", output_dir)
    return None


class CheckpointingTrainer(Trainer):
    """`Trainer` whose checkpoints are whole or not there, and which notices those that were damaged since."""

    model: PreTrainedModel  # or an adapter's, which passes on what it is asked for
    _staging: Path | None = None
    _kept: frozenset[Path] = frozenset()

    @property
    def kept_step(self) -> int:
        """The step whose weights the model has after training: of the best checkpoint if asked for, else the last."""
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        return self.state.global_step if best is None else int(best.rsplit("-", 1)[1])

    @property
    def has_best(self) -> bool:
        """Whether, after training, the model is the one with the best metric."""
        return self.args.load_best_model_at_end and self.kept_step == self.state.best_global_step

    def last_checkpoint(self) -> str | None:
        """Find what to go on from: the last checkpoint that is whole. All processes must call it."""
        found = [last_whole_checkpoint(Path(self.args.output_dir)) if self.is_world_process_zero() else None]
        broadcast_object_list(found)
        return None if found[0] is None else str(found[0])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as it is handed on: others read its tokenizer, and find the base of its adapter."""
        super().save_model(output_dir, _internal_call)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if (folder / TOKENIZER_CONFIG_FILE).exists():
            make_portable(folder, positions_of(self.model.config))
        if (folder / ADAPTER_CONFIG).exists():
            complete_adapter(folder, folder if self._staging is None else Path(self.args.output_dir, folder.name))

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save in a folder beside, seal it, move it to its place; then remove what is beyond `save_total_limit`."""
        output_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = output_dir / STAGING_NAME
        try:
            with explaining_refusals(output_dir / name):
                self._staging = staging
                super()._save_checkpoint(model, trial)
                if self.state.best_model_checkpoint == str(staging / name):
                    self.state.best_model_checkpoint = str(output_dir / name)
                self.accelerator.wait_for_everyone()  # each has written its own random state
                if self.args.should_save:
                    self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
                    seal(staging / name, run_id(output_dir))
                    put_in_place(staging / name, output_dir / name)
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        if self.args.should_save:
            self._remove_old_checkpoints(output_dir)
        self.accelerator.wait_for_everyone()

    def _remove_old_checkpoints(self, output_dir: Path) -> None:
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if not limit or limit < 0:
            return
        checkpoints = sort_checkpoints(str(output_dir), best_model_checkpoint=best)  # the best is last, or next to it
        kept = max(limit, 1 if best in (None, checkpoints[-1]) else 2)
        for checkpoint in map(Path, checkpoints[:-kept]):
            others = not_sealed(checkpoint)
            if not others:
                remove_folder(checkpoint)
            elif checkpoint not in self._kept:
                self._kept |= {checkpoint}
                logger.warning("%s stays: it holds %s, which was not written by the run.", checkpoint, others[0])

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """Take up the state of a checkpoint, with the best one so far where the run's folder is now."""
        counts = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None:
            path = Path(resume_from_checkpoint, TRAINER_STATE_NAME)
            named = TrainerState.load_from_json(str(path)).best_model_checkpoint
            if named is not None:
                self._take_up_best(Path(self.args.output_dir) / Path(named).name)
        return counts

    def _take_up_best(self, best: Path) -> None:
        problem = damage(best)
        self.state.best_model_checkpoint = str(best) if problem is None else None
        if problem is not None:
            self.state.best_metric = self.state.best_global_step = None
            if self.args.load_best_model_at_end:
                logger.warning("%s, the best so far, is damaged (%s): the best from here on counts.", best, problem)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Take no step beyond the last one, as `Trainer` does where that is what it goes on from."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        problem = damage(Path(best))
        if problem is None:
            super()._load_best_model()
        else:
            self.state.best_model_checkpoint = None
            logger.warning("%s, the best, is damaged (%s): the run ends with its last weights.", best, problem)


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
