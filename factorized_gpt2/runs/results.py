"""What a run leaves to be read: the record that `results.json` holds."""

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from ..common.errors import UserError
from ..common.files import read_json, without_nan, write_json
from ..text.source import TextSource

RESULTS_NAME = "results.json"


def megabytes(size: float) -> str:
    """Write bytes in MB: with one decimal from 10 MB on, below with three, below 10 kB with six, so that none is 0."""
    return f"{size / 1e6:.{1 if size >= 1e7 else 3 if size >= 1e4 else 6}f}"


@dataclass(frozen=True)
class Results:
    """The outcome of a run, as `results.json` holds it.

    Attributes:
        run_name: As it was given, or the protocol's name of such a run.
        family: Kind of run, a key of `FAMILIES`.
        n_embd_wte: Rank k; `None` when not factorized.
        eval_loss: Mean over all predicted tokens of the validation split, nats a token.
        perplexity: `exp(eval_loss)`.
        parameters, vocabulary_parameters: Of the plain (merged) model.
        bytes, vocabulary_bytes: Of its parameters.
        settings: The resolved settings, seeds among them.
        versions: Of Python and the libraries.
        words: The settings as they were asked for, as `train_hf.py` takes them.
        git_commit: Commit of this code, with `-dirty` where files differ from it; `None` outside a checkout.
        start_fingerprint: SHA-256 of the weights that the run started from; `None` for a random start, or one that is
            not in a local folder.
        fingerprint: SHA-256 of the weights that the run left; `None` in results of earlier versions.
        content: What identifies the text, tokenizer, start and teacher that the run read, what its start was
            compressed from (`made_from`), and the `model` that it left; empty in such results.
        device: What it ran on, such as "cpu" or a GPU's name.
        processes: How many processes trained.
        disk_bytes: Of the model's weight files.
        bits_per_weight: Budget of a coded vocabulary, bytes on disk times 8 / (V d); `None` for one of floats.
        peak_memory_bytes: Largest amount that the first process held: of the GPU's memory, without CUDA of its own.
        seconds: Wall-clock time of the run in its last sitting, from reading the text to the saved model.
        train_loss: Last logged training loss, nats a token; `None` when nothing was trained.
        best_step: Optimizer step of the weights that were kept; `None` when nothing was trained.
        best_tokens: Tokens seen until then.
        trained_parameters: Parameters that the optimizer changed.
        train_seconds: Wall-clock time of training in its last sitting, evaluations left out; `None` when nothing was
            trained.
        tokens_per_second: Training tokens of all processes over that time.
        training_curve: Pairs of an optimizer step and the mean training loss since the pair before, nats a token.
        validation_curve: Pairs of an optimizer step and the validation loss there, nats a token.
        spectrum: Share of the embedding's variance (or another method's objective) that each rank keeps, rank 1
            first; `None` where nothing was factorized.
    """

    run_name: str
    family: str
    n_embd_wte: int | None
    eval_loss: float
    perplexity: float
    parameters: int
    vocabulary_parameters: int
    bytes: int
    vocabulary_bytes: int
    settings: dict[str, Any]
    versions: dict[str, str]
    words: list[str] = field(default_factory=list)
    git_commit: str | None = None
    start_fingerprint: str | None = None
    fingerprint: str | None = None
    content: dict[str, str] = field(default_factory=dict)
    device: str | None = None
    processes: int = 1
    disk_bytes: int | None = None
    bits_per_weight: float | None = None
    peak_memory_bytes: int | None = None
    seconds: float | None = None
    train_loss: float | None = None
    best_step: int | None = None
    best_tokens: int | None = None
    trained_parameters: int = 0
    train_seconds: float | None = None
    tokens_per_second: float | None = None
    training_curve: list[list[float]] = field(default_factory=list)
    validation_curve: list[list[float]] = field(default_factory=list)
    spectrum: list[float] | None = None

    def text(self, split: str) -> TextSource:
        """Where the run's text of `split`, train or validation, came from."""
        files = self.settings.get(f"{split}_file")
        return TextSource(
            files=tuple(map(str, files)) if isinstance(files, list | tuple) else (),
            dataset_name=self.settings.get("dataset_name"),
            dataset_config_name=self.settings.get("dataset_config_name"),
            split=split,
        )

    @property
    def baseline(self) -> str | None:
        """The model that it started from by PCA or as it was, as its settings name it."""
        name = self.settings.get("baseline")
        return name if isinstance(name, str) else None

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens that an optimizer step sees; `None` where no step was kept that would tell."""
        return self.best_tokens / self.best_step if self.best_step and self.best_tokens else None

    @property
    def has_curve(self) -> bool:
        """Whether there is a loss to draw against tokens."""
        return self.tokens_per_step is not None and bool(self.training_curve or self.validation_curve)

    def write(self, folder: Path) -> None:
        """Write `results.json` into a run's folder, by which the run counts as finished.

        Figures that are not finite, of a run that diverged, are null there.
        """
        write_json(folder / RESULTS_NAME, without_nan(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> "Results | None":
        """Read the `results.json` of a run's folder; `None` where there is none.

        Raises:
            UserError: It cannot be read, lacks a field, or has one that is not known or of another type.
        """
        path = folder / RESULTS_NAME
        if not path.exists():
            return None
        content = read_json(path)
        lost = {name: math.nan for name in ("eval_loss", "perplexity") if content.get(name, 0) is None}
        try:
            results = cls(**content | lost)
        except TypeError as error:
            raise UserError(f"{path} does not hold the results of a run: {error}") from error
        for item in fields(cls):
            value = getattr(results, item.name)
            if not _is_of(value, item.type):
                raise UserError(f"{path} does not hold the results of a run: {item.name} is {value!r:.40}.")
        return results


def _is_of(value: Any, kind: Any) -> bool:
    """Tell whether a value, read from JSON, is of a field's type; a whole number is a float too."""
    if isinstance(kind, UnionType):
        return any(_is_of(value, one) for one in get_args(kind))
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Any:
        return True
    if isinstance(value, bool) or not isinstance(value, (int, float) if origin is float else origin):
        return isinstance(value, bool) and origin is bool
    if isinstance(value, dict):
        value = list(value.values())
    return not isinstance(value, list) or all(_is_of(item, inner[-1]) for item in value)
