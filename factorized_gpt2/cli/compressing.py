"""What `compress.py` does once its words are read."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers.utils import is_matplotlib_available

from ..common.errors import UserError
from ..common.files import require_space
from ..common.fingerprints import tokens_fingerprint
from ..compress.compressor import CalibrationText, Compressor, Recipe
from ..compress.ranks import check_ranks, is_good_enough, largest_rank, smallest_rank_by_loss, smallest_rank_by_share
from ..hub.model_card import Figures, Measurement
from ..hub.repository import check_access, publish
from ..models.dtypes import dtype_name
from ..models.loading import check_tokenizer, load_baseline
from ..models.record import note_measurement
from ..models.sizes import model_size
from ..network.modeling_factorized_gpt2 import FactorizedGPT2
from ..report.plots import plot_loss_against_bytes, plot_spectrum
from ..runs.results import megabytes
from ..settings.devices import DtypeArguments
from ..settings.outputs import JsonArguments, PublishArguments
from ..settings.text_arguments import EvaluationArguments
from ..text.blocks import load_blocks
from ..text.loss import LossSum, perplexity, sum_loss
from ..text.source import TextSource
from ..text.tokenizers import has_tokenizer, load_tokenizer
from .compress_settings import CalibrationArguments, CompressArguments
from .shell import print_table, write_result

logger = logging.getLogger(__name__)


def compress_all(
    arguments: CompressArguments,
    calibration: CalibrationArguments,
    evaluation: EvaluationArguments,
    device: torch.device,
    numbers: DtypeArguments,
    publishing: PublishArguments,
    output: JsonArguments,
) -> None:
    """Load the baseline, choose ranks, factorize, write the folders, print what it cost, publish it if asked."""
    if publishing.push_to_hub:
        check_access(None, publishing.push_to_hub)
    baseline = load_baseline(arguments.baseline)
    if arguments.ranks:
        check_ranks(arguments.ranks, baseline.model.config)
    trunk = model_size(baseline.model)
    require_space(Path(arguments.output_dir), trunk.bytes - trunk.vocabulary_bytes, "a compressed model")
    recipe = Recipe(arguments.method, arguments.tie_word_embeddings, arguments.refine, arguments.seed, numbers.dtype)
    tokenizer = None
    if arguments.tokenizer or recipe.needs_text or evaluation.is_asked_for or has_tokenizer(arguments.baseline):
        tokenizer = load_tokenizer(arguments.tokenizer or arguments.baseline)
        check_tokenizer(baseline.model, tokenizer)
    else:
        logger.warning("%s has no tokenizer, so what is made of it has none.", arguments.baseline)
    block_size = evaluation.block_size_for(baseline.model.config.n_positions)
    text = None
    source = calibration.source(evaluation) if recipe.needs_text else None
    if source is not None:
        blocks = load_blocks(source, tokenizer, block_size, keep_tail=False)
        text = CalibrationText(blocks, calibration.calibration_tokens, source.name)
    compressor = Compressor(
        baseline, recipe, Path(arguments.output_dir), tokenizer, text, arguments.overwrite, device, progress=True
    )
    blocks = (
        load_blocks(evaluation.source(), tokenizer, block_size, keep_tail=True) if evaluation.is_asked_for else None
    )
    measure = _Measure(baseline.model, recipe.method, blocks, evaluation.eval_batch_size, device)
    measure.take_up(compressor)

    rows = [measure.row("-", None, baseline.model, Path(arguments.baseline))]
    ranks, chosen = (arguments.ranks, {}) if arguments.ranks else _choose(arguments, compressor, measure)
    missing = [rank for rank in ranks if not compressor.folder(rank).exists()]
    if missing:
        compressor.factorize_ahead(missing)
    for rank in sorted(ranks, reverse=True):
        model, folder = chosen.get(rank) or compressor.load_or_make(rank)[0], compressor.folder(rank)
        rows.append(measure.row(rank, compressor.share(rank), model, folder))
        measure.note(rank, folder)
    if blocks is not None:
        print(f"Validation loss in nats a token, over {measure.losses['-'].tokens:,} tokens:")
    print_table(rows)
    write_result(
        output.json,
        "compress",
        measure.results,
        method=recipe.method,
        label=compressor.label,
        text=evaluation.source().name if blocks is not None else None,
        tokens=measure.losses["-"].tokens if blocks is not None else None,
        device=str(device),
    )
    _plot(compressor, measure)
    for rank in ranks if publishing.push_to_hub else ():
        measured = measure.record(rank, evaluation.source()) if measure.losses else None
        name, private = _repository(publishing.push_to_hub, rank, ranks), publishing.private or None
        print(f"Published: {publish(compressor.folder(rank), name, private=private, measured=measured)}")


def _repository(name: str, rank: int, ranks: list[int]) -> str:
    return name if len(ranks) == 1 else f"{name}-k{rank}"


class _Measure:
    """Sizes of models, and their losses where there is text."""

    def __init__(
        self, baseline: FactorizedGPT2, method: str, blocks: Dataset | None, batch_size: int, device: torch.device
    ):
        self.baseline_size, self.method = model_size(baseline), method
        self.blocks, self.batch_size, self.device = blocks, batch_size, device
        # Blocks of other sizes make other losses of the same tokens.
        self.text = None if blocks is None else f"{len(blocks[0]['input_ids'])}-{tokens_fingerprint(_ids(blocks))}"
        self.losses: dict[int | str, LossSum] = {}  # by rank; the baseline's under "-"
        self.points: dict[int, tuple[int, float]] = {}  # bytes and loss increase of each rank, earlier calls' too
        self.results: list[dict[str, Any]] = []  # the rows of the table, for programs to read

    def loss(self, rank: int | str, model: FactorizedGPT2) -> float:
        """Measure a model's loss, once for every rank."""
        if rank not in self.losses:
            desc = f"Evaluating {'the baseline' if rank == '-' else f'k = {rank}'}"
            self.losses[rank] = sum_loss(model.to(self.device), self.blocks, self.batch_size, self.device, desc=desc)
            if rank != "-":
                self.points[rank] = model_size(model).bytes, self.increase(rank)
        return self.losses[rank].loss

    def increase(self, rank: int | str) -> float:
        """Say how far a measured model's loss exceeds the baseline's, in nats a token."""
        return self.losses[rank].loss - self.losses["-"].loss

    def take_up(self, compressor: Compressor) -> None:
        """Read from the records of the ranks that are there what was measured on the same text before."""
        if self.text is not None:
            self.points |= compressor.measured(self.text)

    def note(self, rank: int, folder: Path) -> None:
        """Write what was measured into the record of a rank's folder."""
        if self.text is not None:
            note_measurement(folder, self.text, *self.points[rank])

    def record(self, rank: int, text: TextSource) -> Measurement:
        """Put down a rank's loss, and the baseline's beside it."""
        size = self.baseline_size
        baseline = Figures("baseline", None, size.parameters, size.bytes, self.losses["-"].loss)
        return Measurement(self.losses[rank].loss, text, baseline)

    def row(self, rank: int | str, share: float | None, model: FactorizedGPT2, folder: Path) -> dict[str, Any]:
        """Lay out a row of the table."""
        size = model_size(model)
        row = {
            "k": rank,
            "variance" if self.method == "pca" else "share": "" if share is None else f"{share:.4f}",
            "parameters": f"{size.parameters:,}",
            "vocabulary": f"{size.vocabulary_parameters:,}",
            "dtype": dtype_name(model),
            "MB": megabytes(size.bytes),
            "vocabulary MB": megabytes(size.vocabulary_bytes),
            "size": f"{size.bytes / self.baseline_size.bytes:.1%}",
        }
        if self.blocks is not None:
            loss = self.loss(rank, model)
            row |= {"loss": f"{loss:.4f}", "perplexity": f"{perplexity(loss):.2f}"}
            row |= {"increase": f"{self.increase(rank):+.4f}"}
        self.results.append(
            {
                "rank": None if rank == "-" else rank,
                "explained_share": share,
                "dtype": dtype_name(model),
                **asdict(size),
                "loss": None if self.blocks is None else self.losses[rank].loss,
                "perplexity": None if self.blocks is None else perplexity(self.losses[rank].loss),
                "loss_increase": None if self.blocks is None else self.increase(rank),
                "folder": str(folder),
            }
        )
        return row | {"folder": str(folder)}


