"""A baseline apart from its vocabulary, so that another vocabulary can be put in the place of its own."""

import copy
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..common.errors import UserError
from ..network.decoder_slots import vocabulary_of
from ..network.modeling_factorized_gpt2 import FactorizedGPT2


class Original:
    """A language model cut in three: what is before its head, its two matrices, and what comes after its head.

    It computes in float32 and without dropout, and none of its parameters takes a gradient.

    Args:
        model: Unfactorized, a GPT-2 or another decoder. It is not changed.
        device: Where to compute.

    Attributes:
        embedding: (V, d) float32, by which tokens are looked up.
        head: (V, d) float32, by which states are scored; the same tensor where it is tied.

    Raises:
        UserError: Its logits depend on more than what its head computes.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device | str = "cpu"):
        self._scale = 1.0 if isinstance(model, FactorizedGPT2) else vocabulary_of(model)[2]
        self._model = nn.Module.to(copy.deepcopy(model), device, torch.float32).eval().requires_grad_(False)
        head = cast(nn.Linear, self._model.get_output_embeddings())
        self.embedding = cast(nn.Embedding, self._model.get_input_embeddings()).weight
        self.head, self._bias = head.weight, head.bias
        self._seam = _Seam(self.head)
        self._model.set_output_embeddings(self._seam)
        probe = self.head[None, :1]
        once, again = (self._after_head(probe, token) for token in (0, 1))
        if once.shape != probe.shape or not torch.equal(once, again):
            raise UserError(
                f"{type(model).__name__} makes logits of more than its head computes, which refine cannot do."
            )
        self._is_last = once is probe

    def trunk(self, embeds: torch.Tensor) -> torch.Tensor:
        """Lead embeddings (B, T, d), as looked up in `embedding`, to what the head is given, (B, T, d)."""
        self._run(embeds)
        states, self._seam.states = self._seam.states, None
        return states

    def finish(self, products: torch.Tensor) -> torch.Tensor:
        """Make logits (n, V) of the head's products with states, (n, V): add its bias, scale and cap them."""
        products = products if self._bias is None else products + self._bias
        return products if self._is_last else self._after_head(products[None])[0]

    def _after_head(self, products: torch.Tensor, token: int = 0) -> torch.Tensor:
        """Run the decoder over a token, and have the head answer with products (1, n, V): what becomes of those."""
        self._seam.answer = products
        try:
            return self._run(self.embedding[None, token : token + 1])
        finally:
            self._seam.answer = self._seam.states = None

    def _run(self, embeds: torch.Tensor) -> torch.Tensor:
        return self._model(inputs_embeds=self._scale * embeds, use_cache=False).logits


class _Seam(nn.Module):
    """Stands in the place of the head: keeps what it is given, and answers with it or with what it is told."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = weight  # for dtype and device, which some decoders ask for
        self.states: torch.Tensor | None = None
        self.answer: torch.Tensor | None = None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        self.states = states
        return states if self.answer is None else self.answer
