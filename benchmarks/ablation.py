"""What each ingredient brings: share of PCA's loss gap closed on held-out text, without it or with another value.

`python benchmarks/ablation.py --text books --data_dir DATA`; without --text, on Python's documentation.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from unittest.mock import patch

import numpy as np
from baselines import BaselineArguments, Bench, benches
from tabulate import tabulate

from factorized_gpt2 import from_gpt2
from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.compress import data_aware as data_aware_factorization
from factorized_gpt2.compress import row_fit
from factorized_gpt2.compress.calibration import calibrate, compensated_head, count_tokens, spread_blocks
from factorized_gpt2.compress.data_aware import VocabularyUse
from factorized_gpt2.compress.methods import METHODS
from factorized_gpt2.compress.pca import factorize
from factorized_gpt2.compress.row_fit import Side
from factorized_gpt2.models.conversion import vocabulary_matrices
from factorized_gpt2.settings.parsing import ManualParser


@dataclass
class AblationArguments(BaselineArguments):
    """On which baseline, at which ranks."""

    rank_index: list[int] = field(
        default_factory=lambda: [0, 2], metadata={"help": "Which of d/12, d/6, d/3, 2d/3, counted from 0."}
    )


@dataclass(frozen=True)
class Variant:
    """One way to factorize, next to the method as it is."""

    name: str
    method: str
    use: VocabularyUse
    compensated: bool = True
    rank_factor: float = 1
    tied: bool = True
    constants: tuple[tuple[object, str, float], ...] = ()


def main(argv: list[str]) -> None:
    """Measure every variant on every seed's baseline."""
    arguments = ManualParser(AblationArguments, prog="ablation.py", description=__doc__).parse(argv)[0]
    for bench in benches(arguments):
        embedding, _ = vocabulary_matrices(bench.baseline.model)
        baseline = bench.loss(bench.baseline.model)
        ranks = [bench.ranks()[index] for index in arguments.rank_index]
        pca = {rank: bench.loss(from_gpt2(bench.baseline.model, factorize(embedding, rank))) for rank in ranks}
        print(f"seed {bench.seed}: baseline {baseline:.4f}", flush=True)
        table = []
        for variant in _variants(bench, embedding):
            row = {"variant": variant.name}
            for rank in ranks:
                loss = _loss(bench, embedding, variant, rank)
                row[f"k = {rank}"] = f"{(pca[rank] - loss) / (pca[rank] - baseline):.1%}"
            print(row, flush=True)
            table.append(row)
        print(tabulate(table, headers="keys", tablefmt="github", disable_numparse=True))


def _variants(bench: Bench, embedding: np.ndarray) -> Iterator[Variant]:
    use = _use(bench)
    inputs, outputs = use.input_side, use.output_side
    yield Variant("weighted", "weighted", use)
    yield Variant("hidden states, embedding error by length, a = 0.35", "joint", _by_length(use, embedding, 0.35))
    yield Variant("hidden states, embedding error by length, a = 0.5", "joint", _by_length(use, embedding, 0.5))
    yield Variant("joint", "joint", use)
    for factor in (0.25, 4):
        scaled = replace(inputs, vectors=inputs.vectors * np.float32(factor**0.5))
        yield Variant(f"joint, input side times {factor}", "joint", replace(use, input_side=scaled))
    for exponent in (0.5, 1.0):
        constants = ((data_aware_factorization, "FREQUENCY_EXPONENT", exponent),)
        yield Variant(f"joint, frequency exponent {exponent}", "joint", use, constants=constants)
    sample_only = replace(use, token_counts=np.bincount(inputs.tokens, minlength=len(embedding)))
    yield Variant("joint, frequencies of the sample alone", "joint", sample_only)
    yield Variant("tokenwise", "tokenwise", use)
    yield Variant("tokenwise, head not compensated", "tokenwise", use, compensated=False)
    one_round = ((data_aware_factorization, "_ROUNDS", 1),)
    yield Variant("tokenwise, one round", "tokenwise", use, constants=one_round)
    yield Variant(
        "tokenwise, own meetings on the output side alone", "tokenwise", replace(use, input_side=_shared(inputs))
    )
    yield Variant(
        "tokenwise, own meetings on the input side alone", "tokenwise", replace(use, output_side=_shared(outputs))
    )
    for prior in (5, 50, 150):
        yield Variant(
            f"tokenwise, prior of {prior} occurrences",
            "tokenwise",
            use,
            constants=((row_fit, "PRIOR_OCCURRENCES", prior),),
        )
    for exponent in (0.5, 1.0):
        constants = ((data_aware_factorization, "FREQUENCY_EXPONENT", exponent),)
        yield Variant(f"tokenwise, frequency exponent {exponent}", "tokenwise", use, constants=constants)
    certain = replace(outputs, weights=np.full_like(outputs.weights, outputs.weights.mean()))
    yield Variant("tokenwise, draws not weighted by 1 - p", "tokenwise", replace(use, output_side=certain))
    for tokens in (2048, 4096, 65536):
        yield Variant(f"tokenwise, {tokens:,} calibration tokens", "tokenwise", _use(bench, tokens))
    yield Variant("tokenwise, untied, same k: nearly twice the bytes", "tokenwise", use, tied=False)
    yield Variant("tokenwise, untied, half of k: about the same bytes", "tokenwise", use, tied=False, rank_factor=0.5)


def _use(bench: Bench, tokens: int | None = None) -> VocabularyUse:
    calibration = bench.calibration
    sample = calibration.sample if tokens is None else spread_blocks(calibration.blocks, tokens)
    counts = count_tokens(calibration.blocks, bench.baseline.model.config.vocab_size)
    return calibrate(bench.baseline.model, sample, counts, bench.seed)


def _shared(side: Side) -> Side:
    """Keep a side's moment but no token's own meetings."""
    none = np.empty(0, np.int64)
    return replace(side, tokens=none, sources=none, weights=np.empty(0, np.float32))


def _by_length(use: VocabularyUse, embedding: np.ndarray, balance: float) -> VocabularyUse:
    """Measure input errors by their length; `balance` of the metric is theirs after both are brought to one scale."""
    weights, width = use.row_weights(), embedding.shape[1]
    centred = embedding - weights @ embedding
    gram = centred.T @ (weights[:, None] * centred)
    scale = balance / (1 - balance) * np.trace(gram @ use.output_side.second_moment()) / np.trace(gram)
    return replace(
        use, input_side=replace(use.input_side, vectors=np.eye(width, dtype=np.float32) * (scale * width) ** 0.5)
    )


def _loss(bench: Bench, embedding: np.ndarray, variant: Variant, rank: int) -> float:
    method, rank = METHODS[variant.method], max(1, int(rank * variant.rank_factor))
    with ExitStack() as stack:
        for module, name, value in variant.constants:
            stack.enter_context(patch.object(module, name, value))
        head = None if variant.tied else embedding
        factors = method.fit(embedding, head, variant.use).factors([rank])[rank]
    model = from_gpt2(bench.baseline.model, factors)
    if method.compensates_head and variant.compensated:
        tokens = len(variant.use.output_side.vectors)
        sample = spread_blocks(bench.calibration.blocks, tokens)
        scale_down = compensated_head(model, factors.scale_down, sample, variant.use.output_side.vectors)
        model = from_gpt2(bench.baseline.model, replace(factors, scale_down=scale_down))
    return bench.loss(model)


if __name__ == "__main__":
    sys.exit(run_command(main))
