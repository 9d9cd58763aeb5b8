"""Refinement of decoders other than GPT-2: of what they do beside their two matrices nothing is forgotten."""

import numpy as np
import pytest
import torch
from decoders import ARCHITECTURES, VOCAB_SIZE, tiny_decoder
from torch import nn

from factorized_gpt2 import factorize, from_causal_lm, from_gpt2
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.compress.original import Original
from factorized_gpt2.compress.quantizer import encode_table
from factorized_gpt2.compress.refinement import RefinableFactors, refine, refine_against
from factorized_gpt2.compress.vocabulary_refinement import RefinableTable, Teacher
from factorized_gpt2.models.decoder_conversion import vocabulary_matrices_of


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(2, VOCAB_SIZE, (33, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def blocks(ids) -> list[dict]:
    return [{"input_ids": row} for row in ids]


@torch.no_grad()
def divergence(model, baseline, ids) -> float:
    p, q = (each(input_ids=ids).logits.double().log_softmax(-1) for each in (baseline, model))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_parts_of_a_decoder_are_the_decoder(kind, ids):
    model = tiny_decoder(kind)
    parts = [Original(each) for each in ([model, from_gpt2(model)] if kind == "gpt2" else [model])]
    for part in parts:
        assert (part.embedding is part.head) == model.config.tie_word_embeddings
        states = part.trunk(nn.functional.embedding(ids[:2], part.embedding)).flatten(0, 1)
        found = part.finish(states @ part.head.T)
        torch.testing.assert_close(found, model(ids[:2]).logits.flatten(0, 1), atol=1e-5, rtol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert isinstance(model.get_output_embeddings(), nn.Linear)


def test_gradients_lead_through_scales_and_caps(ids):
    for kind in ("gemma2", "gemma3_text", "granite"):
        baseline = tiny_decoder(kind)
        embedding, _ = vocabulary_matrices_of(baseline)
        model = from_causal_lm(baseline, factorize(embedding, 6))
        original, factors = Original(baseline), RefinableFactors(model)
        teacher = Teacher(original.head, ids[:3], finish=original.finish)
        nats = teacher.divergence(factors, original.trunk, backward=True)
        p, q = (each(input_ids=ids[:3]).logits.log_softmax(-1) for each in (baseline, model))
        expected = (p.exp() * (p - q)).sum(-1).mean()
        expected.backward()
        assert nats == pytest.approx(expected.item(), rel=1e-4)
        for name, parameter in factors.named_parameters():
            torch.testing.assert_close(parameter.grad, model.get_parameter(name).grad, atol=1e-6, rtol=1e-3)


def test_logits_of_more_than_the_head_are_refused():
    model = tiny_decoder("llama")
    plain = model.forward

    def with_more(*args, **kwargs):
        outputs = plain(*args, **kwargs)
        outputs.logits = outputs.logits + kwargs["inputs_embeds"].mean()
        return outputs

    model.forward = with_more
    with pytest.raises(UserError, match="LlamaForCausalLM makes logits of more than its head computes"):
        Original(model)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "granite", "gpt_neox", "phi", "opt"])
def test_factors_come_nearer(kind, ids, blocks):
    baseline = tiny_decoder(kind)
    embedding, head = vocabulary_matrices_of(baseline)
    model = from_causal_lm(baseline, factorize(embedding, 6, head))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    refined = refine(model, baseline, blocks, 12)
    assert divergence(refined, baseline, ids) < 0.97 * divergence(model, baseline, ids)
    trained = ("wte.weight", "scale_up.weight", "scale_up.bias", "scale_down.weight", "lm_head.weight")
    for name, weight in refined.state_dict().items():
        assert torch.equal(weight, before[name]) != (name in trained), name
    assert (refined.lm_head.weight is refined.wte.weight) == baseline.config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gemma2", "granite", "opt"])
def test_a_coded_table_comes_nearer_and_its_bias_is_the_models(kind, ids, blocks):
    baseline = tiny_decoder(kind)
    weight, _ = vocabulary_matrices_of(baseline)
    table = encode_table(weight, np.eye(weight.shape[1]), np.full(len(weight), 1 / len(weight)), 3.0)
    vocabulary = RefinableTable(table)
    refine_against(baseline, vocabulary, blocks, 12)
    before, after = (from_causal_lm(baseline, each) for each in (table, vocabulary.table()))
    assert after.lm_head.bias.abs().max() > 0
    assert divergence(after, baseline, ids) < 0.97 * divergence(before, baseline, ids)


def test_a_tables_bias_is_added_to_the_models_own(ids):
    baseline = tiny_decoder("phi", tie_word_embeddings=True)
    weight, _ = vocabulary_matrices_of(baseline)
    table = encode_table(weight, np.eye(weight.shape[1]), np.full(len(weight), 1 / len(weight)), 6.0)
    biased = RefinableTable(table)
    nn.init.normal_(biased.bias)
    plain, both = (from_causal_lm(baseline, each) for each in (table, biased.table()))
    expected = baseline.lm_head.bias + torch.from_numpy(biased.table().bias)
    torch.testing.assert_close(both.lm_head.bias, expected)
    torch.testing.assert_close(plain.lm_head.bias, baseline.lm_head.bias)
