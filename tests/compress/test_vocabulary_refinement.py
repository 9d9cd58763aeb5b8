from dataclasses import replace

import numpy as np
import pytest
import torch
from test_pretrained_benchmark import tiny_llama

from factorized_gpt2.common.errors import UserError
from factorized_gpt2.compress.quantizer import encode_table
from factorized_gpt2.compress.vocabulary_refinement import RefinableTable, Teacher, refine_vocabulary
from factorized_gpt2.network.coded_table import CodedTable

VOCAB, WIDTH = 300, 64


@pytest.fixture(scope="module")
def network():
    return tiny_llama(initializer_range=0.3).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def trunk(network):
    return lambda embedded: network.model(inputs_embeds=embedded, use_cache=False).last_hidden_state


@pytest.fixture(scope="module")
def weight(network):
    return network.lm_head.weight.detach()


@pytest.fixture(scope="module")
def table(weight):
    return encode_table(weight.numpy(), np.eye(WIDTH), np.full(VOCAB, 1 / VOCAB), 3.0)


@pytest.fixture(scope="module")
def teacher(weight):
    return Teacher(weight, torch.randint(VOCAB, (24, 32), generator=torch.Generator().manual_seed(0)))


def test_it_computes_what_the_table_stands_for(table):
    refinable, ids = RefinableTable(table), torch.arange(VOCAB)[None]
    np.testing.assert_allclose(refinable.embed(ids)[0].detach(), table.dense(), rtol=1e-4, atol=1e-5)
    states = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    np.testing.assert_allclose(
        refinable.score(states).detach(), states.numpy() @ table.dense_head().T + table.bias, rtol=1e-3, atol=1e-4
    )
    assert refinable.table().to_bytes() == table.to_bytes()


def test_divergence_and_its_gradient_are_those_of_autograd(network, trunk, weight, table, teacher):
    refinable, blocks = RefinableTable(table), teacher[slice(0, 3)]
    nats = blocks.divergence(refinable, trunk, backward=True)
    gradients = [parameter.grad.clone() for parameter in refinable.parameters()]
    with torch.no_grad():
        expected = network(input_ids=blocks.ids).logits.log_softmax(-1)
    found = refinable.score(trunk(refinable.embed(blocks.ids)).flatten(0, 1)).log_softmax(-1).view_as(expected)
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    assert nats == pytest.approx(divergence.item(), rel=1e-4)
    for gradient, exact in zip(gradients, torch.autograd.grad(divergence, refinable.parameters()), strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-2, atol=1e-6)


def test_refinement_comes_nearer_and_what_is_stored_is_what_was_measured(trunk, table, teacher):
    refinable, held_out = RefinableTable(table), teacher[slice(20, 24)]
    before, after = refine_vocabulary(refinable, trunk, teacher[slice(0, 20)], held_out, steps=20)
    assert after < 0.97 * before
    stored = CodedTable.from_bytes(refinable.table().to_bytes())
    assert np.array_equal(stored.codes, table.codes)
    assert held_out.divergence(RefinableTable(stored), trunk) == pytest.approx(after, rel=1e-3)
    assert np.abs(stored.bias).max() > 0
    assert stored.nbytes < table.nbytes + 3 * VOCAB


def test_equal_seeds_give_equal_bytes(trunk, table, teacher):
    results = []
    for _ in range(2):
        refinable = RefinableTable(table)
        refine_vocabulary(refinable, trunk, teacher[slice(0, 8)], teacher[slice(20, 24)], steps=3, seed=1)
        results.append(refinable.table().to_bytes())
    assert results[0] == results[1] != table.to_bytes()


def test_a_result_that_is_worse_is_not_kept(trunk, table, teacher, monkeypatch):
    refinable = RefinableTable(table)
    monkeypatch.setattr(refinable, "parameter_groups", lambda _: [{"params": [refinable.bias], "lr": 100.0}])
    before, after = refine_vocabulary(refinable, trunk, teacher[slice(0, 4)], teacher[slice(20, 24)], steps=2)
    assert before == after
    assert refinable.table().to_bytes() == table.to_bytes()


def test_no_number_is_one_line(trunk, table, teacher):
    broken = replace(table, mean=np.full_like(table.mean, np.nan))
    with pytest.raises(UserError, match="divergence from the original model is nan"):
        refine_vocabulary(RefinableTable(broken), trunk, teacher, teacher[slice(0, 1)], steps=1)
