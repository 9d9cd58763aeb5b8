"""The loss of causal language models of other architectures, against float64; what is no such model is refused."""

import copy
import re

import pytest
import torch
import transformers
from conftest import VOCAB_SIZE, random_ids, tiny_model
from datasets import Dataset

from factorized_gpt2 import to_gpt2
from factorized_gpt2.cli.evaluate import evaluate
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.models.foreign_models import LossOfLogits, positions_of
from factorized_gpt2.settings.text_arguments import EvaluationArguments
from factorized_gpt2.text.bits_per_byte import sum_document_loss
from factorized_gpt2.text.loss import sum_loss

WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
LENGTH = {"max_position_embeddings": 48}
MODELS = {
    "Bart": BART | LENGTH,
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 48},
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "Llama": WIDE | LENGTH,
    "GPTNeoX": WIDE | LENGTH,
    "OPT": WIDE | LENGTH | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "Roberta": WIDE | LENGTH | {"is_decoder": True},
}


def model_of(kind: str, vocab_size: int = VOCAB_SIZE, seed: int = 0, **overrides):
    """Make a tiny model of an architecture, far enough from its start that tokens differ."""
    tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    config = getattr(transformers, f"{kind}Config")(
        **(MODELS.get(kind, {}) | {"vocab_size": vocab_size} | tokens | overrides)
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape)
    return model


@pytest.fixture(scope="module")
def blocks() -> Dataset:
    lengths = [20] * 3 + [7]
    return Dataset.from_dict({"input_ids": [random_ids(1, n, seed=n + i)[0].tolist() for i, n in enumerate(lengths)]})


@torch.no_grad()
def true_nats(model, rows: list[list[int]]) -> float:
    """Sum over every token but the first of each row, alone in its batch, in float64."""
    exact, nats = copy.deepcopy(model).double(), 0.0
    for row in rows:
        ids = torch.tensor([row])
        log_probabilities = exact(input_ids=ids).logits[0, :-1].log_softmax(-1)
        nats -= log_probabilities.gather(-1, ids[0, 1:, None]).sum().item()
    return nats


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_is_the_sum_over_tokens(kind, blocks):
    model = model_of(kind)
    measurable = LossOfLogits(model)
    measurable.check(20, kind)
    assert not measurable.training
    for batch_size in (1, 3):
        measured = sum_loss(measurable, blocks, batch_size)
        assert measured.tokens == 3 * 19 + 6
        assert measured.nats == pytest.approx(true_nats(model, blocks["input_ids"]), rel=2e-6)
    documents = [row[1:] for row in blocks["input_ids"]]
    with_prefix = true_nats(model, [[0, *document] for document in documents])
    assert sum_document_loss(measurable, documents, 0, 20, 2).nats == pytest.approx(with_prefix, rel=2e-6)
    assert not model.training


def test_rows_are_taken_some_at_a_time_and_a_model_of_ours_agrees(monkeypatch, blocks):
    model = tiny_model()
    expected = sum_loss(model, blocks, 2)
    for rows in (1, 7, 512):
        monkeypatch.setattr("factorized_gpt2.models.foreign_models._ROWS_AT_ONCE", rows)
        for other in (model, to_gpt2(model)):
            assert sum_loss(LossOfLogits(other), blocks, 2).nats == pytest.approx(expected.nats, rel=1e-6)


