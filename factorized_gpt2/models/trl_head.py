"""A factorized head for trl's trainers.

trl never makes all logits at once. Its trainers replace a model's `forward` by one that, when asked for a
`fused_lm_head`, multiplies `model.base_model(...).last_hidden_state` by `model.get_output_embeddings().weight` a few
rows at a time. For a factorized model these do not fit: between them stands `scale_down`, and the tied head may follow
an adapter on `wte`, which its own weight does not show. Here that `forward` is shown a model for which they fit.
"""

import functools
from types import MethodType
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..network.modeling_factorized_gpt2 import FactorizedGPT2


def fit_trl_head(model: nn.Module) -> nn.Module:
    """Make a trainer of trl compute with the whole head of a factorized model.

    Call it once, after the trainer was made: `fit_trl_head(trainer.model)`. Without it the first step fails, because
    hidden states (d wide) do not fit the head's matrix (k wide).

    Args:
        model: A `FactorizedGPT2`, or PEFT's model around one.

    Returns:
        The same model.

    Raises:
        ValueError: There is no `FactorizedGPT2` in it, or trl has not replaced its `forward`.
    """
    inner = next((module for module in model.modules() if isinstance(module, FactorizedGPT2)), None)
    if inner is None:
        raise ValueError(f"{type(model).__name__} contains no FactorizedGPT2.")
    if "forward" not in vars(inner):
        raise ValueError("trl has not replaced the model's forward yet: create the trainer first.")
    of_trl = inner.forward.__func__

    @functools.wraps(type(inner).forward)
    def forward(self, *args, fused_lm_head: bool = False, **kwargs):
        shown = _UpToTheHead(self) if fused_lm_head else self
        return of_trl(shown, *args, fused_lm_head=fused_lm_head, **kwargs)

    inner.forward = MethodType(forward, inner)
    return model


class _HeadMatrix(NamedTuple):
    """A head as it is read: a matrix (V, k) that need not be a parameter of its own."""

    weight: torch.Tensor
    bias: None = None


class _UpToTheHead:
    """A `FactorizedGPT2` whose hidden states are k wide, and whose head is its matrix."""

    def __init__(self, model: FactorizedGPT2):
        self._model = model

    def base_model(self, *args, **kwargs) -> BaseModelOutputWithPast:
        """Compute what the head is applied to, (B, T, k); arguments are the trunk's."""
        outputs = self._model.transformer(*args, **kwargs | {"return_dict": True})
        outputs.last_hidden_state = self._model.to_head_width(outputs.last_hidden_state)
        return outputs

    def get_output_embeddings(self) -> nn.Module | _HeadMatrix:
        """Return the head, or the matrix that it follows."""
        head = self._model.head_or_matrix()
        return _HeadMatrix(head) if isinstance(head, torch.Tensor) else head

    def __getattr__(self, name: str):
        return getattr(self._model, name)
