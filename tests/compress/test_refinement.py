"""Refinement of the vocabulary's factors: what it learns, and what it leaves alone."""

import copy

import numpy as np
import pytest
import torch
from conftest import NO_DROPOUT, VOCAB_SIZE, Terminal, tiny_model
from datasets import Dataset

from factorized_gpt2 import factorize, from_gpt2
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.compress import refinement as module
from factorized_gpt2.compress.refinement import refine
from factorized_gpt2.models.conversion import vocabulary_matrices
from factorized_gpt2.trainer.adapters import DROPOUTS

STEPS = 4
FACTORS = ("transformer.wte.weight", "transformer.scale_up.weight", "transformer.scale_up.bias", "scale_down.weight")


def blocks() -> Dataset:
    ids = np.random.default_rng(0).integers(2, VOCAB_SIZE, (90, 48), dtype=np.int32)
    return Dataset.from_dict({"input_ids": list(ids)})


def pair(dtype=torch.float32, **overrides):
    """Make a baseline and the model that its factors make of it."""
    baseline = tiny_model(n_embd_wte=None, **overrides).to(dtype)
    embedding, head = vocabulary_matrices(baseline)
    return from_gpt2(baseline, factorize(embedding, 6, head)), baseline


@torch.no_grad()
def divergence(model, baseline) -> float:
    """Mean KL(baseline || model) over the text, in nats a token, written out."""
    ids = torch.tensor(blocks()["input_ids"][:])[:, :-1]
    p, q = (copy.deepcopy(each).float().eval()(ids).logits.double().log_softmax(-1) for each in (baseline, model))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def state_of(model) -> dict:
    """Everything about a model that refinement must not touch, weights aside."""
    return {
        "trainable": [weight.requires_grad for weight in model.parameters()],
        "without gradient": [weight.grad is None for weight in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "dropouts": [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)],
        "configuration": model.config.to_dict(),
        "dtype": model.dtype,
    }


def assert_same_weights(weights: dict, expected: dict) -> None:
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize(
    ("dtype", "overrides"),
    [
        (torch.float32, {}),
        (torch.float32, {"tie_word_embeddings": False}),
        (torch.float32, dict.fromkeys(NO_DROPOUT, 0.1)),
        (torch.bfloat16, {}),
    ],
    ids=["tied", "untied", "dropout", "bfloat16"],
)
def test_factors_come_nearer_to_the_baseline_and_nothing_else_changes(dtype, overrides):
    model, baseline = pair(dtype, **overrides)
    baseline.train()  # so that putting it into evaluation mode would show
    model.transformer.wpe.weight.requires_grad_(False)
    weights, states = [weights_of(each) for each in (model, baseline)], [state_of(each) for each in (model, baseline)]
    refined = refine(model, baseline, blocks(), 12)

    assert divergence(refined, baseline) < 0.97 * divergence(model, baseline)
    for each, before, state in zip((model, baseline), weights, states, strict=True):
        assert_same_weights(weights_of(each), before)
        assert state_of(each) == state

    assert not refined.training
    assert refined.dtype == dtype
    assert refined.config.to_dict() == model.config.to_dict()
    assert [module.p for module in refined.modules() if isinstance(module, torch.nn.Dropout)] == states[0]["dropouts"]
    assert [weight.requires_grad for weight in refined.parameters()] == states[0]["trainable"]
    assert (refined.lm_head.weight is refined.transformer.wte.weight) == model.config.tie_word_embeddings
    for name, weight in refined.state_dict().items():
        assert torch.equal(weight, weights[0][name]) != (name in (*FACTORS, "lm_head.weight")), name
    assert refined.transformer.wte.weight is not model.transformer.wte.weight


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    model, baseline = pair()
    first, again, other = (weights_of(refine(model, baseline, blocks(), STEPS, seed)) for seed in (1, 1, 2))
    assert_same_weights(again, first)
    assert not torch.equal(other["scale_down.weight"], first["scale_down.weight"])


def test_half_precision_is_refined_in_float32():
    model, baseline = pair(torch.bfloat16)
    found = refine(model, baseline, blocks(), STEPS)
    expected = refine(copy.deepcopy(model).float(), copy.deepcopy(baseline).float(), blocks(), STEPS)
    assert_same_weights(weights_of(found), weights_of(expected.to(torch.bfloat16)))


def test_a_baseline_that_overflows_float16_is_refined():
    model, baseline = pair(torch.bfloat16)
    for each in (model, baseline):  # far above what float16 holds, and given back by the norm that follows
        each.transformer.wpe.weight.data *= 1e6
    refined = refine(model, baseline, blocks(), STEPS)
    assert all(weight.isfinite().all() for weight in refined.parameters())


def test_dropout_has_no_part_in_it():
    without, with_dropout = (
        weights_of(refine(*pair(**dict.fromkeys(DROPOUTS, probability)), blocks(), STEPS)) for probability in (0, 0.1)
    )
    assert_same_weights(with_dropout, without)


def test_a_short_text_is_used_again_for_every_step():
    model, baseline = pair()
    one_step, many = (refine(model, baseline, blocks().select([0, 1]), steps) for steps in (1, 6))
    moved = [(each.scale_down.weight - model.scale_down.weight).abs().mean() for each in (one_step, many)]
    assert moved[1] > 1.5 * moved[0] > 0


def test_a_text_of_one_block_is_refused():
    with pytest.raises(UserError, match="is one block; refinement needs one more, to be judged by"):
        refine(*pair(), blocks().select([0]), 1)


def test_the_text_is_used_from_its_beginning_to_its_end():
    # One step sees about 2048 of 90 * 48 tokens; were they the first, what the last blocks hold would not matter.
    model, baseline = pair()
    changed = Dataset.from_dict({"input_ids": [*blocks()["input_ids"][:-1], [2] * 48]})
    one, other = (weights_of(refine(model, baseline, text, 1)) for text in (blocks(), changed))
    assert not torch.equal(one["scale_down.weight"], other["scale_down.weight"])


def too_large(model):
    """Give the last norm a weight at which logits overflow float32."""
    model.transformer.ln_f.weight.data.fill_(1e38)
    return model


def test_a_model_that_cannot_be_compared_is_not_refined():
    model, baseline = pair()
    with pytest.raises(UserError, match=r"the divergence .* is nan before its first step\. Compress without it\."):
        refine(model, too_large(baseline), blocks(), STEPS)


def test_nan_on_the_way_is_an_error(monkeypatch):
    model, baseline = pair()
    monkeypatch.setattr(module, "LARGEST_LEARNING_RATE", 1e36)
    with pytest.raises(UserError, match="divergence from the original model is nan after 1 steps"):
        refine(model, baseline, blocks(), STEPS)


@pytest.mark.parametrize(("rate", "is_warned"), [(3e-3, False), (3.0, True)])
def test_refinement_that_leads_away_is_taken_back_and_warned_of(monkeypatch, caplog, rate, is_warned):
    monkeypatch.setattr(module, "LARGEST_LEARNING_RATE", rate)
    model, baseline = pair()
    refined = refine(model, baseline, blocks(), STEPS)
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert ["did not come nearer to the baseline" in message for message in messages] == [True] * is_warned
    assert torch.equal(refined.scale_down.weight, model.scale_down.weight) == is_warned


@pytest.mark.parametrize("progress", [False, True])
def test_nothing_goes_to_stdout(capsys, monkeypatch, progress):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    refine(*pair(), blocks(), 1, progress=progress)
    assert capsys.readouterr().out == ""
    assert ("Refining" in terminal.getvalue()) == progress