def test_half_precision_is_summed_in_float32(blocks):
    model = model_of("Llama").to(torch.bfloat16)
    logits = [model(torch.tensor([row])).logits.double() for row in blocks["input_ids"]]
    nats = sum(
        torch.nn.functional.cross_entropy(each[0, :-1], torch.tensor(row[1:]), reduction="sum").item()
        for each, row in zip(logits, blocks["input_ids"], strict=True)
    )
    assert sum_loss(LossOfLogits(model), blocks, 1).nats == pytest.approx(nats, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "settings", "positions"),
    [
        ("GPT2", {"n_positions": 24}, 24),
        ("Mpt", {"max_seq_len": 24}, 24),
        ("Llama", LENGTH, 48),
        ("Bloom", {}, None),
        ("Bloom", {"seq_length": 24}, 24),
        ("Mamba", {}, None),
        ("Rwkv", {"context_length": 24}, 24),
        ("XLNet", {}, None),  # which gives its length as -1
    ],
)
def test_positions(kind, settings, positions):
    assert positions_of(getattr(transformers, f"{kind}Config")(**settings)) == positions


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra"])
def test_a_model_that_looks_ahead_is_refused(kind):
    model = model_of(kind, **WIDE, is_decoder=False)
    with pytest.raises(UserError, match=f"^{kind} is not a causal language model: its predictions depend on later"):
        LossOfLogits(model).check(12, kind)


def test_blocks_longer_than_a_model_reads_are_refused():
    # Of RoBERTa's positions two are for padding.
    with pytest.raises(UserError, match=r"^me/it cannot be evaluated in blocks of 48 tokens: index"):
        LossOfLogits(model_of("Roberta")).check(48, "me/it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Make folders of models with the corpus's tokenizer."""
    root = tmp_path_factory.mktemp("foreign")
    special = {"pad_token_id": None, "decoder_start_token_id": 0}
    both = transformers.BartForConditionalGeneration(
        transformers.BartConfig(**BART | LENGTH | special, vocab_size=len(tokenizer), encoder_layers=1)
    )
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    )
    models = {kind: model_of(kind, len(tokenizer)) for kind in ("Bart", "Bloom", "Mpt", "Mamba")}
    models |= {"Bert": model_of("Bert", len(tokenizer), **WIDE), "T5": t5, "EncoderDecoder": both}
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def words(folder, corpus, *names, rest=()) -> list[str]:
    models = [str(folder / name) for name in names]
    return ["--models", *models, "--eval_file", str(corpus / "validation.jsonl"), "--device", "cpu", *map(str, rest)]


def test_the_command_measures_them_all(folder, corpus, capsys):
    evaluate(words(folder, corpus, "Bart", "Bloom", "Mpt", "Mamba", rest=("--block_size", 24, "--bits_per_byte")))
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.rpartition("/")[2] for line in lines] == ["Bart", "Bloom", "Mpt", "Mamba"]
    for line in lines:
        loss, perplexity, bits, tokens = (float(word.replace(",", "")) for word in line.split()[:4])
        assert 4 < loss < 12
        assert perplexity == pytest.approx(2.718281828**loss, rel=1e-3)
        assert bits > 0
        assert tokens > 100


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("Bloom", r"{} does not say how many tokens it reads at once: set block_size\."),
        ("Mamba", r"{} does not say how many tokens it reads at once: set block_size\."),
        ("Bert", r"{} is not a causal language model: its predictions depend on later tokens\."),
        ("T5", r"{} is a 't5' model, which is not a causal language model\."),
        ("EncoderDecoder", r"{} is a 'bart' model, which is not a causal language model\."),
    ],
)
def test_the_command_refuses_in_a_line(folder, corpus, name, complaint):
    with pytest.raises(UserError, match=f"^{complaint.format(re.escape(str(folder / name)))}$"):
        evaluate(words(folder, corpus, name))


@pytest.mark.parametrize(("positions", "size"), [(48, 48), (4096, 4096), (131072, 1024)])
def test_a_block_of_very_many_positions_is_smaller_and_said_to_be(positions, size, caplog):
    with caplog.at_level("INFO"):
        assert EvaluationArguments().block_size_for(positions, "some_model") == size
    said = ["some_model has 131072 positions: it reads blocks of 1024 tokens; set block_size to change that."]
    assert caplog.messages == (said if size == 1024 else [])
    assert EvaluationArguments(block_size=131072).block_size_for(131072) == 131072
