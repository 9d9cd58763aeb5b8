"""A trained baseline to compressed models and their folders."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..common.errors import UserError
from ..common.files import read_json, replacing_folder, write_json
from ..common.fingerprints import (
    config_fingerprint,
    files_fingerprint,
    model_content,
    tokenizer_fingerprint,
)
from ..common.weight_files import MODEL_FILES, weight_files
from ..models.decoder_conversion import vocabulary_matrices_of, with_factors
from ..models.dtypes import dtype_name, in_dtype
from ..models.factors import Factors
from ..models.foreign_models import positions_of
from ..models.loading import Baseline, load_compressed
from ..models.record import RECORD_NAME, compressed_folder, noted_measurement
from ..models.verification import verify_copy
from ..network.modeling_factorized_causal_lm import FactorizedCausalLM
from ..network.modeling_factorized_gpt2 import FactorizedGPT2
from ..text.tokenizer_files import save_tokenizer
from .calibration import calibrate, compensated_head, count_tokens
from .data_aware import VocabularyUse
from .factor_files import pca_factors
from .methods import VARIANCE
from .ranks import check_ranks
from .recipe import CalibrationText, Recipe
from .refinement import refine

logger = logging.getLogger(__name__)

_OLD_SHARE_NAME = VARIANCE.in_record  # which in the last release was that of all methods


class _Ordered(Protocol):
    def __lt__(self, other: Any, /) -> bool: ...


Size = TypeVar("Size", bound=_Ordered)  # a rank, or what a vocabulary may take


class AnyCompressor(ABC, Generic[Size]):
    """Makes compressed models of one baseline by one recipe; what does not depend on their size is computed once.

    Args:
        baseline: The trained model.
        recipe: How to compress it.
        root: Folder of the model folders and of the protocol's factor files.
        tokenizer: Goes into the model folders; `None` where there is none.
        text: Calibration text, where the recipe needs it.
        overwrite: Whether what was made otherwise, or from another baseline, may be replaced.
        device: Where calibration and refinement run.
        progress: Whether long work shows a bar.

    Raises:
        UserError: The recipe needs text and there is none.
    """

    def __init__(
        self,
        baseline: Baseline,
        recipe: Recipe,
        root: Path,
        tokenizer: PreTrainedTokenizerBase | None,
        text: CalibrationText | None = None,
        overwrite: bool = False,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ):
        if recipe.needs_text and text is None:
            what = f"method {recipe.method}" if recipe.entry.needs_text else "refinement"
            raise UserError(f"{what} learns from text: set calibration_file or dataset_name.")
        self.baseline, self.root, self.tokenizer, self.text = baseline, root, tokenizer, text
        self.recipe = replace(
            recipe,
            tied=recipe.tied and baseline.model.config.tie_word_embeddings,
            dtype=None if recipe.dtype == dtype_name(baseline.model) else recipe.dtype,
        )
        self.overwrite, self.device, self.progress = overwrite, device, progress
        self.saved: list[Size] = []  # those whose folders were written

    @property
    def share_name(self) -> str:
        """What a model's record calls the share that `make` returns."""
        return self.recipe.entry.share.in_record

    def share(self, size: Size) -> float:
        """Read the share of a size from its folder."""
        return self._share(read_json(self.folder(size) / RECORD_NAME))

    def _share(self, record: dict[str, Any]) -> Any:
        return record.get(self.share_name, record.get(_OLD_SHARE_NAME))

    @property
    def label(self) -> str:
        """What tells this way of compressing from others, as in `tokenwise_refined`."""
        untied = self.baseline.model.config.tie_word_embeddings and not self.recipe.tied
        words = [self.recipe.method, "untied" if untied else "", "refined" if self.recipe.refine_steps else ""]
        return "_".join(filter(None, words))

    @abstractmethod
    def folder(self, size: Size) -> Path:
        """Where the model of some size is kept."""

    def sizes_there(self) -> list[Size]:
        """List the sizes of all folders that hold what this compressor would make, smallest first.

        A folder whose record cannot be read is none of them.
        """

        def size_of(path: Path) -> Size | None:
            try:
                size = self._size_in(read_json(path))
                is_it = size is not None and self.folder(size) == path.parent and not self._difference(size)
            except UserError:
                return None
            return size if is_it else None

        found = map(size_of, self.root.glob(f"gpt_*/{RECORD_NAME}"))
        return sorted(size for size in found if size is not None)

    def measured(self, text: str) -> dict[Size, tuple[int, float]]:
        """Read what the sizes that are there were measured to cost on a text, as `note_measurement` has it."""
        found = {size: noted_measurement(self.folder(size), text) for size in self.sizes_there()}
        return {size: figures for size, figures in found.items() if figures is not None}

    @abstractmethod
    def make(self, size: Size, factors: Factors | None = None) -> tuple[PreTrainedModel, float]:
        """Make a compressed model, in memory.

        Args:
            size: Of the model.
            factors: Of that size, where they are at hand.

        Returns:
            The model in evaluation mode, and its share.
        """

    def save(self, model: PreTrainedModel, size: Size, share: float) -> None:
        """Write a compressed model's folder, whole or not at all, and reload it to see that it is this model.

        Raises:
            UserError: The model's logits are NaN or infinite.
            RuntimeError: The reloaded model's logits differ.
        """
        with replacing_folder(self.folder(size), _FILES) as temporary:
            model.save_pretrained(temporary)
            verify_copy(model, temporary, name=self.folder(size))
            if self.tokenizer is not None:
                save_tokenizer(self.tokenizer, temporary, positions_of(model.config))
            kept = {self.share_name: share, "weights_fingerprint": files_fingerprint(weight_files(temporary))}
            kept |= self._of_all_sizes()
            write_json(temporary / RECORD_NAME, self._record(size) | kept)
        self.saved.append(size)

    def load_or_make(self, sizes: Sequence[Size]) -> Iterator[tuple[Size, PreTrainedModel, float]]:
        """Load the compressed models of sizes, or make their folders first, with one decomposition for all of them.

        Yields:
            The size, the model in evaluation mode, and its share.

        Raises:
            UserError: A size out of range; a folder or the protocol's factor files hold something else, unless
                `overwrite`.
        """
        for size in sizes:
            self.check(size)
        missing = sorted(size for size in sizes if not self.folder(size).exists())
        factors = self._factorize(missing) if missing else {}
        for size in sizes:
            model = self.load(size)
            if model is None:
                model, share = self.make(size, factors.pop(size, None))
                self.save(model, size, share)
            else:
                share = self.share(size)
            yield size, model, share

    def _factorize(self, sizes: Sequence[Size]) -> dict[Size, Factors]:
        """Compute the factors of all sizes that will be made, where one decomposition serves them all."""
        return {}

    def load(self, size: Size) -> PreTrainedModel | None:
        """Load the compressed model of a size if its folder was made from this baseline in this way.

        Raises:
            UserError: A size out of range; the folder holds another compressed model, unless `overwrite`, or none.
        """
        self.check(size)
        folder = self.folder(size)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}, where the model of {self.name_of(size)} belongs, is a file: move it away.")
        if not (folder.exists() and any(folder.iterdir())):
            return None
        if not (folder / RECORD_NAME).exists():
            raise UserError(f"{folder} holds something else than a compressed model; remove it.")
        difference, stored = self._difference(size), read_json(folder / RECORD_NAME)
        weights = files_fingerprint(weight_files(folder))
        if not difference and stored.get("weights_fingerprint", weights) != weights:
            difference = "has other weights than it was made with"
        if not difference:
            logger.info("%s was made in this way before and is reused.", folder)
            unknown = [what for name, what in _WHAT_IS_TAKEN_OVER.items() if name not in stored]
            if unknown:
                logger.warning("%s does not say of which %s it was made.", folder, " and ".join(unknown))
            if self.share_name not in stored:
                logger.warning(
                    "%s calls its share %s; it is %s now, and only this release still reads the old name: "
                    "rename it there, or compress once more with --overwrite.",
                    *(folder / RECORD_NAME, _OLD_SHARE_NAME, self.share_name),
                )
            return load_compressed(str(folder))
        if not self.overwrite:
            raise UserError(f"{folder} {difference}; remove or overwrite it.")
        return None

    @abstractmethod
    def check(self, size: Size) -> None:
        """Refuse a size that is out of range."""

    def _difference(self, size: Size) -> str:
        """Say how a folder's model was made otherwise than this compressor would make it; empty if it was not."""
        record = self.folder(size) / RECORD_NAME
        if not record.is_file():
            return "holds something else than a compressed model"
        stored, asked = read_json(record), self._record(size)
        if stored.get("baseline_fingerprint") != asked["baseline_fingerprint"]:
            return f"was not made from {self.baseline.name}"
        makings = (*_WHAT_MAKES_A_MODEL, *self._of_size(size))
        changed = sorted(name for name in makings if stored.get(name) != asked[name])
        changed += [what for name, what in _WHAT_IS_TAKEN_OVER.items() if stored.get(name, asked[name]) != asked[name]]
        if not changed and not isinstance(self._share(stored), float):
            changed = [self.share_name]
        return f"was made with another {', '.join(changed)}" if changed else ""

    def _record(self, size: Size) -> dict[str, Any]:
        calibration = self.text.record if self.recipe.needs_text else None
        return asdict(self.recipe) | {
            "seed": self.recipe.seed if self.recipe.needs_text else None,
            **self._of_size(size),
            "baseline": self.baseline.name,
            "baseline_fingerprint": self.baseline.fingerprint,
            "baseline_content": model_content(self.baseline.name),
            "config_fingerprint": config_fingerprint(self.baseline.model.config),
            "tokenizer_fingerprint": tokenizer_fingerprint(self.tokenizer),
            "calibration": calibration,
        }

    @abstractmethod
    def name_of(self, size: Size) -> str:
        """Say in words which model is meant."""

    @abstractmethod
    def _of_size(self, size: Size) -> dict[str, Any]:
        """What a model's record says of its size."""

    @abstractmethod
    def _size_in(self, record: dict[str, Any]) -> Size | None:
        """Read the size of a model from its record, if that is of such a model."""

    @abstractmethod
    def _of_all_sizes(self) -> dict[str, Any]:
        """What a model's record says beside, of all sizes."""

    @cached_property
    def _matrices(self) -> tuple[np.ndarray, np.ndarray | None]:
        embedding, head = vocabulary_matrices_of(self.baseline.model)
        return embedding, embedding if head is None and not self.recipe.tied else head

    @cached_property
    def _use(self) -> VocabularyUse:
        counts = count_tokens(self.text.blocks, self.baseline.model.config.vocab_size)
        desc = "Calibrating" if self.progress else None
        return calibrate(self.baseline.model, self.text.sample, counts, self.recipe.seed, self.device, desc)

    @cached_property
    def _fit(self) -> Any:
        """What the method knows of the matrices before it is told a size; a `methods.RankFit` or `BytesFit`."""
        method = self.recipe.entry
        return method.fit(*self._matrices, self._use if method.needs_text else None)


