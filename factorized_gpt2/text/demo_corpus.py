"""Real English that every Python carries, for the demo: nothing downloaded, nothing copied here."""

import ast
import json
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data import topics

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from ..common.errors import UserError
from ..common.files import replacing_folder
from .tokenizer_files import save_tokenizer

END_OF_TEXT = "<|endoftext|>"

_SKIPPED_PACKAGES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"}
_SHORTEST_DOCSTRING = 80  # characters; below, it is a label rather than prose


def python_documents() -> list[str]:
    """Collect the language reference that `help()` shows and the docstrings of the standard library.

    Modules are parsed, not imported. The order is that of topics and paths, so one Python gives one corpus.

    Returns:
        Some 5,000 different documents of together 2 million characters.

    Raises:
        UserError: This Python has neither.
    """
    documents = [text for _, text in sorted(topics.topics.items())]
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if _SKIPPED_PACKAGES.isdisjoint(path.relative_to(library).parts):
            documents += _docstrings(path)
    documents = list(dict.fromkeys(documents))
    if sum(map(len, documents)) < 500_000:
        raise UserError(
            "This Python was installed without its documentation, which is the text of the demo: use another Python."
        )
    return documents


def hold_out(documents: list[str], every: int = 12) -> tuple[list[str], list[str]]:
    """Split documents into training and validation, each `every`-th one being held out."""
    training = [text for index, text in enumerate(documents) if index % every]
    return training, documents[::every]


def write_python_corpus(folder: Path, vocab_size: int, every: int = 12) -> tuple[int, int]:
    """Write `train.jsonl`, `validation.jsonl` and `tokenizer/`, trained on the former, whole or not at all.

    Args:
        folder: What is to hold them.
        vocab_size: Of the tokenizer.
        every: Each `every`-th document is held out.

    Returns:
        How many documents there are to train on, and held out.
    """
    training, validation = hold_out(python_documents(), every)
    with replacing_folder(folder) as temporary:
        for name, texts in (("train", training), ("validation", validation)):
            lines = [json.dumps({"text": text}) + "\n" for text in texts]
            (temporary / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        save_tokenizer(train_tokenizer(training, vocab_size), temporary / "tokenizer")
    return len(training), len(validation)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of GPT-2's kind, with GPT-2's end-of-text token.

    Args:
        texts: What to learn the merges from.
        vocab_size: Tokens at most, end-of-text included; at least 257.

    Returns:
        The tokenizer.
    """
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts, vocab_size=vocab_size, min_frequency=2, special_tokens=[END_OF_TEXT], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT
    )


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in other people's strings
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None and len(text) >= _SHORTEST_DOCSTRING:
                yield text
