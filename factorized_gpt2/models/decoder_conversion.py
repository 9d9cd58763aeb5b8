"""Any causal decoder's weights to factorized weights and back. Pure: models in, models out."""

import copy
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedModel

from ..network.coded_table import CodedTable
from ..network.coded_vocabulary import CodedEmbedding, without_codes
from ..network.configuration_factorized_causal_lm import FactorizedCausalLMConfig
from ..network.decoder_slots import vocabulary_of
from ..network.modeling_factorized_causal_lm import FactorizedCausalLM
from ..network.modeling_factorized_gpt2 import FactorizedGPT2
from .conversion import factor_weights, from_gpt2, vocabulary_matrices
from .factors import Factors


def with_factors(model: PreTrainedModel, factors: Factors | CodedTable) -> FactorizedGPT2 | FactorizedCausalLM:
    """Factorize a baseline: a GPT-2 as `from_gpt2` does, any other decoder as `from_causal_lm` does."""
    if isinstance(model, GPT2LMHeadModel | FactorizedGPT2):
        return from_gpt2(model, factors)
    return from_causal_lm(model, factors)


def from_causal_lm(model: PreTrainedModel, factors: Factors | CodedTable) -> FactorizedCausalLM:
    """Put factors in the place of a causal language model's token embedding and head.

    Args:
        model: A decoder of transformers with one token embedding and one linear head. It is not changed.
        factors: Of its vocabulary matrices; with an `lm_head` of their own they untie a tied model. A coded table of
            the matrix, which must be tied, makes a vocabulary of integers. A bias of the head stays, and one that a
            table brings is added to it.

    Returns:
        A new model in evaluation mode, in the dtype and on the device of `model`.

    Raises:
        ValueError: A model of another kind; factors that do not fit it.
    """
    embedding, head, _ = vocabulary_of(model)
    tied = is_tied(embedding, head)
    shape = embedding.num_embeddings, embedding.embedding_dim
    weights = factor_weights(factors, shape, must_untie=not tied, trunk="")
    own = None if head.bias is None else head.bias.detach().float().cpu()
    biases = [bias for bias in (own, weights.pop("lm_head.bias", None)) if bias is not None]
    replaced = {id(parameter) for part in (embedding, head) for parameter in part.parameters()}
    state = model.state_dict(keep_vars=True)
    decoder = {f"model.{name}": weight for name, weight in state.items() if id(weight) not in replaced}
    table = factors if isinstance(factors, CodedTable) else None
    base_config = copy.deepcopy(model.config)
    base_config.name_or_path = ""  # it is another model
    config = FactorizedCausalLMConfig(
        base_config=base_config,
        n_embd_wte=factors.codes.shape[1] if isinstance(factors, CodedTable) else factors.rank,
        vocabulary_dtype=None if table is None else "int8",
        lm_head_bias=bool(biases),
        tie_word_embeddings=tied and getattr(factors, "lm_head", None) is None,
    )
    if biases:
        weights["lm_head.bias"] = sum(biases[1:], biases[0])
    made = cast(FactorizedCausalLM, _load(FactorizedCausalLM, config, decoder | weights, model))
    if table is not None:
        cast(CodedEmbedding, made.wte).stored = without_codes(table)
    return made


def to_causal_lm(model: FactorizedCausalLM) -> PreTrainedModel:
    """Convert into the stock class of its decoder, for tools that know nothing else.

    The embedding becomes `wte @ scale_up + bias` and the head `scale_down @ lm_head`, two different matrices, so the
    result is untied and its vocabulary takes 2 V d numbers. Its logits are those of `model`, up to rounding.

    Args:
        model: The model to convert. It is not changed. Adapters must have been merged.

    Returns:
        A new model in evaluation mode, in the dtype and on the device of `model`.
    """
    factorized = model.dequantize() if model.config.is_coded else model
    config = copy.deepcopy(model.config.base_config)
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config)
    embedding, head, _ = vocabulary_of(shell)
    state = factorized.state_dict()
    decoder = {name.removeprefix("model."): weight for name, weight in state.items() if name.startswith("model.")}
    table = state["wte.weight"] @ state["scale_up.weight"].T
    if "scale_up.bias" in state:
        table = table + state["scale_up.bias"]
    values = {id(embedding.weight): table, id(head.weight): state["lm_head.weight"] @ state["scale_down.weight"]}
    bias = state.get("lm_head.bias")
    if bias is not None and head.bias is None:
        raise ValueError(f"The head has a bias, which the head of {type(shell).__name__} cannot have.")
    values |= {} if head.bias is None else {id(head.bias): torch.zeros(len(table)) if bias is None else bias}
    named = {name: id(weight) for name, weight in shell.named_parameters(remove_duplicate=False)}
    weights = {name: values[key] for name, key in named.items() if key in values}
    return _load(type(shell), config, decoder | weights, model)


def vocabulary_matrices_of(model: PreTrainedModel) -> tuple[np.ndarray, np.ndarray | None]:
    """Read the matrices that a factorization replaces in a baseline, a GPT-2 or any other causal decoder.

    Returns:
        The token embedding (V, d) float32, and the head's own (V, d) float32, or `None` when it is tied.

    Raises:
        ValueError: A model of another kind.
    """
    if isinstance(model, FactorizedGPT2):
        return vocabulary_matrices(model)
    embedding, head, _ = vocabulary_of(model)
    wte, own = (part.weight.detach().float().cpu().numpy() for part in (embedding, head))
    return wte, None if is_tied(embedding, head) else own


def is_tied(embedding: nn.Embedding, head: nn.Linear) -> bool:
    """Tell whether a head is the embedding in truth, whatever a config says."""
    return head.weight is embedding.weight or torch.equal(head.weight, embedding.weight)


def _load(model_class: Any, config, weights: dict[str, torch.Tensor], like: PreTrainedModel) -> PreTrainedModel:
    """Make a model of copies of exactly these weights, as transformers loads one."""
    copies = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
    model, loading = model_class.from_pretrained(
        None, config=config, state_dict=copies, dtype=like.dtype, output_loading_info=True
    )
    wrong = {kind: names for kind, names in loading.items() if names and kind.endswith("_keys")}
    if wrong:
        raise ValueError(f"The weights do not make a {model_class.__name__}: {wrong}.")
    model.name_or_path = ""
    model.generation_config = copy.deepcopy(like.generation_config)
    return model.to(like.device).eval()
