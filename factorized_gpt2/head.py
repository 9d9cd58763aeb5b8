"""The head of a language model, and what stands before it, for those who multiply the two themselves."""

from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast


def bare(head: nn.Module | torch.Tensor) -> nn.Module | torch.Tensor:
    """Return a head's matrix (V, k) where that is all there is to it: no bias, no adapter, no hook that acts."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_hf_hook")  # the last is accelerate's
    plain = type(head) is nn.Linear and head.bias is None and not any(getattr(head, name, None) for name in hooks)
    return head.weight if plain else head


class HeadMatrix(NamedTuple):
    """A head as it is read: a matrix (V, k) that need not be a parameter of its own."""

    weight: torch.Tensor
    bias: None = None


class UpToTheHead:
    """A `FactorizedGPT2` without its head: the trunk, then `scale_down`; in all else, the trunk.

    Some tools never make all logits at once: they take `model.base_model(...).last_hidden_state`, and a few rows of it
    at a time times the transposed `model.get_output_embeddings().weight`. trl's trainers do. For them the states are
    (B, T, k) here; and as the head may follow an adapter on `wte`, which its weight does not show, a call leaves word
    that the head is about to be read.
    """

    def __init__(self, model: nn.Module):
        self._model = model

    def __call__(self, *args, **kwargs) -> BaseModelOutputWithPast:
        """Compute what the head is applied to; arguments are the trunk's."""
        outputs = self._model.transformer(*args, **kwargs | {"return_dict": True})
        outputs.last_hidden_state = self._model.to_head_width(outputs.last_hidden_state)
        self._model.head_is_read = True
        return outputs

    def __getattr__(self, name: str):
        return getattr(self._model.transformer, name)

    def __eq__(self, other: object) -> bool:
        """Pass for the trunk: a base model with an encoder other than itself counts as an encoder-decoder."""
        return other is self._model.transformer
