"""`compress.py`: a trained GPT-2 to smaller ones, by factorizing its vocabulary."""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers.utils import is_matplotlib_available

from ..common.errors import UserError
from ..common.files import read_json, require_space
from ..common.folder_lock import compress_alone
from ..compress.compressor import METHODS, CalibrationText, Compressor, Recipe
from ..compress.ranks import is_good_enough, smallest_rank_by_loss, smallest_rank_by_share
from ..hub.model_card import Figures, Measurement
from ..hub.repository import check_access, publish
from ..models.loading import check_tokenizer, load_baseline
from ..models.record import RECORD_NAME
from ..models.sizes import model_size
from ..network.modeling_factorized_gpt2 import FactorizedGPT2
from ..report.plots import plot_loss_against_bytes, plot_spectrum
from ..runs.results import megabytes
from ..settings.devices import DeviceArguments
from ..settings.parsing import ManualParser
from ..settings.text_arguments import EvaluationArguments
from ..text.blocks import load_blocks
from ..text.loss import LossSum, perplexity, sum_loss
from ..text.source import TextSource
from ..text.tokenizers import has_tokenizer, load_tokenizer
from .shell import print_table, run_command

logger = logging.getLogger(__name__)


@dataclass
class CompressArguments:
    """What to compress, and how far."""

    _argument_group_name = "What to make of what"

    baseline: str = field(metadata={"help": "Folder or Hub id of a trained, unfactorized GPT-2."})
    ranks: list[int] | None = field(
        default=None, metadata={"help": "Ranks k of the token embedding, each smaller than its width."}
    )
    target_loss_increase: float | None = field(
        default=None,
        metadata={
            "help": "Instead of ranks: the smallest rank whose loss on the evaluation text exceeds the baseline's by "
            "no more than this, in nats a token."
        },
    )
    explained_variance: float | None = field(
        default=None,
        metadata={
            "help": "Instead of ranks, for method pca alone: the smallest rank that keeps this share of the "
            "embedding's variance. Variance tells little of loss: target_loss_increase is the better guide."
        },
    )
    method: str = field(
        default="pca",
        metadata={
            "help": "pca: the protocol's. weighted: rows weighted by frequency. joint: the loss to second order, on "
            "both sides. tokenwise: joint, then every row fitted to its own token's use. All but pca need text.",
            "choices": list(METHODS),
        },
    )
    refine: int = field(
        default=0, metadata={"help": "Steps of training wte, scale_up and scale_down to match the baseline."}
    )
    tie_word_embeddings: bool = field(
        default=True,
        metadata={"help": "One wte serves both sides. False: each side gets its own, V k parameters more."},
    )
    output_dir: str = field(default="model_weights", metadata={"help": "Folder of the compressed models and factors."})
    tokenizer: str | None = field(default=None, metadata={"help": "Folder or Hub id. None: the baseline's."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what was made from another baseline."})
    seed: int = field(default=0, metadata={"help": "Of everything that is drawn."})


@dataclass
class CalibrationArguments:
    """Text that tells how the baseline uses its vocabulary: best of the kind it was trained on."""

    _argument_group_name = "Text to learn from"

    calibration_file: list[str] | None = field(
        default=None, metadata={"help": "Local .txt, .jsonl, .parquet or .bin files instead of the dataset's split."}
    )
    calibration_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    calibration_tokens: int = field(
        default=16384, metadata={"help": "Tokens to run the baseline over; frequencies are counted in all the text."}
    )


@dataclass
class PublishArguments:
    """Where on the Hub what is made goes, if anywhere."""

    _argument_group_name = "Publishing"

    push_to_hub: str | None = field(
        default=None, metadata={"help": "USER/NAME; of several ranks, each becomes NAME-k and its rank."}
    )
    private: bool = field(default=False, metadata={"help": "Let no one else see it."})

    def repository(self, rank: int, ranks: list[int]) -> str:
        """Name the repository of a rank."""
        return self.push_to_hub if len(ranks) == 1 else f"{self.push_to_hub}-k{rank}"


def compress(argv: list[str]) -> None:
    """Load the baseline, choose ranks, factorize, write the folders, print what it cost, publish it if asked."""
    arguments, calibration, evaluation, computing, publishing = ManualParser(
        (CompressArguments, CalibrationArguments, EvaluationArguments, DeviceArguments, PublishArguments),
        prog="compress.py",
        description="Factorize the token embedding and head of a trained GPT-2.",
        usage="%(prog)s --baseline FOLDER --ranks K [K ...] [option ...]",
        examples=(
            "compress.py --baseline openai-community/gpt2 --ranks 64 128",
            "compress.py --baseline my_gpt2 --ranks 64 --method tokenwise --calibration_file train.txt --refine 200",
            "compress.py --baseline my_gpt2 --target_loss_increase 0.02 --eval_file held_out.txt",
        ),
        remark="What was made in the same way before is reused.",
    ).parse(argv)
    check(arguments, calibration, evaluation)
    with compress_alone(Path(arguments.output_dir)):
        _compress(arguments, calibration, evaluation, computing.found, publishing)


def _compress(
    arguments: CompressArguments,
    calibration: CalibrationArguments,
    evaluation: EvaluationArguments,
    device: torch.device,
    publishing: PublishArguments,
) -> None:
    if publishing.push_to_hub:
        check_access(None, publishing.push_to_hub)
    baseline = load_baseline(arguments.baseline)
    if arguments.ranks:
        baseline.check_ranks(arguments.ranks)
    trunk = model_size(baseline.model)
    require_space(Path(arguments.output_dir), trunk.bytes - trunk.vocabulary_bytes, "a compressed model")
    recipe = Recipe(arguments.method, arguments.tie_word_embeddings, arguments.refine, arguments.seed)
    tokenizer = None
    if arguments.tokenizer or recipe.needs_text or evaluation.is_asked_for or has_tokenizer(arguments.baseline):
        tokenizer = load_tokenizer(arguments.tokenizer or arguments.baseline)
        check_tokenizer(baseline.model, tokenizer)
    else:
        logger.warning("%s has no tokenizer, so what is made of it has none.", arguments.baseline)
    block_size = evaluation.block_size_for(baseline.model.config.n_positions)
    text = None
    if recipe.needs_text and (calibration.calibration_file or evaluation.dataset_name):
        source = evaluation.source_of(calibration.calibration_file, calibration.calibration_split)
        blocks = load_blocks(source, tokenizer, block_size, keep_tail=False)
        text = CalibrationText(blocks, calibration.calibration_tokens, source.name)
    compressor = Compressor(
        baseline, recipe, Path(arguments.output_dir), tokenizer, text, arguments.overwrite, device, progress=True
    )
    blocks = (
        load_blocks(evaluation.source(), tokenizer, block_size, keep_tail=True) if evaluation.is_asked_for else None
    )
    measure = _Measure(baseline.model, recipe.method, blocks, evaluation.eval_batch_size, device)

    rows = [measure.row("-", "", baseline.model, Path(arguments.baseline))]
    ranks, chosen = (arguments.ranks, {}) if arguments.ranks else _choose(arguments, compressor, measure)
    missing = [rank for rank in ranks if not compressor.folder(rank).exists()]
    if missing:
        compressor.factorize_ahead(missing)
    for rank in sorted(ranks, reverse=True):
        model, folder = chosen.get(rank) or compressor.load_or_make(rank)[0], compressor.folder(rank)
        share = read_json(folder / RECORD_NAME)[compressor.share_name]
        rows.append(measure.row(rank, f"{share:.4f}", model, folder))
    if blocks is not None:
        print(f"Validation loss in nats a token, over {measure.losses['-'].tokens:,} tokens:")
    print_table(rows)
    _plot(compressor, ranks, measure)
    for rank in ranks if publishing.push_to_hub else ():
        measured = measure.record(rank, evaluation.source()) if measure.losses else None
        name, private = publishing.repository(rank, ranks), publishing.private or None
        print(f"Published: {publish(compressor.folder(rank), name, private=private, measured=measured)}")


def check(arguments: CompressArguments, calibration: CalibrationArguments, evaluation: EvaluationArguments) -> None:
    """Check what can be checked without a model.

    Raises:
        UserError: A setting out of range, or one that contradicts or lacks another.
    """
    ranks, loss, share = arguments.ranks, arguments.target_loss_increase, arguments.explained_variance
    if sum(choice is not None for choice in (ranks, loss, share)) != 1:
        raise UserError("Set one of ranks, target_loss_increase and explained_variance.")
    if share is not None and arguments.method != "pca":
        raise UserError(
            f"explained_variance is for method pca alone; with method {arguments.method} set target_loss_increase."
        )
    if ranks is not None and len(set(ranks)) != len(ranks):
        raise UserError(f"ranks: a rank is given twice in {' '.join(map(str, ranks))}.")
    if loss is not None and not evaluation.is_asked_for:
        raise UserError("target_loss_increase needs text to measure on: set eval_file or dataset_name.")
    if calibration.calibration_file and arguments.method == "pca" and not arguments.refine:
        raise UserError("calibration_file does nothing for method pca without refine; tokenwise makes the most of it.")


class _Measure:
    """Sizes of models, and their losses where there is text."""

    def __init__(
        self, baseline: FactorizedGPT2, method: str, blocks: Dataset | None, batch_size: int, device: torch.device
    ):
        self.baseline_size, self.method = model_size(baseline), method
        self.blocks, self.batch_size, self.device = blocks, batch_size, device
        self.losses: dict[int | str, LossSum] = {}  # by rank; the baseline's under "-"
        self.bytes: dict[int | str, int] = {}

    def loss(self, rank: int | str, model: FactorizedGPT2) -> float:
        """Measure a model's loss, once for every rank."""
        if rank not in self.losses:
            desc = f"Evaluating {'the baseline' if rank == '-' else f'k = {rank}'}"
            self.losses[rank] = sum_loss(model.to(self.device), self.blocks, self.batch_size, self.device, desc=desc)
            self.bytes[rank] = model_size(model).bytes
        return self.losses[rank].loss

    def increase(self, rank: int | str) -> float:
        """Say how far a measured model's loss exceeds the baseline's, in nats a token."""
        return self.losses[rank].loss - self.losses["-"].loss

    def record(self, rank: int, text: TextSource) -> Measurement:
        """Put down a rank's loss, and the baseline's beside it."""
        size = self.baseline_size
        baseline = Figures("baseline", None, size.parameters, size.bytes, self.losses["-"].loss)
        return Measurement(self.losses[rank].loss, text, baseline)

    def row(self, rank: int | str, share: str, model: FactorizedGPT2, folder: Path) -> dict[str, Any]:
        """Lay out a row of the table."""
        size = model_size(model)
        row = {
            "k": rank,
            "variance" if self.method == "pca" else "share": share,
            "parameters": f"{size.parameters:,}",
            "vocabulary": f"{size.vocabulary_parameters:,}",
            "MB": megabytes(size.bytes),
            "vocabulary MB": megabytes(size.vocabulary_bytes),
            "size": f"{size.bytes / self.baseline_size.bytes:.1%}",
        }
        if self.blocks is not None:
            loss = self.loss(rank, model)
            row |= {"loss": f"{loss:.4f}", "perplexity": f"{perplexity(loss):.2f}"}
            row |= {"increase": f"{self.increase(rank):+.4f}"}
        return row | {"folder": str(folder)}


def _choose(
    arguments: CompressArguments, compressor: Compressor, measure: _Measure
) -> tuple[list[int], dict[int, FactorizedGPT2]]:
    """Find the smallest rank that is good enough; return it, and its model where that is at hand, with its folder."""
    width, vocab_size = (getattr(compressor.baseline.model.config, name) for name in ("n_embd", "vocab_size"))
    if arguments.explained_variance is not None:
        rank = smallest_rank_by_share(compressor.shares, arguments.explained_variance)
        if rank >= width:
            raise UserError(f"explained_variance {arguments.explained_variance} needs the whole width of {width}.")
        return [rank], {}

    target, good_enough = arguments.target_loss_increase, {}

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

    rank = smallest_rank_by_loss(increase_of, min(width - 1, vocab_size), target)
    model, share = good_enough[rank]
    if share is not None:
        compressor.save(model, rank, share)
    return [rank], {rank: model}


def _plot(compressor: Compressor, ranks: list[int], measure: _Measure) -> None:
    """Draw the spectrum with every rank that is there, and loss against bytes where there are losses."""
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
        points = [(measure.bytes[rank], measure.increase(rank), rank) for rank in measure.losses if rank != "-"]
        plot_loss_against_bytes(points, measure.baseline_size.bytes, ranks, label, path)
        logger.info("Loss against bytes: %s", path)


def main() -> None:
    """Entry point of the console command and of `compress.py`."""
    sys.exit(run_command(compress))


if __name__ == "__main__":
    main()