class Compressor(AnyCompressor[int]):
    """Makes models by factorizing the vocabulary's matrices at ranks; arguments are those of `AnyCompressor`."""

    @cached_property
    def shares(self) -> np.ndarray:
        """The `explained_share` of each rank, (min(V, d),) float64, rank 1 first."""
        return self._fit.shares

    def folder(self, rank: int) -> Path:
        """Where the model of some rank is kept; for PCA alone, under the protocol's name."""
        return compressed_folder(self.root, rank, self.label, self.recipe.refine_steps > 0)

    def make(self, rank: int, factors: Factors | None = None) -> tuple[PreTrainedModel, float]:
        """Factorize, compensate, refine and round as the recipe says, in memory.

        Returns:
            The compressed model in evaluation mode, and the `explained_share` of its factors.
        """
        factors = factors or self._factorize([rank])[rank]
        model: FactorizedGPT2 | FactorizedCausalLM = with_factors(self.baseline.model, factors)
        if self.recipe.entry.compensates_head:
            desc = f"Compensating the head at k = {rank}" if self.progress else None
            hidden_states = self._use.output_side.vectors
            scale_down = compensated_head(
                model, factors.scale_down, self.text.sample, hidden_states, self.device, desc
            )
            factors = replace(factors, scale_down=scale_down)
            model = with_factors(self.baseline.model, factors)
        if self.recipe.refine_steps:
            model = refine(
                model,
                self.baseline.model,
                self.text.blocks,
                self.recipe.refine_steps,
                self.recipe.seed,
                self.progress,
                self.device,
            )
        return in_dtype(model, self.recipe.dtype), factors.explained_share

    def check(self, rank: int) -> None:
        """Refuse a rank that is out of range."""
        check_ranks([rank], self.baseline.model.config)

    def name_of(self, rank: int) -> str:
        """Say in words which model is meant."""
        return f"rank {rank}"

    def _of_size(self, rank: int) -> dict[str, Any]:
        return {"n_embd_wte": rank}

    def _size_in(self, record: dict[str, Any]) -> int | None:
        rank = record.get("n_embd_wte")
        return rank if isinstance(rank, int) else None

    def _of_all_sizes(self) -> dict[str, Any]:
        return {"spectrum": [round(float(share), 6) for share in self.shares]}

    def _factorize(self, ranks: Sequence[int]) -> dict[int, Factors]:
        check_ranks(ranks, self.baseline.model.config)
        if self.recipe.entry.keeps_factors and self.recipe.tied == self.baseline.model.config.tie_word_embeddings:
            return pca_factors(self.baseline, ranks, self.root, self.overwrite)
        return self._fit.factors(ranks)


_FILES = (*MODEL_FILES, RECORD_NAME, "results.json", "run.json")  # the last two of a run that evaluated it there
_WHAT_MAKES_A_MODEL = ("method", "tied", "refine_steps", "seed", "calibration", "dtype")
_WHAT_IS_TAKEN_OVER = {"config_fingerprint": "config", "tokenizer_fingerprint": "tokenizer"}  # of the baseline
