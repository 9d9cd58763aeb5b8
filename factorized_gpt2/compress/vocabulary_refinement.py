"""Refinement of a vocabulary that stands for another: what is trainable of it is fitted to the original's predictions.

The trunk does not change, and of the vocabulary only few numbers do: codes of a coded table stay what they are.
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

TOKENS_PER_STEP = 1024
LEAST_RATE = 0.05  # of the largest, at the end of the cosine
_WARMUP = 5  # steps
_ROWS_AT_ONCE = 512  # of logits, (rows, V)

Trunk = Callable[[torch.Tensor], torch.Tensor]  # embeddings (B, T, d) to what the head is given, (B, T, d)


class TrainableVocabulary(nn.Module, ABC):
    """Both uses of a vocabulary, of which parts are trainable."""

    @abstractmethod
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Look tokens (B, T) up: (B, T, d)."""

    @abstractmethod
    def score(self, states: torch.Tensor) -> torch.Tensor:
        """Compute logits (n, V) of states (n, d)."""

    @abstractmethod
    def parameter_groups(self) -> list[dict]:
        """Return parameters with their largest learning rates, as an optimizer takes them."""

    @abstractmethod
    def round(self) -> None:
        """Round parameters to what is stored of them."""


@dataclass(frozen=True)
class Teacher:
    """What the original model predicts on blocks of text.

    Attributes:
        weight: (V, d) float32, the original vocabulary.
        ids: (n, T) int64, tokens.
        states: (n, T, d) float32, what the original head is given.
    """

    weight: torch.Tensor
    ids: torch.Tensor
    states: torch.Tensor

    @staticmethod
    @torch.no_grad()
    def read(trunk: Trunk, weight: torch.Tensor, ids: torch.Tensor, desc: str | None = None) -> "Teacher":
        """Run the original model over blocks (n, T), one after the other."""
        rows = Progress(ids, desc=desc, disable=desc is None)
        return Teacher(weight, ids, torch.cat([trunk(nn.functional.embedding(row[None], weight)) for row in rows]))

    def __getitem__(self, rows: slice | torch.Tensor) -> "Teacher":
        return Teacher(self.weight, self.ids[rows], self.states[rows])

    def divergence(self, vocabulary: TrainableVocabulary, trunk: Trunk, backward: bool = False) -> float:
        """Compute KL(original || small) in nats a token, logits of some rows at a time.

        Args:
            vocabulary: The small one.
            trunk: Of both.
            backward: Whether to add its gradient to that of the vocabulary's parameters.

        Returns:
            The mean over all tokens.
        """
        hidden = trunk(vocabulary.embed(self.ids)).flatten(0, 1)
        states = hidden.detach().requires_grad_(backward)
        nats = 0.0
        parts = (each.split(_ROWS_AT_ONCE) for each in (states, self.states.flatten(0, 1)))
        for own, original in zip(*parts, strict=True):
            logits = vocabulary.score(own)
            with torch.no_grad():
                divergences, gradients = divergence_rows(logits.detach(), original @ self.weight.T)
            nats += divergences.sum().item()
            if backward:
                logits.backward(gradients / len(states))
        if backward:
            hidden.backward(states.grad)
        return nats / len(states)


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
        steps: How many, of `TOKENS_PER_STEP` tokens.
        seed: Of the order of the blocks.
        progress: Whether to show a bar.

    Returns:
        The divergence on `held_out` before and after, in nats a token. Where it grew, the vocabulary is what it was,
        and both are equal.

    Raises:
        UserError: NaN or infinity on the way.
    """
    generator = torch.Generator().manual_seed(seed)
    before, start = _measure(vocabulary, trunk, held_out), copy.deepcopy(vocabulary.state_dict())
    groups = vocabulary.parameter_groups()
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-12)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
    at_once = max(1, TOKENS_PER_STEP // teacher.ids.shape[1])
    order = torch.empty(0, dtype=torch.int64)
    for _ in Progress(range(steps), desc="refining", disable=not progress):
        while len(order) < at_once:
            order = torch.cat([order, torch.randperm(len(teacher.ids), generator=generator)])
        rows, order = order[:at_once], order[at_once:]
        optimizer.zero_grad()
        nats = teacher[rows].divergence(vocabulary, trunk, backward=True)
        if not math.isfinite(nats):
            raise UserError(f"Refinement failed: the divergence from the original model is {nats}.")
        optimizer.step()
        schedule.step()
    vocabulary.round()
    after = _measure(vocabulary, trunk, held_out)
    if not after < before:
        vocabulary.load_state_dict(start)
        after = before
    return before, after


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

    def parameter_groups(self) -> list[dict]:
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
    return min(1.0, (step + 1) / min(_WARMUP, steps)) * (LEAST_RATE + (1 - LEAST_RATE) * cosine)
