"""Every way's numbers, refined as a coded table's are: on the same text, as many steps, with the same head bias."""

from typing import Protocol

import numpy as np
import torch
from peers import Groups, Small, low_rank_bytes
from torch import nn

from factorized_gpt2.compress.vocabulary_refinement import RefinableTable, TrainableVocabulary
from factorized_gpt2.models.factors import Factors


class Refinable(Protocol):
    """A `TrainableVocabulary` that says what it has become."""

    def small(self) -> Small:
        """Return what stands for the matrix now, all bytes counted."""


class RefinableCodes(RefinableTable):
    """A coded table."""

    def small(self) -> Small:
        """Return what stands for the matrix now, all bytes counted."""
        table = self.table()
        return Small(table.dense(), table.nbytes, table.dense_head(), table.bias)


class _RefinableRows(TrainableVocabulary):
    """A vocabulary whose rows are computed of parameters, with a head bias in fp16 that takes two bytes a token."""

    def __init__(self, vocab_size: int, nbytes: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self._nbytes = nbytes + 2 * vocab_size

    def rows(self, ids: torch.Tensor | slice) -> torch.Tensor:
        """Compute rows of the matrix."""
        raise NotImplementedError

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Look tokens up."""
        return self.rows(ids)

    def score(self, states: torch.Tensor) -> torch.Tensor:
        """Compute logits."""
        return (states.bfloat16() @ self.rows(slice(None)).bfloat16().T).float() + self.bias

    def parameter_groups(self, divergence: float) -> list[dict]:
        """Move the bias as a coded table's."""
        return [{"params": [self.bias], "lr": 2e-2, "eps": 1e-6}]

    @torch.no_grad()
    def round(self) -> None:
        """Round to half precision."""
        for parameter in self.parameters():
            parameter.copy_(parameter.half().float())

    @torch.no_grad()
    def small(self) -> Small:
        """Return what stands for the matrix now, all bytes counted."""
        return Small(self.rows(slice(None)).numpy(), self._nbytes, bias=self.bias.numpy())


class RefinableGroups(_RefinableRows):
    """Integers that stay; their steps and offsets, one a group, are trained: by factors, and in units of the step."""

    def __init__(self, groups: Groups):
        super().__init__(len(groups.codes), groups.nbytes)
        for name in ("codes", "steps", "offsets"):
            self.register_buffer(name, torch.from_numpy(np.array(getattr(groups, name))))
        self.gains, self.shifts = (nn.Parameter(torch.zeros(groups.steps.shape)) for _ in range(2))

    def rows(self, ids: torch.Tensor | slice) -> torch.Tensor:
        """Compute rows of the matrix."""
        steps, offsets = self._grid()
        return (self.codes[ids] * steps[ids] + offsets[ids]).flatten(-2)

    def parameter_groups(self, divergence: float) -> list[dict]:
        """Move both as the gains of a coded table's rows."""
        return [{"params": [self.gains, self.shifts], "lr": 5e-3, "eps": 1e-5}, *super().parameter_groups(divergence)]

    @torch.no_grad()
    def round(self) -> None:
        """Round what is stored to half precision: steps and offsets, and the bias."""
        super().round()
        grid = self._grid()
        for kept, now in zip((self.steps, self.offsets), grid, strict=True):
            kept.copy_(now.half().float())
        self.gains.zero_()
        self.shifts.zero_()

    def _grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.steps * self.gains.exp(), self.offsets + self.steps * self.shifts


class RefinableFactors(_RefinableRows):
    """Low rank: all of it is trained."""

    def __init__(self, factors: Factors):
        super().__init__(len(factors.wte), low_rank_bytes(factors))
        self.wte, self.scale_up, self.mean = (
            nn.Parameter(torch.from_numpy(np.array(array, np.float32)))
            for array in (factors.wte, factors.scale_up, factors.mean)
        )

    def rows(self, ids: torch.Tensor | slice) -> torch.Tensor:
        """Compute rows of the matrix."""
        return self.wte[ids] @ self.scale_up + self.mean

    def parameter_groups(self, divergence: float) -> list[dict]:
        """Move each by a hundredth of its own spread, rows of tokens that are hardly met by less."""
        wte, *shared = ((each, float(each.detach().std())) for each in (self.wte, self.scale_up, self.mean))
        rates = [{"params": [each], "lr": 0.01 * spread} for each, spread in shared]
        rates.append({"params": [wte[0]], "lr": 0.01 * wte[1], "eps": 1e-6 / wte[1]})
        return [*rates, *super().parameter_groups(divergence)]
