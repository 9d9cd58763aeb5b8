"""Texts and baselines of the benchmarks: a 3-layer GPT-2, d = 192, V = 8192, trained here or found trained."""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset

from factorized_gpt2.arguments import load_config, parse_run
from factorized_gpt2.corpus import hold_out, python_documents, train_tokenizer
from factorized_gpt2.errors import UserError
from factorized_gpt2.files import replacing_folder
from factorized_gpt2.training import run_experiment

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
    seed: int = field(default=0, metadata={"help": "Of the baseline's training, and of every draw after it."})
    work_dir: str = field(default="benchmark_output", metadata={"help": "Where texts and baselines are kept."})
    baseline_steps: int | None = field(
        default=None, metadata={"help": "For a quicker baseline. None: the text's own."}
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
        training, validation = hold_out(python_documents())
        with replacing_folder(folder) as temporary:
            for name, documents in (("train", training), ("validation", validation)):
                Dataset.from_dict({"text": documents}).to_json(temporary / f"{name}.jsonl")
            train_tokenizer(training, VOCAB_SIZE).save_pretrained(temporary / "tokenizer")
    return Texts(str(folder / "train.jsonl"), str(folder / "validation.jsonl"), str(tokenizer), None)


def text_words(texts: Texts) -> list[str]:
    """Spell the text as settings of `train_hf.py`."""
    words = ["--train_file", texts.train_file, "--validation_file", texts.validation_file]
    return words + (["--document_start", texts.document_start] if texts.document_start else [])


def prepare_baseline(arguments: BaselineArguments, texts: Texts) -> Path:
    """Train the baseline, unless it is there; return its folder."""
    folder = Path(arguments.work_dir) / f"{arguments.text}-seed{arguments.seed}" / "gpt_baseline"
    config = Path(__file__).with_name("baseline.json")
    steps = arguments.baseline_steps or STEPS[arguments.text]
    words = ["--config", str(config), "--tokenizer", texts.tokenizer, *text_words(texts), "--output_dir", str(folder)]
    run_experiment(parse_run([*words, "--seed", str(arguments.seed), "--max_steps", str(steps)]))
    return folder


def block_size() -> int:
    """Tokens a block of every baseline."""
    return load_config(str(Path(__file__).with_name("baseline.json")))["block_size"]
