"""`evaluate_models.py`: measure loss and size of existing models on one text."""

import sys
from dataclasses import asdict, dataclass, field
from typing import Annotated

from ..common.errors import UserError
from ..settings.devices import DeviceArguments, DtypeArguments
from ..settings.outputs import JsonArguments
from ..settings.parsing import ManualParser
from ..settings.setting_values import READ
from ..settings.text_arguments import EvaluationArguments
from .shell import print_table, run_command, write_result


@dataclass
class EvaluateArguments:
    """Which models to evaluate."""

    models: list[Annotated[str, READ]] = field(
        metadata={"help": "Folders or Hub ids of the causal language models to evaluate, factorized or not."}
    )
    tokenizer: Annotated[str, READ] | None = field(
        default=None, metadata={"help": "Folder or Hub id of one tokenizer for all models. Default: each model's own."}
    )
    bits_per_byte: bool = field(
        default=False,
        metadata={
            "help": "Also measure bits per byte, as evaluation harnesses do: whole documents, every token predicted "
            "once, in windows of block_size. Unlike the loss, it compares models with different tokenizers."
        },
    )


def evaluate(argv: list[str]) -> None:
    """Evaluate every model on the whole text and print a table."""
    arguments, evaluation, computing, numbers, output = ManualParser(
        (EvaluateArguments, EvaluationArguments, DeviceArguments, DtypeArguments, JsonArguments),
        prog="evaluate_models.py",
        description="Measure causal language models on a text: loss (nats per token), perplexity, size.",
        usage="%(prog)s --models FOLDER [FOLDER ...] --eval_file FILE [option ...]",
        examples=("evaluate_models.py --models gpt2 model_weights/gpt_pca_nofinetune_k64 --eval_file held_out.txt",),
    ).parse(argv)
    if not evaluation.is_asked_for:
        raise UserError("No text to evaluate on: set eval_file or dataset_name.")
    if arguments.bits_per_byte and evaluation.source().is_tokenized:
        raise UserError("bits_per_byte needs text, but eval_file contains token ids.")
    # What follows takes seconds to import.
    from ..models.dtypes import dtype_name, in_dtype
    from ..models.foreign_models import LossOfLogits, measurable, positions_of
    from ..models.loading import check_tokenizer, load_causal_lm
    from ..models.sizes import model_size
    from ..runs.results import megabytes
    from ..text.bits_per_byte import measure_bits_per_byte
    from ..text.blocks import load_blocks
    from ..text.loss import perplexity, sum_loss
    from ..text.tokenizers import load_tokenizer

    device = computing.found
    rows, results = [], []
    for name in arguments.models:
        model = in_dtype(load_causal_lm(name), numbers.dtype).to(device)
        tokenizer = load_tokenizer(arguments.tokenizer or name)
        check_tokenizer(model, tokenizer)
        block_size = evaluation.block_size_for(positions_of(model.config), name)
        network = measurable(model)
        if isinstance(network, LossOfLogits):
            network.check(block_size, name)
        blocks = load_blocks(evaluation.source(), tokenizer, block_size, keep_tail=True)
        measured = sum_loss(network, blocks, evaluation.eval_batch_size, device, desc=f"Evaluating {name}")
        row = {"loss": f"{measured.loss:.4f}", "perplexity": f"{perplexity(measured.loss):.2f}"}
        result = {"model": name, "loss": measured.loss, "perplexity": perplexity(measured.loss)}
        if arguments.bits_per_byte:
            text = (evaluation.source(), tokenizer, block_size, evaluation.eval_batch_size)
            bits = measure_bits_per_byte(network, *text, device, desc=f"Evaluating {name}, documents")
            row["bits per byte"] = f"{bits:.4f}"
            result["bits_per_byte"] = bits
        size = model_size(model)
        about = {"tokens": measured.tokens, "block_size": block_size, "dtype": dtype_name(model)}
        results.append(result | about | asdict(size))
        rows.append(
            row
            | {
                "tokens": f"{measured.tokens:,}",
                "parameters": f"{size.parameters:,}",
                "dtype": str(model.dtype).removeprefix("torch."),
                "MB": megabytes(size.bytes),
                "model": name,
            }
        )
    print_table(rows)
    write_result(output.json, "evaluate", results, text=evaluation.source().name, device=str(device))


def main() -> None:
    """Entry point of the console command and of `evaluate_models.py`."""
    sys.exit(run_command(evaluate))
