"""The head of a language model."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .coded_vocabulary import CodedEmbedding

# What derives from `FactorizedHead` is such a model.
if TYPE_CHECKING:
    _Model = PreTrainedModel
else:
    _Model = object


def bare(head: nn.Module | torch.Tensor) -> nn.Module | torch.Tensor:
    """Return a head's matrix (V, k) where that is all there is to it: no bias, no adapter, no hook that acts."""
    if type(head) is nn.Linear and head.bias is None and not has_hooks(head):
        return head.weight
    return head


def has_hooks(head: nn.Module) -> bool:
    """Tell whether something happens when a head is called, beside what its class does."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_hf_hook")  # the last is accelerate's
    return any(getattr(head, name, None) for name in hooks)


def share_matrix(embedding: nn.Embedding, head: nn.Module) -> None:
    """Give a head the matrix of what was put in the place of the embedding that it is tied to."""
    # Different shapes mean a resizing under way, which ties the head itself; copies of the model for several
    # devices (`nn.DataParallel`) are put together of modules that have no parameters.
    weight = embedding._parameters.get("weight")
    if isinstance(head, nn.Linear) and weight is not None and weight.shape == head.weight.shape:
        head.weight = weight


class FactorizedHead(_Model):
    """What a language model with `scale_down` (d, k), or without, and `lm_head` (k, V) computes with them.

    The tie of the head to the embedding holds for adapters too, which act on both.
    """

    scale_down: nn.Linear | None
    lm_head: Any  # linear, coded, or with an adapter around it

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map final hidden states to logits: `lm_head(scale_down(hidden_states))`.

        Args:
            hidden_states: (..., d) floats, what the trunk ends with.

        Returns:
            (..., V) logits.

        Raises:
            ValueError: An adapter on a head that is tied to `wte`.
        """
        hidden_states, head = self.to_head_width(hidden_states), self.head_or_matrix()
        return head(hidden_states) if isinstance(head, nn.Module) else nn.functional.linear(hidden_states, head)

    def to_head_width(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states if self.scale_down is None else self.scale_down(hidden_states)  # [..., d] -> [..., k]

    def head_or_matrix(self) -> nn.Module | torch.Tensor:
        """Return what maps (..., k) to logits: a module, or where `wte` is adapted and the head follows it, (V, k)."""
        if not self.config.tie_word_embeddings:
            return self.lm_head
        adapter = getattr(self.lm_head, "token_adapter", self.lm_head)  # of trained tokens
        own = any(hasattr(adapter, name) for name in ("base_layer", "modules_to_save"))
        if own and not getattr(adapter, "tied_adapter", None):
            raise ValueError(
                "lm_head is tied to wte and cannot carry an adapter of its own: target wte (the head follows it), or "
                "untie the head first (tie_word_embeddings=False)."
            )
        wte = self.get_input_embeddings()
        if isinstance(wte, nn.Embedding | CodedEmbedding):
            return self.lm_head
        # In one row: hooks on an embedding, such as NEFTune's, count on a batch.
        return wte(torch.arange(self.config.vocab_size, device=self.lm_head.weight.device)[None])[0]
