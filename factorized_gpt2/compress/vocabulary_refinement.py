"""Refinement of a vocabulary that stands for another: what is trainable of it is fitted to the original's predictions.

The trunk does not change, and of a coded table only few numbers do: its codes stay what they are.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from ..common.errors import UserError
from ..common.progress import Progress
from ..network.coded_table import BIAS_NAT, GAIN_OCTAVE, CodedTable
from ..trainer.distillation import divergence_rows

LEAST_RATE = 0.05  # of the largest, at the end of the cosine
_WARMUP = 5  # steps, or a tenth of them if those are fewer
_ROWS_AT_ONCE = 512  # of logits, (rows, V)

Trunk = Callable[[torch.Tensor], torch.Tensor]  # embeddings (B, T, d) to what the head is given, (B, T, d)


class TrainableVocabulary(nn.Module, ABC):
    """Both uses of a vocabulary, of which parts are trainable.

    Attributes:
        tokens_per_step: How many a step learns from.
    """

    tokens_per_step = 1024

    @abstractmethod
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Look tokens (B, T) up: (B, T, d)."""

    @abstractmethod
    def score(self, states: torch.Tensor) -> torch.Tensor:
        """Compute products (n, V) of states (n, d) with the head's matrix, and what bias there is in it."""

    @abstractmethod
    def parameter_groups(self, divergence: float) -> list[dict]:
        """Return parameters with their largest learning rates, as an optimizer takes them.

        Args:
            divergence: Of the start, in nats a token.
        """

    @abstractmethod
    def round(self) -> None:
        """Round parameters to what is stored of them."""


@dataclass(frozen=True)
class Teacher:
    """The original model's vocabulary, and blocks of text to predict.

    Attributes:
        weight: (V, d) floats, the original head.
        ids: (n, T) int64, tokens.
        states: (n, T, d) floats, what the original head is given, where it is known.
        embedding: (V, d) floats, the original embedding; `None` where it is tied.
        finish: What makes logits of what a head computes, (n, V) to (n, V); `None`: they are the logits.
    """

    weight: torch.Tensor
    ids: torch.Tensor
    states: torch.Tensor | None = None
    embedding: torch.Tensor | None = None
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __getitem__(self, rows: slice | torch.Tensor) -> "Teacher":
        return replace(self, ids=self.ids[rows], states=None if self.states is None else self.states[rows])

    def divergence(self, vocabulary: TrainableVocabulary, trunk: Trunk, backward: bool = False) -> float:
        """Compute KL(original || small) in nats a token, logits of some rows at a time.

        Args:
            vocabulary: The small one.
            trunk: Of both.
            backward: Whether to add its gradient to that of the vocabulary's parameters.

        Returns:
            The mean over all tokens.
        """
        finish = self.finish or (lambda logits: logits)
        hidden = trunk(vocabulary.embed(self.ids)).flatten(0, 1)
        states = hidden.detach().requires_grad_(backward)
        nats = 0.0
        parts = (each.split(_ROWS_AT_ONCE) for each in (states, self._read(trunk).flatten(0, 1)))
        for own, original in zip(*parts, strict=True):
            logits = finish(vocabulary.score(own))
            with torch.no_grad():
                divergences, gradients = divergence_rows(logits.detach(), finish(original @ self.weight.T))
            nats += divergences.sum().item()
            if backward:
                logits.backward(gradients / len(states))
        if backward:
            hidden.backward(states.grad)
        return nats / len(states)

    @torch.no_grad()
    def _read(self, trunk: Trunk) -> torch.Tensor:
        embedding = self.weight if self.embedding is None else self.embedding
        return trunk(nn.functional.embedding(self.ids, embedding)) if self.states is None else self.states


