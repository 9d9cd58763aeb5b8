"""The ways to make a vocabulary small, as one list; help, tables, model cards and benchmarks read it.

To add one, write its entry and the function that this names. Nothing heavy is imported, so that a command can list
them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np

    from ..models.factors import Factors
    from ..network.coded_table import CodedTable
    from .data_aware import VocabularyUse


class RankFit(Protocol):
    """What a method by rank knows of a vocabulary before it is told the rank."""

    @property
    def shares(self) -> np.ndarray:
        """The `explained_share` of every rank, (min(V, d),) float64, rank 1 first."""

    def factors(self, ranks: Sequence[int]) -> dict[int, Factors]:
        """Make the factors of ranks, each 1 <= k <= min(V, d)."""


class BytesFit(Protocol):
    """What a method by bytes knows of a vocabulary before it is told the budget."""

    def table(self, bits_per_weight: float, rank: int | None = None) -> CodedTable:
        """Code within a budget, of no more components than `rank`; a `ValueError` where that cannot be."""


@dataclass(frozen=True)
class Share:
    """What the number is called that says how much a model keeps, or takes.

    Attributes:
        in_table: In what `compress.py` prints.
        in_json: In what it writes for programs.
        in_record: In the record of the model's folder.
    """

    in_table: str
    in_json: str
    in_record: str


VARIANCE = Share("variance", "explained_share", "explained_variance_ratio")
_LOSS = Share("share", "explained_share", "explained_share")
_BITS = Share("bits a weight", "bits_per_weight", "stored_bits_per_weight")


@dataclass(frozen=True)
class Method:
    """What a method is, needs and costs.

    Attributes:
        name: As `--method` takes it.
        title: As pictures have it.
        summary: What it is, to stand after "by".
        source: Its formula or paper, in the letters of docs/factorization.md.
        share: What its models' share is called.
        markers: How pictures mark its models, and those that were refined after it.
        color: In which colour.
        fitted_by: "module:function", which is in this package and takes and returns what `fit` does.
        needs_text: Whether it learns from text.
        by: What its models are asked for by: a rank, or the bytes that the vocabulary may take.
        compensates_head: Whether the head is then fitted to what the compressed model gives it.
        keeps_factors: Whether factors are kept as the protocol's files.
    """

    name: str
    title: str
    summary: str
    source: str
    share: Share
    markers: tuple[str, str]
    color: str
    fitted_by: str
    needs_text: bool = True
    by: Literal["rank", "bytes"] = "rank"
    compensates_head: bool = False
    keeps_factors: bool = False

    def fit(self, weight: np.ndarray, lm_head: np.ndarray | None, use: VocabularyUse | None) -> Any:
        """Compute what does not depend on the size of a model.

        Args:
            weight: (V, d) floats, V >= 2, finite: the token embedding, the head's too when `lm_head` is `None`.
            lm_head: (V, d) floats, finite: the head's own matrix, which methods by bytes do not take.
            use: What text says of them; `None` where the method needs none.

        Returns:
            A `RankFit` or a `BytesFit`, as `by` says.
        """
        module, _, function = self.fitted_by.partition(":")
        return getattr(import_module(f".{module}", __package__), function)(weight, lm_head, use)


METHODS = {
    method.name: method
    for method in (
        Method(
            name="pca",
            title="PCA",
            summary="principal component analysis of the token embedding",
            source="least sum e e^T (Eckart & Young, 1936)",
            share=VARIANCE,
            markers=("o", "X"),
            color="tab:blue",
            fitted_by="pca:PCAFit",
            needs_text=False,
            keeps_factors=True,
        ),
        Method(
            name="weighted",
            title="weighted",
            summary="a low-rank fit of the token embedding that counts each token as often as it occurs",
            source="least sum q e e^T",
            share=_LOSS,
            markers=("<", ">"),
            color="tab:olive",
            fitted_by="data_aware:weighted",
        ),
        Method(
            name="joint",
            title="joint",
            summary="a fit of the loss to second order, on the embedding's side and on the head's",
            source="least sum q e C e^T, C = E[g g^T] + E[h h^T]",
            share=_LOSS,
            markers=("p", "*"),
            color="tab:pink",
            fitted_by="data_aware:joint",
        ),
        Method(
            name="tokenwise",
            title="tokenwise",
            summary="a fit of the loss to second order, then of every token's row to that token's own use",
            source="joint, then a Bayesian regression for every row",
            share=_LOSS,
            markers=("^", "v"),
            color="tab:green",
            fitted_by="data_aware:tokenwise",
            compensates_head=True,
        ),
        Method(
            name="coded",
            title="coded",
            summary="rounding the vocabulary to integers as exact as the loss needs, and entropy coding them",
            source="joint's directions, steps ~ q^(-1/4), rANS (Duda, 2013)",
            share=_BITS,
            markers=("D", "d"),
            color="tab:red",
            fitted_by="quantizer:TableFit",
            by="bytes",
        ),
    )
}
BY_RANK = tuple(method.name for method in METHODS.values() if method.by == "rank")
DEFAULT, CODED = "pca", "coded"  # with nothing asked for; where a budget of bytes is
