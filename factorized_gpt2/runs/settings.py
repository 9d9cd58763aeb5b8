"""What a run is told: a JSON config first, flags over it, every check before any work."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.activations import ACT2FN

from ..common.errors import UserError
from ..network.blockwise_loss import BACKENDS, cut_cross_entropy_runs
from ..settings.parsing import ManualParser, as_flags, load_config, setting_name, without_flags
from ..settings.setting_values import check_values
from ..settings.text_arguments import DataArguments
from .families import UNKNOWN_METHOD, family_of
from .training_fields import ELSEWHERE, refused

logger = logging.getLogger(__name__)

PRINT_CONFIG = "--print_config"
_TOKEN = "hub_token"
_YES = ("1", "true", "yes", "on")  # in the environment

LORA_TARGETS = ("wte", "scale_up", "scale_down", "q_proj", "k_proj", "v_proj", "c_proj", "mlp_up", "mlp_down")


def launched_processes() -> int:
    """Count the processes that a launcher started together with this one, itself included."""
    return int(os.environ.get("WORLD_SIZE") or 1)


@dataclass
class ModelArguments:
    """The network, and where it starts."""

    _argument_group_name = "The model and its start"

    baseline: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a trained, unfactorized GPT-2 to start from. None: a random start."},
    )
    compressed: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a model that compress.py made, to start from instead of a baseline."},
    )
    dequantize: bool = field(
        default=False,
        metadata={
            "help": "Make floats of a compressed model's vocabulary of integers, which can then be adapted and "
            "trained; the model grows."
        },
    )
    n_embd_wte: int | None = field(
        default=None,
        metadata={"help": "Rank k of the token embedding. None, or d for a random start: not factorized."},
    )
    n_layer: int | None = field(default=None, metadata={"help": "Blocks (random start only). Default: 12."})
    n_head: int | None = field(default=None, metadata={"help": "Attention heads (random start only). Default: 12."})
    n_embd: int | None = field(default=None, metadata={"help": "Width d (random start only). Default: 768."})
    activation_function: str | None = field(
        default=None, metadata={"help": "Of the MLP (random start only): gelu is exact. Default: gelu_new, GPT-2's."}
    )
    dropout: float | None = field(
        default=None, metadata={"help": "Dropout of embeddings, attention and residuals while training. Default: 0.1."}
    )
    tie_word_embeddings: bool = field(
        default=True,
        metadata={
            "help": "The head shares its matrix with wte. A LoRA adapter on wte then acts on the head too, and merges "
            "into one matrix. False: the head gets a matrix of its own and an adapter on wte acts on the input alone; "
            "the model grows by V k parameters."
        },
    )


@dataclass
class AdapterArguments:
    """LoRA; without a rank the whole model trains."""

    _argument_group_name = "LoRA adapters"

    lora_rank: int = field(default=0, metadata={"help": "Rank of the LoRA adapters. 0: no adapters."})
    lora_alpha: float = field(default=64, metadata={"help": "Adapters are scaled by lora_alpha / lora_rank."})
    lora_dropout: float = field(default=0.1, metadata={"help": "Dropout before the adapters of linear layers."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(LORA_TARGETS), metadata={"help": "Names of the modules that get an adapter."}
    )


@dataclass
class DistillationArguments:
    """A teacher whose predictions the model learns from, beside the text."""

    _argument_group_name = "Distillation"

    distillation_weight: float = field(
        default=0.0,
        metadata={
            "help": "w of (1 - w) * cross-entropy + w * KL(teacher || model), between 0 (no teacher) and 1 (the "
            "teacher alone)."
        },
    )
    distillation_temperature: float = field(
        default=1.0,
        metadata={"help": "t: both distributions are flattened by it, the divergence scaled by t squared."},
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of an unfactorized GPT-2. None: the baseline, or the compressed model's."},
    )


@dataclass
class RunArguments(TrainingArguments):
    """`TrainingArguments`, and what they leave to the environment."""

    _argument_group_name = "Training: options of TrainingArguments, and some of our own"

    effective_batch_size: int | None = field(
        default=None,
        metadata={"help": "Blocks a step over all processes; gradient_accumulation_steps follows from it."},
    )
    wandb_mode: str = field(
        default="auto",
        metadata={
            "help": "auto: online when a W&B login is at hand, else offline.",
            "choices": ["auto", "online", "offline", "disabled"],
        },
    )
    hub_base_model_id: str | None = field(
        default=None,
        metadata={
            "help": "Hub id of the compressed model that a LoRA run starts from, published before: the adapter is "
            "then published too, as hub_model_id-adapter."
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace what another run, or another baseline, left in the output folders."}
    )
    loss_backend: str = field(
        default="blockwise",
        metadata={
            "help": "How the loss does without logits. blockwise: anywhere. attention: an attention kernel, of a head "
            "that is not trained. cut_cross_entropy: that package's kernels, on CUDA in half precision. auto: "
            "attention where it can run and pays, else blockwise. logits: it does not do without.",
            "choices": list(BACKENDS),
        },
    )
    # Every parameter takes part in every step; and looking for NaN would wait for the device each time.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Let DistributedDataParallel look for parameters without a gradient."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN and infinity out of the logged loss, for a wait in every step."}
    )

    def __post_init__(self) -> None:
        self._take_up_the_launchers_precision()
        has_cuda = torch.cuda.is_available() and not self.use_cpu
        self.as_configured = {name: getattr(self, name) for name in ("fp16", "bf16", "torch_compile")}
        # A CPU asked for in so many words can do these two.
        if not has_cuda and (self.fp16 or ((self.bf16 or self.torch_compile) and not self.use_cpu)):
            if os.environ.get("LOCAL_RANK", "0") == "0":
                logger.warning("No CUDA on this machine: training in float32, not compiled.")
            self.fp16 = False
            self.bf16 = self.bf16 and self.use_cpu
            self.torch_compile = self.torch_compile and self.use_cpu
        self.dataloader_pin_memory = self.dataloader_pin_memory and has_cuda
        if self.disable_tqdm is None:  # bars are for terminals
            self.disable_tqdm = not sys.stderr.isatty()
        launched = launched_processes()
        # Without a GPU, processes find each other only if they are told that it is a CPU they run on.
        self.use_cpu = self.use_cpu or (launched > 1 and not has_cuda)
        super().__post_init__()
        self.mixed_precision = "fp16" if self.fp16 else "bf16" if self.bf16 else "no"  # and not the environment's
        if os.environ.get("WANDB_DISABLED", "").lower() in _YES and "wandb" in self.report_to:
            logger.info("WANDB_DISABLED is set: nothing is reported to W&B.")
            self.report_to = [name for name in self.report_to if name != "wandb"]
        if launched > 1 and self.world_size != launched:
            raise UserError(f"{launched} processes were launched, but each sees {self.world_size}.")
        if self.effective_batch_size is not None:
            self.gradient_accumulation_steps = self._accumulation_for(self.effective_batch_size)

    def _take_up_the_launchers_precision(self) -> None:
        """Count `accelerate launch --mixed_precision` as the setting that it stands for."""
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in _YES:
            raise UserError("The launcher asks for DeepSpeed, which these runs do not take: shard by FSDP instead.")
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
        if precision not in ("no", "fp16", "bf16"):
            raise UserError(f"The launcher asks for mixed_precision {precision}; these runs take no, fp16 and bf16.")
        if precision != "no" and not (self.fp16 or self.bf16):
            setattr(self, precision, True)

    def _accumulation_for(self, effective_batch_size: int) -> int:
        per_pass = self.train_batch_size * self.world_size
        if effective_batch_size < 1 or effective_batch_size % per_pass:
            per_device = self.per_device_train_batch_size
            fitting = [n for n in range(1, 65) if effective_batch_size % (n * per_device) == 0]
            raise UserError(
                f"effective_batch_size={effective_batch_size} cannot be had from {per_pass // per_device} device(s) "
                f"with per_device_train_batch_size={per_device}; "
                f"device counts that fit: {', '.join(map(str, fitting)) or 'none'}."
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

    def family(self, is_factorized: bool, method: str | None = None) -> str:
        """Name what this run does: the protocol's word for it, or one like it.

        Args:
            is_factorized: Whether its model is.
            method: How the compressed model that it starts from was made, as far as its folder says.

        Returns:
            A key of `FAMILIES`.
        """
        if self.is_from_scratch:
            return "lowrank-scratch" if is_factorized else "baseline"
        made_by = (method or UNKNOWN_METHOD) if self.model.compressed else "pca"
        return family_of(made_by if is_factorized else None, self.training.do_train, bool(self.adapter.lora_rank))

    @property
    def is_from_scratch(self) -> bool:
        """Whether the run starts from random weights."""
        return self.start is None

    def settings(self) -> dict[str, Any]:
        """Every setting by name, as JSON holds it, without those that say where and how verbosely to run."""
        parts = (self.model, self.adapter, self.distillation, self.data)
        settings = {item.name: getattr(part, item.name) for part in parts for item in fields(part)}
        settings |= self.training.to_dict()
        for name in ("logging_dir", "local_rank", "overwrite_output_dir", "disable_tqdm", _TOKEN):
            settings.pop(name, None)
        return settings

    def config(self) -> dict[str, Any]:
        """Collect what was asked for, and what else differs from the defaults: a config that means the same run.

        It does on other machines too: precision and compilation stand as they were asked for.
        """
        asked = {setting_name(word) for word in self.words if word.startswith("--")}
        defaults = Run(*(part() for part in _PARTS)).settings()
        settings = self.settings() | self.training.as_configured
        config = {name: value for name, value in settings.items() if name in asked or value != defaults[name]}
        return config if config.get("report_to", True) else config | {"report_to": ["none"]}


_PARTS = (ModelArguments, AdapterArguments, DistillationArguments, DataArguments, RunArguments)  # as in `Run`


def default_settings() -> dict[str, Any]:
    """Collect the default of every setting that has a fixed one."""
    return {item.name: item.default for part in _PARTS for item in fields(part) if item.default is not MISSING}


def parse_run(argv: list[str]) -> Run:
    """Read a run from the command line: `--config NAME`, and flags that override it.

    Args:
        argv: The words after the program's name.

    Returns:
        The run, checked as far as that needs neither data nor weights.

    Raises:
        UserError: An unknown, mistyped or contradictory setting, by name.
    """
    selector = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    selector.add_argument("--config", action="append", default=[])
    selected, flags = selector.parse_known_args(argv)
    parser = _make_parser()
    config: dict[str, Any] = {}
    for name in selected.config:
        config |= load_config(name)
    parser.refuse_unknown(config, "config key")
    words = as_flags(config) + flags
    _refuse_token(words)
    *parts, _ = parser.parse(words)
    run = Run(*parts, words=without_flags(words, {"overwrite_output_dir", "print_config"}))
    _check(run)
    return run


def check_words(words: Sequence[str]) -> list[str]:
    """Check the names and types of flags, as far as each can be judged alone.

    Returns:
        The names, as settings have them.

    Raises:
        UserError: An unknown or mistyped flag, or a token.
    """
    _refuse_token(words)
    parser = _make_parser()
    _, rest = parser.parse_known_args(list(words))
    parser.refuse_unknown((word.partition("=")[0] for word in rest), "argument")
    return [setting_name(word) for word in words if word.startswith("--")]


def _refuse_token(words: Sequence[str]) -> None:
    if any(word.startswith("--") and setting_name(word) == _TOKEN for word in words):
        raise UserError(
            f"{_TOKEN} is not taken: process lists, shell histories and files would show it. Log in with "
            "`hf auth login`, or set HF_TOKEN."
        )


def _make_parser() -> ManualParser:
    parser = ManualParser(
        _PARTS,
        prog="train_hf.py",
        description="Train, fine-tune with LoRA or evaluate a GPT-2 with a factorized vocabulary.",
        usage="%(prog)s --config NAME [option ...]",
        examples=(
            "train_hf.py --config baseline.json",
            "train_hf.py --config pca_lora_k64.json --train_file train.txt --validation_file held_out.txt",
            "train_hf.py --config pca_lora_k64.json --learning_rate 1e-3 --print_config",
        ),
        remark="All options can stand in a JSON config, by the same names; flags override it. The same command\n"
        "goes on with a run that was cut off, and does not repeat one that is finished.",
        refused=refused(),
        elsewhere=ELSEWHERE,
    )
    parser.add_argument("--config", metavar="NAME", help="JSON config: a path, or a name under configs/.")
    parser.add_argument(PRINT_CONFIG, action="store_true", help="Print, as a JSON config, what would run, and end.")
    return parser


def _check(run: Run) -> None:
    model, adapter, distillation, data, training = run.model, run.adapter, run.distillation, run.data, run.training
    check_values(run.settings())
    for name in ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if isinstance(getattr(training, name, None), str):
            raise UserError(f"{name} must be a JSON object, got {getattr(training, name)!r}.")
    shape = [name for name in ("n_layer", "n_head", "n_embd", "activation_function") if getattr(model, name)]
    if not run.is_from_scratch and shape:
        raise UserError(f"{shape[0]} contradicts baseline: the shape of the network is the baseline's.")
    if model.activation_function not in (None, *ACT2FN):
        raise UserError(f"activation_function={model.activation_function!r} is none of {', '.join(sorted(ACT2FN))}.")
    if model.compressed and (model.baseline or model.n_embd_wte):
        other = "baseline" if model.baseline else "n_embd_wte"
        raise UserError(f"{other} contradicts compressed: the compressed model is what the run starts from.")
    if model.dequantize and not model.compressed:
        raise UserError("dequantize is for a compressed model: set compressed.")
    if run.is_from_scratch and data.tokenizer is None:
        raise UserError("Without a baseline, tokenizer must name one (a folder or Hub id).")
    if run.is_from_scratch and not training.do_train:
        raise UserError("Nothing to do: do_train is off and there is no baseline to evaluate.")
    if adapter.lora_rank and run.is_from_scratch:
        raise UserError("lora_rank must be 0, or positive together with a baseline to adapt.")
    if distillation.distillation_weight and run.is_from_scratch and not distillation.teacher:
        raise UserError("distillation_weight needs a teacher: name one, or a baseline.")
    if distillation.distillation_weight and training.label_smoothing_factor:
        raise UserError("label_smoothing_factor does nothing beside distillation_weight: set one of them to 0.")
    if distillation.teacher and not distillation.distillation_weight:
        raise UserError("teacher does nothing while distillation_weight is 0.")
    _check_training(training)
    on_cuda, half = training.device.type == "cuda", training.fp16 or training.bf16
    if training.loss_backend == "cut_cross_entropy" and not cut_cross_entropy_runs(on_cuda, half):
        raise UserError("loss_backend=cut_cross_entropy needs CUDA, fp16 or bf16, and the package cut-cross-entropy.")
    head_is_trained = not adapter.lora_rank or {"wte", "lm_head"} & set(adapter.lora_target_modules)
    if training.loss_backend == "attention" and training.do_train and head_is_trained:
        raise UserError(
            "loss_backend=attention needs a head that is not trained: LoRA whose lora_target_modules leave out wte "
            "and lm_head. loss_backend=auto takes it where it can."
        )
    if data.streaming and training.max_steps < 1:
        raise UserError("streaming needs max_steps: a stream does not say where it ends.")
    if training.do_train and training.max_steps < 1 and training.num_train_epochs <= 0:
        raise UserError("Nothing to train: set max_steps or num_train_epochs.")
    if not (data.dataset_name or data.validation_file):
        raise UserError("No validation text: set validation_file or dataset_name.")
    if training.do_train and not (data.dataset_name or data.train_file):
        raise UserError("No training text: set train_file or dataset_name.")


def _check_training(training: RunArguments) -> None:
    """Refuse what `TrainingArguments` take and these runs cannot do, or would do in silence otherwise than asked."""
    # The best model is the one of least loss; its metric is the run's result.
    if training.metric_for_best_model not in (None, "loss", "eval_loss") or training.greater_is_better:
        raise UserError("metric_for_best_model must be loss, of which less is better (greater_is_better=false).")
    if training.save_strategy == "best" and training.metric_for_best_model is None:
        raise UserError("save_strategy=best needs metric_for_best_model=loss.")
    if training.auto_find_batch_size and training.effective_batch_size is not None:
        raise UserError("auto_find_batch_size contradicts effective_batch_size, which it would change.")
    for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if getattr(training, name, None) and not training.dataloader_num_workers:
            raise UserError(f"{name} needs dataloader_num_workers.")
