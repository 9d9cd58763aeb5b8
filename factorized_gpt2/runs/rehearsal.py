"""What a training will be made of by its settings, made once and thrown away before anything is written."""

import math
import os
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from ..common.errors import REFUSED_SETTINGS, UserError, blaming
from .settings import YES, RunArguments


def rehearse(training: RunArguments, model: PreTrainedModel) -> None:
    """See that libraries can use the settings that they alone understand.

    Args:
        training: The settings.
        model: To be trained; it is not changed.

    Raises:
        UserError: They cannot; the message names the settings.
    """
    with blaming("report_to cannot be used", *REFUSED_SETTINGS):
        for callback in get_reporting_integration_callbacks(training.report_to):
            callback()
    if not training.do_train:
        return
    _check_sharding(training, model)
    if training.torch_compile:
        with blaming("torch_compile_backend and torch_compile_mode cannot be used", *REFUSED_SETTINGS):
            TorchDynamoPlugin(backend=training.torch_compile_backend)
            nn.Identity().compile(backend=training.torch_compile_backend, mode=training.torch_compile_mode)
    if training.gradient_checkpointing:
        with blaming("gradient_checkpointing_kwargs cannot be used", *REFUSED_SETTINGS):
            chosen: Any = training.gradient_checkpointing_kwargs or {}
            checkpoint(nn.Identity(), torch.zeros(1), **{"use_reentrant": False} | chosen)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer: torch.optim.Optimizer = torch.optim.SGD([parameter], lr=training.learning_rate)
    with blaming("optim and optim_args cannot be used", *REFUSED_SETTINGS):
        kind, options = Trainer.get_optimizer_cls_and_kwargs(training, model)
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and "params" not in options:
            optimizer = kind([parameter], **options)
    with blaming("lr_scheduler_type and lr_scheduler_kwargs cannot be used", *REFUSED_SETTINGS):
        _rehearse_schedule(training, optimizer)


def _check_sharding(training: RunArguments, model: PreTrainedModel) -> None:
    """See that the blocks that FSDP is to wrap, by the launcher's config or by the settings, are this model's."""
    is_launched = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in YES
    names = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "") if is_launched else ""
    config: Any = training.fsdp_config or {}  # which `TrainingArguments` have read, if it was text
    asked = config.get("transformer_layer_cls_to_wrap") or []
    asked = [asked] if isinstance(asked, str) else asked
    if not (isinstance(asked, list) and all(isinstance(name, str) for name in asked)):
        raise UserError(
            f"transformer_layer_cls_to_wrap is {asked!r}, which is not a name of a class or a list of names."
        )
    wrapped = [name.strip() for name in (*names.split(","), *asked)]
    own = {type(module).__name__ for module in model.modules()}
    for name in filter(None, wrapped):
        if name not in own:
            blocks = ", ".join(model._no_split_modules)
            raise UserError(
                f"transformer_layer_cls_to_wrap names {name}, but the layers of this model are {blocks}: name that "
                "class."
            )


def _rehearse_schedule(training: RunArguments, optimizer: torch.optim.Optimizer) -> None:
    steps = max(training.max_steps, 1)
    warmup_steps = training.get_warmup_steps(steps)
    options: Any = training.lr_scheduler_kwargs  # as above
    schedule = get_scheduler(training.lr_scheduler_type, optimizer, warmup_steps, steps, options)
    for step in (0, warmup_steps, (warmup_steps + steps) // 2, steps):
        if isinstance(schedule, LambdaLR) and not math.isfinite(factor := schedule.lr_lambdas[0](step)):
            raise ValueError(f"at step {step} the learning rate is multiplied by {factor}.")
