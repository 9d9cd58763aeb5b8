"""What `compress.py` does once its words are read."""

import logging
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import is_matplotlib_available

from ..common.errors import UserError
from ..common.files import require_space
from ..compress.coded import SEARCHED, Budget, BudgetTooSmall, CodedCompressor
from ..compress.compressor import AnyCompressor, Compressor
from ..compress.ranks import check_ranks, is_good_enough, largest_rank, smallest_rank_by_loss, smallest_rank_by_share
from ..compress.recipe import CalibrationText, Recipe
from ..hub.repository import check_access, publish
from ..models.foreign_models import positions_of
from ..models.loading import check_tokenizer, load_baseline
from ..models.sizes import model_size, stored_bytes, vocabulary_width
from ..report.plots import plot_loss_against_bytes, plot_spectrum
from ..settings.devices import DtypeArguments
from ..settings.outputs import JsonArguments, PublishArguments
from ..settings.text_arguments import EvaluationArguments
from ..text.blocks import load_blocks
from ..text.tokenizers import has_tokenizer, load_tokenizer
from .compress_settings import CalibrationArguments, CompressArguments
from .measuring import BASELINE, Measure, size_name
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
    """Load the baseline, choose sizes, compress, write the folders, print what it cost, publish it if asked."""
    if publishing.push_to_hub:
        check_access(None, publishing.push_to_hub)
    baseline = load_baseline(arguments.baseline)
    if arguments.ranks:
        check_ranks(arguments.ranks, baseline.model.config)
    method = arguments.chosen
    trunk = model_size(baseline.model)
    require_space(Path(arguments.output_dir), trunk.bytes - trunk.vocabulary_bytes, "a compressed model")
    recipe = Recipe(method.name, arguments.tie_word_embeddings, arguments.refine, arguments.seed, numbers.dtype)
    tokenizer = None
    if arguments.tokenizer or recipe.needs_text or evaluation.is_asked_for or has_tokenizer(arguments.baseline):
        tokenizer = load_tokenizer(arguments.tokenizer or arguments.baseline)
        check_tokenizer(baseline.model, tokenizer)
    else:
        logger.warning("%s has no tokenizer, so the compressed models have none either.", arguments.baseline)
    block_size = evaluation.block_size_for(positions_of(baseline.model.config))
    text = None
    source = calibration.source(evaluation) if recipe.needs_text else None
    if source is not None:
        blocks = load_blocks(source, tokenizer, block_size, keep_tail=False)
        text = CalibrationText(blocks, calibration.calibration_tokens, source.name)
    compressor: AnyCompressor[Any] = {"rank": Compressor, "bytes": CodedCompressor}[method.by](
        baseline, recipe, Path(arguments.output_dir), tokenizer, text, arguments.overwrite, device, progress=True
    )
    blocks = (
        load_blocks(evaluation.source(), tokenizer, block_size, keep_tail=True) if evaluation.is_asked_for else None
    )
    measure = Measure(baseline.model, method, blocks, evaluation.eval_batch_size, device)
    measure.take_up(compressor)

    rows = [measure.row(BASELINE, None, baseline.model, Path(arguments.baseline))]
    sizes: list[Any] | None = _budgets(arguments, baseline.model.config) if method.by == "bytes" else arguments.ranks
    made: Iterable[tuple[Any, PreTrainedModel, float]]
    if sizes:
        made = compressor.load_or_make(sorted(sizes, reverse=True))
    else:
        (chosen,) = _choose(arguments, compressor, measure)
        made, sizes = [chosen], [chosen[0]]
    for size, model, share in made:
        rows.append(measure.row(size, share, model, compressor.folder(size)))
        measure.note(size, compressor.folder(size))
    if blocks is not None:
        print(f"Validation loss in nats a token, over {measure.losses[BASELINE].tokens:,} tokens:")
    print_table(rows)
    write_result(
        output.json,
        "compress",
        measure.results,
        method=recipe.method,
        label=compressor.label,
        text=evaluation.source().name if blocks is not None else None,
        tokens=measure.losses[BASELINE].tokens if blocks is not None else None,
        device=str(device),
    )
    _plot(compressor, measure)
    for size in sizes if publishing.push_to_hub else ():
        measured = measure.record(size, evaluation.source()) if measure.losses else None
        folder, private = compressor.folder(size), publishing.private or None
        name = repository_name(publishing.push_to_hub, folder, len(sizes) > 1)
        print(f"Published: {publish(folder, name, private=private, measured=measured)}")


