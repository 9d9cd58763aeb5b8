"""Text to packed blocks: nothing lost, nothing invented, document ends marked."""

import json
import os
from itertools import chain

import datasets
import pyarrow
import pytest
import torch
from conftest import DOCUMENTS
from pyarrow import parquet

from factorized_gpt2.common import fingerprints
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.text.blocks import IGNORED_LABEL, collate_blocks, load_blocks, stream_blocks
from factorized_gpt2.text.source import TextSource
from factorized_gpt2.text.tokenizers import load_tokenizer


def tokens_of(tokenizer, texts: list[str]) -> list[int]:
    """Tokenize texts one by one, with the end-of-text token after each."""
    return list(chain(*([*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts)))


def write_rows(path, texts, column="text"):
    if path.suffix == ".parquet":
        datasets.Dataset.from_dict({column: texts}).to_parquet(path)
    else:
        path.write_text("\n".join(json.dumps({column: text}) for text in texts), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("block_size", [2, 7, 64])
def test_every_row_is_a_document(tmp_path, tokenizer, name, block_size):
    source = TextSource(files=(write_rows(tmp_path / name, DOCUMENTS, "body"),), text_column="body")
    blocks = load_blocks(source, tokenizer, block_size, keep_tail=True)["input_ids"]
    expected = tokens_of(tokenizer, DOCUMENTS)
    whole, rest = divmod(len(expected), block_size)
    assert [len(block) for block in blocks] == [block_size] * whole + [rest] * (rest >= 2)
    assert list(chain(*blocks)) == expected[: len(expected) - (rest if rest < 2 else 0)]


def test_the_tail_is_dropped_for_training(corpus, tokenizer):
    source = TextSource(files=(str(corpus / "validation.jsonl"),))
    kept = load_blocks(source, tokenizer, 100, keep_tail=True)["input_ids"]
    dropped = load_blocks(source, tokenizer, 100, keep_tail=False)["input_ids"]
    assert len(kept[-1]) < 100
    assert [list(block) for block in dropped] == [list(block) for block in kept[:-1]]


def test_a_text_file_is_one_document(tmp_path, tokenizer):
    lines = "".join(f"{text}\n" for text in DOCUMENTS)
    (tmp_path / "book.txt").write_text(lines, encoding="utf-8")
    (blocks,) = load_blocks(TextSource(files=(str(tmp_path / "book.txt"),)), tokenizer, 10**6, keep_tail=True)[
        "input_ids"
    ]
    assert tokenizer.decode(blocks[:-1]) == lines
    assert list(blocks).count(tokenizer.eos_token_id) == 1
    assert blocks[-1] == tokenizer.eos_token_id


def test_several_files_are_several_documents(tmp_path, tokenizer):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"file {name}\n", encoding="utf-8")
    files = tuple(str(tmp_path / f"{name}.txt") for name in "ab")
    (block,) = load_blocks(TextSource(files=files), tokenizer, 10**6, keep_tail=True)["input_ids"]
    assert tokenizer.decode(block) == "file a\n<|endoftext|>file b\n<|endoftext|>"


def test_documents_of_rows_and_of_files(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", ["one", None, "two\nthree", ""])
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"first line of {name}\n\nlast", encoding="utf-8")
    files = (str(tmp_path / "a.txt"), rows, str(tmp_path / "b.txt"))
    texts = ["first line of a\n\nlast", "one", "", "two\nthree", "", "first line of b\n\nlast"]
    assert list(TextSource(files=files).documents()) == texts


@pytest.mark.parametrize("name", ["wiki.tokens", "wiki.jsonl"])
def test_documents_of_a_pattern(tmp_path, name):
    lines = ["", " = One = ", "first", " = Two = ", " = Three = "]
    if name.endswith("tokens"):
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    else:
        write_rows(tmp_path / name, lines)
    source = TextSource(files=(str(tmp_path / name),), document_start="^ = [^=]")
    assert list(source.documents()) == ["\n", " = One = \nfirst\n", " = Two = \n", " = Three = \n"]


@pytest.mark.parametrize("name", ["wiki.tokens", "wiki.jsonl"])
def test_a_pattern_starts_documents(tmp_path, tokenizer, name):
    lines = [" = One = ", "first", " = = Part = = ", "second", " = Two = ", "third"]
    if name.endswith("tokens"):
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        write_rows(tmp_path / name, lines)
    source = TextSource(files=(str(tmp_path / name),), document_start="^ = [^=]")
    (block,) = load_blocks(source, tokenizer, 10**6, keep_tail=True)["input_ids"]
    assert tokenizer.decode(block) == (
        " = One = \nfirst\n = = Part = = \nsecond\n<|endoftext|> = Two = \nthird\n<|endoftext|>"
    )


def test_packing_does_not_depend_on_batches_or_processes(tmp_path, tokenizer):
    texts = [f"{index} {text}" for index in range(120) for text in DOCUMENTS]
    source = TextSource(files=(write_rows(tmp_path / "many.jsonl", texts),))
    blocks = load_blocks(source, tokenizer, 50, keep_tail=True, num_proc=2)["input_ids"]
    assert len(texts) > 10_000
    assert list(chain(*blocks)) == tokens_of(tokenizer, texts)


def test_an_array_is_cached_until_it_changes(tmp_path, tokenizer):
    path = tmp_path / "array.json"
    source = TextSource(files=(str(path),))
    path.write_text(json.dumps([{"text": text} for text in DOCUMENTS]))
    first, second = (source.load()[0][0] for _ in range(2))
    assert first.cache_files
    assert first.cache_files == second.cache_files
    path.write_text(json.dumps([{"text": "another"}]))
    assert [row["text"] for row in source.load()[0][0]] == ["another"]


def test_a_second_load_reads_the_cache(corpus, tokenizer):
    source = TextSource(files=(str(corpus / "train.jsonl"),))
    first, second = (load_blocks(source, tokenizer, 16, keep_tail=False) for _ in range(2))
    assert first.cache_files
    assert first.cache_files == second.cache_files
    assert load_blocks(source, tokenizer, 17, keep_tail=False).cache_files != first.cache_files


def test_the_cache_knows_the_text_by_its_content_and_the_code_by_its_version(tmp_path, tokenizer, monkeypatch):
    source = TextSource(files=(write_rows(tmp_path / "a.jsonl", ["one two three four five six"]),))
    kept = load_blocks(source, tokenizer, 4, keep_tail=True)
    state = (tmp_path / "a.jsonl").stat()
    write_rows(tmp_path / "a.jsonl", ["six five four three two one"])
    os.utime(tmp_path / "a.jsonl", ns=(state.st_atime_ns, state.st_mtime_ns))
    fingerprints._digest.cache_clear()  # as in another process
    changed = load_blocks(source, tokenizer, 4, keep_tail=True)
    assert [list(row) for row in changed["input_ids"]] != [list(row) for row in kept["input_ids"]]
    monkeypatch.setattr("factorized_gpt2.text.source._FORMAT", -1)
    assert load_blocks(source, tokenizer, 4, keep_tail=True)._fingerprint != changed._fingerprint


def test_a_cache_that_cannot_be_written_is_named(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file/cache")
    source = TextSource(files=(write_rows(tmp_path / "a.jsonl", ["one"]),))
    with pytest.raises(UserError, match=r"file/cache, where .* cannot be written \(.*\): set HF_DATASETS_CACHE"):
        load_blocks(source, tokenizer, 4, keep_tail=True)


def make_bad_source(folder, kind: str) -> TextSource:
    path = folder / "text.txt"
    if kind == "missing":
        return TextSource(files=(str(path),))
    if kind == "suffix":
        (folder / "text.doc").write_text("x")
        return TextSource(files=(str(folder / "text.doc"),))
    if kind == "column":
        return TextSource(files=(write_rows(folder / "rows.jsonl", ["x"]),), text_column="body")
    if kind == "not UTF-8":
        path.write_bytes(b"\xff\xfe\xfa" * 100)
    elif kind == "not JSON":
        path = folder / "rows.jsonl"
        path.write_text("{")
    elif kind == "short":
        path.write_text("a")
    elif kind == "nothing":
        return TextSource()
    return TextSource(files=(str(path),))


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("missing", "text.txt does not exist"),
        ("suffix", "unknown kind of file '.doc'"),
        ("column", "no column 'body'; its columns are text"),
        ("not UTF-8", "text.txt cannot be read"),
        ("not JSON", "rows.jsonl: line 1 is not JSON"),
        ("short", "too few for one block of 50"),
        ("nothing", "No text given"),
    ],
)
def test_text_that_cannot_be_used(tmp_path, tokenizer, kind, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        load_blocks(make_bad_source(tmp_path, kind), tokenizer, 50, keep_tail=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_that_is_not_there(tmp_path, streaming):
    write_rows(tmp_path / "train.parquet", DOCUMENTS[:3])
    source = TextSource(dataset_name=str(tmp_path), split="train[1:2]" if not streaming else "train")
    assert next(iter(source.load(streaming)[0][0]))["text"] == DOCUMENTS[0 if streaming else 1]
    for split in ("validation", "validation[:5]", "validation+train"):
        with pytest.raises(UserError, match=r"no split 'val.*'; its splits are train: .*validation_file") as caught:
            TextSource(dataset_name=str(tmp_path), split=split).load(streaming)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [datasets.Dataset, datasets.DatasetDict])
def test_a_dataset_of_save_to_disk(tmp_path, kind):
    rows = datasets.Dataset.from_dict({"text": DOCUMENTS[:3]})
    (rows if kind is datasets.Dataset else kind(train=rows)).save_to_disk(tmp_path / "a")
    with pytest.raises(UserError, match=r"a was written by save_to_disk .* to_parquet, .*train_file"):
        TextSource(dataset_name=str(tmp_path / "a")).load()


@pytest.mark.parametrize("kind", [pyarrow.string_view(), pyarrow.binary()])
def test_text_types_of_a_dataset(tmp_path, kind):
    texts = pyarrow.array(["One", None, ""]).cast(pyarrow.string() if kind != pyarrow.binary() else kind)
    parquet.write_table(pyarrow.table({"text": texts.cast(kind)}), tmp_path / "train.parquet")
    source = TextSource(dataset_name=str(tmp_path))
    if kind != pyarrow.binary():
        assert [row["text"] for row in source.load()[0][0]] == ["One", None, ""]
        return
    with pytest.raises(UserError, match="the column 'text' does not hold text but binary"):
        source.load()


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_json(tmp_path, streaming):
    texts = ["null\nnull", None, "a\u2028b\x85c", "\N{DROMEDARY CAMEL}"]
    rows = [json.dumps({"meta": None, "text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "lines.jsonl").write_bytes(("\ufeff" + "\r\n\n  \n".join(rows)).encode())
    (tmp_path / "array.json").write_bytes(f"\ufeff \n[{','.join(rows)}]".encode())
    source = TextSource(files=(str(tmp_path / "lines.jsonl"), str(tmp_path / "array.json")))
    assert [[row["text"] for row in dataset] for dataset, _ in source.load(streaming)] == [texts, texts]


def test_a_tokenizer_from_vocabulary_and_merges(corpus, tmp_path, tokenizer):
    tokenizer.backend_tokenizer.model.save(str(tmp_path))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.encode(DOCUMENTS[0]) == tokenizer.encode(DOCUMENTS[0])
    assert loaded.eos_token == "<|endoftext|>"


def test_a_tokenizer_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="No tokenizer can be loaded"):
        load_tokenizer(str(tmp_path))


def test_collation_ignores_padding():
    batch = collate_blocks([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    assert torch.equal(batch["input_ids"], torch.tensor([[5, 6, 7], [8, 9, 0]]))
    assert torch.equal(batch["labels"], torch.tensor([[5, 6, 7], [8, 9, IGNORED_LABEL]]))
    assert batch["input_ids"].dtype == torch.int64


@pytest.mark.parametrize("document_start", [None, "Chapter 1"])
@pytest.mark.parametrize("kind", ["jsonl", "txt", "parquet"])
def test_a_stream_gives_the_blocks_that_would_be_prepared(tmp_path, tokenizer, kind, document_start):
    path = tmp_path / f"text.{kind}"
    path.write_text("\n".join(DOCUMENTS), encoding="utf-8") if kind == "txt" else write_rows(path, DOCUMENTS)
    files = (str(path),) * 2
    source = TextSource(files=files, document_start=document_start)
    prepared = [row.tolist() for row in load_blocks(source, tokenizer, 16, keep_tail=False)["input_ids"]]
    streamed = [list(row["input_ids"]) for row in stream_blocks(source, tokenizer, 16, shuffle_buffer=1, seed=0)]
    assert streamed == prepared
    assert len(streamed) > 100


def test_a_stream_with_many_rows_of_no_text(tmp_path, tokenizer):
    texts = [DOCUMENTS[0]] * 300 + [""] * 1000 + [None] * 1000 + [DOCUMENTS[0]]
    source = TextSource(files=(write_rows(tmp_path / "text.jsonl", texts),))
    prepared = [row.tolist() for row in load_blocks(source, tokenizer, 16, keep_tail=False)["input_ids"]]
    assert [list(row["input_ids"]) for row in stream_blocks(source, tokenizer, 16, 1, 0)] == prepared


def test_a_stream_is_shuffled_within_its_buffer_by_its_seed(corpus, tokenizer):
    source = TextSource(files=(str(corpus / "train.jsonl"),))
    ordered, first, again, other = (
        [tuple(row["input_ids"]) for row in stream_blocks(source, tokenizer, 16, buffer, seed)]
        for buffer, seed in ((1, 0), (20, 0), (20, 0), (20, 1))
    )
    assert first == again != other
    assert sorted(first) == sorted(other) == sorted(ordered)
    places = {block: place for place, block in enumerate(ordered)}
    once = [(place, block) for place, block in enumerate(first) if ordered.count(block) == 1]
    assert all(places[block] <= place + 20 for place, block in once)
    assert sum(places[block] != place for place, block in enumerate(first)) > len(first) / 2


@pytest.mark.parametrize("kind", ["missing", "column"])
def test_a_stream_that_cannot_be_read(tmp_path, tokenizer, kind):
    (tmp_path / "text.jsonl").write_text('{"words": "a"}\n')
    name = "text.jsonl" if kind == "column" else "nowhere.jsonl"
    complaint = "no column 'text'; its columns are words" if kind == "column" else "nowhere.jsonl does not exist"
    with pytest.raises(UserError, match=complaint):
        stream_blocks(TextSource(files=(str(tmp_path / name),)), tokenizer, 16, 1, 0)
