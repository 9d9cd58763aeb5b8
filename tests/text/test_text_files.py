"""Text in the files that people have: any name, any packing, byte order marks, the types of parquet."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pytest
from pyarrow import parquet

from factorized_gpt2.common.errors import UserError
from factorized_gpt2.text.source import TextSource
from factorized_gpt2.text.text_files import kind_of

TEXTS = ["One\n", "two \N{DROMEDARY CAMEL}\n", "\n", "three\n"]


def pack_zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": pack_zstd}


def write(path, texts=TEXTS):
    """Write rows as the suffix of a name says."""
    if path.suffix.lower() == ".parquet":
        parquet.write_table(pyarrow.table({"text": texts}), path)
        return str(path)
    lines = texts if ".json" not in path.name.lower() else [json.dumps({"text": text}) + "\n" for text in texts]
    path.write_bytes(PACKERS.get(path.suffix.lower(), bytes)("".join(lines).encode()))
    return str(path)


def rows_of(*files, streaming: bool = False, **settings) -> list:
    loaded = TextSource(files=tuple(map(str, files)), **settings).load(streaming)
    return [row["text"] for dataset, _ in loaded for row in dataset]


NAMES = ["text[1].txt", "a*b.txt", "what?.txt", "{a,b}.jsonl", "**.parquet", "a::b.txt", ".hidden.txt", "%20 x.txt"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_file_that_was_named_is_read(tmp_path, name, streaming):
    folder = tmp_path / "[2023] a::b"
    folder.mkdir()
    suffix = name[name.rindex(".") :]
    for other in ("text1", "axb", "whats", "a", "b", "x", " x"):
        write(folder / f"{other}{suffix}", ["another\n"])
    assert rows_of(write(folder / name), streaming=streaming) == TEXTS


@pytest.mark.parametrize(
    "name",
    [
        "A.TXT",
        "a.Jsonl",
        "A.PARQUET",
        "a.b.txt",
        *(f"a{kind}{packing}" for kind in (".txt", ".json") for packing in PACKERS),
    ],
)
def test_kinds_and_packings(tmp_path, name):
    assert rows_of(write(tmp_path / name)) == TEXTS
    assert rows_of(write(tmp_path / name.upper())) == TEXTS


@pytest.mark.parametrize("name", ["a", "a.gz", "a.doc.gz", "a.parquet.gz", "a.txt.zip", ".txt"])
def test_unknown_kinds(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="unknown kind of file"):
        kind_of(tmp_path / name)


@pytest.mark.parametrize("packing", PACKERS)
def test_packed_files_that_are_cut_off(tmp_path, packing):
    path = tmp_path / f"a.txt{packing}"
    texts = [f"{index * 7919} {index**3}\n" for index in range(5000)]
    content = PACKERS[packing]("".join(texts).encode())
    path.write_bytes(content + content)  # packed files may be strung together
    assert rows_of(path) == texts * 2
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"a\.txt\.\w+ cannot be read") as caught:
        rows_of(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.tokens.gz", "a.jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    path = tmp_path / name
    write(path)
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    content = b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    assert rows_of(path) == TEXTS


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_named(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes(("\ufeff" * (encoding != "utf-16") + "One\n").encode(encoding))
    with pytest.raises(UserError, match=r"a\.txt cannot be read: it is UTF-16; save it as UTF-8"):
        rows_of(tmp_path / "a.txt")


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
)
def test_text_types_of_parquet(tmp_path, kind):
    texts = ["One", None, "", "two"] * 600
    columns = {"other": range(len(texts)), "a.b": pyarrow.array(texts).cast(kind)}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet", row_group_size=100)
    assert rows_of(tmp_path / "a.parquet", text_column="a.b") == texts


@pytest.mark.parametrize(
    ("values", "named"),
    [([b"One"], "binary"), ([1], "int64"), ([["One"]], "list"), ([None], "null"), ([{"x": "One"}], "struct")],
)
def test_other_types_of_parquet_are_named(tmp_path, values, named):
    parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"a\.parquet: the column 'text' does not hold text but {named}"):
        rows_of(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column 'body'; its columns are text"):
        rows_of(tmp_path / "a.parquet", text_column="body")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"a\.parquet cannot be read"):
        rows_of(tmp_path / "a.parquet")
