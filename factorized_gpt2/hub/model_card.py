"""What a published model says of itself: the Hub's model card, from the records that stand beside the weights."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from tabulate import tabulate

from ..common.files import read_json
from ..common.markdown import code, escaped
from ..compress.methods import METHODS
from ..models.adapter_folder import LIBRARY, LORA_TAG, lora_summary
from ..models.record import RECORD_NAME
from ..models.sizes import vocabulary_width
from ..network.configuration_factorized_causal_lm import FactorizedCausalLMConfig
from ..network.configuration_factorized_gpt2 import FactorizedGPT2Config
from ..runs.results import Results, megabytes
from ..text.loss import perplexity
from ..text.source import TextSource

TRANSFORMERS = "5.10"  # the oldest version that the code of the network runs with


@dataclass(frozen=True)
class Figures:
    """A row of a card's table: how large a model is, and how well it does.

    Attributes:
        name: What the row is called.
        n_embd_wte: Rank k; `None` when not factorized.
        parameters: All of them, shared ones counted once.
        bytes: Of these parameters.
        eval_loss: Nats a token; `None` where it was not measured.
    """

    name: str
    n_embd_wte: int | None
    parameters: int
    bytes: int
    eval_loss: float | None = None

    @classmethod
    def of(cls, results: Results, name: str) -> "Figures":
        """Take them from the record of a run."""
        return cls(name, results.n_embd_wte, results.parameters, results.bytes, results.eval_loss)


@dataclass(frozen=True)
class Measurement:
    """What was measured of a model, where no `results.json` beside it says so.

    Attributes:
        eval_loss: Nats a token.
        text: What it was measured on.
        baseline: The model that it was compressed from, measured on the same text.
    """

    eval_loss: float
    text: TextSource
    baseline: Figures | None = None


@dataclass(frozen=True)
class History:
    """Where a model comes from, as the records in its folder tell it.

    Attributes:
        recipe: How it was compressed, or its start was: the record that `compress.py` leaves, or as much of it as is
            known.
        results: The record of the run that left it, if a run did.
    """

    recipe: dict[str, Any]
    results: Results | None

    @classmethod
    def read(cls, folder: Path) -> "History":
        """Read the records of a model's folder, and that of the compressed model it started from, if it is at hand.

        Raises:
            UserError: A record cannot be read.
        """
        results = Results.read(folder)
        settings = results.settings if results else {}
        start = folder if results is None else Path(settings.get("compressed") or folder)
        if (start / RECORD_NAME).exists():
            return cls(read_json(start / RECORD_NAME), results)
        start = settings.get("compressed")
        by_pca = results is not None and start is None and results.family.startswith("pca-")
        return cls({"baseline": start or settings.get("baseline"), "method": "pca" if by_pca else None}, results)

    @property
    def base(self) -> str | None:
        """The folder or Hub id of the model that it was made from; `None` after a random start."""
        return self.recipe.get("baseline")

    @property
    def training_text(self) -> TextSource | None:
        """What it was trained on; `None` where it was not."""
        return self.results.text("train") if self.results and self.results.trained_parameters else None

    def measurement(self) -> Measurement | None:
        """What the run measured, and beside it the baseline, if its own record is at hand and of the same text."""
        if self.results is None:
            return None
        baseline, figures = Results.read(Path(self.base)) if self.base else None, None
        same = ("validation_file", "dataset_name", "dataset_config_name", "block_size", "max_eval_samples")
        if baseline and all(baseline.settings.get(name) == self.results.settings.get(name) for name in same):
            figures = Figures.of(baseline, "baseline")
        return Measurement(self.results.eval_loss, self.results.text("validation"), figures)


def model_card(
    repo_id: str,
    config: FactorizedGPT2Config | FactorizedCausalLMConfig,
    size: tuple[int, int],
    history: History,
    measured: Measurement | None = None,
    base_model: str | None = None,
    license: str | None = None,
    plots: Sequence[str] = (),
    revision: str | None = None,
) -> ModelCard:
    """Write the card of a whole model.

    Args:
        repo_id: Where it will be.
        config: Its configuration.
        size: Its parameters and their bytes.
        history: Where it comes from.
        measured: How well it does; by default what its run measured.
        base_model: Hub id of the model that it was made from, if that is on the Hub.
        license: Its licence, as the Hub names it.
        plots: Names of pictures in the repository.
        revision: The branch, if it is not `main`.

    Returns:
        The card; nothing in it names a folder of this machine.
    """
    measured = measured or history.measurement()
    name, rank = _short(repo_id), config.n_embd_wte if config.is_factorized else None
    own = Figures(name, rank, *size, measured.eval_loss if measured else None)
    where = _where(repo_id, revision)
    remote = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"tokenizer = AutoTokenizer.from_pretrained({where}, trust_remote_code=True)",
        f"model = AutoModelForCausalLM.from_pretrained({where}, trust_remote_code=True)",
    )
    base = config.get_text_config()
    decoder = None if base is config else base.model_type
    own_class = "FactorizedGPT2" if decoder is None else "FactorizedCausalLM"
    package = (f"from factorized_gpt2 import {own_class}", f"model = {own_class}.from_pretrained({where})")
    data = _metadata(name, measured, history, base_model, license, library_name="transformers", tags=_tags(decoder))
    return _card(
        data,
        f"# {name}",
        _architecture(config),
        _origin(config.is_factorized, history, base_model),
        *_table(own, measured),
        *(f"![{escaped(Path(plot).stem.replace('_', ' '))}]({quote(plot, safe='')})" for plot in plots),
        "## Use",
        _python(*remote),
        f"This runs the code in this repository, which needs `torch` and `transformers` {TRANSFORMERS} or later (and "
        "below 6), and is under the MIT licence. "
        "With the package `factorized_gpt2` no code of the repository runs:",
        _python(*package),
    )


def adapter_card(
    repo_id: str,
    base_model: str,
    lora: dict[str, Any],
    history: History,
    license: str | None = None,
    revision: str | None = None,
    decoder: str | None = None,
) -> ModelCard:
    """Write the card of an adapter.

    Args:
        repo_id: Where it will be.
        base_model: Hub id of the compressed model that it adapts.
        lora: Its `adapter_config.json`.
        history: Of the run that trained it.
        license: As in `model_card`.
        revision: As in `model_card`.
        decoder: The `model_type` of what it adapts, apart from its vocabulary; `None`: a GPT-2.

    Returns:
        The card.
    """
    name, results, measured = _short(repo_id), history.results, history.measurement()
    where = _where(repo_id, revision)
    loading = (
        "from peft import AutoPeftModelForCausalLM",
        f"model = AutoPeftModelForCausalLM.from_pretrained({where}, trust_remote_code=True)",
        "model = model.merge_and_unload()  # as small as the base, and as fast",
    )
    is_factorized = results is None or results.n_embd_wte is not None
    adapted = f"a {_kind(decoder)}" + (" with a factorized vocabulary" if is_factorized else "")
    data = _metadata(
        name,
        measured,
        history,
        base_model,
        license,
        library_name=LIBRARY,
        tags=[*_tags(decoder), LORA_TAG],
    )
    return _card(
        data,
        f"# {name}",
        f"{lora_summary(lora)} of [{base_model}](/{base_model}), {adapted}.",
        *([_training(history), *_table(Figures.of(results, "with this adapter"), measured)] if results else ()),
        "## Use",
        _python(*loading),
        "`trust_remote_code` runs the code in the base's repository, which needs `transformers` "
        f"{TRANSFORMERS} or later (and below 6); it is not needed after `import factorized_gpt2`.",
    )


def _card(data: ModelCardData, *parts: str) -> ModelCard:
    body = "\n\n".join(part for part in parts if part)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _metadata(
    name: str,
    measured: Measurement | None,
    history: History,
    base_model: str | None,
    license: str | None,
    **more: Any,
) -> ModelCardData:
    trained_on = history.training_text
    scores: dict[str, Any] = {}
    if measured and math.isfinite(perplexity(measured.eval_loss)):
        text, metrics = measured.text, {"perplexity": perplexity(measured.eval_loss), "loss": measured.eval_loss}
        data: dict[str, Any] = {
            "task_type": "text-generation",
            "dataset_name": _text_name(text),
            # Of text that is no dataset the Hub takes any name that could be one.
            "dataset_type": re.sub(r"[^\w.-]+", "-", _text_name(text)) if text.files else text.dataset_name,
            "dataset_config": None if text.files else text.dataset_config_name,
            "dataset_split": None if text.files else text.split,
        }
        scores["model_name"] = name
        scores["eval_results"] = [
            EvalResult(metric_type=metric, metric_value=value, **data) for metric, value in metrics.items()
        ]
    return ModelCardData(
        base_model=base_model,
        license=license,
        datasets=[trained_on.dataset_name] if trained_on and not trained_on.files else None,
        pipeline_tag="text-generation",
        **scores,
        **more,
    )


def _kind(decoder: str | None) -> str:
    return "GPT-2" if decoder is None else f"{code(decoder)} model of transformers"


def _tags(decoder: str | None) -> list[str]:
    kinds = [FactorizedGPT2Config.model_type] if decoder is None else [FactorizedCausalLMConfig.model_type, decoder]
    return [*kinds, "custom_code", "text-generation"]


def _architecture(config: FactorizedGPT2Config | FactorizedCausalLMConfig) -> str:
    base = config.get_text_config()
    kind = f"A {_kind(None if base is config else base.model_type)}"
    shape = f"{base.num_hidden_layers} layers, width d = {vocabulary_width(base)}, V = {base.vocab_size:,} tokens"
    if not config.is_factorized:
        return f"{kind}: {shape}."
    if config.is_coded:
        return (
            f"{kind} with a vocabulary of integers: {shape}. Embedding and head share a V x k table of int8 with a "
            f"step a row, k = {config.n_embd_wte}, and a k x d and a d x k matrix lead to and from it. The file holds "
            "the table entropy-coded; in memory a number takes a byte."
        )
    head = "the first of them again" if config.tie_word_embeddings else "a k x V matrix of its own"
    return (
        f"{kind} with a factorized vocabulary: {shape}. Its token embedding is the product of a V x k and a k x d "
        f"matrix with k = {config.n_embd_wte}; its head is a d x k matrix and {head}."
    )


def _origin(is_factorized: bool, history: History, base_model: str | None) -> str:
    """Say in a few sentences how a model was made."""
    recipe, sentences = history.recipe, []
    base = f"[{base_model}](/{base_model})" if base_model else code(Path(history.base).name) if history.base else None
    if base and is_factorized and recipe.get("method"):
        refined = recipe.get("refine_steps")
        refined = f", refined for {escaped(refined)} steps to predict what it predicts" if refined else ""
        name = recipe["method"]
        what = METHODS[name].summary if name in METHODS else "a factorization"
        sentences.append(f"Compressed from {base} by {what} ({code(name)}){refined}.")
        if recipe.get("calibration"):
            text = recipe["calibration"]
            names = ", ".join(Path(name).name if Path(name).suffix else name for name in text["text"].split(", "))
            sentences.append(f"How it uses its tokens was measured on {text['tokens']:,} tokens of {escaped(names)}.")
    elif base:
        sentences.append(f"Made from {base}.")
    if history.training_text:
        sentences.append(_training(history))
    return " ".join(sentences)


def _training(history: History) -> str:
    results = history.results
    rank = escaped(results.settings.get("lora_rank") or "")
    how = f"Trained with LoRA of rank {rank}" if rank else "Trained" if history.base else "Trained from a random start"
    text = f" on {escaped(_text_name(history.training_text))}" if history.training_text else ""
    return f"{how}{text}: {results.best_step or 0:,} steps, {results.best_tokens or 0:,} tokens."


def _table(own: Figures, measured: Measurement | None) -> list[str]:
    figures = [own, measured.baseline] if measured and measured.baseline else [own]
    table = tabulate([_row(row) for row in figures], headers="keys", tablefmt="github", disable_numparse=True)
    if measured is None:
        return ["## Size", table]
    return ["## Size and loss", table, f"Loss in nats a token, over {escaped(_text_name(measured.text))}."]


def _row(figures: Figures) -> dict[str, Any]:
    row = {"": figures.name, "k": figures.n_embd_wte or "-"}
    row |= {"parameters": f"{figures.parameters:,}", "MB": megabytes(figures.bytes)}
    if figures.eval_loss is not None:
        row |= {"loss": f"{figures.eval_loss:.4f}", "perplexity": f"{perplexity(figures.eval_loss):.2f}"}
    return row


def _text_name(text: TextSource) -> str:
    return ", ".join(Path(name).name for name in text.files) if text.files else text.name


def _short(repo_id: str) -> str:
    return repo_id.rsplit("/", 1)[-1]


def _where(repo_id: str, revision: str | None) -> str:
    return json.dumps(repo_id) + (f", revision={json.dumps(revision)}" if revision else "")


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])
