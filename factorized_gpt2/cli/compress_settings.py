"""What `compress.py` is told, beside the text to evaluate on, the device and where to publish."""

from dataclasses import dataclass, field, replace
from typing import Annotated

from ..compress.methods import CODED, DEFAULT, METHODS, Method
from ..settings.setting_values import COUNT, NOT_NEGATIVE, OUTPUT_FOLDER, POSITIVE, READ, SEED, Range
from ..settings.text_arguments import EvaluationArguments, check_pattern
from ..text.source import TextSource

_NEEDING_TEXT = ", ".join(method.name for method in METHODS.values() if method.needs_text)


@dataclass
class CompressArguments:
    """What to compress, and how far."""

    _argument_group_name = "What to make of what"

    baseline: Annotated[str, READ] = field(metadata={"help": "Folder or Hub id of a trained, unfactorized GPT-2."})
    ranks: list[Annotated[int, COUNT]] | None = field(
        default=None, metadata={"help": "Ranks k of the token embedding, each smaller than its width."}
    )
    bits_per_weight: list[Annotated[float, POSITIVE]] | None = field(
        default=None,
        metadata={
            "help": "Budgets of method coded, a model each: bits that the vocabulary takes in the file, everything "
            "counted, for each of its V d weights. Ranks beside it are upper limits, for every budget in turn."
        },
    )
    vocabulary_mb: list[Annotated[float, POSITIVE]] | None = field(
        default=None, metadata={"help": "The same budgets in million bytes, instead of bits_per_weight."}
    )
    target_loss_increase: Annotated[float, POSITIVE] | None = field(
        default=None,
        metadata={
            "help": "Instead of ranks or budgets: the smallest model whose loss on the evaluation text exceeds the "
            "baseline's by no more than this, in nats a token."
        },
    )
    explained_variance: Annotated[float, Range(0, 1, is_open_below=True)] | None = field(
        default=None,
        metadata={
            "help": "Instead of ranks, for method pca alone: the smallest rank that keeps this share of the "
            "embedding's variance. Variance tells little of loss: target_loss_increase is the better guide."
        },
    )
    method: str = field(
        default=DEFAULT,
        metadata={
            "help": " ".join(f"{method.name}: {method.summary}." for method in METHODS.values())
            + f" Text is needed by {_NEEDING_TEXT}. Budgets imply {CODED}, the best at equal bytes.",
            "choices": list(METHODS),
        },
    )
    refine: Annotated[int, NOT_NEGATIVE] = field(
        default=0,
        metadata={
            "help": "Steps of training wte, scale_up and scale_down to match the baseline; of method coded, steps of "
            "rows and columns, mean and a bias of the head."
        },
    )
    tie_word_embeddings: bool = field(
        default=True,
        metadata={"help": "One wte serves both sides. False: each side gets its own, V k parameters more."},
    )
    output_dir: Annotated[str, OUTPUT_FOLDER] = field(
        default="model_weights", metadata={"help": "Folder of the compressed models and factors."}
    )
    tokenizer: Annotated[str, READ] | None = field(
        default=None, metadata={"help": "Folder or Hub id. None: the baseline's."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace what was made from another baseline."})
    seed: Annotated[int, SEED] = field(default=0, metadata={"help": "Of everything that is drawn."})

    @property
    def chosen(self) -> Method:
        """The method that is meant: budgets imply the one that takes them."""
        budgets = self.bits_per_weight or self.vocabulary_mb
        return METHODS[CODED if budgets and self.method == DEFAULT else self.method]


@dataclass
class CalibrationArguments:
    """Text that tells how the baseline uses its vocabulary: best of the kind it was trained on."""

    _argument_group_name = "Text to learn from"

    calibration_file: list[Annotated[str, READ]] | None = field(
        default=None, metadata={"help": "Local .txt, .jsonl, .parquet or .bin files instead of the dataset's split."}
    )
    calibration_dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset on the Hub. None: the one to evaluate on."}
    )
    calibration_dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    calibration_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    calibration_text_column: str | None = field(
        default=None, metadata={"help": "Column of the text. None: text_column."}
    )
    calibration_document_start: str | None = field(
        default=None,
        metadata={"help": "Regular expression; a row that it matches starts a document. None: document_start."},
    )
    calibration_tokens: Annotated[int, COUNT] = field(
        default=16384, metadata={"help": "Tokens to run the baseline over; frequencies are counted in all the text."}
    )

    def __post_init__(self) -> None:
        check_pattern("calibration_document_start", self.calibration_document_start)

    def source(self, evaluation: EvaluationArguments) -> TextSource | None:
        """Where the text comes from: what is not said here is as for the text to evaluate on; `None` for no text."""
        names = ("dataset_name", "dataset_config_name", "text_column", "document_start")
        own = {name: getattr(self, f"calibration_{name}") for name in names}
        if self.calibration_dataset_name is None:
            own = {name: value for name, value in own.items() if value is not None}
        else:  # of another dataset, configuration and documents are others
            own |= {"text_column": own["text_column"] or evaluation.text_column, "dataset_document_start": None}
        shared = replace(evaluation, **own)
        if not (self.calibration_file or shared.dataset_name):
            return None
        return shared.source_of(self.calibration_file, self.calibration_split)
