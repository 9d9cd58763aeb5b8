"""The benchmark on foreign models, on a tiny random Llama."""

import json

import numpy as np
import peers
import pretrained
import pytest
import torch
from conftest import DOCUMENTS
from foreign_models import TiedModel, token_losses
from transformers import LlamaConfig, LlamaForCausalLM

from factorized_gpt2.common.errors import UserError
from factorized_gpt2.text.demo_corpus import train_tokenizer

VOCAB, WIDTH = 300, 64


def tiny_llama(**config) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=True, **sizes | config))


@pytest.fixture(scope="module")
def model():
    return TiedModel(tiny_llama())


@pytest.fixture
def blocks():
    return torch.randint(VOCAB, (3, 16), generator=torch.Generator().manual_seed(1))


def test_losses_are_the_models_own(model, blocks):
    losses = token_losses(model.hidden_states(blocks), model.original, blocks)
    expected = model.model(input_ids=blocks, labels=blocks).loss
    assert losses.mean() == pytest.approx(expected.item(), rel=1e-5)


def test_a_table_replaces_both_sides(model, blocks):
    table = np.random.default_rng(0).normal(size=(VOCAB, WIDTH))
    model.use_table(table)
    head = model.model.get_output_embeddings().weight
    assert head is model.model.get_input_embeddings().weight
    np.testing.assert_allclose(head.detach().numpy(), table.astype(np.float32))
    model.use_table(model.table)
    assert torch.equal(head, model.original)


def test_calibration_is_what_autograd_says(model, blocks):
    calibration = model.calibrate(blocks, seed=3)
    hidden = model.hidden_states(blocks).flatten(0, 1)
    np.testing.assert_allclose(calibration.hidden, hidden, atol=1e-5)
    probabilities = (hidden @ model.original.T).softmax(-1)
    np.testing.assert_allclose(calibration.head_use, (probabilities * (1 - probabilities)).sum(0), rtol=1e-4)
    embedded = model.model.get_input_embeddings()(blocks[:1]).detach().requires_grad_(True)
    labels = torch.from_numpy(calibration.draws[:16, 0])
    logits = model.model(inputs_embeds=embedded).logits[0]
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    np.testing.assert_allclose(calibration.gradients[:16], embedded.grad[0], atol=1e-5)


def test_a_head_of_its_own_is_refused():
    with pytest.raises(UserError, match="head of its own"):
        TiedModel(LlamaForCausalLM(LlamaConfig(**tiny_llama().config.to_dict() | {"tie_word_embeddings": False})))


@pytest.mark.parametrize(("bits", "group", "size"), [(8, 0, 65), (4, 64, 36), (3, 32, 32), (2, 32, 24)])
def test_round_to_nearest_counts_its_scales_and_errs_by_half_a_step(bits, group, size):
    weight = np.random.default_rng(0).uniform(-1, 1, size=(50, WIDTH)).astype(np.float32)
    small = peers.round_to_nearest(weight, bits, group).small()
    expected = 50 * (WIDTH * bits / 8 + 4 * WIDTH / (group or WIDTH))
    assert small.nbytes == expected
    assert np.sqrt(np.square(small.embedding - weight).mean()) == pytest.approx(2 / 2**bits / 12**0.5, rel=0.35)


def test_gptq_errs_less_than_rounding_where_the_hessian_looks():
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(200, WIDTH)).astype(np.float32)
    inputs = generator.normal(size=(500, 8)) @ generator.normal(size=(8, WIDTH)) + 0.1 * generator.normal(
        size=(500, WIDTH)
    )
    found = peers.gptq(weight, inputs.T @ inputs / 500, 3, WIDTH).small()
    rounded = peers.round_to_nearest(weight, 3, WIDTH).small()
    assert found.nbytes == rounded.nbytes
    errors = [np.square(inputs @ (small.embedding - weight).T).sum() for small in (found, rounded)]
    assert errors[0] < 0.3 * errors[1]


def test_the_command_measures_every_way(tmp_path, capsys):
    train_tokenizer(DOCUMENTS, VOCAB).save_pretrained(tmp_path / "model")
    tiny_llama(max_position_embeddings=64).save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(DOCUMENTS) * 3)
    words = [str(tmp_path / "model"), "--calibration_file", str(text), "--text_file", str(text), str(text)]
    words = ["--model", *words, "--tokens", "128", "--calibration_tokens", "128", "--block_size", "32"]
    words += ["--ranks", "8", "--bits", "8", "3", "--budgets", "6", "--output", str(tmp_path / "out")]
    words += ["--refine_steps", "2", "--work_dir", str(tmp_path / "work")]
    pretrained.main([*words, "--only", "coded"])
    measured = json.loads((tmp_path / "out" / "pretrained.json").read_text())["ways"]
    pretrained.main(words)
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "pretrained.json").read_text())
    names = [way["name"] for way in results["ways"]]
    expected = ["coded, 6 bits", "PCA, k = 8", "joint, k = 8", "tokenwise, k = 8", "int8, rows", "int3, groups of 32"]
    assert {*expected, "GPTQ int3, groups of 64", "GPTQ int3, groups of 64, refined"} <= set(names)
    assert {f"{name}, refined" for name in expected} <= set(names)
    assert results["ways"][: len(measured)] == measured  # not measured again
    with pytest.raises(UserError, match="something else"):
        pretrained.main([*words[:-2], "--tokens", "64"])
    assert all(name in printed for name in names)
    by_name = {way["name"]: way for way in results["ways"]}
    assert by_name["coded, 6 bits"]["bits_per_weight"] <= 6
    assert abs(by_name["int8, rows"]["increase"][0]) < 0.02
    assert (tmp_path / "out" / "pretrained.png").stat().st_size > 1000
