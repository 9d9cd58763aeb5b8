"""Loss over a whole split."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from ..common.progress import Progress
from .blocks import IGNORED_LABEL, Blocks, batches_of


@dataclass(frozen=True)
class LossSum:
    """Negative log-likelihood summed over tokens.

    Attributes:
        nats: Sum over all predicted tokens, in nats.
        tokens: How many tokens were predicted: in a block of T, all but the first.
    """

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Mean over tokens, in nats a token."""
        return self.nats / self.tokens if self.tokens else math.nan


def perplexity(loss: float) -> float:
    """`exp(loss)` of a loss in nats a token; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def sum_loss(
    model: nn.Module,
    blocks: Blocks,
    batch_size: int,
    device: torch.device | str = "cpu",
    context: Callable[[], AbstractContextManager] = nullcontext,
    desc: str | None = None,
    counted: int | None = None,
) -> LossSum:
    """Sum a causal language model's loss over every predicted token of `blocks`.

    The result does not depend on the batch size beyond rounding.

    Args:
        model: Takes `input_ids`, `labels` (B, T), `num_items_in_batch` and `skip_logits`, returns `loss`. Its mode is
            restored.
        blocks: Rows of `input_ids`.
        batch_size: Blocks a forward pass.
        device: Where the model is.
        context: Makes the context manager around every forward pass, such as autocast.
        desc: Label of the progress bar; `None` for no bar.
        counted: How many of the blocks count, from the first; the others only pass through the model, as they must
            where it is sharded over processes whose shares differ. `None`: all.

    Returns:
        The sum and its number of tokens.
    """
    counted = len(blocks) if counted is None else counted
    batches = batches_of(blocks, batch_size)
    bar = Progress(batches, desc=desc, disable=desc is None)
    return sum_batches(model, _counting(bar, counted), device, context)


def _counting(batches: Iterable[dict[str, torch.Tensor]], counted: int) -> Iterator[dict[str, torch.Tensor]]:
    """Take the labels out of all rows after the first `counted`."""
    for batch in batches:
        batch["labels"][max(0, counted) :] = IGNORED_LABEL
        counted -= len(batch["labels"])
        yield batch


@torch.no_grad()
def sum_batches(
    model: nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    device: torch.device | str = "cpu",
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> LossSum:
    """Sum a causal language model's loss over every label of batches.

    Within a batch the sum is the model's own, in float32 (`num_items_in_batch=1` turns its mean into a sum); over
    batches it is kept in float64.

    Args:
        model: As in `sum_loss`; takes `shift_labels` where the batches have them.
        batches: `input_ids`, `labels` and, if they are shifted already, `shift_labels`, each (B, T) int64.
        device: Where the model is.
        context: As in `sum_loss`.

    Returns:
        The sum and its number of tokens.
    """
    was_training = model.training
    model.eval()
    nats, tokens = torch.zeros((), dtype=torch.float64), 0
    try:
        for batch in batches:
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            with context():
                outputs = model(**on_device, num_items_in_batch=1, use_cache=False, skip_logits=True)
            nats += outputs.loss.cpu().double()
            labels = batch["shift_labels"] if "shift_labels" in batch else batch["labels"][:, 1:]
            tokens += int((labels != IGNORED_LABEL).sum())
    finally:
        model.train(was_training)
    return LossSum(nats.item(), tokens)
