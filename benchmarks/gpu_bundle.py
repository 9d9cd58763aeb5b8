"""Collect what the GPU's tests and benchmark need on a machine without network, and check that it is small enough.

`make gpu-bundle`, or with packages whose wheels go along: `python benchmarks/gpu_bundle.py --wheels NAME ...`.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.common.errors import UserError, first_line
from factorized_gpt2.common.files import replacing_folder
from factorized_gpt2.settings.parsing import ManualParser
from factorized_gpt2.text.blocks import token_stream
from factorized_gpt2.text.demo_corpus import write_python_corpus
from factorized_gpt2.text.source import TextSource
from factorized_gpt2.text.token_file import write_token_file
from factorized_gpt2.text.tokenizers import load_tokenizer, vocabulary_size

REPOSITORY = Path(__file__).resolve().parents[1]
CONTENT = {"train.bin", "validation.bin", "tokenizer", "wheels"}
MIB = 2**20
PYTHON = "3.12"  # on the machine with the GPU
VOCAB_SIZE = 4096  # of the tokenizer that is trained where there is none


@dataclass
class BundleArguments:
    """What goes along."""

    data_dir: str = field(
        default="../shared/data",
        metadata={
            "help": "Holds books/{train,validation}.parquet, rows opening a book '# Title: ', and gpt2-tokenizer/. "
            "Where there is none, the documentation that every Python carries is taken."
        },
    )
    train_file: list[str] | None = field(default=None, metadata={"help": "Text of your own, as train_hf.py takes it."})
    validation_file: list[str] | None = field(default=None, metadata={"help": "Text to hold out; with train_file."})
    tokenizer: str | None = field(default=None, metadata={"help": "Folder or Hub id; with train_file."})
    document_start: str | None = field(default=None, metadata={"help": "As train_hf.py takes it; with train_file."})
    wheels: list[str] = field(default_factory=list, metadata={"help": "Packages of which the wheel goes along."})
    output_dir: str = field(default=".gpu-bundle", metadata={"help": "Folder to make; git ignores this one."})
    mib: float = field(default=64, metadata={"help": "MiB that the folder and the repository may have together."})


@dataclass(frozen=True)
class Texts:
    """Training and held-out text, and the tokenizer of both."""

    training: TextSource
    validation: TextSource
    tokenizer: str


def main(argv: list[str]) -> None:
    """Make the folder, say how large everything is, and which command runs it over there."""
    arguments = ManualParser(BundleArguments, prog="gpu_bundle.py", description=__doc__).parse(argv)[0]
    folder = Path(arguments.output_dir)
    foreign = {path.name for path in folder.glob("*")} - CONTENT
    if foreign:
        raise UserError(f"{folder} holds {min(foreign)} and is no bundle: choose another --output_dir.")
    repository = repository_bytes()
    with replacing_folder(folder, ("*", "*/")) as temporary:  # all in it is a bundle's
        fill(temporary, arguments, int(arguments.mib * MIB) - repository)
        bundle = bytes_of(temporary)
    print(f"{folder}: {bundle / MIB:.1f} MiB, with the repository {(bundle + repository) / MIB:.1f} MiB.\n")
    install = f"python -m pip install --no-index --no-deps {folder}/wheels/*.whl; " if arguments.wheels else ""
    print(
        f'{install}python -m pytest -q tests/test_cuda.py -k "not cpu"; '
        f"python benchmarks/gpu.py --bundle {folder} --output_dir gpu_results --seconds 600"
    )


def fill(folder: Path, arguments: BundleArguments, room: int) -> None:
    """Write everything into a folder, the training text last, as much of it as fits into `room` bytes.

    Raises:
        UserError: Text, tokenizer or wheels cannot be had, or no room is left for training text.
    """
    if arguments.wheels:
        download(arguments.wheels, folder / "wheels")
    with tempfile.TemporaryDirectory() as corpus:
        texts = find_texts(arguments, Path(corpus) / "text")
        tokenizer = load_tokenizer(texts.tokenizer)
        tokenizer.save_pretrained(folder / "tokenizer")
        size = vocabulary_size(tokenizer)
        held_out = write_token_file(folder / "validation.bin", token_stream(texts.validation, tokenizer), size)
        fitting = (room - bytes_of(folder)) // 2
        if fitting <= 0:
            raise UserError(f"{arguments.mib:g} MiB leave no room for training text beside what else goes along.")
        pieces = FirstTokens(token_stream(texts.training, tokenizer), fitting)
        written = write_token_file(folder / "train.bin", pieces, size)
    print(f"{written:,} tokens to train on, {held_out:,} held out; a vocabulary of {size:,}.")
    if written < pieces.all:
        print(f"Of the {pieces.all:,} tokens of training text, the last {pieces.all - written:,} do not fit.")


class FirstTokens:
    """The first tokens of a text, in pieces; once they are read, `all` says how many there were."""

    def __init__(self, pieces: Iterator[np.ndarray], count: int):
        self.pieces, self.count, self.all = pieces, count, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the pieces, the last one cut."""
        for piece in self.pieces:
            yield piece[: max(0, self.count - self.all)]
            self.all += len(piece)


def find_texts(arguments: BundleArguments, corpus: Path) -> Texts:
    """Take the text that was asked for, or what is there; where there is none, write Python's into `corpus`.

    Raises:
        UserError: Something lacks to text of one's own.
    """
    if arguments.train_file:
        if not (arguments.validation_file and arguments.tokenizer):
            raise UserError("train_file needs validation_file and tokenizer.")
        files = (arguments.train_file, arguments.validation_file)
        tokenizer, start = arguments.tokenizer, arguments.document_start
    elif (Path(arguments.data_dir) / "books").is_dir():
        data = Path(arguments.data_dir)
        files = [[str(data / "books" / f"{split}.parquet")] for split in ("train", "validation")]
        tokenizer, start = str(data / "gpt2-tokenizer"), "# Title: "
    else:
        print(f"There is no {Path(arguments.data_dir) / 'books'}: the text is Python's documentation.")
        write_python_corpus(corpus, VOCAB_SIZE)
        files, start = [[str(corpus / f"{split}.jsonl")] for split in ("train", "validation")], None
        tokenizer = str(corpus / "tokenizer")
    training, validation = (TextSource(files=tuple(names), document_start=start) for names in files)
    return Texts(training, validation, tokenizer)


def download(packages: list[str], folder: Path) -> None:
    """Fetch the wheels of packages, without what they depend on.

    Raises:
        UserError: pip finds none.
    """
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    words += ["--python-version", PYTHON, "--dest", str(folder), "--", *packages]
    finished = subprocess.run(words, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise UserError(f"pip fetches no wheel of {', '.join(packages)}: {finished.stderr.strip()}")


def repository_bytes() -> int:
    """Add up the files that git tracks.

    Raises:
        UserError: This is no checkout.
    """
    try:
        words = ["git", "ls-files", "-z"]
        listed = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"{REPOSITORY} is no git checkout: {first_line(error)}") from error
    files = [REPOSITORY / name for name in listed.split("\0") if name]
    return sum(path.stat().st_size for path in files if path.is_file())


def bytes_of(folder: Path) -> int:
    """Add up the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    sys.exit(run_command(main))
