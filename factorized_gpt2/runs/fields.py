"""Settings of a run beside `TrainingArguments`. They can be read without importing torch."""

from dataclasses import dataclass, field
from typing import Annotated

from ..settings.setting_values import COUNT, NOT_NEGATIVE, POSITIVE, READ, SHARE
from .training_fields import LIMITS

# The modules of a GPT-2; on other decoders they stand for all-linear.
LORA_TARGETS = ("wte", "scale_up", "scale_down", "q_proj", "k_proj", "v_proj", "c_proj", "mlp_up", "mlp_down")


# Copies of the network's and the trainer's own, which cannot be imported without torch.
ALL_LINEAR = "all-linear"
LOSS_BACKENDS = ("blockwise", "attention", "cut_cross_entropy", "auto", "logits")


@dataclass
class ModelArguments:
    """The network, and the model that training starts from."""

    _argument_group_name = "Model"

    baseline: Annotated[str, READ] | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a trained, unfactorized GPT-2 to start from, or with n_embd_wte of another "
            "decoder. Without baseline or compressed, the run starts from random weights."
        },
    )
    compressed: Annotated[str, READ] | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a compressed model to start from, as compress.py makes it. Replaces baseline."
        },
    )
    dequantize: bool = field(
        default=False,
        metadata={
            "help": "Turn the integer vocabulary of a compressed model (method coded) into floats, so that all of it "
            "can be trained. The model becomes larger."
        },
    )
    n_embd_wte: Annotated[int, COUNT] | None = field(
        default=None,
        metadata={
            "help": "Rank k of the token embedding. With a baseline, the baseline is first compressed to this rank by "
            "PCA, beside output_dir. Default: not factorized."
        },
    )
    n_layer: Annotated[int, COUNT] | None = field(
        default=None, metadata={"help": "Number of layers, for a random start only. Default: 12."}
    )
    n_head: Annotated[int, COUNT] | None = field(
        default=None, metadata={"help": "Attention heads, for a random start only. Default: 12."}
    )
    n_embd: Annotated[int, COUNT] | None = field(
        default=None, metadata={"help": "Width d of the network, for a random start only. Default: 768."}
    )
    activation_function: str | None = field(
        default=None,
        metadata={
            "help": "Activation of the MLP, for a random start only. gelu is the exact function. Default: gelu_new, "
            "GPT-2's approximation."
        },
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
            "help": "The head shares the matrix wte with the embedding. A LoRA adapter on wte then changes both. "
            "False: the head gets a matrix of its own, which adds V k parameters."
        },
    )


@dataclass
class AdapterArguments:
    """LoRA adapters. Without a rank the whole model is trained."""

    _argument_group_name = "LoRA adapters"

    lora_rank: Annotated[int, NOT_NEGATIVE] = field(
        default=0, metadata={"help": "Rank of the LoRA adapters. 0: no adapters, the whole model is trained."}
    )
    lora_alpha: Annotated[float, POSITIVE] = field(
        default=64, metadata={"help": "The adapters' output is multiplied by lora_alpha / lora_rank."}
    )
    lora_dropout: Annotated[float, SHARE] = field(
        default=0.1, metadata={"help": "Dropout on the input of the adapters of linear layers."}
    )
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(LORA_TARGETS),
        metadata={
            "help": "Modules that get an adapter. all-linear: every linear layer of the decoder, scale_up, scale_down "
            "and, unless it is coded, wte. On a decoder other than GPT-2 the default means the same. Default: "
            f"{' '.join(LORA_TARGETS)}."
        },
    )


@dataclass
class DistillationArguments:
    """Distillation: learn from the predictions of a teacher as well as from the text."""

    _argument_group_name = "Distillation"

    distillation_weight: Annotated[float, SHARE] = field(
        default=0.0,
        metadata={
            "help": "Weight w of the teacher in the training loss (1 - w) * cross-entropy + w * KL(teacher || model). "
            "0: no teacher; 1: the teacher only."
        },
    )
    distillation_temperature: Annotated[float, POSITIVE] = field(
        default=1.0,
        metadata={
            "help": "Temperature t: the logits of both models are divided by t, and the divergence is multiplied by t "
            "squared."
        },
    )
    teacher: Annotated[str, READ] | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of the teacher, an unfactorized model with the same tokens. Default: the "
            "baseline, or the model that the compressed one was made from."
        },
    )


@dataclass
class TrainingFields:
    """Training options that `TrainingArguments` lack, or have with another type or default."""

    _argument_group_name = "Training (options of transformers' TrainingArguments, and our own)"
    _limits = LIMITS

    effective_batch_size: Annotated[int, COUNT] | None = field(
        default=None,
        metadata={
            "help": "Blocks per optimizer step, over all processes. gradient_accumulation_steps is computed from it; "
            "a number of processes that cannot give this batch is refused."
        },
    )
    wandb_mode: str = field(
        default="auto",
        metadata={
            "help": "Weights & Biases, with report_to=wandb. auto: online if a login is stored, else offline.",
            "choices": ["auto", "online", "offline", "disabled"],
        },
    )
    hub_base_model_id: str | None = field(
        default=None,
        metadata={
            "help": "Hub id of the published compressed model that a LoRA run started from. With it, push_to_hub also "
            "publishes the adapter, as NAME-adapter."
        },
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "USER/NAME: publish the finished model in this repository of the Hub."}
    )
    private: bool = field(default=False, metadata={"help": "Publish in a private repository."})
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Start again and replace what is in output_dir, even if that run is finished or had other "
            "settings. "
            "Models that were compressed from another baseline are replaced too."
        },
    )
    loss_backend: str = field(
        default="blockwise",
        metadata={
            "help": "How the training loss is computed. blockwise: block by block, without storing all logits; works "
            "everywhere. attention: by an attention kernel, on CUDA in half precision, for a head that is not "
            "trained. "
            "cut_cross_entropy: by the kernels of that package, on CUDA in half precision. auto: attention where it "
            "works and is faster, else blockwise. logits: ordinary cross-entropy, which needs the most memory and "
            "returns the logits.",
            "choices": list(LOSS_BACKENDS),
        },
    )
    # Every parameter takes part in every step; and looking for NaN would wait for the device each time.
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Let DistributedDataParallel search for parameters without a gradient, which costs time."},
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Leave NaN and infinity out of the logged loss. On a GPU this slows down every step."},
    )
