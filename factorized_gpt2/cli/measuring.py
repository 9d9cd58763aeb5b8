"""What `compress.py` finds out of the models that it makes: sizes, and losses where there is text."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..common.fingerprints import tokens_fingerprint
from ..compress.coded import Budget
from ..compress.compressor import AnyCompressor
from ..compress.methods import Method
from ..hub.model_card import Figures, Measurement
from ..models.dtypes import dtype_name
from ..models.foreign_models import measurable
from ..models.record import note_measurement
from ..models.sizes import model_size, stored_bytes
from ..runs.results import megabytes
from ..text.blocks import Blocks
from ..text.loss import LossSum, perplexity, sum_loss
from ..text.source import TextSource

Size = int | Budget | str  # a rank, what method coded may take, or BASELINE
BASELINE = "-"


def size_name(size: Size) -> str:
    """Say which model is meant."""
    return "the baseline" if size == BASELINE else str(size) if isinstance(size, Budget) else f"k = {size}"


class Measure:
    """Sizes of models, and their losses where there is text.

    Args:
        baseline: What they are made from.
        method: Of all of them.
        blocks: The text, or `None`.
        batch_size: Blocks a forward pass.
        device: Where losses are measured.
    """

    def __init__(
        self, baseline: PreTrainedModel, method: Method, blocks: Blocks | None, batch_size: int, device: torch.device
    ):
        self.baseline_size, self.method = model_size(baseline), method
        self.blocks, self.batch_size, self.device = blocks, batch_size, device
        # Blocks of other sizes make other losses of the same tokens.
        self.text = None if blocks is None else f"{len(blocks[0]['input_ids'])}-{tokens_fingerprint(_ids(blocks))}"
        self.losses: dict[Size, LossSum] = {}
        self.points: dict[Size, tuple[int, float]] = {}  # bytes and loss increase of each, earlier calls' too
        self.results: list[dict[str, Any]] = []  # the rows of the table, for programs to read

    def loss(self, size: Size, model: PreTrainedModel, stored: int | None = None) -> float:
        """Measure a model's loss, once for every size.

        Args:
            size: The rank or the budget.
            model: Of that size.
            stored: Bytes of its file, where they are not those of its parameters.

        Returns:
            The loss, in nats a token.
        """
        if size not in self.losses:
            model, desc = nn.Module.to(model, self.device), f"Evaluating {size_name(size)}"
            self.losses[size] = sum_loss(measurable(model), self.blocks, self.batch_size, self.device, desc=desc)
        if size != BASELINE:
            self.points[size] = model_size(model).bytes if stored is None else stored, self.increase(size)
        return self.losses[size].loss

    def increase(self, size: Size) -> float:
        """Say how far a measured model's loss exceeds the baseline's, in nats a token."""
        return self.losses[size].loss - self.losses[BASELINE].loss

    def take_up(self, compressor: AnyCompressor) -> None:
        """Read from the records of the models that are there what was measured on the same text before."""
        if self.text is not None:
            self.points |= compressor.measured(self.text)

    def note(self, size: Size, folder: Path) -> None:
        """Write what was measured into the record of a model's folder."""
        if self.text is not None:
            note_measurement(folder, self.text, *self.points[size])

    def record(self, size: Size, text: TextSource) -> Measurement:
        """Put down a model's loss, and the baseline's beside it."""
        of = self.baseline_size
        baseline = Figures("baseline", None, of.parameters, of.bytes, self.losses[BASELINE].loss)
        return Measurement(self.losses[size].loss, text, baseline)

    def row(self, size: Size, share: float | None, model: PreTrainedModel, folder: Path) -> dict[str, Any]:
        """Lay out a row of the table.

        Args:
            size: Of the model.
            share: What its record calls `share_name`; `None` for the baseline.
            model: It.
            folder: Where it is.
        """
        of, rank = model_size(model), None if size == BASELINE else model.config.n_embd_wte
        called, by_bytes = self.method.share, self.method.by == "bytes"
        stored = stored_bytes(folder) if by_bytes and size != BASELINE else of.bytes
        row = {
            "k": rank or "-",
            called.in_table: "" if share is None else f"{share:.4f}",
            "parameters": f"{of.parameters:,}",
            "vocabulary": f"{of.vocabulary_parameters:,}",
            "dtype": dtype_name(model),
            "MB": megabytes(of.bytes),
            "vocabulary MB": megabytes(of.vocabulary_bytes),
        }
        row |= {"file MB": megabytes(stored)} if by_bytes else {}
        row["size"] = f"{stored / self.baseline_size.bytes:.1%}"
        loss = None if self.blocks is None else self.loss(size, model, stored)
        if loss is not None:
            row |= {"loss": f"{loss:.4f}", "perplexity": f"{perplexity(loss):.2f}"}
            row |= {"increase": f"{self.increase(size):+.4f}"}
        result = {
            "rank": rank,
            called.in_json: share,
            "dtype": dtype_name(model),
            **asdict(of),
            "stored_bytes": stored,
        }
        result |= {
            "loss": loss,
            "perplexity": None if loss is None else perplexity(loss),
            "loss_increase": None if loss is None else self.increase(size),
        }
        self.results.append(result | {"folder": str(folder)})
        return row | {"folder": str(folder)}


def _ids(blocks: Blocks) -> Iterator[Sequence[int]]:
    return (blocks[index]["input_ids"] for index in range(len(blocks)))