def _ids(blocks: Dataset) -> Iterator[Sequence[int]]:
    return (blocks[index]["input_ids"] for index in range(len(blocks)))


def _choose(
    arguments: CompressArguments, compressor: Compressor, measure: _Measure
) -> tuple[list[int], dict[int, FactorizedGPT2]]:
    """Find the smallest rank that is good enough; return it, and its model where that is at hand, with its folder."""
    config = compressor.baseline.model.config
    if arguments.explained_variance is not None:
        rank = smallest_rank_by_share(compressor.shares, arguments.explained_variance)
        if rank >= config.n_embd:
            share, width = arguments.explained_variance, config.n_embd
            raise UserError(f"explained_variance {share} needs the whole width of {width}.")
        return [rank], {}

    target, good_enough = arguments.target_loss_increase, {}
    known = {rank: increase for rank, (_, increase) in measure.points.items()}

    def increase_of(rank: int) -> float:
        stored = compressor.load(rank)
        model, share = (stored, None) if stored else compressor.make(rank)
        measure.loss(rank, model)
        increase = measure.increase(rank)
        print(f"k = {rank}: {increase:+.4f} nats a token", flush=True)
        if is_good_enough(increase, target):
            good_enough.clear()  # each is smaller than the last
            good_enough[rank] = model, share
        return increase

    rank = smallest_rank_by_loss(increase_of, largest_rank(config), target, known)
    if rank not in good_enough:  # measured by an earlier call
        return [rank], {}
    model, share = good_enough[rank]
    if share is not None:
        compressor.save(model, rank, share)
    return [rank], {rank: model}


def _plot(compressor: Compressor, measure: _Measure) -> None:
    """Draw the spectrum with every rank that is there, and loss against bytes with all measured on this text."""
    if not is_matplotlib_available():
        logger.warning("No plots: the package matplotlib is not installed.")
        return
    label, root = compressor.label, compressor.root
    path = root / f"spectrum_{label}.png"
    if compressor.saved or not path.with_suffix(".svg").exists():
        plot_spectrum(compressor.shares, compressor.ranks_there(), compressor.recipe.method, path)
        logger.info("Spectrum: %s", path)
    if measure.losses:
        path = root / f"loss_against_bytes_{label}.png"
        points = [(*point, rank) for rank, point in measure.points.items()]
        plot_loss_against_bytes(points, measure.baseline_size.bytes, compressor.ranks_there(), label, path)
        logger.info("Loss against bytes: %s", path)
