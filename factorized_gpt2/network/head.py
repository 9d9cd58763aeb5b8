"""The head of a language model."""

import torch
from torch import nn


def bare(head: nn.Module | torch.Tensor) -> nn.Module | torch.Tensor:
    """Return a head's matrix (V, k) where that is all there is to it: no bias, no adapter, no hook that acts."""
    if type(head) is nn.Linear and head.bias is None and not has_hooks(head):
        return head.weight
    return head


def has_hooks(head: nn.Module) -> bool:
    """Tell whether something happens when a head is called, beside what its class does."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_hf_hook")  # the last is accelerate's
    return any(getattr(head, name, None) for name in hooks)
