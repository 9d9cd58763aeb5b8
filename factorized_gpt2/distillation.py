"""How far a model is from its teacher: the Kullback-Leibler divergence of their next-token distributions."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .data import IGNORED_LABEL
from .modeling_factorized_gpt2 import FactorizedGPT2

ROWS_AT_ONCE = (
    512  # of the teacher's logits, (rows, V); all of them at once would take as much memory as the student's
)


def kl_divergence(
    logits: torch.Tensor,
    teacher_logits_of: Callable[[slice], torch.Tensor],
    counted: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Sum KL(teacher || student) over tokens (Hinton et al., 2015), with the teacher's logits never there as a whole.

    With p = softmax(teacher / t) and q = softmax(student / t), row by row:
    `t**2 * (counted * (p * (p.log() - q.log())).sum(-1)).sum()`. The factor t**2 keeps the
    gradient's scale as t grows.

    Args:
        logits: (N, V) floats of the student; differentiable.
        teacher_logits_of: Gives the teacher's logits (n, V) of n rows.
        counted: (N,) bool, which rows count.
        temperature: t > 0.

    Returns:
        Scalar float32, in nats.
    """
    return _KLDivergence.apply(logits, teacher_logits_of, counted, temperature)


class _KLDivergence(torch.autograd.Function):
    """Takes the gradient on the way forward, a few rows at a time: one tensor of the logits' size, their gradient."""

    @staticmethod
    def forward(ctx, logits, teacher_logits_of, counted, temperature):
        gradient = torch.empty_like(logits)
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for start in range(0, len(logits), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            counts = counted[rows].float()[:, None]
            teacher = (teacher_logits_of(rows).float() / temperature).log_softmax(-1)
            student = (logits[rows].float() / temperature).log_softmax(-1)
            probabilities = teacher.exp()
            total += (probabilities * (teacher - student) * counts).sum()
            gradient[rows] = (student.exp_() - probabilities) * (counts * temperature)
        ctx.save_for_backward(gradient)
        return total * temperature**2

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None


@dataclass(frozen=True)
class Distillation:
    """A teacher, and how much of the loss it gives.

    Attributes:
        teacher: Its parameters take no gradient; put into evaluation mode.
        weight: w in [0, 1] of `(1 - w) * cross_entropy + w * KL(teacher || student)`.
        temperature: Of both distributions in the divergence.
    """

    teacher: FactorizedGPT2
    weight: float
    temperature: float = 1.0

    def __post_init__(self) -> None:
        self.teacher.eval().requires_grad_(False)

    @torch.no_grad()
    def divergence(self, logits: torch.Tensor, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sum the divergence over the positions of which the next label counts.

        Args:
            logits: (B, T, V) of the student; differentiable.
            input_ids: (B, T) int64.
            labels: (B, T) int64, not shifted.

        Returns:
            Scalar float32, in nats.
        """
        hidden_states = self.teacher.transformer(input_ids).last_hidden_state.flatten(0, 1)  # [B * T, d]
        counted = nn.functional.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1)).flatten()

        def teacher_logits_of(rows: slice) -> torch.Tensor:
            return self.teacher.compute_logits(hidden_states[rows])

        with torch.enable_grad():
            return kl_divergence(logits.flatten(0, 1), teacher_logits_of, counted, self.temperature)
