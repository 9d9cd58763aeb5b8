"""A saved model is what it was in memory, or it is not kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..common.errors import UserError
from .foreign_models import positions_of

PROBE_TOKENS = 64
TOLERANCE = 1e-4  # largest difference of a logit, relative to the largest where that exceeds 1


@torch.no_grad()
def probe_logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Compute logits in evaluation mode, (B, T, V) float32 on the CPU."""
    device = next(model.parameters()).device
    with _full_float32():
        return model.eval()(input_ids=input_ids.to(device), use_cache=False).logits.float().cpu()


@contextmanager
def _full_float32() -> Iterator[None]:
    """Multiply float32 with all its bits on CUDA too.

    `TrainingArguments` turn TF32 on where bfloat16 is compiled, for all that follows in the process. Its 11 bits would
    tell a merged adapter from the adapter beside its matrix.
    """
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before


def verify_saved(folder: Path, probe: torch.Tensor, expected: torch.Tensor, device: torch.device, name: Path) -> float:
    """Reload a model that was just saved, and compare it with what was to be saved.

    Args:
        folder: Where it is.
        probe: (B, T) int64 token ids.
        expected: (B, T, V) float32, the logits that they must give: of the model in memory or, where adapters were
            merged, of the model that still had them.
        device: Where `expected` was computed.
        name: The folder that errors name, if the model is yet to be moved there.

    Returns:
        The largest difference of a logit.

    Raises:
        UserError: The model in memory has logits that are NaN or infinite.
        RuntimeError: The reloaded model's logits differ.
    """
    if not torch.isfinite(expected).all():
        raise UserError(
            f"The model for {name} computes NaN or infinity and was not saved: check the model it was made from."
        )
    reloaded = nn.Module.to(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False), device)
    difference = (probe_logits(reloaded, probe) - expected).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
        raise RuntimeError(
            f"The model saved for {name} does not equal the model in memory: logits differ by {difference:.2e}. "
            "It is not kept."
        )
    return difference


def verify_copy(model: PreTrainedModel, folder: Path, name: Path) -> None:
    """Reload a model that was just saved as it is in memory, and compare the two on tokens of the whole vocabulary.

    Args:
        model: In memory; put into evaluation mode.
        folder: Where it was saved.
        name: The folder that errors name, if the model is yet to be moved there.

    Raises:
        UserError: The model in memory has logits that are NaN or infinite.
        RuntimeError: The reloaded model's logits differ.
    """
    vocab_size = model.config.vocab_size
    length = min(PROBE_TOKENS, positions_of(model.config) or PROBE_TOKENS, vocab_size)
    probe = torch.linspace(0, vocab_size - 1, length).long()[None]
    verify_saved(folder, probe, probe_logits(model, probe), model.device, name)
