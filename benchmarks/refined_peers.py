"""Other ways' numbers, refined as a coded table's are: on the same text, as many steps, with the same head bias."""

import numpy as np
import torch
from peers import Groups, Small
from torch import nn

from factorized_gpt2.compress.vocabulary_refinement import RefinableTable, TrainableVocabulary
from factorized_gpt2.models.factors import Factors


class _Refinable(TrainableVocabulary):
    """A vocabulary whose rows are computed of parameters, with a head bias in fp16 that takes two bytes a token."""

    def __init__(self, size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))

    def rows(self, ids: torch.Tensor | slice) -> torch.Tensor:
        """Compute rows of the matrix."""
        raise NotImplementedError

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Look tokens up."""
        return self.rows(ids)

    def score(self, states: torch.Tensor) -> torch.Tensor:
        """Compute logits."""
        return (states.bfloat16() @ self.rows(slice(None)).bfloat16().T).float() + self.bias

    @torch.no_grad()
    def round(self) -> None:
        """Round to half precision."""
        for parameter in self.parameters():
            parameter.copy_(parameter.half().float())

    @torch.no_grad()
    def small(self, nbytes: int) -> Small:
        """Return the matrix, and the bytes of what it was beside those of the bias."""
        return Small(self.rows(slice(None)).numpy(), nbytes + 2 * len(self.bias), bias=self.bias.detach().numpy())


class RefinableGroups(_Refinable):
    """Integers that stay; their steps and offsets, one a group, are trained."""

    def __init__(self, groups: Groups):
        super().__init__(len(groups.codes))
        self.register_buffer("codes", torch.from_numpy(groups.codes))
        self.steps, self.offsets = (
            nn.Parameter(torch.from_numpy(np.array(a))) for a in (groups.steps, groups.offsets)
        )

    def rows(self, ids: torch.Tensor | slice) -> torch.Tensor:
        """Compute rows of the matrix."""
        return (self.codes[ids] * self.steps[ids] + self.offsets[ids]).flatten(-2)

    def parameter_groups(self, divergence: float) -> list[dict]:
        """Move steps by half a percent, offsets by as much as the ends of the grid."""
        step = float(self.steps.detach().mean())
        return [
            {"params": [self.steps], "lr": 5e-3 * step, "eps": 1e-6},
            {"params": [self.offsets], "lr": 2e-2 * step, "eps": 1e-6},
            {"params": [self.bias], "lr": 2e-2, "eps": 1e-6},
        ]


class RefinableFactors(_Refinable):
    """Low rank: all of it is trained."""

    def __init__(self, factors: Factors):
        super().__init__(len(factors.wte))
        self.wte, self.scale_up, self.mean = (
            nn.Parameter(torch.from_numpy(np.array(array, np.float32)))
            for array in (factors.wte, factors.scale_up, factors.mean)
        )

    def rows(self, ids: torch.Tensor | slice) -> torch.Tensor:
        """Compute rows of the matrix."""
        return self.wte[ids] @ self.scale_up + self.mean

    def parameter_groups(self, divergence: float) -> list[dict]:
        """Move each by a hundredth of its own spread."""
        rates = [
            {"params": [parameter], "lr": 0.01 * float(parameter.detach().std())}
            for parameter in (self.wte, self.scale_up, self.mean)
        ]
        return [*rates, {"params": [self.bias], "lr": 2e-2, "eps": 1e-6}]


def small_table(refinable: RefinableTable) -> Small:
    """Return what a refined coded table stands for."""
    table = refinable.table()
    return Small(table.dense(), table.nbytes, table.dense_head(), table.bias)
