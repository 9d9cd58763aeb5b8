"""What is asked of a compressor: how to compress, and text to learn from."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..common.errors import UserError
from ..common.fingerprints import tokens_fingerprint
from ..text.blocks import Blocks
from .calibration import spread_blocks
from .methods import DEFAULT, METHODS, Method


@dataclass(frozen=True)
class CalibrationText:
    """Text that tells how a baseline uses its vocabulary.

    Attributes:
        blocks: All of it, rows of `input_ids`: tokens are counted in all, and refinement draws from all.
        tokens: How many of them the model is run over.
        name: Files or dataset it was read from.
    """

    blocks: Blocks
    tokens: int
    name: str

    @cached_property
    def sample(self) -> Blocks:
        """The blocks that the model is run over, spread evenly."""
        return spread_blocks(self.blocks, self.tokens)

    @cached_property
    def record(self) -> dict[str, Any]:
        """What a compressed model's record says of it; the fingerprint is of the sampled tokens."""
        ids = [row["input_ids"] for row in iter(self.sample)]
        return {
            "text": self.name,
            "blocks": len(self.blocks),
            "tokens": int(sum(len(row) for row in ids)),
            "block_size": len(ids[0]),
            "fingerprint": tokens_fingerprint(ids),
        }


@dataclass(frozen=True)
class Recipe:
    """How a baseline is compressed, apart from the rank.

    Attributes:
        method: Name of one of `methods.METHODS`.
        tied: Whether one `wte` serves both sides; a tied baseline can be given two, an untied one never one.
        refine_steps: Steps of refinement after the factorization.
        seed: Of every draw.
        dtype: Of the weights, as in "bfloat16"; `None`: the baseline's.

    Raises:
        UserError: There is no such method.
    """

    method: str = DEFAULT
    tied: bool = True
    refine_steps: int = 0
    seed: int = 0
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"There is no method {self.method!r}; there are {', '.join(METHODS)}.")

    @property
    def entry(self) -> Method:
        """What is known of the method."""
        return METHODS[self.method]

    @property
    def needs_text(self) -> bool:
        """Whether there is something to learn from calibration text."""
        return self.entry.needs_text or self.refine_steps > 0
