"""LoRA on a factorized model: what is adapted, how it starts, how it merges."""

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..common.errors import UserError
from ..network.decoder_slots import Slot
from ..network.modeling_factorized_causal_lm import FactorizedCausalLM
from ..network.modeling_factorized_gpt2 import FactorizedGPT2

DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")  # of a GPT-2
ALL_LINEAR = "all-linear"
_OTHER_DROPS = re.compile("layerdrop|classifier|summary")  # of whole layers, or of heads that are not here


def add_lora(
    model: FactorizedGPT2 | FactorizedCausalLM, rank: int, alpha: float, dropout: float, target_modules: Sequence[str]
) -> PeftModel:
    """Freeze a model and attach LoRA adapters that leave its outputs as they are.

    Every adapter adds `alpha / rank * B A` with A (rank, in) Kaiming-uniform and B (out, rank) zero (Hu et al., 2021,
    "LoRA"). On `wte` the input is the one-hot token, so A is (rank, V) and B (k, rank). While the head is tied it
    multiplies by the adapted `wte`: merging into the one shared matrix then changes nothing.

    Args:
        model: The model to adapt; it becomes part of the result.
        rank: Rank of the adapters.
        alpha: Numerator of their scale.
        dropout: Dropout before A, on linear layers.
        target_modules: As `lora_targets` takes them.

    Returns:
        The adapted model.

    Raises:
        UserError: As `lora_targets`.
    """
    targets = lora_targets(model, rank, target_modules)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides by it, and takes floats as well as its `int`
        lora_dropout=dropout,
        target_modules=targets,
        # What stands in a decoder for its embedding and head may have the name of what is adapted.
        exclude_modules=[name for name, module in model.named_modules() if isinstance(module, Slot)] or None,
    )
    with warnings.catch_warnings():
        # PEFT cannot know that this head follows wte's adapter, and warns of tied weights.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        # It asks transformers by a name that is on its way out.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        adapted = get_peft_model(model, config)
    for module in adapted.modules():
        if isinstance(module, LoraEmbedding):
            _start_like_linear(module)
    return adapted


def lora_targets(model: FactorizedGPT2 | FactorizedCausalLM, rank: int, target_modules: Sequence[str]) -> list[str]:
    """Name the modules that get adapters, if they all can have them.

    Args:
        model: To be adapted.
        rank: Of the adapters.
        target_modules: Names of modules, such as `wte` or `q_proj`. `all-linear` stands for every linear layer of the
            decoder, `scale_up`, `scale_down` and, unless it is of integers, `wte`. `scale_up` and `scale_down` are
            passed over where the model is not factorized.

    Raises:
        UserError: A name that no linear layer or embedding has, a vocabulary of integers, the head while it is tied,
            or a rank beyond the widest layer.
    """
    linear = {name: module for name, module in _linear_layers(model.get_decoder()) if name != "scale_up"}
    widest = max(max(module.weight.shape) for module in linear.values())
    if rank > widest:
        raise UserError(f"lora_rank {rank} is larger than the model's widest layer, of {widest}.")
    present = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding | Conv1D)
    }
    vocabulary = ("scale_up", "scale_down") if model.config.is_coded else ("wte", "scale_up", "scale_down")
    every = [*vocabulary, *dict.fromkeys(_short(name) for name in linear)]
    asked = [name for target in target_modules for name in (every if target == ALL_LINEAR else [target])]
    absent_by_design = () if model.config.is_factorized else ("scale_up", "scale_down")
    targets = [name for name in dict.fromkeys(asked) if name not in absent_by_design]
    codes = sorted({"wte", "lm_head"}.intersection(targets)) if model.config.is_coded else []
    if codes:
        raise UserError(
            f"lora_target_modules: {codes[0]} is of integers, which cannot be adapted; leave it out, or make "
            "floats of it with dequantize=true."
        )
    for name in targets:
        if name not in present and name not in every:
            raise UserError(
                f"lora_target_modules: the model has no linear layer or embedding {name!r}; it has "
                f"{', '.join(sorted(present))}."
            )
    if "lm_head" in targets and model.config.tie_word_embeddings:
        raise UserError(
            "lora_target_modules: lm_head is tied to wte and follows its adapter; leave it out, or untie the head "
            "with tie_word_embeddings=false."
        )
    return targets


def _linear_layers(trunk: nn.Module) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    return ((name, module) for name, module in trunk.named_modules() if isinstance(module, nn.Linear | Conv1D))


def _short(name: str) -> str:
    """Shorten a module's name to what it has in common with those of the other layers: a number alone says nothing."""
    return cast(re.Match, re.search(r"[^.]*(\.\d+)*$", name))[0]


def merge(adapted: PeftModel) -> FactorizedGPT2 | FactorizedCausalLM:
    """Add the adapters into the weights and return the plain model, of the same size as before they were attached.

    Raises:
        ValueError: NaN or infinity in an adapter.
    """
    return adapted.merge_and_unload(safe_merge=True).eval()


def untie_head(model: FactorizedGPT2 | FactorizedCausalLM) -> None:
    """Give the head a matrix of its own, a copy of `wte`, in place."""
    if model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        wte = cast(nn.Embedding, model.get_input_embeddings())
        model.lm_head.weight = nn.Parameter(wte.weight.detach().clone())
        model.all_tied_weights_keys = {}


@torch.no_grad()
def _start_like_linear(module: LoraEmbedding) -> None:
    """PEFT starts an embedding's adapter with A zero and B normal; start it like those of linear layers."""
    for name, lora_a in module.lora_embedding_A.items():
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
        nn.init.zeros_(module.lora_embedding_B[name])


def set_dropout(model: FactorizedGPT2 | FactorizedCausalLM, probability: float) -> list[str]:
    """Set every dropout of a model, in its configuration and in its modules, in place.

    Returns:
        What the configuration calls those that it has.
    """
    fields = model.config.get_text_config().to_dict()
    numbers = {name for name, value in fields.items() if type(value) in (float, int)}
    names = sorted(name for name in numbers if "drop" in name and not _OTHER_DROPS.search(name))
    chosen = dict.fromkeys(names, probability)
    model.config.get_text_config().update(chosen)
    with torch.device("meta"):
        rebuilt = cast(type[PreTrainedModel], type(model))(model.config)
    # Some modules read the configuration as they compute, others kept its numbers when they were built.
    for module, made in zip(model.modules(), rebuilt.modules(), strict=True):
        vars(module).update({name: value for name, value in vars(made).items() if isinstance(value, float)})
        config = vars(module).get("config")
        if config is not None:
            config.get_text_config().update(chosen)
    return names
