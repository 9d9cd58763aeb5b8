"""Where text comes from: datasets of the Hub or local files, as rows of one column, cached on disk or streamed."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError, blaming, first_line, is_defect, silenced
from ..common.fingerprints import files_fingerprint
from ..common.lfs_pointers import refuse_pointers
from .documents import parts_of_documents
from .text_files import kind_of, read_rows

if TYPE_CHECKING:
    import datasets
    from datasets import Dataset, IterableDataset


TOKEN_SUFFIX = ".bin"  # of files of token ids
_FILE_SETTINGS = "train_file, validation_file, eval_file, calibration_file"


_FORMAT = 2  # of what is cached on disk; to be raised with every change to what this module makes of a text


def is_token_file(name: str) -> bool:
    """Say by a file's name whether it holds token ids."""
    return Path(name).suffix.lower() == TOKEN_SUFFIX


@dataclass(frozen=True)
class TextSource:
    """Where text comes from: a dataset of the Hub, or local files.

    Attributes:
        files: Local files, of the kinds that `text_files.kind_of` knows, or files of token ids (.bin); when there are
            none, `dataset_name` is read.
        dataset_name: Hub id.
        dataset_config_name: Configuration of that dataset.
        split: Split of that dataset.
        text_column: Column that holds the text.
        document_start: Regular expression: a row that it matches at its beginning starts a document. `None`: every
            row is a document, except that a text file is one document. In files of token ids, documents are joined
            already.
    """

    files: tuple[str, ...] = ()
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    split: str = "train"
    text_column: str = "text"
    document_start: str | None = field(default=None)

    @property
    def name(self) -> str:
        """What to call it in a record."""
        if self.files:
            return ", ".join(self.files)
        return " ".join(filter(None, (self.dataset_name, self.dataset_config_name, self.split)))

    @property
    def is_tokenized(self) -> bool:
        """Whether it is files of token ids, rather than text.

        Raises:
            UserError: It is both.
        """
        names = [name for name in self.files if is_token_file(name)]
        if names and len(names) < len(self.files):
            other = next(name for name in self.files if not is_token_file(name))
            raise UserError(f"{names[0]} contains token ids, {other} text: give files of one kind only.")
        return bool(names)

    def load(self, streaming: bool = False) -> list[tuple[Dataset | IterableDataset, re.Pattern | None]]:
        """Load the text.

        Args:
            streaming: Read it as it is needed, from where it lies, instead of from a copy on disk.

        Returns:
            Datasets with one column `text`, a line or a row each, with the pattern that starts a document, or `None`
            where the whole dataset is one.

        Raises:
            UserError: A file or dataset that cannot be read, or has no such column; a cache that cannot be written.
        """
        _require_cache()
        pattern = re.compile(self.document_start) if self.document_start else None
        every_row = pattern or re.compile("")
        if not self.files:
            if self.dataset_name is None:
                raise UserError("No text given: name files or a dataset.")
            return [(self._load_dataset(self.dataset_name, streaming), every_row)]
        refuse_pointers(map(Path, self.files))
        loaded = []
        for name in self.files:
            path = Path(name)
            if path.is_dir():
                raise UserError(f"{name} is a folder, not a file.")
            if not path.is_file():
                raise UserError(f"The file {name} does not exist.")
            if is_token_file(name):
                raise UserError(f"{name} contains token ids, but this needs text.")
            loaded.append((self._load_file(path, streaming), pattern if kind_of(path) == "text" else every_row))
        return loaded

    def documents(self) -> Iterator[str]:
        """Read the text document by document.

        Raises:
            UserError: As `load`.
        """
        for dataset, document_start in self.load():
            parts: list[str] = []
            for rows in dataset.iter(batch_size=1000):
                for text, starts in zip(*parts_of_documents(rows["text"], document_start), strict=True):
                    if starts and parts:
                        yield "".join(parts)
                        parts = []
                    parts.append(text)
            if parts:
                yield "".join(parts)

    def _load_dataset(self, name: str, streaming: bool) -> Dataset | IterableDataset:
        column = self.text_column
        if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            raise UserError(
                f"{name} was written by save_to_disk and is not a dataset as on the Hub: write it with to_parquet, "
                f"and "
                f"name that file ({_FILE_SETTINGS})."
            )
        with _reading(name):
            try:
                dataset = datasets_package().load_dataset(
                    name, self.dataset_config_name, split=self.split, streaming=streaming
                )
            except ValueError as error:  # among others of a split that is not there
                splits = datasets_package().get_dataset_split_names(name, self.dataset_config_name)
                if re.split(r"[\[+]", self.split)[0] in splits:
                    raise
                raise UserError(
                    f"{name} has no split {self.split!r}; its splits are {', '.join(splits)}: name one (split, "
                    f"calibration_split), or local files instead ({_FILE_SETTINGS})."
                ) from error
            # A stream may know its columns from its rows alone.
            columns = dataset.column_names or list(next(iter(dataset), {}))
        if column not in columns:
            raise UserError(f"{name} has no column {column!r}; its columns are {', '.join(columns)}.")
        text_types = [datasets_package().Value(kind) for kind in ("string", "large_string", "string_view")]
        kind = (dataset.features or {}).get(column, text_types[0])
        if kind not in text_types:
            raise UserError(f"{name}: the column {column!r} does not hold text but {getattr(kind, 'dtype', kind)}.")
        dataset = dataset.select_columns([column])
        return dataset if column == "text" else dataset.rename_column(column, "text")

    def _load_file(self, path: Path, streaming: bool) -> Dataset | IterableDataset:
        settings = {"path": str(path), "column": self.text_column}
        making = {"generator": read_rows, "gen_kwargs": settings, "features": _text_features()}
        with _reading(str(path)):
            # What cannot be read at its beginning is better known before a run that streams it.
            if not sum(1 for _ in islice(read_rows(**settings), 1000)):
                raise UserError(f"{path} has no text: it is empty.")
            if streaming:
                return datasets_package().IterableDataset.from_generator(**making)
            identity = (files_fingerprint([path]), self.text_column)
            return datasets_package().Dataset.from_generator(**making, fingerprint=cache_hash(identity))


def datasets_package() -> ModuleType:
    """Import `datasets`, or say in one line that reading text needs it."""
    with blaming(
        f"Text is read with the package datasets, which files of token ids ({TOKEN_SUFFIX}) do not need", ImportError
    ):
        import datasets
    return datasets


def cache_hash(value: Any) -> str:
    """Hash for the cache on disk."""
    return datasets_package().fingerprint.Hasher.hash((_FORMAT, value))


def _require_cache() -> None:
    """See that the folder can be written that texts and tokens are cached in."""
    folder = Path(datasets_package().config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"{folder}, where texts are cached, cannot be written ({error.strerror}): set HF_DATASETS_CACHE, or "
            "HF_HOME, to a folder that is writable."
        ) from error


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn errors of datasets, and of every reader of files below it, into one that names the text."""
    try:
        with silenced(datasets_package().logging):
            yield
    except UserError:
        raise
    except Exception as error:  # of datasets, and of every reader of files below it
        cause = error.__cause__ or error  # datasets wraps what a builder or a generator raises
        if is_defect(cause):
            raise
        message = str(cause) if isinstance(cause, UserError) else f"{name} cannot be read: {first_line(cause)}"
        raise UserError(message) from error


def _text_features() -> datasets.Features:
    return datasets_package().Features({"text": datasets_package().Value("large_string")})
