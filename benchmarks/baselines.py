"""Texts and baselines of the benchmarks: a 3-layer GPT-2, d = 192, V = 8192, trained here or found trained."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, disable_progress_bars, load_dataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from factorized_gpt2.common.errors import UserError
from factorized_gpt2.common.files import replacing_folder
from factorized_gpt2.compress.calibration import spread_blocks
from factorized_gpt2.compress.compressor import Compressor
from factorized_gpt2.compress.recipe import CalibrationText, Recipe
from factorized_gpt2.models.loading import Baseline, load_baseline
from factorized_gpt2.runs.run import run_experiment
from factorized_gpt2.runs.settings import parse_run
from factorized_gpt2.settings.parsing import load_config
from factorized_gpt2.text.blocks import load_blocks
from factorized_gpt2.text.demo_corpus import train_tokenizer, write_python_corpus
from factorized_gpt2.text.loss import sum_loss
from factorized_gpt2.text.source import TextSource
from factorized_gpt2.text.tokenizers import load_tokenizer

CONFIG = Path(__file__).with_name("baseline.json")
BLOCK_SIZE = load_config(str(CONFIG))["block_size"]
VOCAB_SIZE = 8192
STEPS = {"books": 2500, "python": 1000}  # of 2,048 tokens: an eighth of an epoch, and four epochs


@dataclass
class BaselineArguments:
    """Which baseline to measure on."""

    text: str = field(
        default="python",
        metadata={
            "help": "books: --data_dir's. python: the documentation that every Python carries.",
            "choices": ["books", "python"],
        },
    )
    data_dir: str = field(
        default="../shared/data",
        metadata={"help": "Holds books/{train,train-small,validation}.parquet, rows opening a book '# Title: '."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Each trains a baseline, and draws all that is drawn after it."}
    )
    calibration_tokens: int = field(default=16384, metadata={"help": "Tokens of the training text."})
    eval_tokens: int = field(default=131072, metadata={"help": "Tokens of the held-out text, evenly spread."})
    work_dir: str = field(default="benchmark_output", metadata={"help": "Where texts and baselines are kept."})
    baseline_steps: int | None = field(
        default=None, metadata={"help": "For a quicker baseline. None: the text's own."}
    )
    baselines: list[str] | None = field(
        default=None, metadata={"help": "Folders of trained baselines, one for each seed, instead of training some."}
    )


@dataclass(frozen=True)
class Texts:
    """Files of one text and what cuts them into documents."""

    train_file: str
    validation_file: str
    tokenizer: str
    document_start: str | None


def prepare_texts(arguments: BaselineArguments) -> Texts:
    """Find or make the training and held-out text and a tokenizer trained on it."""
    folder = Path(arguments.work_dir) / f"{arguments.text}-text"
    tokenizer = folder / "tokenizer"
    if arguments.text == "books":
        books = Path(arguments.data_dir) / "books"
        if not books.is_dir():
            raise UserError(f"There is no folder {books}: name another --data_dir, or take --text python.")
        if not folder.exists():
            small = load_dataset("parquet", data_files=str(books / "train-small.parquet"), split="train")
            with replacing_folder(folder) as temporary:
                train_tokenizer(small["text"], VOCAB_SIZE).save_pretrained(temporary / "tokenizer")
        return Texts(str(books / "train.parquet"), str(books / "validation.parquet"), str(tokenizer), "# Title: ")
    if not folder.exists():
        write_python_corpus(folder, VOCAB_SIZE)
    return Texts(str(folder / "train.jsonl"), str(folder / "validation.jsonl"), str(tokenizer), None)


def text_words(texts: Texts) -> list[str]:
    """Spell the text as settings of `train_hf.py`."""
    words = ["--train_file", texts.train_file, "--validation_file", texts.validation_file]
    return words + (["--document_start", texts.document_start] if texts.document_start else [])


def prepare_baseline(arguments: BaselineArguments, texts: Texts, seed: int) -> Path:
    """Train the baseline, unless it is there; return its folder."""
    folder = Path(arguments.work_dir) / f"{arguments.text}-seed{seed}" / "gpt_baseline"
    steps = arguments.baseline_steps or STEPS[arguments.text]
    words = ["--config", str(CONFIG), "--tokenizer", texts.tokenizer, *text_words(texts), "--output_dir", str(folder)]
    run_experiment(parse_run([*words, "--seed", str(seed), "--max_steps", str(steps)]))
    return folder


@dataclass(frozen=True)
class Bench:
    """A trained baseline and the text to measure on."""

    seed: int
    baseline: Baseline
    tokenizer: PreTrainedTokenizerBase
    calibration: CalibrationText
    held_out: Dataset

    def compressor(self, method: str, tied: bool = True, refine_steps: int = 0) -> Compressor:
        """Make a compressor that keeps nothing on disk but PCA's factor files."""
        recipe = Recipe(method, tied, refine_steps, self.seed)
        root = Path(self.baseline.name).parent
        return Compressor(self.baseline, recipe, root, self.tokenizer, self.calibration)

    def loss(self, model: nn.Module) -> float:
        """Measure a model, in nats a token of the held-out text."""
        return sum_loss(model, self.held_out, batch_size=16).loss

    def ranks(self) -> list[int]:
        """d/12, d/6, d/3 and 2d/3."""
        width = self.baseline.model.config.n_embd
        return [round(width * twelfths / 12) for twelfths in (1, 2, 4, 8)]


def benches(arguments: BaselineArguments) -> Iterator[Bench]:
    """Train or find the baseline of every seed."""
    disable_progress_bars()
    logging.disable_progress_bar()
    texts = prepare_texts(arguments)
    tokenizer = load_tokenizer(texts.tokenizer)
    if arguments.baselines and len(arguments.baselines) != len(arguments.seeds):
        raise UserError(f"--baselines names {len(arguments.baselines)} folders for {len(arguments.seeds)} seeds.")
    for number, seed in enumerate(arguments.seeds):
        trained = arguments.baselines[number] if arguments.baselines else prepare_baseline(arguments, texts, seed)
        baseline = load_baseline(str(trained))
        training, validation = (
            load_blocks(
                TextSource(files=(name,), document_start=texts.document_start), tokenizer, BLOCK_SIZE, keep_tail=False
            )
            for name in (texts.train_file, texts.validation_file)
        )
        calibration = CalibrationText(training, arguments.calibration_tokens, texts.train_file)
        yield Bench(seed, baseline, tokenizer, calibration, spread_blocks(validation, arguments.eval_tokens))
