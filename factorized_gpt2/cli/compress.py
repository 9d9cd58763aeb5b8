"""`compress.py`: make a trained GPT-2 or another decoder smaller by factorizing its vocabulary."""

import sys
from pathlib import Path

from ..common.errors import UserError
from ..common.folder_lock import compress_alone
from ..compress.methods import CODED, VARIANCE
from ..settings.devices import DeviceArguments, DtypeArguments
from ..settings.outputs import JsonArguments, PublishArguments
from ..settings.parsing import ManualParser
from ..settings.text_arguments import EvaluationArguments
from .compress_settings import CalibrationArguments, CompressArguments
from .shell import run_command


def compress(argv: list[str]) -> None:
    """Load the baseline, choose ranks, factorize, write the folders, print what it cost, publish it if asked."""
    arguments, calibration, evaluation, computing, numbers, publishing, output = ManualParser(
        (
            *(CompressArguments, CalibrationArguments, EvaluationArguments, DeviceArguments, DtypeArguments),
            *(PublishArguments, JsonArguments),
        ),
        prog="compress.py",
        description="Make a trained GPT-2 or another decoder smaller: replace its token\n"
        "embedding and head by thin factors (--ranks) or a few bits per weight\n"
        "(--bits_per_weight).",
        usage="%(prog)s --baseline FOLDER (--ranks K [K ...] | --bits_per_weight B [B ...]) [option ...]",
        examples=(
            "compress.py --baseline openai-community/gpt2 --ranks 64 128",
            "compress.py --baseline my_gpt2 --ranks 64 --method tokenwise --calibration_file train.txt --refine 200",
            "compress.py --baseline my_gpt2 --target_loss_increase 0.02 --eval_file held_out.txt",
            "compress.py --baseline my_gpt2 --bits_per_weight 1 1.75 2.75 --calibration_file train.txt",
        ),
        remark="Each model is saved in a folder of its own under output_dir. A model\n"
        "that was made before with the same settings from the same files is reused.",
    ).parse(argv)
    check(arguments, calibration, evaluation)
    # What follows takes seconds to import.
    from .compressing import compress_all

    with compress_alone(Path(arguments.output_dir)):
        compress_all(arguments, calibration, evaluation, computing.found, numbers, publishing, output)


def check(arguments: CompressArguments, calibration: CalibrationArguments, evaluation: EvaluationArguments) -> None:
    """Check what can be checked without a model.

    Raises:
        UserError: A setting out of range, or one that contradicts or lacks another.
    """
    ranks, loss, share = arguments.ranks, arguments.target_loss_increase, arguments.explained_variance
    method = arguments.chosen
    if method.by == "bytes" or arguments.bits_per_weight or arguments.vocabulary_mb:
        _check_budgets(arguments)
    elif sum(choice is not None for choice in (ranks, loss, share)) != 1:
        raise UserError(
            "Set one of ranks, bits_per_weight, vocabulary_mb, target_loss_increase and explained_variance."
        )
    if share is not None and method.share is not VARIANCE:
        raise UserError(
            f"explained_variance works with method pca only; with method {method.name} set target_loss_increase."
        )
    if ranks is not None and len(set(ranks)) != len(ranks):
        raise UserError(f"ranks: a rank is given twice in {' '.join(map(str, ranks))}.")
    if loss is not None and not evaluation.is_asked_for:
        raise UserError("target_loss_increase needs text to evaluate on: set eval_file or dataset_name.")
    own_text = calibration.calibration_file or calibration.calibration_dataset_name
    if own_text and not (method.needs_text or arguments.refine):
        name = "calibration_file" if calibration.calibration_file else "calibration_dataset_name"
        raise UserError(
            f"{name} has no effect with method {method.name} without refine; set method=tokenwise to use it."
        )


def _check_budgets(arguments: CompressArguments) -> None:
    method = arguments.chosen
    choices = {name: getattr(arguments, name) for name in ("bits_per_weight", "vocabulary_mb", "target_loss_increase")}
    if method.by == "rank":
        raise UserError(f"bits_per_weight and vocabulary_mb are for method {CODED}, not for {method.name}.")
    if sum(choice is not None for choice in choices.values()) != 1:
        raise UserError(f"Method {method.name} needs one of {', '.join(choices)}.")
    if not arguments.tie_word_embeddings:
        raise UserError(f"Method {method.name} needs a tied head: leave tie_word_embeddings at its default.")
    if arguments.ranks and arguments.target_loss_increase is not None:
        raise UserError("Set either ranks or target_loss_increase, not both.")
    for name in ("bits_per_weight", "vocabulary_mb"):
        sizes = choices[name] or ()
        if len(set(sizes)) != len(sizes):
            raise UserError(f"{name}: a size is given twice in {' '.join(map(str, sizes))}.")


def main() -> None:
    """Entry point of the console command and of `compress.py`."""
    sys.exit(run_command(compress))


if __name__ == "__main__":
    main()
