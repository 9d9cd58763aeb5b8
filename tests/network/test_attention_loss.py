"""The loss of a frozen head by attention against plain formulas in float64."""

import pytest
import torch
from conftest import random_ids, tiny_model
from torch.nn.functional import cross_entropy

from factorized_gpt2.network import attention_loss, blockwise_loss
from factorized_gpt2.network.attention_loss import attention_runs, parts_for, sum_by_attention
from factorized_gpt2.network.blockwise_loss import sum_cross_entropy, usable_backends

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of the gradient, relative


def problem(rows=123, vocabulary=99, width=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = (3 * torch.randn(vocabulary, width, generator=generator) / width**0.5).to(dtype)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[::5] = -100
    return hidden, weight, labels


def exact(hidden, weight, labels):
    hidden = hidden.double().requires_grad_()
    loss = cross_entropy(hidden @ weight.double().T, labels, reduction="sum")
    return loss.detach(), torch.autograd.grad(loss, hidden)[0]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("width", [5, 64, 768])
@pytest.mark.parametrize("parts", [1, 2, 7])
def test_loss_and_gradient(monkeypatch, dtype, width, parts):
    monkeypatch.setattr(attention_loss, "_number_of_parts", lambda *_: parts)
    inputs = problem(width=width, dtype=dtype)
    loss, gradient = sum_by_attention(*inputs)
    expected, expected_gradient = exact(*inputs)
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4 if dtype != torch.float32 else 1e-6)
    assert (gradient - expected_gradient).norm() < TOLERANCES[dtype] * expected_gradient.norm()
    assert not gradient[::5].any()


def test_no_label_counts():
    hidden, weight, labels = problem()
    loss, gradient = sum_by_attention(hidden, weight, labels.fill_(-100))
    assert loss == 0
    assert not gradient.any()


def test_a_kernel_of_ones_own_is_called_with_views_of_the_head():
    hidden, weight, labels = problem()
    shapes = []

    def kernel(queries, keys):
        shapes.append((tuple(queries.shape), tuple(keys.shape), keys.data_ptr()))
        return attention_loss._on_cpu(queries, keys)

    assert torch.equal(
        sum_by_attention(hidden, weight, labels, kernel=kernel)[0], sum_by_attention(hidden, weight, labels)[0]
    )
    assert shapes == [((1, 1, 123, 5), (1, 1, 99, 5), weight.data_ptr())]


@pytest.mark.parametrize(("tiles", "slots", "parts"), [(128, 264, 2), (256, 264, 1), (64, 264, 4), (1, 264, 64)])
def test_the_parts_that_keep_a_device_busiest(tiles, slots, parts):
    assert parts_for(tiles, slots) == parts


def test_where_attention_runs():
    assert attention_runs("cpu", torch.float32, 768)
    assert attention_runs("cuda", torch.bfloat16, 256)
    assert not attention_runs("cuda", torch.float32, 64)
    assert not attention_runs("cuda", torch.float16, 257)
    assert not attention_runs("mps", torch.float16, 64)


def test_the_choice_of_a_backend():
    hidden, weight, _ = problem()
    hidden.requires_grad_()
    trained = weight.clone().requires_grad_()
    assert usable_backends(hidden, weight) == ["blockwise", "attention"]
    assert usable_backends(hidden, trained) == usable_backends(hidden, torch.nn.Linear(5, 99)) == ["blockwise"]
    assert blockwise_loss._choose("auto", hidden, weight) == "attention"
    assert blockwise_loss._choose("auto", hidden, trained) == "blockwise"
    assert blockwise_loss._choose("auto", hidden.detach(), weight) == "blockwise"
    assert blockwise_loss._choose("auto", hidden.bfloat16(), weight.bfloat16()) == "blockwise"
    with pytest.raises(ValueError, match="attention needs a frozen plain head"):
        blockwise_loss._choose("attention", hidden, trained)


@pytest.mark.parametrize("backend", ["auto", "attention"])
def test_a_model_with_a_frozen_head(backend):
    ids = random_ids(2, 12)
    gradients = {}
    for name in ("blockwise", backend):
        model = tiny_model().train()
        model.lm_head.requires_grad_(False)
        model.loss_backend = name
        loss = model(ids, labels=ids).loss
        loss.backward()
        gradients[name] = [loss.detach(), *(weight.grad for weight in model.parameters() if weight.requires_grad)]
    for actual, expected in zip(gradients[backend], gradients["blockwise"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_the_operator_under_compilation():
    hidden, weight, labels = problem()
    hidden.requires_grad_()
    torch.library.opcheck(blockwise_loss._sum_cross_entropy, (hidden, weight, labels, -100, True, False, True))
    torch.library.opcheck(blockwise_loss._sum_cross_entropy, (hidden, weight, labels, -100, False, False, True))
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(sum_cross_entropy(hidden, weight, labels, backend="attention"), hidden, create_graph=True)
