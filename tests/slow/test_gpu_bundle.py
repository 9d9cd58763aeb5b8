"""What goes along to a machine with a GPU and no network: text, tokenizer and wheels, not more than may."""

import subprocess
import sys
from pathlib import Path

import gpu_bundle
import numpy as np
import pytest
from conftest import DOCUMENTS
from datasets import Dataset

from factorized_gpt2.common.errors import UserError
from factorized_gpt2.text import demo_corpus as corpus_module
from factorized_gpt2.text.blocks import load_blocks
from factorized_gpt2.text.source import TextSource
from factorized_gpt2.text.tokenizers import load_tokenizer

COMMAND = (
    'python -m pytest -q tests/test_cuda.py -k "not cpu"; '
    "python benchmarks/gpu.py --bundle {} --output_dir gpu_results --seconds 600"
)


@pytest.fixture
def own_text(corpus) -> list[str]:
    files = [f"--{split}_file={corpus / split}.jsonl" for split in ("train", "validation")]
    return [*files, f"--tokenizer={corpus / 'tokenizer'}"]


def ids_of(path: Path) -> list[int]:
    return np.frombuffer(path.read_bytes(), "<u2").tolist()


def test_a_bundle_of_ones_own_text(own_text, corpus, tokenizer, tmp_path, capsys):
    folder = tmp_path / "bundle"
    gpu_bundle.main([*own_text, f"--output_dir={folder}"])
    for split in ("train", "validation"):
        source = TextSource(files=(str(corpus / f"{split}.jsonl"),))
        (block,) = load_blocks(source, tokenizer, 10**6, keep_tail=True)
        assert ids_of(folder / f"{split}.bin") == list(block["input_ids"])
    assert load_tokenizer(str(folder / "tokenizer")).encode(DOCUMENTS[0]) == tokenizer.encode(DOCUMENTS[0])
    counted, size, _, command = capsys.readouterr().out.splitlines()
    assert counted == f"{len(ids_of(folder / 'train.bin')):,} tokens to train on, 272 held out; a vocabulary of 300."
    assert size.startswith(f"{folder}: 0.0 MiB, with the repository ")
    assert command == COMMAND.format(folder)
    assert {path.name for path in folder.iterdir()} == {"train.bin", "validation.bin", "tokenizer"}


def test_what_does_not_fit_is_cut_and_said(own_text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_bundle, "repository_bytes", lambda: 3 * gpu_bundle.MIB)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    gpu_bundle.main([*own_text, f"--output_dir={whole}"])
    limit = 3 * gpu_bundle.MIB + gpu_bundle.bytes_of(whole) - 201
    capsys.readouterr()
    gpu_bundle.main([*own_text, f"--output_dir={cut}", f"--mib={limit / gpu_bundle.MIB}"])
    tokens = ids_of(whole / "train.bin")
    assert ids_of(cut / "train.bin") == tokens[:-101]
    assert f"Of the {len(tokens):,} tokens of training text, the last 101 do not fit." in capsys.readouterr().out
    assert limit - 2 < 3 * gpu_bundle.MIB + gpu_bundle.bytes_of(cut) <= limit
    with pytest.raises(UserError, match="3 MiB leave no room for training text"):
        gpu_bundle.main([*own_text, f"--output_dir={tmp_path / 'none'}", "--mib=3"])
    assert not (tmp_path / "none").exists()


def test_books_are_taken_where_they_are(tokenizer, tmp_path, capsys):
    (tmp_path / "books").mkdir()
    tokenizer.save_pretrained(tmp_path / "gpt2-tokenizer")
    for split in ("train", "validation"):
        rows = {"text": ["# Title: One", "a", "# Title: Two", "b"]}
        Dataset.from_dict(rows).to_parquet(tmp_path / "books" / f"{split}.parquet")
    gpu_bundle.main([f"--data_dir={tmp_path}", f"--output_dir={tmp_path / 'bundle'}"])
    text = "# Title: One\na\n<|endoftext|># Title: Two\nb\n<|endoftext|>"
    assert tokenizer.decode(ids_of(tmp_path / "bundle/train.bin")) == text


def test_without_any_text_it_is_pythons_documentation(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(corpus_module, "python_documents", lambda: DOCUMENTS)
    gpu_bundle.main([f"--data_dir={tmp_path / 'nowhere'}", f"--output_dir={tmp_path / 'bundle'}"])
    assert "nowhere/books: the text is Python's documentation." in capsys.readouterr().out
    assert len(ids_of(tmp_path / "bundle/train.bin")) > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_wheels_are_downloaded_and_installed(own_text, tmp_path, capsys, monkeypatch):
    asked = []

    def pip(words, **kwargs):
        if words[0] != sys.executable:
            return run(words, **kwargs)
        asked.append(words)
        folder = Path(words[words.index("--dest") + 1])
        if "gone" in words:
            return subprocess.CompletedProcess(words, 1, "", "ERROR: No matching distribution found for gone\n")
        folder.mkdir()
        (folder / "small-1-py3-none-any.whl").touch()
        return subprocess.CompletedProcess(words, 0, "", "")

    run = subprocess.run
    monkeypatch.setattr(gpu_bundle.subprocess, "run", pip)
    folder = tmp_path / "bundle"
    gpu_bundle.main([*own_text, f"--output_dir={folder}", "--wheels", "small"])
    assert asked[0][1:7] == ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    assert (folder / "wheels/small-1-py3-none-any.whl").exists()
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"python -m pip install --no-index --no-deps {folder}/wheels/*.whl; {COMMAND.format(folder)}"
    with pytest.raises(UserError, match="no wheel of gone: ERROR: No matching distribution"):
        gpu_bundle.main([*own_text, f"--output_dir={folder}", "--wheels", "gone"])
    assert (folder / "train.bin").exists()  # the one from before


def test_a_folder_of_something_else_stays(own_text, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds thesis\.tex and is no bundle"):
        gpu_bundle.main([*own_text, f"--output_dir={tmp_path}"])
    with pytest.raises(UserError, match="train_file needs validation_file and tokenizer"):
        gpu_bundle.main([own_text[0], f"--output_dir={tmp_path / 'bundle'}"])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
