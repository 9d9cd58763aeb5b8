"""Settings of `compress.py`: the model, the sizes, the method and the calibration text."""

from dataclasses import dataclass, field, replace
from typing import Annotated

from ..compress.methods import CODED, DEFAULT, METHODS, Method
from ..settings.setting_values import COUNT, NOT_NEGATIVE, OUTPUT_FOLDER, POSITIVE, READ, SEED, Range
from ..settings.text_arguments import EvaluationArguments, check_pattern
from ..text.source import TextSource

_NEEDING_TEXT = ", ".join(method.name for method in METHODS.values() if method.needs_text)


@dataclass
class CompressArguments:
    """Which model to compress, by which method, to which size."""

    _argument_group_name = "Model, method and size"

    baseline: Annotated[str, READ] = field(
        metadata={
            "help": "Folder or Hub id of the trained model to compress: a GPT-2, or another causal decoder of "
            "transformers. It must not be factorized already."
        }
    )
    ranks: list[Annotated[int, COUNT]] | None = field(
        default=None,
        metadata={
            "help": "Ranks k to compress to: how many values are stored for each token. One model is made for each "
            "rank. Every rank must be smaller than the width of the embedding."
        },
    )
    bits_per_weight: list[Annotated[float, POSITIVE]] | None = field(
        default=None,
        metadata={
            "help": "Compress the vocabulary to this many bits in the file for each of its V d weights, everything "
            "counted. One model is made for each value, by method coded. With ranks, each rank is an upper limit for "
            "each of these sizes."
        },
    )
    vocabulary_mb: list[Annotated[float, POSITIVE]] | None = field(
        default=None,
        metadata={"help": "The same as bits_per_weight, with the sizes of the vocabulary given in MB (10^6 bytes)."},
    )
    target_loss_increase: Annotated[float, POSITIVE] | None = field(
        default=None,
        metadata={
            "help": "Find the smallest model whose loss on the evaluation text is at most this many nats per token "
            "above the baseline's (0.01 nats is 1 %% of perplexity). Replaces ranks or bits_per_weight. Needs "
            "eval_file or dataset_name."
        },
    )
    explained_variance: Annotated[float, Range(0, 1, is_open_below=True)] | None = field(
        default=None,
        metadata={
            "help": "Find the smallest rank that keeps this share of the embedding's variance, between 0 and 1. "
            "Replaces ranks; for method pca only. Variance says little about the loss: prefer target_loss_increase."
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
            "help": "After factorizing, train only the vocabulary for this many steps, so that the model predicts "
            "what the baseline predicts on the calibration text. The loss falls; the size stays."
        },
    )
    tie_word_embeddings: bool = field(
        default=True,
        metadata={
            "help": "Embedding and head share one matrix wte. False: each gets a matrix of its own, which adds V k "
            "parameters."
        },
    )
    output_dir: Annotated[str, OUTPUT_FOLDER] = field(
        default="model_weights", metadata={"help": "Folder that gets one subfolder for each compressed model."}
    )
    tokenizer: Annotated[str, READ] | None = field(
        default=None, metadata={"help": "Folder or Hub id of the tokenizer. Default: the baseline's."}
    )
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Replace compressed models in output_dir that were made from another baseline, or changed since."
        },
    )
    seed: Annotated[int, SEED] = field(default=0, metadata={"help": "Random seed."})

    @property
    def chosen(self) -> Method:
        """The method that is meant: budgets imply the one that takes them."""
        budgets = self.bits_per_weight or self.vocabulary_mb
        return METHODS[CODED if budgets and self.method == DEFAULT else self.method]


@dataclass
class CalibrationArguments:
    """Text on which the baseline is run to see how it uses its vocabulary; best like its training text."""

    _argument_group_name = "Calibration text (for every method but pca)"

    calibration_file: list[Annotated[str, READ]] | None = field(
        default=None,
        metadata={
            "help": "Local .txt, .jsonl, .parquet or .bin files to calibrate on, instead of a dataset. Take text like "
            "that which the model was trained on."
        },
    )
    calibration_dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset of the Hub to calibrate on. Default: dataset_name."}
    )
    calibration_dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of that dataset. Default: dataset_config_name."}
    )
    calibration_split: str = field(default="train", metadata={"help": "Split of the dataset to calibrate on."})
    calibration_text_column: str | None = field(
        default=None, metadata={"help": "Column that holds the text. Default: text_column."}
    )
    calibration_document_start: str | None = field(
        default=None,
        metadata={"help": "Regular expression: a row that matches it starts a new document. Default: document_start."},
    )
    calibration_tokens: Annotated[int, COUNT] = field(
        default=16384,
        metadata={
            "help": "How many tokens the baseline is run over. More tokens cost time and memory. How often each token "
            "occurs is counted in the whole text."
        },
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
