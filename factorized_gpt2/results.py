"""What a run leaves to be read: the record that `results.json` holds."""

from dataclasses import dataclass
from typing import Any

RESULTS_NAME = "results.json"


@dataclass(frozen=True)
class Results:
    """The outcome of a run, as `results.json` holds it.

    Attributes:
        run_name: The protocol's name of the run.
        family: Kind of run: baseline, lowrank-scratch, pca-nofinetune, pca-lora or pca-finetune.
        n_embd_wte: Rank k; `None` when not factorized.
        eval_loss: Mean over all predicted tokens of the validation split, nats a token.
        perplexity: `exp(eval_loss)`.
        parameters, vocabulary_parameters: Of the plain (merged) model.
        bytes, vocabulary_bytes: Of its parameters.
        settings: The resolved settings.
        versions: Of Python and the libraries.
        train_loss: Last logged training loss, nats a token; `None` when nothing was trained.
        best_step: Optimizer step of the weights that were kept; `None` when nothing was trained.
        best_tokens: Tokens seen until then.
        trained_parameters: Parameters that the optimizer changed.
        train_seconds: Wall-clock time of training in this process; `None` when nothing was trained.
        tokens_per_second: Training tokens over that time.
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
    train_loss: float | None = None
    best_step: int | None = None
    best_tokens: int | None = None
    trained_parameters: int = 0
    train_seconds: float | None = None
    tokens_per_second: float | None = None
