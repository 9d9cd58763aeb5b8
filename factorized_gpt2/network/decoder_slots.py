"""Where a decoder of transformers has its token embedding and its head, and what stands there in their place."""

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class Slot(nn.Module):
    """Stands in the decoder for a matrix, and has the model around it compute; no modules or weights of its own."""

    def __init__(self, owner: PreTrainedModel):
        super().__init__()
        self.owner: tuple[Any] = (owner,)  # in a tuple it is no module of this one


class EmbeddingSlot(Slot):
    """Returns what the decoder takes for embeddings, whatever scale of them there is included."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        (owner,) = self.owner
        return owner.to_hidden_width(owner.wte(ids))

    @property
    def weight(self) -> torch.Tensor:
        """For dtype and device, which some decoders ask for."""
        return self.owner[0].scale_up.weight


class HeadSlot(Slot):
    """Returns logits; or, where `states` is a list, puts what `lm_head` would be given there and returns it.

    Attributes:
        is_last: Whether what this returns is what the decoder returns, with neither scale nor cap; `None`: not known.
    """

    states: list[torch.Tensor] | None = None
    is_last: bool | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        (owner,) = self.owner
        if self.states is None:
            return owner.compute_logits(hidden_states)
        self.states.append(owner.to_head_width(hidden_states))
        return self.states[-1]

    @property
    def weight(self) -> torch.Tensor:
        """For dtype and device, which some decoders ask for."""
        return self.owner[0].scale_down.weight


def is_encoder(config: PretrainedConfig) -> bool:
    """Tell whether a configuration is of a network that is a decoder only where it says so, and it does not."""
    return hasattr(config, "add_cross_attention") and getattr(config, "is_decoder", True) is False


def vocabulary_of(model: PreTrainedModel) -> tuple[nn.Embedding, nn.Linear, float]:
    """Find what a factorization replaces in a causal language model.

    Returns:
        The token embedding, the head, and the number by which the embedding multiplies what it looks up.

    Raises:
        ValueError: The model is no decoder with an embedding and a linear head on the same width.
    """
    name, config = type(model).__name__, model.config
    needed = "supported are causal decoders with one token embedding and one linear head."
    if hasattr(config, "n_embd_wte"):
        raise ValueError(f"{name} is a model of this package already; {needed}")
    if is_encoder(config):
        raise ValueError(f"{name} is an encoder, unless its config says is_decoder; {needed}")
    if config.is_encoder_decoder or config.get_text_config(decoder=True) is not config:
        raise ValueError(f"{name} is made of more than a decoder of text; {needed}")
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        embedding, head = None, None
    if not (isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear)):
        found = " and ".join("none" if part is None else type(part).__name__ for part in (embedding, head))
        raise ValueError(f"{name} has as embedding and head: {found}; {needed}")
    if embedding.weight.shape != head.weight.shape:
        shapes = tuple(embedding.weight.shape), tuple(head.weight.shape)
        raise ValueError(f"{name} has an embedding of shape {shapes[0]} and a head of {shapes[1]}; {needed}")
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    if type(embedding) is not nn.Embedding and not isinstance(scale, int | float):
        raise ValueError(f"{name} looks tokens up by a {type(embedding).__name__}, which is not known here; {needed}")
    if getattr(model, "_is_stateful", False) or hasattr(config, "hidden_size_per_layer_input"):
        raise ValueError(f"{name} is recurrent or looks tokens up in every layer; {needed}")
    return embedding, head, 1.0 if scale is None else float(scale)
