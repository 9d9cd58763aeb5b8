"""Documents and their pieces: the same whatever parts they came in, and tokenized as if they were whole."""

import json
import random
from itertools import chain

import pytest
from conftest import DOCUMENTS
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from factorized_gpt2.text import documents
from factorized_gpt2.text.blocks import load_blocks, stream_blocks
from factorized_gpt2.text.documents import pieces_of_documents
from factorized_gpt2.text.source import TextSource

CODE = "def area(width, height):\n    if width < 0:\n\n        raise ValueError(width)\n\n    return height\n\n\n"
PROSE = "\n\n".join(DOCUMENTS) + " Don't,  he said (twice) .\n \n Then: ... 12 345 , l\u2019\u00e9t\u00e9 .\n"
CHINESE = "\u8fd9\u662f\u4e00\u4e2a\u53e5\u5b50\u3002\n\u53e6\u4e00\u53e5\uff0c12\u4e2a\u3002\n" * 20
TEXT = (PROSE + CODE * 5 + CHINESE + PROSE) * 2


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 50)
    monkeypatch.setattr(documents, "LONGEST_PIECE", 400)


def in_parts(text: str, seed: int) -> list[str]:
    generator, parts = random.Random(seed), []
    while text:
        size = generator.choice([0, 1, 7, 60, 500, 3000])
        parts, text = [*parts, text[:size]], text[size:]
    return parts


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("seed", range(5))
def test_pieces_do_not_depend_on_the_parts(seed):
    texts = [TEXT, "", "short", "x" * 2000, TEXT[100:], ""]
    whole = list(pieces_of_documents((text, True) for text in texts))
    parts = [(part, not place) for text in texts for place, part in enumerate(in_parts(text, seed) or [""])]
    assert list(pieces_of_documents(parts)) == whole
    assert [starts for _, starts in whole].count(True) == len(texts)
    assert "".join(text for text, _ in whole) == "".join(texts)
    assert max(len(text) for text, _ in whole) == 400
    assert len(whole) > len(TEXT) / 100


def test_what_comes_before_the_first_document_starts_none():
    assert list(pieces_of_documents([("a", False), ("b", False), ("c", True)])) == [("ab", False), ("c", True)]


GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
GPT4 += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITTING = {
    "GPT-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "GPT-4": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GPT4), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "RoBERTa": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "BERT": pre_tokenizers.BertPreTokenizer(),
    "SentencePiece": pre_tokenizers.Metaspace(),
    "characters": pre_tokenizers.Split("", "isolated"),
}


def trained(splitting: str, text: str) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE(unk_token="?"))
    made.pre_tokenizer, made.decoder = SPLITTING[splitting], decoders.ByteLevel()
    if splitting == "SentencePiece":
        made.normalizer = normalizers.NFKC()
    made.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=600, special_tokens=["?", "<e>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>")


MATERIAL = {"prose": PROSE, "code": CODE * 40, "Chinese": CHINESE * 5}
MARKING_THE_BEGINNING = {"RoBERTa", "SentencePiece"}  # where there are spaces between letters to cut at


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("splitting", "material"),
    [(name, text) for name in SPLITTING for text in MATERIAL if name not in MARKING_THE_BEGINNING or text == "prose"],
)
def test_pieces_are_tokenized_as_the_whole(splitting, material):
    text = MATERIAL[material]
    tokenizer = trained(splitting, text)
    pieces = [piece for piece, _ in pieces_of_documents([(text, True)])]
    assert len(pieces) > 10
    in_pieces = tokenizer(pieces, add_special_tokens=False)["input_ids"]
    assert list(chain(*in_pieces)) == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("size", [50, 2**14])
def test_the_kind_of_file_changes_no_token(tmp_path, monkeypatch, size):
    monkeypatch.setattr(documents, "PIECE", size)
    monkeypatch.setattr(documents, "LONGEST_PIECE", 4 * size)
    tokenizer = trained("GPT-2", CODE)
    expected = [*tokenizer.encode(CODE * 30), tokenizer.eos_token_id]
    (tmp_path / "a.txt").write_text(CODE * 30)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": CODE * 30}))
    lines = [json.dumps({"text": line}) for line in (CODE * 30).splitlines()]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    for name, start in (
        ("a.txt", None),
        ("a.jsonl", None),
        ("lines.jsonl", "no such line"),
        ("a.txt", "no such line"),
    ):
        source = TextSource(files=(str(tmp_path / name),), document_start=start)
        blocks = load_blocks(source, tokenizer, 16, keep_tail=True)["input_ids"]
        assert list(chain(*blocks)) == expected
        streamed = [list(row["input_ids"]) for row in stream_blocks(source, tokenizer, 16, 1, 0)]
        assert streamed == [list(block) for block in blocks if len(block) == 16]


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_of_a_pattern_are_tokenized_whole(tmp_path, streaming):
    tokenizer = trained("GPT-2", CODE)
    (tmp_path / "a.txt").write_text(f"preface\n\n{CODE * 30}")
    source = TextSource(files=(str(tmp_path / "a.txt"),), document_start="def ")
    texts = ["preface\n\n", *[CODE] * 30]
    expected = list(chain(*([*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts)))
    if streaming:
        blocks = [row["input_ids"] for row in stream_blocks(source, tokenizer, 2, shuffle_buffer=1, seed=0)]
    else:
        blocks = load_blocks(source, tokenizer, 2, keep_tail=False)["input_ids"]
    assert list(chain(*blocks)) == expected[: len(expected) // 2 * 2]


@pytest.mark.parametrize("content", ["", "\n", "\ufeff"])
def test_a_file_with_next_to_nothing(tmp_path, tokenizer, content):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text(content, encoding="utf-8")
        source = TextSource(files=(str(tmp_path / name),))
        with pytest.raises(documents.UserError, match=r"a\.\w+ has (no text: it is empty|\d tokens of text)"):
            load_blocks(source, tokenizer, 16, keep_tail=False)
