"""What `compress.py` does once its words are read."""

import logging
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers.utils import is_matplotlib_available

from ..common.errors import UserError
from ..common.files import read_json, require_space
from ..compress.coded import SEARCHED, Budget, BudgetTooSmall, CodedCompressor
from ..compress.compressor import CalibrationText, Compressor, Recipe
from ..compress.methods import CODED
from ..compress.ranks import is_good_enough, smallest_rank_by_loss, smallest_rank_by_share
from ..hub.model_card import Figures, Measurement
from ..hub.repository import check_access, publish
from ..models.loading import check_tokenizer, load_baseline
from ..models.record import RECORD_NAME
from ..models.sizes import model_size, stored_bytes
from ..network.configuration_factorized_gpt2 import FactorizedGPT2Config
from ..network.modeling_factorized_gpt2 import FactorizedGPT2
from ..report.plots import plot_loss_against_bytes, plot_spectrum
from ..runs.results import megabytes
from ..settings.publishing import PublishArguments
from ..settings.text_arguments import EvaluationArguments
from ..text.blocks import load_blocks
from ..text.loss import LossSum, perplexity, sum_loss
from ..text.source import TextSource
from ..text.tokenizers import has_tokenizer, load_tokenizer
from .compress_settings import CalibrationArguments, CompressArguments
from .shell import print_table

logger = logging.getLogger(__name__)

Size = int | Budget | str  # a rank, what method coded may take, or "-": of the baseline


def compress_all(
    arguments: CompressArguments,
    calibration: CalibrationArguments,
    evaluation: EvaluationArguments,
    device: torch.device,
    publishing: PublishArguments,
) -> None:
    """Load the baseline, choose ranks, factorize, write the folders, print what it cost, publish it if asked."""
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
    sizes = _budgets(arguments, baseline.model.config) if method == CODED else arguments.ranks
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
        name = repository_name(publishing.push_to_hub, folder, len(sizes) > 1)
        print(f"Published: {publish(folder, name, private=private, measured=measured)}")


def _budgets(arguments: CompressArguments, config: FactorizedGPT2Config) -> list[Budget]:
    """List the budgets that are asked for, each with every largest rank."""
    ranks, weights = arguments.ranks or [None], config.vocab_size * config.n_embd
    if arguments.bits_per_weight:
        return [Budget(bits, rank) for bits in arguments.bits_per_weight for rank in ranks]
    return [Budget.of_megabytes(size, weights, rank) for size in arguments.vocabulary_mb or () for rank in ranks]


def repository_name(name: str, folder: Path, is_one_of_several: bool) -> str:
    """Name the repository of a model's folder."""
    size = re.search(r"_([kb][\d.]+(_k\d+)?)$", folder.name)[1].replace("_", "-")
    return f"{name}-{size}" if is_one_of_several else name


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
