"""The arithmetic of a coded vocabulary: embedding, head and loss compute what float64 does, a block at a time."""

from functools import partial

import pytest
import torch

from factorized_gpt2.network import blockwise_loss, code_products
from factorized_gpt2.network.coded_vocabulary import CodedEmbedding, CodedHead


@pytest.mark.parametrize("rows", [1, 7, 20])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2.5e-3)], ids=str
)
def test_numbers_are_those_of_float64(monkeypatch, dtype, tolerance, rows):
    """Errors are relative to the largest number; a dtype's own rounding is 6e-8, 4e-3 and 5e-4."""
    monkeypatch.setitem(code_products.BLOCK_CODES, "cpu", 64 * 10)  # several blocks, the last of them smaller
    embedding, head = CodedEmbedding(200, 64).to(dtype), CodedHead(200, 64, bias=True).to(dtype)
    embedding.start_at_random(0.02)
    head.codes, head.steps = embedding.codes, embedding.steps
    head.bias.data.normal_(std=0.1)
    head.steps.data.mul_(torch.rand(200).to(dtype) + 0.5)
    dense = (head.codes.double() * head.steps.detach().double()[:, None]).requires_grad_()
    hidden = torch.randn(rows, 64).to(dtype).requires_grad_()
    exact_hidden = hidden.detach().double().requires_grad_()
    upstream, ids = torch.randn(rows, 200).to(dtype), torch.randint(200, (rows,))
    logits, exact = head(hidden), exact_hidden @ dense.T + head.bias.detach().double()
    rows_looked_up = embedding(ids)
    with torch.no_grad():
        assert (head(hidden).double() - exact).abs().max() < tolerance * exact.abs().max()
    ((logits * upstream).sum() + rows_looked_up.sum()).backward()
    ((exact * upstream.double()).sum() + dense[ids].sum()).backward()
    exact_steps = (dense.grad * head.codes.double()).sum(1)
    for found, expected in (
        (logits, exact),
        (rows_looked_up, dense[ids]),
        (hidden.grad, exact_hidden.grad),
        (head.steps.grad, exact_steps),
        (head.bias.grad, upstream.double().sum(0)),
    ):
        assert found.dtype == dtype
        assert (found.double() - expected).abs().max() < tolerance * expected.abs().max()


def test_any_number_of_dimensions():
    head = CodedHead(30, 8)
    head.start_at_random(0.1)
    hidden = torch.randn(2, 3, 8)
    expected = hidden @ head.dense().T
    torch.testing.assert_close(head(hidden), expected)
    torch.testing.assert_close(head(hidden[0, 0]), expected[0, 0])
    assert head(hidden[:0]).shape == (0, 3, 30)


def test_no_more_than_a_block_is_there_in_floats(monkeypatch):
    monkeypatch.setitem(code_products.BLOCK_CODES, "cpu", 64 * 10)
    head = CodedHead(200, 64)
    largest, cast = [], torch.Tensor.to

    def spy(tensor, *args, **kwargs):
        if tensor.dtype == torch.int8:
            largest.append(tensor.numel())
        return cast(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", spy)
    hidden = torch.randn(5, 64, requires_grad=True)
    head(hidden).sum().backward()
    assert max(largest) == 640


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str
)
def test_a_summed_loss_is_that_of_float64(monkeypatch, dtype, tolerance):
    """Errors are relative to the largest number, as above."""
    monkeypatch.setitem(code_products.BLOCK_CODES, "cpu", 64 * 10)
    monkeypatch.setitem(blockwise_loss.BLOCK_LOGITS, "cpu", 3 * 200)
    head = CodedHead(200, 64, bias=True)
    head.start_at_random(0.2)
    head.bias.data.normal_()
    head.to(dtype)
    steps, bias = (weight.detach().double().requires_grad_() for weight in (head.steps, head.bias))
    hidden = torch.randn(20, 64).to(dtype).requires_grad_()
    exact_hidden, labels = hidden.detach().double().requires_grad_(), torch.randint(200, (20,))
    labels[3] = -100
    exact = exact_hidden @ (head.codes.double() * steps[:, None]).T + bias
    exact = torch.nn.functional.cross_entropy(exact, labels, reduction="sum")
    found = blockwise_loss.sum_cross_entropy(hidden, head, labels)
    (1.5 * exact).backward()
    (1.5 * found).backward()
    assert found.item() == pytest.approx(exact.item(), rel=tolerance)
    for mine, theirs in ((hidden, exact_hidden), (head.steps, steps), (head.bias, bias)):
        assert mine.grad.dtype == dtype
        assert (mine.grad.double() - theirs.grad).abs().max() < tolerance * theirs.grad.abs().max()
    with torch.no_grad():
        assert blockwise_loss.sum_cross_entropy(hidden, head, labels) == found
    row_loss = partial(blockwise_loss.cross_entropy_rows, labels=labels)
    gradients, hidden.grad = hidden.grad, None
    general = blockwise_loss.sum_row_loss(hidden, head, row_loss)
    (1.5 * general).backward()
    assert general == found
    assert torch.equal(hidden.grad, gradients)
    head.requires_grad_(False)
    hidden.grad = None
    (1.5 * blockwise_loss.sum_cross_entropy(hidden, head, labels)).backward()
    assert torch.equal(hidden.grad, gradients)
