"""The head of a language model."""

import torch
from torch import nn


def bare(head: nn.Module | torch.Tensor) -> nn.Module | torch.Tensor:
    """Return a head's matrix (V, k) where that is all there is to it: no bias, no adapter, no hook that acts."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_hf_hook")  # the last is accelerate's
    plain = type(head) is nn.Linear and head.bias is None and not any(getattr(head, name, None) for name in hooks)
    return head.weight if plain else head
