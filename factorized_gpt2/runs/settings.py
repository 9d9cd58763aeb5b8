"""What a run is told: a JSON config first, flags over it, every check before any work."""

import logging
import os
import sys
import warnings
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.activations import ACT2FN

from ..common.errors import UserError
from ..common.files import read_json
from ..network.blockwise_loss import cut_cross_entropy_is_exact, cut_cross_entropy_runs
from ..settings.devices import launched_processes
from ..settings.setting_values import check_values
from ..settings.text_arguments import DataArguments
from ..settings.words import setting_name, without_flags
from .checks import check_resolved, check_together
from .families import UNKNOWN_METHOD, family_of
from .fields import AdapterArguments, DistillationArguments, ModelArguments, TrainingFields
from .words import PARTS, limits, parser_of, read_words

logger = logging.getLogger(__name__)

YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")  # in the environment

_WANDB_MODES = ("online", "offline", "shared", "disabled", "run", "dryrun")  # the last two are older names


@dataclass
class RunArguments(TrainingFields, TrainingArguments):  # type: ignore[misc]  # push_to_hub names the repository
    """`TrainingArguments`, and what they leave to the environment."""

    def __post_init__(self) -> None:
        self._take_up_the_launchers_precision()
        self._read_sharding()
        has_cuda = torch.cuda.is_available() and not self.use_cpu
        self.as_configured = {name: getattr(self, name) for name in ("fp16", "bf16", "torch_compile")}
        # A CPU asked for in so many words can do these two.
        if not has_cuda and (self.fp16 or ((self.bf16 or self.torch_compile) and not self.use_cpu)):
            if os.environ.get("LOCAL_RANK", "0") == "0":
                logger.warning("No CUDA on this machine: training in float32, without compiling.")
            self.fp16 = False
            self.bf16 = self.bf16 and self.use_cpu
            self.torch_compile = self.torch_compile and self.use_cpu
        self.dataloader_pin_memory = self.dataloader_pin_memory and has_cuda
        if self.disable_tqdm is None:  # bars are for terminals
            self.disable_tqdm = not sys.stderr.isatty()
        launched = launched_processes()
        # Without a GPU, processes find each other only if they are told that it is a CPU they run on.
        self.use_cpu = self.use_cpu or (launched > 1 and not has_cuda)
        with warnings.catch_warnings():
            # Of a name that is the only one in the oldest version of transformers that is supported.
            warnings.filterwarnings("ignore", message=".gradient_checkpointing", category=FutureWarning)
            super().__post_init__()
        self.mixed_precision = "fp16" if self.fp16 else "bf16" if self.bf16 else "no"  # and not the environment's
        self._take_up_wandbs_environment()
        if launched > 1 and self.world_size != launched:
            raise UserError(f"{launched} processes were launched, but each sees {self.world_size}.")
        if self.effective_batch_size is not None:
            self.gradient_accumulation_steps = self._accumulation_for(self.effective_batch_size)

    def _take_up_wandbs_environment(self) -> None:
        if "wandb" not in self.report_to:
            return
        mode = os.environ.get("WANDB_MODE") or "online"
        if mode not in _WANDB_MODES:
            raise UserError(f"WANDB_MODE is {mode!r} in the environment; W&B knows {', '.join(_WANDB_MODES)}.")
        if os.environ.get("WANDB_DISABLED", "").lower() in YES:
            logger.info("WANDB_DISABLED is set: nothing is logged to W&B.")
            self.report_to = [name for name in self.report_to if name != "wandb"]

    def _take_up_the_launchers_precision(self) -> None:
        """Count `accelerate launch --mixed_precision` as the setting that it stands for."""
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in YES:
            raise UserError("The launcher asks for DeepSpeed, which is not supported here: use FSDP instead.")
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
        if precision not in ("no", "fp16", "bf16"):
            raise UserError(
                f"The launcher asks for mixed_precision {precision}; only no, fp16 and bf16 are supported."
            )
        if precision != "no" and not (self.fp16 or self.bf16):
            setattr(self, precision, True)

    def _read_sharding(self) -> None:
        """Read what FSDP is told, in the words of flags and of configs.

        Raises:
            UserError: The file of `fsdp_config` cannot be read; it stands there without `fsdp`.
        """
        if str(self.fsdp).lower() in (*YES, *_NO):  # transformers knows the flag without a word and itself True
            # transformers takes True as well as the words that it declares.
            self.fsdp = True if str(self.fsdp).lower() in YES else None  # type: ignore[assignment]
        if self.fsdp_config and not self.fsdp:
            raise UserError("fsdp_config has no effect without fsdp: add --fsdp True, or leave fsdp_config out.")
        if isinstance(self.fsdp_config, str) and not self.fsdp_config.startswith("{"):
            self.fsdp_config = read_json(Path(self.fsdp_config))

    def _accumulation_for(self, effective_batch_size: int) -> int:
        per_pass = self.train_batch_size * self.world_size
        if effective_batch_size < 1 or effective_batch_size % per_pass:
            per_device = self.per_device_train_batch_size
            fitting = [n for n in range(1, 65) if effective_batch_size % (n * per_device) == 0]
            raise UserError(
                f"effective_batch_size={effective_batch_size} is not possible with {per_pass // per_device} device(s) "
                f"with per_device_train_batch_size={per_device}; "
                f"numbers of devices that work: {', '.join(map(str, fitting)) or 'none'}."
            )
        return effective_batch_size // per_pass


