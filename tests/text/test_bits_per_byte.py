"""Bits per byte of documents, against windows written out, probabilities known beforehand and sums made by hand."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import DOCUMENTS, perturb, random_ids, tiny_model
from torch import nn

from factorized_gpt2 import to_gpt2
from factorized_gpt2.cli.evaluate import evaluate
from factorized_gpt2.text.bits_per_byte import bits_per_byte, measure_bits_per_byte, rolling_windows, sum_document_loss
from factorized_gpt2.text.blocks import IGNORED_LABEL
from factorized_gpt2.text.source import TextSource

PREFIX = 0
LENGTHS = [3, 48, 0, 1, 49, 200, 96]  # the tiny models have 48 positions


@pytest.fixture
def documents() -> list[list[int]]:
    return [random_ids(1, length, seed=length)[0].tolist() for length in LENGTHS]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], []),
        ([1], [([0], [1])]),
        ([1, 2, 3], [([0, 1, 2], [1, 2, 3])]),
        ([1, 2, 3, 4], [([0, 1, 2, 3], [1, 2, 3, 4])]),
        ([1, 2, 3, 4, 5], [([0, 1, 2, 3], [1, 2, 3, 4]), ([1, 2, 3, 4], [None, None, None, 5])]),
        ([1, 2, 3, 4, 5, 6, 7], [([0, 1, 2, 3], [1, 2, 3, 4]), ([3, 4, 5, 6], [None, 5, 6, 7])]),
        ([1, 2, 3, 4, 5, 6, 7, 8], [([0, 1, 2, 3], [1, 2, 3, 4]), ([4, 5, 6, 7], [5, 6, 7, 8])]),
    ],
)
def test_windows_of_four(tokens, expected):
    windows = [(inputs.tolist(), labels.tolist()) for inputs, labels in rolling_windows(tokens, PREFIX, 4)]
    assert windows == [
        (inputs, [IGNORED_LABEL if label is None else label for label in labels]) for inputs, labels in expected
    ]


def test_the_sum_is_that_of_every_token_in_its_window(model, documents):
    nats = 0.0
    with torch.no_grad():
        for tokens in documents:
            for inputs, labels in rolling_windows(tokens, PREFIX, 48):
                log_probabilities = model(torch.from_numpy(inputs)[None]).logits[0].double().log_softmax(-1)
                nats -= sum(log_probabilities[i, label].item() for i, label in enumerate(labels) if label >= 0)
    measured = sum_document_loss(model, documents, PREFIX, 48, batch_size=3)
    assert measured.tokens == sum(LENGTHS)
    assert measured.nats == pytest.approx(nats, rel=1e-6)


def test_neither_batch_size_nor_order_matter(model, documents):
    sums = [sum_document_loss(model, documents, PREFIX, 48, batch_size).nats for batch_size in (1, 2, 5, 100)]
    sums.append(sum_document_loss(model, documents[::-1], PREFIX, 48, 2).nats)
    assert sums == pytest.approx([sums[0]] * 5, rel=1e-6)


def test_smaller_windows_cost_context(documents):
    model = tiny_model()
    assert sum_document_loss(model, documents, PREFIX, 16, 4).tokens == sum(LENGTHS)
    assert sum_document_loss(model, documents, PREFIX, 16, 4).nats != pytest.approx(
        sum_document_loss(model, documents, PREFIX, 48, 4).nats, rel=1e-3
    )


def test_a_stock_gpt2_measures_the_same(model, documents):
    measured, stock = (sum_document_loss(m, documents, PREFIX, 48, 4) for m in (model, to_gpt2(model)))
    assert stock.tokens == measured.tokens
    assert stock.nats == pytest.approx(measured.nats, rel=1e-6)


class Halves(nn.Module):
    """Gives token n a probability of 2 ** -n, wherever it stands: n bits."""

    def forward(self, input_ids, labels, shift_labels, **_):
        assert input_ids.shape == labels.shape == shift_labels.shape
        bits = torch.where(shift_labels == IGNORED_LABEL, 0, shift_labels).sum()
        return SimpleNamespace(loss=bits * math.log(2))


def test_bits_of_known_probabilities():
    measured = sum_document_loss(Halves(), [[1, 2, 1], [], [5, 3, 1, 1, 1, 4, 1]], PREFIX, 3, batch_size=2)
    assert measured.tokens == 10
    assert bits_per_byte(measured.nats, 8) == pytest.approx(20 / 8)
    assert bits_per_byte(math.log(8), 1) == pytest.approx(3)


def test_no_text_has_no_measure(tokenizer, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n{"text": null}\n', encoding="utf-8")
    source = TextSource(files=(str(tmp_path / "empty.jsonl"),))
    assert math.isnan(measure_bits_per_byte(tiny_model(), source, tokenizer, 48, 4))


def test_bytes_are_those_of_utf8_and_text_is_tokenized_whole(tokenizer, tmp_path):
    text = "Der Bär\n\n\nsaß im Gras. " + DOCUMENTS[0]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    model = tiny_model(vocab_size=len(tokenizer))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    expected = sum_document_loss(model, [ids], tokenizer.eos_token_id, 48, 4).nats / math.log(2) / (len(text) + 2)
    source = TextSource(files=(str(tmp_path / "text.txt"),))
    assert measure_bits_per_byte(model, source, tokenizer, 48, 4) == pytest.approx(expected, rel=1e-6)


def test_the_command_adds_a_column(corpus, tokenizer, tmp_path, capsys):
    for name, seed in (("a", 5), ("b", 6)):
        perturb(tiny_model(vocab_size=len(tokenizer)), seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    text = ["--eval_file", str(corpus / "validation.jsonl"), "--block_size", "32"]
    models = [str(tmp_path / name) for name in ("a", "b")]
    evaluate(["--models", *models, *text])
    without = capsys.readouterr().out.splitlines()
    evaluate(["--models", *models, *text, "--bits_per_byte", "True"])
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert "bits per byte" not in without[0]
    assert header.split()[:5] == ["loss", "perplexity", "bits", "per", "byte"]
    assert [row.split()[:2] + row.split()[3:] for row in rows] == [row.split() for row in without[2:]]
    documents = [json.loads(line)["text"] for line in (corpus / "validation.jsonl").read_text().splitlines()]
    for name, seed, row in zip(("a", "b"), (5, 6), rows, strict=True):
        model = perturb(tiny_model(vocab_size=len(tokenizer)), seed)
        loss = sum_document_loss(model, [tokenizer.encode(text) for text in documents], 0, 32, 1)
        expected = loss.nats / math.log(2) / len("".join(documents))
        assert float(row.split()[2]) == pytest.approx(expected, abs=1e-4), name


def test_a_text_is_measured_in_the_memory_of_a_document(tokenizer, tmp_path, monkeypatch):
    """No call of the tokenizer sees more than some pieces, and few windows are there at a time."""
    monkeypatch.setattr("factorized_gpt2.text.documents.PIECE", 50)
    monkeypatch.setattr("factorized_gpt2.text.documents.LONGEST_PIECE", 400)
    monkeypatch.setattr("factorized_gpt2.text.bits_per_byte._BATCHES_HELD", 2)
    texts = ["\n\n".join(DOCUMENTS), "", DOCUMENTS[0], "Der B\u00e4r"]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    model, seen = tiny_model(vocab_size=len(tokenizer)), []
    ids = [tokenizer.encode(text) for text in texts]
    expected = sum_document_loss(model, ids, tokenizer.eos_token_id, 48, 4).nats / math.log(2)
    call = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, text, **rest: seen.extend(map(len, text)) or call(self, text, **rest)
    )
    measured = measure_bits_per_byte(model, TextSource(files=(str(tmp_path / "text.jsonl"),)), tokenizer, 48, 4)
    assert measured == pytest.approx(expected / sum(len(text.encode()) for text in texts), rel=1e-6)
    assert len(seen) > 20
    assert max(seen) <= 400
