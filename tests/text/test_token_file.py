"""Files of token ids: the blocks of the text they were written from, read where they lie; wrong files named."""

import json
import pickle
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_model

from factorized_gpt2.cli.compress import compress
from factorized_gpt2.cli.evaluate import evaluate
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.compress.calibration import count_tokens
from factorized_gpt2.runs.run import run_experiment
from factorized_gpt2.runs.settings import parse_run
from factorized_gpt2.text.blocks import load_blocks, stream_blocks, token_stream
from factorized_gpt2.text.loss import sum_loss
from factorized_gpt2.text.source import TextSource
from factorized_gpt2.text.token_file import TokenBlocks, write_token_file
from factorized_gpt2.text.tokenizers import vocabulary_size

TINY = [
    *(
        "--n_layer=1",
        "--n_head=2",
        "--n_embd=16",
        "--block_size=16",
        "--max_steps=4",
        "--use_cpu",
        "--torch_compile=false",
    ),
    *("--report_to=none", "--do_train", "--per_device_train_batch_size=4", "--eval_strategy=steps", "--eval_steps=2"),
    *("--logging_steps=1", "--learning_rate=1e-2"),
]


@pytest.fixture(scope="module")
def tokens(corpus, tokenizer, tmp_path_factory) -> Path:
    """Make a folder of `train.bin` and `validation.bin`, written from the corpus."""
    folder = tmp_path_factory.mktemp("tokens")
    for name in ("train", "validation"):
        source = TextSource(files=(str(corpus / f"{name}.jsonl"),))
        write_token_file(folder / f"{name}.bin", token_stream(source, tokenizer), vocabulary_size(tokenizer))
    return folder


def write(path: Path, ids) -> str:
    path.write_bytes(np.array(ids, "<u2").tobytes())
    return str(path)


def rows_of(blocks) -> list[list[int]]:
    return [list(row["input_ids"]) for row in blocks]


@pytest.mark.parametrize("keep_tail", [False, True])
@pytest.mark.parametrize("block_size", [16, 100, 131])
def test_blocks_are_those_of_the_text(corpus, tokens, tokenizer, block_size, keep_tail):
    for name in ("train", "validation"):
        blocks, prepared = (
            load_blocks(TextSource(files=(str(path),), document_start=start), tokenizer, block_size, keep_tail)
            for path, start in ((tokens / f"{name}.bin", "^ = [^=]"), (corpus / f"{name}.jsonl", None))
        )
        assert rows_of(blocks) == rows_of(prepared)
        assert len(blocks) == len(prepared) > 1
        assert list(blocks[-1]["input_ids"]) == list(prepared[-1]["input_ids"])
        assert blocks[0]["input_ids"].dtype == prepared[0]["input_ids"].dtype


@pytest.mark.parametrize(("keep_tail", "lengths"), [(False, [4, 4]), (True, [4, 4, 2])])
def test_files_follow_each_other(tmp_path, tokenizer, keep_tail, lengths):
    parts = ([1, 2, 3], [], [4], [5, 6, 7, 8, 9, 10])
    files = tuple(write(tmp_path / f"{index}.bin", ids) for index, ids in enumerate(parts))
    blocks = load_blocks(TextSource(files=files), tokenizer, 4, keep_tail)
    assert [len(row) for row in rows_of(blocks)] == lengths
    assert list(chain(*rows_of(blocks))) == list(range(1, sum(lengths) + 1))
    with pytest.raises(IndexError):
        blocks[len(lengths)]


def test_one_token_left_is_no_block(tmp_path):
    assert rows_of(TokenBlocks([write(tmp_path / "a.bin", [1, 2, 3, 4, 5])], 4, keep_tail=True)) == [[1, 2, 3, 4]]


def test_workers_open_the_files_themselves(tokens):
    blocks = TokenBlocks([str(tokens / "train.bin")], 16, keep_tail=False)
    pickled = pickle.dumps(blocks)
    assert len(pickled) < 1000 < blocks.tokens
    assert rows_of(pickle.loads(pickled)) == rows_of(blocks)


def test_what_was_read_cannot_be_written_back(tokens):
    before = (tokens / "train.bin").read_bytes()
    blocks = TokenBlocks([str(tokens / "train.bin")], 16, keep_tail=False)
    blocks[0]["input_ids"][:] = 7
    assert (tokens / "train.bin").read_bytes() == before
    assert list(blocks[0]["input_ids"]) != [7] * 16


