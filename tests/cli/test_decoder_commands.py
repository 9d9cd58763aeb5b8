"""The commands on decoders other than GPT-2: compressed by every method, measured, loaded, calibrated."""

import json

import numpy as np
import pytest
import torch
from decoders import tiny_decoder
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from factorized_gpt2 import FactorizedCausalLM, from_gpt2
from factorized_gpt2.cli.compress import compress
from factorized_gpt2.cli.evaluate import evaluate
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.compress.calibration import calibrate
from factorized_gpt2.models.loading import load_baseline, load_compressed

_REFINED = ("tokenwise", "coded")
KINDS = ["llama", "gemma3_text", "opt", "phi"]


class Blocks(Dataset):
    """Rows of random tokens."""

    def __init__(self, size: int, rows: int = 4, length: int = 16):
        self.ids = torch.randint(2, size, (rows, length), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict:
        return {"input_ids": self.ids[row].tolist()}


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("decoders")
    for kind in KINDS:
        tiny_decoder(kind, vocab_size=len(tokenizer)).save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
    return root


@pytest.fixture
def text(corpus) -> list[str]:
    return ["--eval_file", str(corpus / "validation.jsonl"), "--block_size", "32"]


def words(folder, out, *more) -> list[str]:
    return [str(word) for word in ("--baseline", folder, "--output_dir", out, "--device", "cpu", *more)]


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_by_every_method(kind, folders, corpus, text, tmp_path, capsys):
    learning = ("--calibration_file", corpus / "train.jsonl", "--calibration_tokens", 512, *text)
    methods = {
        "pca": ("--ranks", 8, *text),
        "joint": ("--method", "joint", "--ranks", 8, *learning),
        "tokenwise": ("--method", "tokenwise", "--ranks", 8, *learning),
        "coded": ("--bits_per_weight", 4, *learning),
    }
    if kind == "phi":  # whose head has a matrix of its own
        with pytest.raises(UserError, match="has a head of its own; method coded codes one matrix"):
            compress(words(folders / kind, tmp_path, *methods.pop("coded")))
    methods |= {
        f"{method}_refined": (*options, "--refine", 6) for method, options in methods.items() if method in _REFINED
    }
    increases = {}
    for method, options in methods.items():
        compress(words(folders / kind, tmp_path, *options, "--json", tmp_path / "rows.json"))
        baseline, row = json.loads((tmp_path / "rows.json").read_text())["rows"]
        increases[method] = row["loss_increase"]
        assert row["vocabulary_bytes"] < baseline["vocabulary_bytes"]  # codes may be more, and are bytes
        model = load_compressed(row["folder"])
        assert isinstance(model, FactorizedCausalLM)
        assert model.config.is_coded == ("coded" in method)
        evaluate(["--models", row["folder"], *text, "--json", str(tmp_path / "loss.json")])
        (found,) = json.loads((tmp_path / "loss.json").read_text())["rows"]
        assert found["loss"] == pytest.approx(row["loss"], abs=1e-5)
        capsys.readouterr()
        compress(words(folders / kind, tmp_path, *options))  # reused: nothing is computed again
        assert "Loading" not in capsys.readouterr().out
    for method in filter(increases.__contains__, _REFINED):
        assert increases[f"{method}_refined"] != increases[method]
    if "coded" in increases:
        assert abs(increases["coded"]) < 0.2


def test_calibration_finds_what_it_finds_of_a_gpt2():
    """Of the same model, in this package's layout and in transformers'."""
    stock = tiny_decoder("gpt2")
    counts = np.arange(99)
    ours, any_decoder = (calibrate(model, Blocks(99), counts) for model in (from_gpt2(stock), stock))
    assert np.array_equal(ours.output_side.tokens, any_decoder.output_side.tokens)
    for side in ("input_side", "output_side"):
        found, expected = getattr(any_decoder, side), getattr(ours, side)
        np.testing.assert_allclose(found.vectors, expected.vectors, atol=1e-5)
    np.testing.assert_allclose(any_decoder.head_use, ours.head_use, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "cohere", "granite", "gemma2", "opt"])
def test_calibration_counts_whatever_scales_and_caps_there_are(kind):
    """Against derivatives of the whole model's logits: by a row of the embedding, and by rows of the head."""
    model, blocks = tiny_decoder(kind), Blocks(99, rows=1)
    use = calibrate(model, blocks, np.ones(99, np.int64))
    drawn = torch.from_numpy(use.output_side.tokens).view(len(blocks.ids[0]), -1)
    model.config.tie_word_embeddings = False
    weight = model.get_output_embeddings().weight.detach()
    head = torch.nn.Linear(*reversed(weight.shape), bias=False)
    head.weight.data = weight.clone()
    model.set_output_embeddings(head)
    logits = model(blocks.ids).logits[0]
    probabilities = logits.detach().softmax(-1)

    loss = nn.functional.cross_entropy(logits, drawn[:, 0], reduction="sum")
    (by_rows,) = torch.autograd.grad(loss, model.get_input_embeddings().weight, retain_graph=True)
    expected = torch.zeros_like(by_rows).index_add(0, blocks.ids[0], torch.from_numpy(use.input_side.vectors))
    torch.testing.assert_close(expected, by_rows, atol=1e-4, rtol=1e-3)

    position, draw = 5, 2
    token, place = drawn[position, draw], position * drawn.shape[1] + draw
    (by_head,) = torch.autograd.grad(logits[position, token], head.weight)
    found = torch.from_numpy(use.output_side.vectors[position]).norm().square() * use.output_side.weights[place]
    variance = (1 - probabilities[position, token]) / drawn.shape[1]
    torch.testing.assert_close(found, by_head[token].norm().square() * variance, rtol=1e-3, atol=1e-6)


def test_a_baseline_says_whether_its_head_is_tied(folders):
    assert load_baseline(str(folders / "llama")).model.config.tie_word_embeddings
    assert not load_baseline(str(folders / "phi")).model.config.tie_word_embeddings


def test_what_cannot_be_factorized_is_named(tmp_path):
    config = AutoConfig.for_model("mamba", vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    with pytest.raises(UserError, match="mamba cannot be factorized: MambaForCausalLM is recurrent") as caught:
        load_baseline(str(tmp_path / "mamba"))
    assert "\n" not in str(caught.value)
