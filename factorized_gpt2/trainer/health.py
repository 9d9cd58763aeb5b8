"""Training that goes wrong says so: NaN and infinity stop it, a loss scale or a loss that goes astray is warned of."""

import logging
import math
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from ..common.errors import UserError

logger = logging.getLogger(__name__)

LOW_SCALE, DEAD_SCALE = 1.0, 2.0**-16  # loss scales; a GradScaler begins at 2**16
DIVERGED_LOGS = 5  # logged losses in a row, after which a run counts as diverging
DIVERGED_NATS = 1.0  # by which each of them exceeds the lowest so far

_SUSPECTS = ("the training loss", "the gradient norm", "a trained weight")


class TrainingFailure(UserError):
    """Training that cannot go on.

    Attributes:
        problem: What happened and at which step, without the way out.
    """

    def __init__(self, problem: str, way_out: str):
        super().__init__(f"{problem} {way_out}")
        self.problem = problem


class TrainingHealth(TrainerCallback):
    """Watches a `Trainer`.

    - NaN or infinity in the training loss, the gradient norm, the evaluation loss or, before they are evaluated or
      saved, the trained weights stops the run: a checkpoint that is there is a good one. On a CPU every step is looked
      at. On a GPU, where to look is to wait, those are that are logged, evaluated or saved: a loss that was NaN since
      the last of them still shows then, in the sum that is logged.
    - Under fp16 an infinite gradient is normal: the step is skipped and the loss scale halved. A scale below 1, when
      gradients overflow as they are, is warned of; one below `DEAD_SCALE`, when they are hardly numbers any more and
      step after step is skipped, stops the run.
    - A run diverges if `DIVERGED_LOGS` logged losses in a row each exceed ln V, that of guessing among all tokens
      alike, and by `DIVERGED_NATS` the lowest before; it is warned of and goes on. One high loss is no divergence,
      nor is a start above ln V.

    Args:
        output_dir: Where the run's checkpoints are.
        vocab_size: V.
    """

    def __init__(self, output_dir: str, vocab_size: int):
        self._output_dir, self._vocab_size = output_dir, vocab_size
        self._good_step = 0
        self._is_scale_low = False
        self._lowest, self._high_losses = math.inf, 0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Take up what a run that goes on had logged."""
        self._good_step = state.global_step
        self._lowest = min((row["loss"] for row in state.log_history if "loss" in row), default=math.inf)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Warn when logged losses stay far above what they were."""
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        self._lowest = min(self._lowest, loss)
        uniform = math.log(self._vocab_size)
        self._high_losses = self._high_losses + 1 if loss > max(uniform, self._lowest + DIVERGED_NATS) else 0
        if self._high_losses == DIVERGED_LOGS:
            logger.warning(
                "Step %d: the run diverges. The last %d logged losses all exceed %.2f, that of guessing among %d "
                "tokens alike, and the lowest was %.2f. Lower learning_rate or lengthen warmup_steps.",
                *(state.global_step, DIVERGED_LOGS, uniform, self._vocab_size, self._lowest),
            )

    def check_step(self, trainer: Trainer, losses: torch.Tensor, gradient_norm: torch.Tensor | float | None) -> None:
        """Look at a step before it is logged, evaluated or saved. All processes must call it; they stop together.

        Args:
            trainer: Whose step it was.
            losses: Scalar, the sum of this process's losses since the last logged one.
            gradient_norm: Of the step, before clipping.

        Raises:
            TrainingFailure: NaN or infinity, or a loss scale that collapsed.
        """
        control, step = trainer.control, trainer.state.global_step
        is_kept = control.should_evaluate or control.should_save
        if not (_is_free_to_look(trainer.args.device) or control.should_log or is_kept):
            return
        scaler = trainer.accelerator.scaler
        faults = torch.tensor(
            [
                not math.isfinite(losses),
                not (scaler or gradient_norm is None or math.isfinite(gradient_norm)),
                is_kept and not _is_finite(trainer.model),
            ],
            dtype=torch.int64,
            device=trainer.args.device,
        )
        counts = trainer.accelerator.reduce(faults).tolist()
        found = [suspect for suspect, count in zip(_SUSPECTS, counts, strict=True) if count]
        if found:
            first = self._good_step + 1
            when = f"at step {step}" if first >= step else f"between steps {first} and {step}"
            raise self._failure(f"{when}: {found[0]} is NaN or infinite")
        self._good_step = step
        if scaler:
            self._check_scale(scaler.get_scale(), step)

    def _check_scale(self, scale: float, step: int) -> None:
        if scale < DEAD_SCALE:
            raise self._failure(
                f"at step {step}: gradients overflow in float16 even at a loss scale of {scale:.1e}, and steps are "
                "skipped",
                "train in bfloat16 (--fp16 False --bf16 True), ",
            )
        if scale < LOW_SCALE and not self._is_scale_low:
            logger.warning("Step %d: gradients overflow in float16, and the loss scale has fallen to %g.", step, scale)
        self._is_scale_low = scale < LOW_SCALE

    def check_evaluation(self, loss: float, step: int) -> None:
        """Look at an evaluation's loss, in nats a token, after a number of steps.

        Raises:
            UserError: NaN or infinity.
        """
        if math.isfinite(loss):
            return
        if step == 0:
            raise UserError(f"The model that the run starts from has a validation loss of {loss}: make it anew.")
        raise self._failure(f"at step {step}: the validation loss is {loss}")

    def _failure(self, problem: str, more_ways: str = "") -> TrainingFailure:
        folder = self._output_dir
        last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
        kept = "There is no checkpoint." if last is None else f"The last good checkpoint is {last}."
        return TrainingFailure(
            f"Training went wrong {problem}.",
            f"{kept} The same command would come to the same end: {more_ways}lower learning_rate, lengthen "
            "warmup_steps or set a smaller max_grad_norm, and start anew with --overwrite.",
        )


def _is_free_to_look(device: torch.device) -> bool:
    return device.type == "cpu"


def _is_finite(model: nn.Module) -> bool:
    """Tell whether all trained weights, or this process's part of them, are finite; waits for the device once."""
    trained = [weight.detach() for weight in model.parameters() if weight.requires_grad]
    local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in trained]
    return bool(torch.stack([torch.isfinite(weight).all() for weight in local]).all())
