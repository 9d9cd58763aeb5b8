"""Settings for the text that a command reads, which several commands share."""

import logging
import re
from dataclasses import dataclass, field
from typing import Annotated

from ..common.errors import UserError
from ..text.source import TextSource
from .setting_values import COUNT, READ, Range

BLOCK = Range(2)  # tokens, of which all but the first are predicted

logger = logging.getLogger(__name__)

_MOST_POSITIONS = 4096  # that make a block by default: attention and logits of more fill a machine's memory
_BLOCK_OF_MANY = 1024


def check_pattern(name: str, pattern: str | None) -> None:
    """Refuse a setting that is no regular expression, by name."""
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise UserError(f"{name}={pattern!r} is not a regular expression: {error}.") from error


def block_size_for(asked: int | None, positions: int | None, name: str) -> int:
    """Check a block size against a model's positions, which it is by default, unless they are very many.

    Args:
        asked: Tokens of a block; `None` for the default.
        positions: How many there are; `None` where the model does not say.
        name: What to call the model.

    Raises:
        UserError: It does not fit, or neither it nor the positions are known.
    """
    block_size = asked
    if block_size is None:
        if positions is None:
            raise UserError(f"{name} does not say how many tokens it reads at once: set block_size.")
        block_size = positions
        if positions > _MOST_POSITIONS:
            block_size = _BLOCK_OF_MANY
            logger.info(
                "%s has %d positions: it reads blocks of %d tokens; set block_size to change that.",
                *(name, positions, block_size),
            )
    if positions is not None and not 2 <= block_size <= positions:
        raise UserError(f"block_size must lie between 2 and the model's {positions} positions, got {block_size}.")
    return block_size


@dataclass
class TextArguments:
    """Where text comes from, and where its documents start."""

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset of the Hub to read text from."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    text_column: str = field(
        default="text",
        metadata={"help": "Column or JSON key that holds the text, in datasets and in JSON and parquet files."},
    )
    document_start: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression: a row that matches it starts a new document. Default: every row is a "
            "document."
        },
    )
    dataset_document_start: str | None = field(
        default=None, metadata={"help": "The same for the dataset only, not for local files. Default: document_start."}
    )

    def __post_init__(self) -> None:
        for name in ("document_start", "dataset_document_start"):
            check_pattern(name, getattr(self, name))

    def source_of(self, files: list[str] | None, split: str) -> TextSource:
        """Text of local files, or where there are none of a split of the dataset."""
        is_own = bool(files) or self.document_start is not None
        return TextSource(
            files=tuple(files or ()),
            dataset_name=self.dataset_name,
            dataset_config_name=self.dataset_config_name,
            split=split,
            text_column=self.text_column,
            document_start=self.document_start if is_own else self.dataset_document_start,
        )


@dataclass
class DataArguments(TextArguments):
    """Text, tokenizer and block size of a run."""

    _argument_group_name = "Text"

    train_file: list[Annotated[str, READ]] | None = field(
        default=None,
        metadata={
            "help": "Local .txt, .jsonl or .parquet files, or .bin files of token ids, to train on instead of the "
            "dataset."
        },
    )
    validation_file: list[Annotated[str, READ]] | None = field(
        default=None,
        metadata={
            "help": "Local files to validate on instead of the dataset's validation split. --eval_file means the same."
        },
    )
    tokenizer: Annotated[str, READ] | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of the tokenizer. Default: the tokenizer of the model that the run starts from."
        },
    )
    block_size: Annotated[int, BLOCK] | None = field(
        default=None,
        metadata={
            "help": "Tokens per block (context length). Default: as many as the starting model reads at once, but "
            "1024 where that is more than 4096; from scratch, 1024."
        },
    )
    preprocessing_num_workers: Annotated[int, Range(1, 1024)] | None = field(
        default=None, metadata={"help": "How many processes tokenize the text. Default: one."}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read and tokenize the training text during training, for text larger than the disk. Needs "
            "max_steps. A run that resumes reads again, and skips, the text it has already seen."
        },
    )
    shuffle_buffer: Annotated[int, COUNT] = field(
        default=10_000, metadata={"help": "Streaming shuffles within a buffer of this many blocks, held in memory."}
    )
    max_eval_samples: Annotated[int, COUNT] | None = field(
        default=None,
        metadata={"help": "Evaluate only on this many blocks, the first of the validation text. Default: all."},
    )

    def source(self, split: str) -> TextSource:
        """Where the text of `split`, train or validation, comes from."""
        return self.source_of(self.train_file if split == "train" else self.validation_file, split)


@dataclass
class EvaluationArguments(TextArguments):
    """Text on which models are evaluated."""

    _argument_group_name = "Evaluation text"

    eval_file: list[Annotated[str, READ]] | None = field(
        default=None,
        metadata={"help": "Local .txt, .jsonl, .parquet or .bin files to evaluate on, instead of a dataset."},
    )
    split: str = field(default="validation", metadata={"help": "Split of the dataset to evaluate on."})
    block_size: Annotated[int, BLOCK] | None = field(
        default=None,
        metadata={
            "help": "Tokens per block (context length). Default: as many as the model reads at once, but 1024 if that "
            "is more than 4096."
        },
    )
    eval_batch_size: Annotated[int, COUNT] = field(
        default=4,
        metadata={"help": "Blocks per forward pass. The result is the same for any value; memory and speed differ."},
    )

    @property
    def is_asked_for(self) -> bool:
        """Whether there is any text to evaluate on."""
        return bool(self.eval_file or self.dataset_name)

    def source(self) -> TextSource:
        """Where the text comes from."""
        return self.source_of(self.eval_file, self.split)

    def block_size_for(self, positions: int | None, name: str = "The model") -> int:
        """Choose or check the block size, as the function of that name does."""
        return block_size_for(self.block_size, positions, name)