def test_training_compression_and_evaluation_are_those_on_the_text(corpus, tokens, tmp_path, capsys):
    def results(folder, suffix):
        root = tmp_path / suffix[:3]  # tables are as wide as paths are long
        train, validation = (folder / f"{split}.{suffix}" for split in ("train", "validation"))
        files = [f"--train_file={train}", f"--validation_file={validation}", "--max_eval_samples=9"]
        words = [*TINY, *files, f"--tokenizer={corpus / 'tokenizer'}", f"--output_dir={root / 'run'}"]
        trained = run_experiment(parse_run(words))
        words = [f"--baseline={root / 'run'}", f"--output_dir={root}", "--ranks=5", "--method=tokenwise", "--refine=2"]
        compress([*words, f"--calibration_file={train}", "--calibration_tokens=99", f"--eval_file={validation}"])
        evaluate([f"--models={root / 'run'}", f"--eval_file={validation}"])
        record = json.loads((root / "gpt_tokenwise_refined_k5/compression.json").read_text())["calibration"]
        tables = capsys.readouterr().out.replace(str(root), "")
        return trained.training_curve, trained.eval_loss, record.pop("text").rpartition(".")[2], record, tables

    curve, loss, kind, record, tables = results(tokens, "bin")
    assert len(curve) == 4
    assert record["blocks"] > 9 > record["tokens"] / 16 > 6
    assert "over 255 tokens" in tables
    assert (curve, loss, "jsonl", record, tables) == results(corpus, "jsonl")
    assert kind == "bin"


def test_tokens_are_counted_and_measured(tokens, tokenizer):
    blocks = load_blocks(TextSource(files=(str(tokens / "train.bin"),)), tokenizer, 16, keep_tail=True)
    ids = np.frombuffer((tokens / "train.bin").read_bytes(), "<u2")
    np.testing.assert_array_equal(count_tokens(blocks, 300), np.bincount(ids, minlength=300))
    assert sum_loss(tiny_model(vocab_size=300), blocks, 64).tokens == len(ids) - len(blocks)


def test_bits_per_byte_need_text(tokens, tmp_path):
    words = [f"--models={tmp_path}", f"--eval_file={tokens / 'validation.bin'}", "--bits_per_byte"]
    with pytest.raises(UserError, match="bits_per_byte needs text, but eval_file contains token ids"):
        evaluate(words)


@pytest.mark.parametrize(
    ("ids", "settings", "complaint"),
    [
        ([7], {}, "has 1 tokens, too few for one block of 50"),
        ([], {}, "has 0 tokens, too few for one block of 50"),
        ([7] * 99 + [300], {}, "text.bin contains the token id 300, but the tokenizer has 300 ids"),
        ([7] * 99, {"files": ["text.txt"]}, "text.bin contains token ids, text.txt text: give files of one kind"),
        ([7] * 99, {"files": ["gone.bin"]}, "gone.bin does not exist"),
        (b"abc" * 99, {}, "text.bin has 297 bytes, an odd number"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, monkeypatch, tokenizer, ids, settings, complaint):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("words")
    Path("text.bin").write_bytes(ids if isinstance(ids, bytes) else np.array(ids, "<u2").tobytes())
    source = TextSource(**settings | {"files": ("text.bin", *settings.get("files", ()))})
    with pytest.raises(UserError, match=complaint) as caught:
        load_blocks(source, tokenizer, 50, keep_tail=True)
    assert "\n" not in str(caught.value)


def test_token_ids_are_neither_streamed_nor_documents(tokens, tokenizer):
    source = TextSource(files=(str(tokens / "train.bin"),))
    with pytest.raises(UserError, match=r"streaming has no effect on .*train\.bin"):
        stream_blocks(source, tokenizer, 16, 1, 0)
    with pytest.raises(UserError, match=r"train\.bin contains token ids, but this needs text"):
        next(source.documents())


def test_what_uint16_does_not_hold_is_not_written(tmp_path):
    path = tmp_path / "text.bin"
    with pytest.raises(UserError, match="uint16, which allows 65,536 tokens; the tokenizer has 65,537"):
        write_token_file(path, [np.zeros(3, np.int32)], 65_537)
    for wrong in (-1, 300):
        with pytest.raises(UserError, match="has a token id beyond the tokenizer's 300"):
            write_token_file(path, [np.arange(9), np.array([5, wrong])], 300)
    assert not list(tmp_path.iterdir())
    assert write_token_file(path, [np.array([65_535]), np.empty(0, np.int32)], 65_536) == 1
    assert path.read_bytes() == b"\xff\xff"
