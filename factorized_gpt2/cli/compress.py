"""`compress.py`: a trained GPT-2 to smaller ones, by PCA of its vocabulary."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..arguments import EvaluationArguments, ManualParser
from ..compression import compressed_model, load_baseline, pca_factors
from ..data import load_blocks, load_tokenizer
from ..errors import UserError
from ..evaluation import model_size, perplexity, sum_loss
from .shell import print_table, run_command


@dataclass
class CompressArguments:
    """What to compress, and how far."""

    baseline: str = field(metadata={"help": "Folder or Hub id of a trained, unfactorized GPT-2."})
    ranks: list[int] = field(metadata={"help": "Ranks k of the token embedding, each smaller than its width."})
    output_dir: str = field(default="model_weights", metadata={"help": "Folder of the compressed models and factors."})
    tokenizer: str | None = field(default=None, metadata={"help": "Folder or Hub id. None: the baseline's."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what was made from another baseline."})


def compress(argv: list[str]) -> None:
    """Load the baseline, factorize it at every rank, write the folders, print what it cost."""
    arguments, evaluation = ManualParser(
        (CompressArguments, EvaluationArguments),
        prog="compress.py",
        description="Factorize the token embedding and head of a trained GPT-2 by principal component analysis.",
    ).parse(argv)
    if len(set(arguments.ranks)) != len(arguments.ranks):
        raise UserError(f"ranks: a rank is given twice in {' '.join(map(str, arguments.ranks))}.")
    baseline = load_baseline(arguments.baseline)
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.baseline)
    baseline.check_tokenizer(tokenizer)
    root = Path(arguments.output_dir)
    ranks = sorted(arguments.ranks, reverse=True)
    factors = pca_factors(baseline, ranks, root, arguments.overwrite)
    blocks = None
    if evaluation.is_asked_for:
        block_size = evaluation.block_size_for(baseline.model.config.n_positions)
        blocks = load_blocks(evaluation.source(), tokenizer, block_size, keep_tail=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    before = model_size(baseline.model)
    rows = []
    for rank in [None, *ranks]:
        if rank is None:
            model, folder = baseline.model, Path(arguments.baseline)
        else:
            model, folder = compressed_model(baseline, rank, root, tokenizer, arguments.overwrite, factors[rank])
        size = model_size(model)
        row = {
            "k": "-" if rank is None else rank,
            "variance": "" if rank is None else f"{factors[rank].explained_variance_ratio:.4f}",
            "parameters": f"{size.parameters:,}",
            "vocabulary": f"{size.vocabulary_parameters:,}",
            "MB": f"{size.bytes / 1e6:.1f}",
            "vocabulary MB": f"{size.vocabulary_bytes / 1e6:.1f}",
            "size": f"{size.bytes / before.bytes:.1%}",
        }
        if blocks is not None:
            name = "baseline" if rank is None else f"k = {rank}"
            measured = sum_loss(
                model.to(device), blocks, evaluation.eval_batch_size, device, desc=f"Evaluating {name}"
            )
            row |= {"loss": f"{measured.loss:.4f}", "perplexity": f"{perplexity(measured.loss):.2f}"}
        rows.append(row | {"folder": str(folder)})
    if blocks is not None:
        print(f"Validation loss in nats a token, over {measured.tokens:,} tokens:")
    print_table(rows)


def main() -> None:
    """Entry point of the console command and of `compress.py`."""
    sys.exit(run_command(compress))
