"""Every way to make a vocabulary matrix small that `pretrained.py` measures: ours and the peers, refined or not."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from foreign_models import Calibration
from peers import Groups, Small, gguf_type, gguf_types, gptq, low_rank, round_to_nearest
from refined_peers import Refinable, RefinableCodes, RefinableFactors, RefinableGroups

from factorized_gpt2.compress.coded import REFINED_BITS
from factorized_gpt2.compress.data_aware import VocabularyUse
from factorized_gpt2.compress.methods import METHODS, Method
from factorized_gpt2.models.factors import Factors

_GROUP = 64  # numbers that share a step, with GPTQ


@dataclass(frozen=True)
class Way:
    """One way, which nothing has been computed of yet.

    Attributes:
        family: Which of them are one line of a picture.
        name: What it is called.
        make: Computes what stands for the matrix.
        refinable: The same before refinement; `None` where there is nothing to train.
    """

    family: str
    name: str
    make: Callable[[], Small]
    refinable: Callable[[], Refinable] | None = None

    def refined(self, refine: Callable[[Refinable], None]) -> Iterator["Way"]:
        """Yield this way with refinement in place after it, if that can be."""
        if self.refinable is None:
            return
        start = self.refinable

        def make() -> Small:
            vocabulary = start()
            refine(vocabulary)
            return vocabulary.small()

        yield Way(f"{self.family}, refined", f"{self.name}, refined", make)


@dataclass(frozen=True)
class Ways:
    """All ways of one matrix.

    Args:
        weight: (V, d) float32.
        calibration: What met its rows.
        use: The same, with counts of all the text.
    """

    weight: np.ndarray
    calibration: Calibration
    use: VocabularyUse

    def all(self, budgets: Sequence[float], ranks: Sequence[int], bits: Sequence[int]) -> Iterator[Way]:
        """Yield ours at budgets and ranks, integers of so many bits, and the types of gguf."""
        width = self.weight.shape[1]
        for method in METHODS.values():
            sizes, own = (budgets, self._at_bytes) if method.by == "bytes" else (ranks, self._at_rank)
            for size in sizes:
                yield own(method, size)
        for number in bits:
            for group in (0, 128, 64, 32):
                if not group or width % group == 0:
                    name = f"int{number}, " + (f"groups of {group}" if group else "rows")
                    yield _groups(
                        "round to nearest", name, lambda b=number, g=group: round_to_nearest(self.weight, b, g)
                    )
        for number in bits:
            if number <= 4 and width % _GROUP == 0:
                name = f"GPTQ int{number}, groups of {_GROUP}"
                yield _groups("GPTQ", name, lambda b=number: gptq(self.weight, self._hessian, b, _GROUP))
        for name in gguf_types(width):
            yield Way("gguf", name, lambda n=name: gguf_type(self.weight, n))

    def _at_bytes(self, method: Method, budget: float) -> Way:
        def make() -> Small:
            table = self._fit(method).table(budget)
            return Small(table.dense(), table.nbytes)

        def refinable() -> Refinable:
            return RefinableCodes(
                self._fit(method).table(budget - REFINED_BITS / self.weight.shape[1]), torch.bfloat16
            )

        return Way(method.title, f"{method.title}, {budget:g} bits", make, refinable)

    def _at_rank(self, method: Method, rank: int) -> Way:
        def make() -> Factors:
            return self._fit(method).factors([rank])[rank]

        name = f"{method.title}, k = {rank}"
        return Way(f"{method.title}, fp16", name, lambda: low_rank(make()), lambda: RefinableFactors(make()))

    def _fit(self, method: Method) -> Any:
        return method.fit(self.weight, None, self.use)

    @cached_property
    def _hessian(self) -> np.ndarray:
        hidden = self.calibration.hidden
        return hidden.T.astype(np.float64) @ hidden / len(hidden)


def _groups(family: str, name: str, make: Callable[[], Groups]) -> Way:
    return Way(family, name, lambda: make().small(), lambda: RefinableGroups(make()))