def refine_vocabulary(
    vocabulary: TrainableVocabulary,
    trunk: Trunk,
    teacher: Teacher,
    held_out: Teacher,
    steps: int,
    seed: int = 0,
    progress: bool = False,
) -> tuple[float, float]:
    """Train a vocabulary in place: Adam, a cosine schedule, no weight decay.

    Args:
        vocabulary: What to train.
        trunk: Of which no parameter requires a gradient.
        teacher: The text to train on; used more than once if it is too short.
        held_out: Other text, by which is decided whether the result is better than the start.
        steps: How many, of `tokens_per_step` tokens.
        seed: Of the order of the blocks.
        progress: Whether to show a bar.

    Returns:
        The divergence on `held_out` before and after, in nats a token. Where it did not fall, the vocabulary is what
        it was, and both are equal.

    Raises:
        UserError: NaN or infinity on the way.
    """
    generator = torch.Generator().manual_seed(seed)
    start = copy.deepcopy(vocabulary.state_dict())
    before = _finite(_measure(vocabulary, trunk, held_out), "before its first step")
    optimizer = torch.optim.Adam(vocabulary.parameter_groups(before), betas=(0.9, 0.95), eps=1e-12)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
    at_once = max(1, vocabulary.tokens_per_step // teacher.ids.shape[1])
    order = torch.empty(0, dtype=torch.int64)
    for step in Progress(range(steps), desc="Refining", disable=not progress):
        while len(order) < at_once:
            order = torch.cat([order, torch.randperm(len(teacher.ids), generator=generator)])
        rows, order = order[:at_once], order[at_once:]
        optimizer.zero_grad()
        _finite(teacher[rows].divergence(vocabulary, trunk, backward=True), f"after {step} steps")
        optimizer.step()
        schedule.step()
    vocabulary.round()
    after = _measure(vocabulary, trunk, held_out)
    if not after < before:
        vocabulary.load_state_dict(start)
        after = before
    return before, after


def _finite(divergence: float, when: str) -> float:
    if not math.isfinite(divergence):
        raise UserError(
            f"Refinement failed: the divergence from the original model is {divergence} {when}. Compress without it."
        )
    return divergence


class RefinableTable(TrainableVocabulary):
    """A coded table whose codes and rotation stay: trainable are gains of rows and of both sides' columns, mean, bias.

    A token whose probability is seldom far from zero has gradients below `eps` and hardly moves: Adam alone would
    move all tokens alike, most of them by noise.

    Args:
        table: As quantized or refined before.
        dtype: Of the products with codes; half precision holds int8 codes exactly.
    """

    codes: torch.Tensor
    steps: torch.Tensor
    rotation: torch.Tensor
    up_steps: torch.Tensor
    down_steps: torch.Tensor

    def __init__(self, table: CodedTable, dtype: torch.dtype = torch.float32):
        super().__init__()
        self._table = table
        fixed = {
            **{"codes": table.codes, "steps": table.steps, "rotation": table.scale_codes},
            **{"up_steps": table.scale_steps, "down_steps": table.head_scale_steps},
        }
        for name, array in fixed.items():
            self.register_buffer(name, torch.tensor(array, dtype=torch.float32), persistent=False)
        self.codes = self.codes.to(dtype)
        self.up_gains, self.down_gains = (nn.Parameter(torch.zeros(len(self.up_steps))) for _ in range(2))
        self.gains = nn.Parameter(torch.zeros(len(self.steps)))
        self.mean = nn.Parameter(torch.from_numpy(table.mean.astype(np.float32)))
        self.bias = nn.Parameter(torch.from_numpy(table.bias))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Look tokens (B, T) up: (B, T, d)."""
        rows = self.codes[ids].float() * (self.steps * self.gains.exp())[ids].unsqueeze(-1)
        return (rows * (self.up_steps * self.up_gains.exp())) @ self.rotation + self.mean

    def score(self, states: torch.Tensor) -> torch.Tensor:
        """Compute logits (n, V) of states (n, d)."""
        turned = states @ self.rotation.T * (self.down_steps * self.down_gains.exp())
        products = (turned.to(self.codes.dtype) @ self.codes.T).float()
        return products * (self.steps * self.gains.exp()) + self.bias

    def parameter_groups(self, divergence: float) -> list[dict]:
        """Return parameters with their largest learning rates, as an optimizer takes them."""
        spread = float(self.mean.detach().std()) + 1e-12
        return [
            {"params": [self.up_gains, self.down_gains], "lr": 5e-3},
            {"params": [self.mean], "lr": 0.01 * spread},
            {"params": [self.gains], "lr": 5e-3, "eps": 1e-5},
            {"params": [self.bias], "lr": 2e-2, "eps": 1e-6},
        ]

    @torch.no_grad()
    def round(self) -> None:
        """Round parameters to what is stored of them."""
        table = self.table()
        device = self.gains.device
        columns = (table.scale_steps, table.head_scale_steps)
        up, down = (torch.from_numpy(array.astype(np.float32)).to(device) for array in columns)
        self.gains.copy_(torch.from_numpy(np.log(table.steps)).to(device) - self.steps.log())
        self.bias.copy_(torch.from_numpy(table.bias))
        self.mean.copy_(torch.from_numpy(table.mean.astype(np.float32)))
        self.up_gains.copy_(up / self.up_steps).log_()
        self.down_gains.copy_(down / self.down_steps).log_()

    @torch.no_grad()
    def table(self) -> CodedTable:
        """Return the coded table that results."""
        octaves = self.gains.cpu().numpy() / math.log(2) + self._table.gains / GAIN_OCTAVE
        return replace(
            self._table,
            gains=_to_int8(GAIN_OCTAVE * octaves),
            bias_codes=_to_int8(BIAS_NAT * self.bias.cpu().numpy()),
            mean=self.mean.cpu().numpy().astype(np.float16),
            scale_steps=(self.up_steps * self.up_gains.exp()).cpu().numpy().astype(np.float16),
            head_scale_steps=(self.down_steps * self.down_gains.exp()).cpu().numpy().astype(np.float16),
        )


def _to_int8(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), -127, 127).astype(np.int8)


@torch.no_grad()
def _measure(vocabulary: TrainableVocabulary, trunk: Trunk, held_out: Teacher) -> float:
    parts = [held_out[slice(row, row + 1)] for row in range(len(held_out.ids))]
    return sum(part.divergence(vocabulary, trunk) for part in parts) / len(parts)


def _share(step: int, steps: int) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    warmup = max(1, min(_WARMUP, steps // 10))
    return min(1.0, (step + 1) / warmup) * (LEAST_RATE + (1 - LEAST_RATE) * cosine)
