"""Settings of a run that contradict or lack each other. Nothing is imported here that computes."""

from typing import Any, Protocol

from ..common.errors import UserError
from ..settings.text_arguments import DataArguments
from .fields import ALL_LINEAR, AdapterArguments, DistillationArguments, ModelArguments


class TrainingSettings(Protocol):
    """What is looked at here of `RunArguments`, or of what stands in for them where these are not imported."""

    do_train: bool
    max_steps: int
    num_train_epochs: float
    label_smoothing_factor: float
    loss_backend: str
    effective_batch_size: int | None
    metric_for_best_model: str | None
    greater_is_better: bool | None
    save_strategy: Any  # a word, or an enumeration that equals it
    auto_find_batch_size: bool
    dataloader_num_workers: int


def check_together(
    model: ModelArguments,
    adapter: AdapterArguments,
    distillation: DistillationArguments,
    data: DataArguments,
    training: TrainingSettings,
) -> None:
    """Check the settings of a run against each other.

    Args:
        model, adapter, distillation, data: As they are.
        training: As they are.

    Raises:
        UserError: Naming a setting that contradicts or lacks another, or that these runs cannot honour.
    """
    is_from_scratch = not (model.baseline or model.compressed)
    shape = [name for name in ("n_layer", "n_head", "n_embd", "activation_function") if getattr(model, name)]
    if not is_from_scratch and shape:
        raise UserError(f"{shape[0]} contradicts baseline: the shape of the network is the baseline's.")
    if model.compressed and (model.baseline or model.n_embd_wte):
        other = "baseline" if model.baseline else "n_embd_wte"
        raise UserError(f"{other} contradicts compressed: the compressed model is what the run starts from.")
    if model.dequantize and not model.compressed:
        raise UserError("dequantize needs a compressed model: set compressed.")
    if is_from_scratch and data.tokenizer is None:
        raise UserError("Without a baseline, tokenizer must name one (a folder or Hub id).")
    if is_from_scratch and not training.do_train:
        raise UserError("Nothing to do: do_train is off and there is no baseline to evaluate.")
    if adapter.lora_rank and is_from_scratch:
        raise UserError("lora_rank must be 0, or positive together with a baseline to adapt.")
    if distillation.distillation_weight and is_from_scratch and not distillation.teacher:
        raise UserError("distillation_weight needs a teacher: name one, or a baseline.")
    if distillation.distillation_weight and training.label_smoothing_factor:
        raise UserError(
            "label_smoothing_factor has no effect together with distillation_weight: set one of them to 0."
        )
    if distillation.teacher and not distillation.distillation_weight:
        raise UserError("teacher has no effect while distillation_weight is 0.")
    head_is_trained = not adapter.lora_rank or {"wte", "lm_head", ALL_LINEAR} & set(adapter.lora_target_modules)
    if training.loss_backend == "attention" and training.do_train and head_is_trained:
        raise UserError(
            "loss_backend=attention needs a head that is not trained: LoRA whose lora_target_modules leave out wte "
            "and lm_head. loss_backend=auto uses it where it can."
        )
    if data.streaming and training.max_steps < 1:
        raise UserError("streaming needs max_steps, because the length of a stream is not known.")
    if training.do_train and training.max_steps < 1 and training.num_train_epochs <= 0:
        raise UserError("Nothing to train: set max_steps or num_train_epochs.")
    if not (data.dataset_name or data.validation_file):
        raise UserError("No validation text: set validation_file or dataset_name.")
    if training.do_train and not (data.dataset_name or data.train_file):
        raise UserError("No training text: set train_file or dataset_name.")


def check_resolved(training: TrainingSettings) -> None:
    """Refuse what `TrainingArguments` take and these runs cannot do, or would do in silence otherwise than asked.

    Args:
        training: `RunArguments`, which have filled in what follows from other settings.

    Raises:
        UserError: Naming the setting.
    """
    # The best model is the one of least loss; its metric is the run's result.
    if training.metric_for_best_model not in (None, "loss", "eval_loss") or training.greater_is_better:
        raise UserError("metric_for_best_model must be loss, with greater_is_better=false.")
    if training.save_strategy == "best" and training.metric_for_best_model is None:
        raise UserError("save_strategy=best needs metric_for_best_model=loss.")
    if training.auto_find_batch_size and training.effective_batch_size is not None:
        raise UserError("auto_find_batch_size contradicts effective_batch_size, which it would change.")
    for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if getattr(training, name, None) and not training.dataloader_num_workers:
            raise UserError(f"{name} needs dataloader_num_workers.")
