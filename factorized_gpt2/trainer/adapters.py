"""LoRA on a factorized GPT-2: what is adapted, how it starts, how it merges."""

import math
import warnings
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from torch import nn

from ..common.errors import UserError
from ..network.modeling_factorized_gpt2 import FactorizedGPT2

DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def add_lora(
    model: FactorizedGPT2, rank: int, alpha: float, dropout: float, target_modules: Sequence[str]
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
        target_modules: Names of modules, such as `wte` or `q_proj`. `scale_up` and `scale_down` are passed over where
            the model is not factorized.

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


def lora_targets(model: FactorizedGPT2, rank: int, target_modules: Sequence[str]) -> list[str]:
    """Name the modules that get adapters, if they all can have them.

    Raises:
        UserError: A name that no linear layer or embedding has, a vocabulary of integers, the head while it is tied,
            or a rank beyond the widest layer.
    """
    widest = model.config.n_inner or 4 * model.config.n_embd
    if rank > widest:
        raise UserError(f"lora_rank {rank} is larger than the model's widest layer, of {widest}.")
    present = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }
    absent_by_design = () if model.config.is_factorized else ("scale_up", "scale_down")
    targets = [name for name in target_modules if name not in absent_by_design]
    codes = sorted({"wte", "lm_head"}.intersection(targets)) if model.config.is_coded else []
    if codes:
        raise UserError(
            f"lora_target_modules: {codes[0]} is of integers, which cannot be adapted; leave it out, or make "
            "floats of it with dequantize=true."
        )
    for name in targets:
        if name not in present:
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


def merge(adapted: PeftModel) -> FactorizedGPT2:
    """Add the adapters into the weights and return the plain model, of the same size as before they were attached.

    Raises:
        ValueError: NaN or infinity in an adapter.
    """
    return adapted.merge_and_unload(safe_merge=True).eval()


def untie_head(model: FactorizedGPT2) -> None:
    """Give the head a matrix of its own, a copy of `wte`, in place."""
    if model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.transformer.wte.weight.detach().clone())
        model.all_tied_weights_keys = {}


@torch.no_grad()
def _start_like_linear(module: LoraEmbedding) -> None:
    """PEFT starts an embedding's adapter with A zero and B normal; start it like those of linear layers."""
    for name, lora_a in module.lora_embedding_A.items():
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
        nn.init.zeros_(module.lora_embedding_B[name])


def set_dropout(model: FactorizedGPT2, probability: float) -> None:
    """Set every dropout of a model, in its configuration (which attention reads) and in its modules."""
    model.config.update(dict.fromkeys(DROPOUTS, probability))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
