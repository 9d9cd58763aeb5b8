"""The type of a model's weights, when it is asked for by name."""

from typing import TypeVar

import torch
from transformers import PreTrainedModel

from ..common.errors import UserError

Model = TypeVar("Model", bound=PreTrainedModel)


def dtype_name(model: PreTrainedModel) -> str:
    """Name the type of a model's weights, as in "bfloat16"."""
    return str(model.dtype).removeprefix("torch.")


def in_dtype(model: Model, name: str | None) -> Model:
    """Round a model's weights to a type, in place.

    Args:
        model: Of any floating type.
        name: Such as "float16"; `None` leaves the model as it is.

    Returns:
        The model.

    Raises:
        UserError: A weight is too large for the type, and would become infinite.
    """
    if name is None:
        return model
    dtype = getattr(torch, name)
    largest = torch.finfo(dtype).max
    for weight_name, weight in model.named_parameters():
        if weight.detach().abs().max() > largest:
            raise UserError(f"The weight {weight_name!r} is too large for dtype {name}; use bfloat16.")
    return model.to(dtype)
