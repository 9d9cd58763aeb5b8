"""Refinement: the vocabulary's factors alone, trained for a few steps to match the baseline's predictions."""

import copy
import logging
import math
import tempfile

import torch
from transformers import PrinterCallback, TrainingArguments

from ..common.errors import UserError
from ..models.sizes import is_vocabulary
from ..network.modeling_factorized_gpt2 import FactorizedGPT2
from ..text.blocks import Blocks, collate_blocks
from ..trainer.adapters import set_dropout
from ..trainer.distillation import Distillation
from ..trainer.health import TrainingFailure
from ..trainer.progress import StepProgress
from ..trainer.trainer import FactorizedTrainer
from .calibration import spread_blocks

logger = logging.getLogger(__name__)

TOKENS_PER_STEP = 2048
LARGEST_LEARNING_RATE = 3e-3
_FAR = 0.25  # divergence of a start, in nats a token, from which on it learns at the largest rate


def refine(
    model: FactorizedGPT2,
    baseline: FactorizedGPT2,
    blocks: Blocks,
    steps: int,
    seed: int = 0,
    progress: bool = False,
    device: torch.device | str = "cpu",
) -> FactorizedGPT2:
    """Train `wte`, `scale_up`, `scale_down` (and an untied `lm_head`) on KL(baseline || model); the trunk is frozen.

    AdamW with a cosine schedule down to a twentieth of the learning rate, `TOKENS_PER_STEP` tokens a step, no dropout.
    Both models compute in float32: half precision alone moves a teacher by as much as a good start is away from it.
    The divergence is quadratic in the distance of the weights, so the learning rate goes with the root of the start's
    divergence, up to `LARGEST_LEARNING_RATE`: a good start takes small steps, and keeps what it has.

    Args:
        model: Factorized. It is not changed.
        baseline: The model that it was made of.
        blocks: Text to match on, rows of `input_ids`; used more than once if it is too short.
        steps: How many steps.
        seed: Of the order of the blocks.
        progress: Whether to show a bar.
        device: Where to train; as `check_device` allows.

    Returns:
        The refined model, in evaluation mode, in the dtype and on the device of `model`. One that ended further from
        the baseline than it began is warned of.

    Raises:
        UserError: NaN or infinity on the way; a device that cannot be trained on.
    """
    check_device(device)
    student = copy.deepcopy(model).to(device, torch.float32)
    for name, weight in student.named_parameters():
        weight.requires_grad_(is_vocabulary(name))
    set_dropout(student, 0.0)
    blocks = spread_blocks(blocks, steps * TOKENS_PER_STEP)
    distillation = Distillation(copy.deepcopy(baseline).to(device, torch.float32), weight=1.0)
    measured = spread_blocks(blocks, 2 * TOKENS_PER_STEP)
    divergence = _finite(_divergence(student, distillation, measured), "before its first step")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=torch.device(device).type == "cpu",
            max_steps=steps,
            per_device_train_batch_size=max(1, TOKENS_PER_STEP // len(blocks[0]["input_ids"])),
            learning_rate=LARGEST_LEARNING_RATE * min(1.0, divergence / _FAR) ** 0.5,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.05},
            warmup_steps=min(10, steps // 10),
            adam_beta2=0.95,
            optim="adamw_torch_fused",
            seed=seed,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        # One device: DataParallel would split the batch of the student, not of the teacher.
        arguments._n_gpu = min(1, arguments.n_gpu)
        trainer = FactorizedTrainer(
            distillation=distillation,
            model=student,
            args=arguments,
            train_dataset=blocks,
            data_collator=collate_blocks,
        )
        trainer.remove_callback(PrinterCallback)
        if progress:
            trainer.add_callback(StepProgress("Refining"))
        try:
            trainer.train()
        except TrainingFailure as failure:
            raise UserError(f"Refinement failed. {failure.problem} Compress without it.") from failure
    reached = _finite(_divergence(student, distillation, measured), "after its last step")
    if reached > divergence:
        logger.warning(
            "Refinement for %d steps led away from the baseline: from %.4f nats a token to %.4f, over %d tokens of "
            "its text. Give it more text, or other steps.",
            *(steps, divergence, reached, sum(len(row["input_ids"]) for row in iter(measured))),
        )
    refined = copy.deepcopy(model)
    refined.load_state_dict(student.state_dict())
    return refined.eval()


def check_device(device: torch.device | str) -> None:
    """Refuse a device that `Trainer` would not take: in one process it trains on the first GPU, whichever is named.

    Raises:
        UserError: Any GPU but the first.
    """
    index = torch.device(device).index
    if index:
        raise UserError(
            f"Refinement runs on the first GPU, not on {device}: set CUDA_VISIBLE_DEVICES={index} and device=cuda."
        )


@torch.no_grad()
def _divergence(student: FactorizedGPT2, distillation: Distillation, blocks: Blocks) -> float:
    """Measure KL(baseline || student), in nats a token."""
    student.eval()
    nats, tokens = 0.0, 0
    for row in iter(blocks):
        batch = {name: value.to(student.device) for name, value in collate_blocks([row]).items()}
        nats += student(batch["input_ids"], row_loss=distillation.row_loss(**batch), use_cache=False).loss.item()
        tokens += batch["labels"].numel() - 1
    return nats / tokens


def _finite(divergence: float, when: str) -> float:
    if not math.isfinite(divergence):
        raise UserError(f"Refinement failed: the divergence from the baseline is {divergence} {when}.")
    return divergence
