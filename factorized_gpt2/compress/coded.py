"""A trained baseline to models whose vocabulary is of integers, at a budget of bytes."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..common.errors import UserError, first_line
from ..models.decoder_conversion import with_factors
from ..models.dtypes import in_dtype
from ..models.factors import Factors
from ..models.sizes import vocabulary_width
from ..network.coded_table import CodedTable
from .compressor import AnyCompressor
from .methods import CODED
from .ranks import check_ranks
from .refinement import refine_against
from .vocabulary_refinement import RefinableTable

SEARCHED = tuple(float(f"{0.5 * 2 ** (step / 8):.3f}") for step in range(33))  # bits a weight, from 0.5 to 8
_MOST_BITS = 16
REFINED_BITS = 5  # a row: what its gain and bias take


class BudgetTooSmall(UserError):
    """No table of the baseline's matrix takes so little."""


@dataclass(frozen=True)
class Budget:
    """What a vocabulary may take.

    Attributes:
        bits: For each of its V d weights, everything counted.
        rank: The largest number of components; `None`: whatever the bits buy.
    """

    bits: float
    rank: int | None = None

    @staticmethod
    def of_megabytes(megabytes: float, weights: int, rank: int | None = None) -> "Budget":
        """Return the budget of so many million bytes for so many weights, in whole thousandths of a bit."""
        return Budget(int(8e9 * megabytes / weights) / 1000, rank)

    def __lt__(self, other: "Budget") -> bool:
        return (self.bits, self.rank or math.inf) < (other.bits, other.rank or math.inf)

    def __str__(self) -> str:
        return f"{self.bits:g} bits" + (f", k <= {self.rank}" if self.rank else "")


class CodedCompressor(AnyCompressor[Budget]):
    """Makes models by coding the vocabulary's matrix within budgets, where `Compressor` does so by rank.

    Arguments are those of `AnyCompressor`; the share says how many bits a weight the vocabulary takes.

    Raises:
        UserError: As there; the baseline's head is not tied.
    """

    def __init__(self, baseline, *args, **kwargs):
        if not baseline.model.config.tie_word_embeddings:
            raise UserError(f"{baseline.name} has a head of its own; method {CODED} codes one matrix for both sides.")
        super().__init__(baseline, *args, **kwargs)

    def folder(self, size: Budget) -> Path:
        rank = f"_k{size.rank}" if size.rank else ""
        refined = "" if self.recipe.refine_steps else "_nofinetune"
        return self.root / f"gpt_{self.label}{refined}_b{size.bits:g}{rank}"

    def make(self, size: Budget, factors: Factors | None = None) -> tuple[PreTrainedModel, float]:
        """Code the matrix, and refine what is beside its codes if the recipe says so, in memory.

        Returns:
            The compressed model in evaluation mode, and the bits a weight that its table takes.

        Raises:
            UserError: A budget that is out of range.
            BudgetTooSmall: One that holds no table.
        """
        self.check(size)
        refines, width = bool(self.recipe.refine_steps), vocabulary_width(self.baseline.model.config)
        room = REFINED_BITS / width if refines else 0.0  # in the budget, for what refinement adds
        while True:
            try:
                table = self._encode(size, size.bits - room)
            except ValueError as error:
                raise BudgetTooSmall(f"A vocabulary of {size} cannot be made: {first_line(error)}") from error
            table = self._refined(table) if refines else table
            if table.bits_per_weight <= size.bits:
                break
            room += 1.1 * (table.bits_per_weight - size.bits)
        return in_dtype(with_factors(self.baseline.model, table), self.recipe.dtype), table.bits_per_weight

    def check(self, size: Budget) -> None:
        if not 0 < size.bits <= _MOST_BITS:
            raise UserError(f"{size.bits:g} bits a weight are out of range: at most {_MOST_BITS}, and more than 0.")
        if size.rank is not None:
            check_ranks([size.rank], self.baseline.model.config)

    def _encode(self, size: Budget, bits: float) -> CodedTable:
        if size.rank is not None:  # beyond a byte for each of its codes, a low rank is as exact as it gets
            bits = min(bits, 8 * size.rank / vocabulary_width(self.baseline.model.config))
        table = self._fit.table(bits, size.rank)
        if not table.codes.shape[1]:
            raise ValueError("all codes would be 0.")
        return table

    def _refined(self, table: CodedTable) -> CodedTable:
        vocabulary, recipe = RefinableTable(table), self.recipe
        refine_against(
            *(self.baseline.model, vocabulary, self.text.blocks, recipe.refine_steps, recipe.seed),
            *(self.progress, self.device),
        )
        return vocabulary.table()

    def name_of(self, size: Budget) -> str:
        return str(size)

    def _of_size(self, size: Budget) -> dict[str, Any]:
        return {"bits_per_weight": size.bits, "largest_rank": size.rank}

    def _size_in(self, record: dict[str, Any]) -> Budget | None:
        bits, rank = record.get("bits_per_weight"), record.get("largest_rank")
        is_budget = isinstance(bits, int | float) and (rank is None or isinstance(rank, int))
        return Budget(bits, rank) if is_budget else None

    def _of_all_sizes(self) -> dict[str, Any]:
        return {}