def _budgets(arguments: CompressArguments, config: PretrainedConfig) -> list[Budget]:
    """List the budgets that are asked for, each with every largest rank."""
    ranks, weights = arguments.ranks or [None], config.vocab_size * vocabulary_width(config)
    if arguments.bits_per_weight:
        return [Budget(bits, rank) for bits in arguments.bits_per_weight for rank in ranks]
    return [Budget.of_megabytes(size, weights, rank) for size in arguments.vocabulary_mb or () for rank in ranks]


def repository_name(name: str, folder: Path, is_one_of_several: bool) -> str:
    """Name the repository of a model's folder."""
    size = re.search(r"_([kb][\d.]+(_k\d+)?)$", folder.name)[1].replace("_", "-")
    return f"{name}-{size}" if is_one_of_several else name


def _choose(
    arguments: CompressArguments, compressor: AnyCompressor[Any], measure: Measure
) -> Iterable[tuple[Any, PreTrainedModel, float]]:
    """Find the smallest model that is good enough; return its size, itself and its share, as `load_or_make` does."""
    config, by_bytes = compressor.baseline.model.config, measure.method.by == "bytes"
    if arguments.explained_variance is not None and isinstance(compressor, Compressor):
        rank = smallest_rank_by_share(compressor.shares.tolist(), arguments.explained_variance)
        if rank >= vocabulary_width(config):
            share, width = arguments.explained_variance, vocabulary_width(config)
            raise UserError(
                f"explained_variance={share} needs the full width of {width}, so nothing is gained: set a smaller "
                f"share."
            )
        return compressor.load_or_make([rank])

    target = arguments.target_loss_increase
    good_enough: dict[Any, tuple[PreTrainedModel, float | None]] = {}
    sizes: Sequence[Any] = [Budget(bits) for bits in SEARCHED] if by_bytes else range(1, largest_rank(config) + 1)
    known = {sizes.index(size) + 1: increase for size, (_, increase) in measure.points.items() if size in sizes}

    def increase_of(number: int) -> float:
        size = sizes[number - 1]
        stored = compressor.load(size)
        try:
            model, share = (stored, None) if stored else compressor.make(size)
        except BudgetTooSmall:
            return math.inf
        measure.loss(size, model, _file_size(model, share, compressor.folder(size)) if by_bytes else None)
        increase = measure.increase(size)
        print(f"{size_name(size)}: {increase:+.4f} nats a token", flush=True)
        if is_good_enough(increase, target):
            good_enough.clear()  # each is smaller than the last
            good_enough[size] = model, share
        return increase

    def name_of(number: int) -> str:
        return compressor.name_of(sizes[number - 1])

    size = sizes[smallest_rank_by_loss(increase_of, len(sizes), target, known, name_of) - 1]
    if size not in good_enough:  # measured by an earlier call
        return compressor.load_or_make([size])
    model, share = good_enough[size]
    if share is None:
        share = compressor.share(size)
    else:
        compressor.save(model, size, share)
    return [(size, model, share)]


def _file_size(model: PreTrainedModel, bits_per_weight: float | None, folder: Path) -> int:
    """Tell how many bytes a model of coded vocabulary has in its file; nearly so where there is none yet."""
    if bits_per_weight is None:
        return stored_bytes(folder)
    size, weights = model_size(model), model.config.vocab_size * vocabulary_width(model.config)
    return size.bytes - size.vocabulary_bytes + round(bits_per_weight * weights / 8)


def _plot(compressor: AnyCompressor[Any], measure: Measure) -> None:
    """Draw the spectrum with every rank that is there, and loss against bytes with all measured on this text."""
    if not is_matplotlib_available():
        logger.warning("No plots were made, because the package matplotlib is not installed.")
        return
    label, root = compressor.label, compressor.root
    path = root / f"spectrum_{label}.png"
    if isinstance(compressor, Compressor) and (compressor.saved or not path.with_suffix(".svg").exists()):
        plot_spectrum(compressor.shares.tolist(), compressor.sizes_there(), compressor.recipe.method, path)
        logger.info("Spectrum: %s", path)
    if measure.losses:
        path = root / f"loss_against_bytes_{label}.png"
        points = [(*point, size_name(size)) for size, point in measure.points.items()]
        labelled = [size_name(size) for size in compressor.sizes_there()]
        plot_loss_against_bytes(points, measure.baseline_size.bytes, labelled, label, path)
        logger.info("Loss against bytes: %s", path)
