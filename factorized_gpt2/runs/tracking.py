"""Weights & Biases: online when there is an account, on disk when there is none, never a prompt."""

import logging
import os
from pathlib import Path
from typing import Any

from ..common.errors import UserError, first_line
from .settings import RunArguments

logger = logging.getLogger(__name__)

_UNFINISHED = "wandb-resume.json"  # W&B's own name for where it keeps the id of a run that is not closed


def start_tracking(training: RunArguments) -> None:
    """Open the W&B run that the Trainer's callback then reports to.

    A project and a mode set in the environment (`WANDB_PROJECT`, `WANDB_MODE`) count; otherwise the settings do, and
    the mode `auto` is online when a login is stored. What cannot be reached is recorded under the output folder, to
    be sent later by `wandb sync`.
    A run that was cut off goes on under its W&B id, which that folder keeps until the run is closed.

    Raises:
        UserError: W&B does not take the project's or the run's name.
    """
    if not _is_tracked(training):
        return
    import wandb

    mode = os.environ.get("WANDB_MODE") or training.wandb_mode
    if mode == "auto":
        mode = "online" if _has_login() else "offline"
    project = os.environ.get("WANDB_PROJECT") or training.project
    wandb.setup(wandb.Settings(quiet=True, show_info=False))  # its warnings and errors stay; where it is, we say
    init: dict[str, Any] = {"project": project, "name": training.run_name, "dir": _made(training.output_dir)}
    # W&B would record the remote's address, in which some people keep a token; `results.json` has the commit.
    init |= {"resume": "auto", "settings": wandb.Settings(quiet=True, show_info=False, disable_git=True)}
    if training.overwrite:
        (Path(training.output_dir) / "wandb" / _UNFINISHED).unlink(missing_ok=True)
    run = _opened(mode, init)
    if run.offline:
        logger.info("W&B logs offline, to %s", Path(run.dir).parent)
    elif run.url:
        logger.info("W&B: %s", run.url)


def finish_tracking(training: RunArguments, summary: dict[str, Any]) -> None:
    """Add a run's outcome to its W&B summary and close it, where there is one."""
    if not _is_tracked(training):
        return
    import wandb

    if wandb.run is not None:
        wandb.run.summary.update(summary)
        wandb.finish()


def _is_tracked(training: RunArguments) -> bool:
    return "wandb" in training.report_to and training.process_index == 0


def _opened(mode: str, init: dict[str, Any]) -> Any:
    import wandb

    try:
        return wandb.init(**init | {"mode": mode})
    except (wandb.errors.Error, ValueError) as error:
        if mode == "offline":
            raise UserError(f"W&B does not accept this project or run_name: {first_line(error)}") from error
        logger.warning("W&B cannot be reached (%s); the run is logged offline.", first_line(error))
        return _opened("offline", init)


def _has_login() -> bool:
    import wandb

    try:
        return bool(wandb.login(prompt=False))
    except (wandb.errors.Error, ValueError):
        return False


def _made(folder: str) -> str:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return folder