@dataclass(frozen=True)
class Run:
    """Everything that one run is told."""

    model: ModelArguments
    adapter: AdapterArguments
    distillation: DistillationArguments
    data: DataArguments
    training: RunArguments
    words: tuple[str, ...] = ()  # as they were asked for

    @property
    def start(self) -> str | None:
        """Folder or Hub id of the weights that the run starts from; `None` for a random start."""
        return self.model.compressed or self.model.baseline

    def family(self, is_factorized: bool, method: str | None = None, is_refined: bool = False) -> str:
        """Name what this run does: the protocol's word for it, or one like it.

        Args:
            is_factorized: Whether its model is.
            method: How the compressed model that it starts from was made, as far as its folder says.
            is_refined: Whether it was refined then.

        Returns:
            A key of `FAMILIES`.
        """
        if self.is_from_scratch:
            return "lowrank-scratch" if is_factorized else "baseline"
        made_by = (method or UNKNOWN_METHOD) if self.model.compressed else "pca"
        made_by = made_by if is_factorized else None
        return family_of(made_by, self.training.do_train, bool(self.adapter.lora_rank), is_refined)

    @property
    def is_from_scratch(self) -> bool:
        """Whether the run starts from random weights."""
        return self.start is None

    def settings(self) -> dict[str, Any]:
        """Every setting by name, as JSON holds it, without those that say where and how verbosely to run."""
        parts = (self.model, self.adapter, self.distillation, self.data)
        settings = {item.name: getattr(part, item.name) for part in parts for item in fields(part)}
        settings |= self.training.to_dict()
        settings["push_to_hub"] = settings["push_to_hub"] or False  # as earlier versions wrote it
        for name in ("logging_dir", "local_rank", "overwrite", "disable_tqdm", "hub_token"):
            settings.pop(name, None)
        return settings

    def config(self) -> dict[str, Any]:
        """Collect what was asked for, and what else differs from the defaults: a config that means the same run.

        It does on other machines too: precision and compilation stand as they were asked for.
        """
        asked = {setting_name(word) for word in self.words if word.startswith("--")}
        defaults = Run(
            ModelArguments(), AdapterArguments(), DistillationArguments(), DataArguments(), RunArguments()
        ).settings()
        settings = self.settings() | self.training.as_configured
        config = {name: value for name, value in settings.items() if name in asked or value != defaults[name]}
        return config if config.get("report_to", True) else config | {"report_to": ["none"]}


def default_settings() -> dict[str, Any]:
    """Collect the default of every setting that has a fixed one."""
    return {
        item.name: item.default
        for part in (*PARTS, RunArguments)
        for item in fields(part)
        if item.default is not MISSING
    }


def parse_run(argv: list[str]) -> Run:
    """Read a run from the command line: `--config NAME`, and flags that override it.

    Args:
        argv: The words after the program's name.

    Returns:
        The run, checked as far as that needs neither data nor weights.

    Raises:
        UserError: An unknown, mistyped or contradictory setting, by name.
    """
    words = read_words(argv)
    model, adapter, distillation, data, training, _ = parser_of(RunArguments).parse(words)
    asked = without_flags(words, {"overwrite", "print_config"})
    run = Run(model, adapter, distillation, data, training, asked)
    _check(run)
    return run


def _check(run: Run) -> None:
    model, training = run.model, run.training
    check_values(run.settings(), limits())
    for name in ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if isinstance(getattr(training, name, None), str):
            raise UserError(f"{name} must be a JSON object, got {getattr(training, name)!r}.")
    check_together(model, run.adapter, run.distillation, run.data, training)
    check_resolved(training)
    if model.activation_function not in (None, *ACT2FN):
        raise UserError(
            f"activation_function={model.activation_function!r} is not one of {', '.join(sorted(ACT2FN))}."
        )
    on_cuda, half = training.device.type == "cuda", training.fp16 or training.bf16
    if training.loss_backend == "cut_cross_entropy" and not cut_cross_entropy_runs(on_cuda, half):
        raise UserError("loss_backend=cut_cross_entropy needs CUDA, fp16 or bf16, and the package cut-cross-entropy.")
    if training.loss_backend == "cut_cross_entropy" and not cut_cross_entropy_is_exact():
        logger.warning(
            "The installed cut-cross-entropy sums gradients in half precision: in bf16 they are off by up to 5 %. "
            "Its later releases sum in float32; loss_backend=blockwise does so too."
        )
