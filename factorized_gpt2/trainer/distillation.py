"""How far a model is from its teacher: the Kullback-Leibler divergence of their next-token distributions."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..network.blockwise_loss import RowLoss, cross_entropy_rows
from ..text.blocks import IGNORED_LABEL


def divergence_rows(
    logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute KL(teacher || student) of rows of logits (Hinton et al., 2015) and its gradient by the student's.

    With p = softmax(teacher / t) and q = softmax(student / t), row by row: `t**2 * (p * (p.log() - q.log())).sum(-1)`.
    The factor t**2 keeps the gradient's scale as t grows.

    Args:
        logits: (n, V) float32 of the student.
        teacher_logits: (n, V) floats.
        temperature: t > 0.

    Returns:
        The divergences (n, 1) in nats and their gradients (n, V), both float32.
    """
    teacher = (teacher_logits.float() / temperature).log_softmax(-1)
    student = (logits / temperature).log_softmax(-1)
    probabilities = teacher.exp()
    divergences = (probabilities * teacher.sub_(student)).sum(-1, keepdim=True)
    return divergences * temperature**2, student.exp_().sub_(probabilities).mul_(temperature)


@torch.no_grad()
def has_plain_logits(model: PreTrainedModel) -> bool:
    """Tell whether a decoder's logits are what its head computes, with neither a scale nor a cap after it."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    states = model.get_decoder()(ids, use_cache=False).last_hidden_state
    return torch.allclose(model(ids, use_cache=False).logits, model.get_output_embeddings()(states), rtol=1e-4)


@dataclass(frozen=True)
class Distillation:
    """A teacher, and how much of the loss it gives.

    Attributes:
        teacher: A decoder whose logits are what its head computes (`has_plain_logits`), not factorized and without
            adapters. Its parameters take no gradient; put into evaluation mode.
        weight: w in [0, 1] of `(1 - w) * cross_entropy + w * KL(teacher || student)`.
        temperature: Of both distributions in the divergence.
    """

    teacher: PreTrainedModel
    weight: float
    temperature: float = 1.0

    def __post_init__(self) -> None:
        self.teacher.eval().requires_grad_(False)

    @torch.no_grad()
    def row_loss(self, input_ids: torch.Tensor, labels: torch.Tensor) -> RowLoss:
        """Make the mixed loss of a batch, for a model that takes it as `row_loss`.

        Neither model's logits are ever there as a whole. Positions count of which the next label does. Under autocast
        the teacher computes in its dtype.

        Args:
            input_ids: (B, T) int64.
            labels: (B, T) int64, not shifted.

        Returns:
            The loss of rows; its sum is in nats.
        """
        states = self.teacher.get_decoder()(input_ids, use_cache=False).last_hidden_state.flatten(0, 1)  # [B * T, d]
        head, kind = self.teacher.get_output_embeddings(), input_ids.device.type
        # The blocks come later, without autocast: cast once here for all of them.
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
        states, weight = states.to(dtype), head.weight.to(dtype)
        bias = None if head.bias is None else head.bias.to(dtype)
        next_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()

        def mixed_rows(logits: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            counts = (next_labels[rows, None] != IGNORED_LABEL).float()
            losses, gradients = divergence_rows(
                logits, nn.functional.linear(states[rows], weight, bias), self.temperature
            )
            if self.weight == 1:
                logits.copy_(gradients)
                return losses * counts, counts
            cross_entropies, scales = cross_entropy_rows(logits, rows, next_labels)
            logits.mul_(scales * (1 - self.weight)).add_(gradients, alpha=self.weight)
            return torch.lerp(cross_entropies, losses, self.weight) * counts, counts

        return mixed_rows
