"""What a run can be told, apart from `TrainingArguments`: its own settings, as they are read without torch."""

from dataclasses import dataclass, field
from typing import Annotated

from ..settings.setting_values import COUNT, NOT_NEGATIVE, POSITIVE, READ, SHARE
from .training_fields import LIMITS

# The modules of a GPT-2; on other decoders they stand for all-linear.
LORA_TARGETS = ("wte", "scale_up", "scale_down", "q_proj", "k_proj", "v_proj", "c_proj", "mlp_up", "mlp_down")


# Those of the network and of the trainer, which are not imported to read settings.
ALL_LINEAR = "all-linear"
LOSS_BACKENDS = ("blockwise", "attention", "cut_cross_entropy", "auto", "logits")


@dataclass
class ModelArguments:
    """The network, and where it starts."""

    _argument_group_name = "The model and its start"

    baseline: Annotated[str, READ] | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a trained, unfactorized GPT-2 to start from, or with n_embd_wte of another "
            "decoder. None: a random start."
        },
    )
    compressed: Annotated[str, READ] | None = field(
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
    n_embd_wte: Annotated[int, COUNT] | None = field(
        default=None,
        metadata={"help": "Rank k of the token embedding. None, or d for a random start: not factorized."},
    )
    n_layer: Annotated[int, COUNT] | None = field(
        default=None, metadata={"help": "Blocks (random start only). Default: 12."}
    )
    n_head: Annotated[int, COUNT] | None = field(
        default=None, metadata={"help": "Attention heads (random start only). Default: 12."}
    )
    n_embd: Annotated[int, COUNT] | None = field(
        default=None, metadata={"help": "Width d (random start only). Default: 768."}
    )
    activation_function: str | None = field(
        default=None, metadata={"help": "Of the MLP (random start only): gelu is exact. Default: gelu_new, GPT-2's."}
    )
    dropout: Annotated[float, SHARE] | None = field(
        default=None,
        metadata={
            "help": "Dropout of embeddings, attention and residuals while training, as far as the model's config has "
            "one. Default: the model's own; from scratch 0.1."
        },
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

    lora_rank: Annotated[int, NOT_NEGATIVE] = field(
        default=0, metadata={"help": "Rank of the LoRA adapters. 0: no adapters."}
    )
    lora_alpha: Annotated[float, POSITIVE] = field(
        default=64, metadata={"help": "Adapters are scaled by lora_alpha / lora_rank."}
    )
    lora_dropout: Annotated[float, SHARE] = field(
        default=0.1, metadata={"help": "Dropout before the adapters of linear layers."}
    )
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(LORA_TARGETS),
        metadata={
            "help": "Names of the modules that get an adapter. all-linear: every linear layer of the decoder, "
            "scale_up, scale_down and, unless it is of integers, wte. On a decoder that is no GPT-2 the default means "
            "the same."
        },
    )


@dataclass
class DistillationArguments:
    """A teacher whose predictions the model learns from, beside the text."""

    _argument_group_name = "Distillation"

    distillation_weight: Annotated[float, SHARE] = field(
        default=0.0,
        metadata={
            "help": "w of (1 - w) * cross-entropy + w * KL(teacher || model), between 0 (no teacher) and 1 (the "
            "teacher alone)."
        },
    )
    distillation_temperature: Annotated[float, POSITIVE] = field(
        default=1.0,
        metadata={"help": "t: both distributions are flattened by it, the divergence scaled by t squared."},
    )
    teacher: Annotated[str, READ] | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of an unfactorized model with the same tokens. None: the baseline, or the "
            "compressed model's."
        },
    )


@dataclass
class TrainingFields:
    """What a run takes beside `TrainingArguments`, or with another type or default than theirs."""

    _argument_group_name = "Training: options of TrainingArguments, and some of our own"
    _limits = LIMITS

    effective_batch_size: Annotated[int, COUNT] | None = field(
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
            "then published too, as NAME-adapter."
        },
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "USER/NAME: publish the model there, once it is trained and saved."}
    )
    private: bool = field(default=False, metadata={"help": "Let no one else see what is published."})
    overwrite: bool = field(
        default=False, metadata={"help": "Replace what another run, or another baseline, left in the output folders."}
    )
    loss_backend: str = field(
        default="blockwise",
        metadata={
            "help": "How the loss does without logits. blockwise: anywhere. attention: an attention kernel, of a head "
            "that is not trained. cut_cross_entropy: that package's kernels, on CUDA in half precision. auto: "
            "attention where it can run and pays, else blockwise. logits: it does not do without.",
            "choices": list(LOSS_BACKENDS),
        },
    )
    # Every parameter takes part in every step; and looking for NaN would wait for the device each time.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Let DistributedDataParallel look for parameters without a gradient."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN and infinity out of the logged loss, for a wait in every step."}
    )
