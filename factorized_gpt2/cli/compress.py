"""`compress.py`: a trained GPT-2 to smaller ones, by factorizing its vocabulary."""

import logging
import math
import re
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
from ..compress.coded import CODED, SEARCHED, Budget, BudgetTooSmall, CodedCompressor
from ..compress.compressor import METHODS, CalibrationText, Compressor, Recipe
from ..compress.ranks import is_good_enough, smallest_rank_by_loss, smallest_rank_by_share
from ..hub.model_card import Figures, Measurement
from ..hub.repository import check_access, publish
from ..models.loading import check_tokenizer, load_baseline
from ..models.record import RECORD_NAME
from ..models.sizes import model_size, stored_bytes
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

Size = int | Budget | str  # a rank, what method coded may take, or "-": of the baseline


@dataclass
class CompressArguments:
    """What to compress, and how far."""

    _argument_group_name = "What to make of what"

    baseline: str = field(metadata={"help": "Folder or Hub id of a trained, unfactorized GPT-2."})
    ranks: list[int] | None = field(
        default=None, metadata={"help": "Ranks k of the token embedding, each smaller than its width."}
    )
    bits_per_weight: list[float] | None = field(
        default=None,
        metadata={
            "help": "Budgets of method coded, a model each: bits that the vocabulary takes in the file, everything "
            "counted, for each of its V d weights. Ranks beside it are upper limits, for every budget in turn."
        },
    )
    vocabulary_mb: list[float] | None = field(
        default=None, metadata={"help": "The same budgets in million bytes, instead of bits_per_weight."}
    )
    target_loss_increase: float | None = field(
        default=None,
        metadata={
            "help": "Instead of ranks or budgets: the smallest model whose loss on the evaluation text exceeds the "
            "baseline's by no more than this, in nats a token."
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
            "both sides. tokenwise: joint, then every row fitted to its own token's use. coded: joint's directions, "
            "integers, entropy coding; the best at equal bytes. All but pca need text. Budgets imply coded.",
            "choices": [*METHODS, CODED],
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

    @property
    def makes_codes(self) -> bool:
        """Whether the vocabulary becomes integers."""
        return self.method == CODED or bool(self.bits_per_weight or self.vocabulary_mb)

    def budgets(self, weights: int) -> list[Budget]:
        """List the budgets that are asked for, of a vocabulary of so many weights."""
        ranks = self.ranks or [None]
        if self.bits_per_weight:
            return [Budget(bits, rank) for bits in self.bits_per_weight for rank in ranks]
        return [Budget.of_megabytes(size, weights, rank) for size in self.vocabulary_mb or () for rank in ranks]


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
        default=None,
        metadata={"help": "USER/NAME; of several, each becomes NAME-k and its rank, or NAME-b and its bits."},
    )
    private: bool = field(default=False, metadata={"help": "Let no one else see it."})

    def repository(self, folder: Path, is_one_of_several: bool) -> str:
        """Name the repository of a model's folder."""
        size = re.search(r"_([kb][\d.]+(_k\d+)?)$", folder.name)[1].replace("_", "-")
        return f"{self.push_to_hub}-{size}" if is_one_of_several else self.push_to_hub


def compress(argv: list[str]) -> None:
    """Load the baseline, choose ranks, factorize, write the folders, print what it cost, publish it if asked."""
    arguments, calibration, evaluation, computing, publishing = ManualParser(
        (CompressArguments, CalibrationArguments, EvaluationArguments, DeviceArguments, PublishArguments),
        prog="compress.py",
        description="Factorize the token embedding and head of a trained GPT-2.",
        usage="%(prog)s --baseline FOLDER (--ranks K [K ...] | --bits_per_weight B [B ...]) [option ...]",
        examples=(
            "compress.py --baseline openai-community/gpt2 --ranks 64 128",
            "compress.py --baseline my_gpt2 --ranks 64 --method tokenwise --calibration_file train.txt --refine 200",
            "compress.py --baseline my_gpt2 --target_loss_increase 0.02 --eval_file held_out.txt",
            "compress.py --baseline my_gpt2 --bits_per_weight 1 1.75 2.75 --calibration_file train.txt",
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
    method = CODED if arguments.makes_codes else arguments.method
    trunk = model_size(baseline.model)
    require_space(Path(arguments.output_dir), trunk.bytes - trunk.vocabulary_bytes, "a compressed model")
    recipe = Recipe(method, arguments.tie_word_embeddings, arguments.refine, arguments.seed)
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
    compressor = (CodedCompressor if method == CODED else Compressor)(
        baseline, recipe, Path(arguments.output_dir), tokenizer, text, arguments.overwrite, device, progress=True
    )
    blocks = (
        load_blocks(evaluation.source(), tokenizer, block_size, keep_tail=True) if evaluation.is_asked_for else None
    )
    measure = _Measure(baseline.model, method, blocks, evaluation.eval_batch_size, device)

    rows = [measure.row("-", "", baseline.model, Path(arguments.baseline))]
    sizes = arguments.budgets(baseline.model.transformer.wte.weight.numel()) if method == CODED else arguments.ranks
    sizes, chosen = (sizes, {}) if sizes else _choose(arguments, compressor, measure)
    missing = [size for size in sizes if not compressor.folder(size).exists()]
    if missing:
        compressor.factorize_ahead(missing)
    for size in sorted(sizes, reverse=True):
        model, folder = chosen.get(size) or compressor.load_or_make(size)[0], compressor.folder(size)
        share = read_json(folder / RECORD_NAME)[compressor.share_name]
        rows.append(measure.row(size, f"{share:.4f}", model, folder))
    if blocks is not None:
        print(f"Validation loss in nats a token, over {measure.losses['-'].tokens:,} tokens:")
    print_table(rows)
    _plot(compressor, sizes, measure)
    for size in sizes if publishing.push_to_hub else ():
        measured = measure.record(size, evaluation.source()) if measure.losses else None
        folder, private = compressor.folder(size), publishing.private or None
        name = publishing.repository(folder, len(sizes) > 1)
        print(f"Published: {publish(folder, name, private=private, measured=measured)}")


def check(arguments: CompressArguments, calibration: CalibrationArguments, evaluation: EvaluationArguments) -> None:
    """Check what can be checked without a model.

    Raises:
        UserError: A setting out of range, or one that contradicts or lacks another.
    """
    ranks, loss, share = arguments.ranks, arguments.target_loss_increase, arguments.explained_variance
    if arguments.makes_codes:
        _check_codes(arguments)
    elif sum(choice is not None for choice in (ranks, loss, share)) != 1:
        raise UserError(
            "Set one of ranks, bits_per_weight, vocabulary_mb, target_loss_increase and explained_variance."
        )
    if share is not None and (arguments.makes_codes or arguments.method != "pca"):
        method = CODED if arguments.makes_codes else arguments.method
        raise UserError(f"explained_variance is for method pca alone; with method {method} set target_loss_increase.")
    if ranks is not None and len(set(ranks)) != len(ranks):
        raise UserError(f"ranks: a rank is given twice in {' '.join(map(str, ranks))}.")
    if loss is not None and not evaluation.is_asked_for:
        raise UserError("target_loss_increase needs text to measure on: set eval_file or dataset_name.")
    learns = arguments.makes_codes or arguments.refine or arguments.method != "pca"
    if calibration.calibration_file and not learns:
        raise UserError("calibration_file does nothing for method pca without refine; tokenwise makes the most of it.")


def _check_codes(arguments: CompressArguments) -> None:
    choices = {name: getattr(arguments, name) for name in ("bits_per_weight", "vocabulary_mb", "target_loss_increase")}
    if sum(choice is not None for choice in choices.values()) != 1:
        raise UserError(f"Method {CODED} needs one of {', '.join(choices)}.")
    if arguments.method not in ("pca", CODED):  # the first is the default
        raise UserError(f"bits_per_weight and vocabulary_mb are for method {CODED}, not for {arguments.method}.")
    if arguments.refine:
        raise UserError(f"refine trains floats; of method {CODED} there are none.")
    if not arguments.tie_word_embeddings:
        raise UserError(f"Method {CODED} codes one matrix for both sides: leave tie_word_embeddings as it is.")
    if arguments.ranks and arguments.target_loss_increase is not None:
        raise UserError("Set one of ranks and target_loss_increase.")
    for name in ("bits_per_weight", "vocabulary_mb"):
        sizes = choices[name] or ()
        if any(not size > 0 for size in sizes) or len(set(sizes)) != len(sizes):
            raise UserError(f"{name}: budgets must be positive and differ, got {' '.join(map(str, sizes))}.")


class _Measure:
    """Sizes of models, and their losses where there is text."""

    def __init__(
        self, baseline: FactorizedGPT2, method: str, blocks: Dataset | None, batch_size: int, device: torch.device
    ):
        self.baseline_size, self.method = model_size(baseline), method
        self.blocks, self.batch_size, self.device = blocks, batch_size, device
        self.losses: dict[Size, LossSum] = {}  # the baseline's under "-"
        self.bytes: dict[Size, int] = {}

    def loss(self, size: Size, model: FactorizedGPT2, stored: int | None = None) -> float:
        """Measure a model's loss, once for every size.

        Args:
            size: The rank or the budget.
            model: Of that size.
            stored: Bytes of its file, where they are not those of its parameters.

        Returns:
            The loss, in nats a token.
        """
        if size not in self.losses:
            desc = f"Evaluating {'the baseline' if size == '-' else _name(size)}"
            self.losses[size] = sum_loss(model.to(self.device), self.blocks, self.batch_size, self.device, desc=desc)
            self.bytes[size] = model_size(model).bytes if stored is None else stored
        return self.losses[size].loss

    def increase(self, size: Size) -> float:
        """Say how far a measured model's loss exceeds the baseline's, in nats a token."""
        return self.losses[size].loss - self.losses["-"].loss

    def record(self, size: Size, text: TextSource) -> Measurement:
        """Put down a model's loss, and the baseline's beside it."""
        of = self.baseline_size
        baseline = Figures("baseline", None, of.parameters, of.bytes, self.losses["-"].loss)
        return Measurement(self.losses[size].loss, text, baseline)

    def row(self, size: Size, share: str, model: FactorizedGPT2, folder: Path) -> dict[str, Any]:
        """Lay out a row of the table."""
        of, stored = model_size(model), None
        row = {
            "k": "-" if size == "-" else model.config.n_embd_wte,
            {"pca": "variance", CODED: "bits a weight"}.get(self.method, "share"): share,
            "parameters": f"{of.parameters:,}",
            "vocabulary": f"{of.vocabulary_parameters:,}",
            "MB": megabytes(of.bytes),
            "vocabulary MB": megabytes(of.vocabulary_bytes),
        }
        if self.method == CODED:
            stored = of.bytes if size == "-" else stored_bytes(folder)
            row["file MB"] = megabytes(stored)
        row["size"] = f"{(stored or of.bytes) / self.baseline_size.bytes:.1%}"
        if self.blocks is not None:
            loss = self.loss(size, model, stored)
            row |= {"loss": f"{loss:.4f}", "perplexity": f"{perplexity(loss):.2f}"}
            row |= {"increase": f"{self.increase(size):+.4f}"}
        return row | {"folder": str(folder)}


def _name(size: Size) -> str:
    return str(size) if isinstance(size, Budget) else f"k = {size}"


def _choose(
    arguments: CompressArguments, compressor: Compressor, measure: _Measure
) -> tuple[list[Size], dict[Size, FactorizedGPT2]]:
    """Find the smallest model that is good enough; return its size, and where it is at hand itself, saved."""
    config = compressor.baseline.model.config
    is_coded = measure.method == CODED
    if arguments.explained_variance is not None:
        rank = smallest_rank_by_share(compressor.shares, arguments.explained_variance)
        if rank >= config.n_embd:
            width = config.n_embd
            raise UserError(f"explained_variance {arguments.explained_variance} needs the whole width of {width}.")
        return [rank], {}

    target, good_enough = arguments.target_loss_increase, {}
    ranks = range(1, min(config.n_embd - 1, config.vocab_size) + 1)
    sizes = [Budget(bits) for bits in SEARCHED] if is_coded else ranks

    def increase_of(number: int) -> float:
        size = sizes[number - 1]
        stored = compressor.load(size)
        try:
            model, share = (stored, None) if stored else compressor.make(size)
        except BudgetTooSmall:
            return math.inf
        measure.loss(size, model, _file_size(model, share, compressor.folder(size)) if is_coded else None)
        increase = measure.increase(size)
        print(f"{_name(size)}: {increase:+.4f} nats a token", flush=True)
        if is_good_enough(increase, target):
            good_enough.clear()  # each is smaller than the last
            good_enough[size] = model, share
        return increase

    size = sizes[
        smallest_rank_by_loss(increase_of, len(sizes), target, lambda number: compressor.name_of(sizes[number - 1]))
        - 1
    ]
    model, share = good_enough[size]
    if share is not None:
        compressor.save(model, size, share)
    return [size], {size: model}


def _file_size(model: FactorizedGPT2, bits_per_weight: float | None, folder: Path) -> int:
    """Tell how many bytes a model of coded vocabulary has in its file; nearly so where there is none yet."""
    if bits_per_weight is None:
        return stored_bytes(folder)
    size, config = model_size(model), model.config
    return size.bytes - size.vocabulary_bytes + round(bits_per_weight * config.vocab_size * config.n_embd / 8)


def _plot(compressor: Compressor, sizes: list[Size], measure: _Measure) -> None:
    """Draw the spectrum with every rank that is there, and loss against bytes where there are losses."""
    if not is_matplotlib_available():
        logger.warning("No plots: the package matplotlib is not installed.")
        return
    label, root = compressor.label, compressor.root
    path = root / f"spectrum_{label}.png"
    if measure.method != CODED and (compressor.saved or not path.with_suffix(".svg").exists()):
        plot_spectrum(compressor.shares, compressor.ranks_there(), compressor.recipe.method, path)
        logger.info("Spectrum: %s", path)
    if measure.losses:
        path = root / f"loss_against_bytes_{label}.png"
        points = [(measure.bytes[size], measure.increase(size), _name(size)) for size in measure.losses if size != "-"]
        names = [_name(size) for size in sizes]
        plot_loss_against_bytes(points, measure.baseline_size.bytes, names, label, path)
        logger.info("Loss against bytes: %s", path)


def main() -> None:
    """Entry point of the console command and of `compress.py`."""
    sys.exit(run_command(compress))


if __name__ == "__main__":
    main()
