"""Products with int8 codes: as exact as floats are, by integers or by blocks, on any processor."""

import pytest
import torch

from factorized_gpt2.network import code_products
from factorized_gpt2.network.code_products import TimesCodes, integer_product

DTYPES = [(torch.float32, 2e-7), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)]  # of the largest number


def problem(rows: int, columns: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * columns)
    codes = torch.randint(-128, 128, (300, columns), generator=generator, dtype=torch.int8)
    return torch.randn(rows, columns, generator=generator).to(dtype), codes


@pytest.fixture
def by_blocks(monkeypatch):
    monkeypatch.setattr(code_products, "multiplies_integers_exactly", lambda: False)


@pytest.mark.parametrize("columns", [2, 31, 64, 587])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
def test_integers_multiply_as_float64_does(dtype, tolerance, columns):
    inputs, codes = problem(3, columns, dtype)
    inputs[1] *= 1e-3  # every row has a unit of its own
    exact = inputs.double() @ codes.double().T
    product = integer_product(inputs, codes)
    assert product.dtype == dtype
    assert ((product.double() - exact).abs().amax(1) <= tolerance * exact.abs().amax(1)).all()


@pytest.mark.parametrize("extreme", [1.0, -1.0])
def test_the_largest_sums_do_not_overflow(extreme):
    inputs, codes = torch.full((1, 4096), extreme), torch.full((20, 4096), -128, dtype=torch.int8)
    torch.testing.assert_close(integer_product(inputs, codes), torch.full((1, 20), -128 * 4096 * extreme))


def test_digits_carry():
    inputs = torch.cat([torch.arange(-300, 300) / 2**15, torch.ones(1)])[None]  # around borders of the lower digits
    product = integer_product(inputs, torch.eye(601, dtype=torch.int8))
    torch.testing.assert_close(product, inputs, rtol=0, atol=6.1e-8)


def test_one_column_is_left_to_floats():
    inputs, codes = problem(2, 1)
    torch.testing.assert_close(TimesCodes.apply(inputs, codes, False), inputs @ codes.float().T)


def test_rows_of_zeros_and_of_what_is_not_finite():
    inputs, codes = problem(4, 16)
    inputs[0], inputs[1, 3], inputs[2, 5] = 0, float("nan"), float("inf")
    product = integer_product(inputs, codes)
    assert (product[0] == 0).all()
    assert product[1:3].isnan().all()
    assert product[3].isfinite().all()


def test_threads_change_nothing():
    inputs, codes = problem(2, 587)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = integer_product(inputs, codes)
        torch.set_num_threads(2)
        assert torch.equal(integer_product(inputs, codes), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rows", [1, 5, 16, 17])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
def test_blocks_give_the_same(monkeypatch, dtype, tolerance, rows):
    inputs, codes = problem(rows, 64, dtype)
    by_integers = TimesCodes.apply(inputs, codes, False)
    monkeypatch.setitem(code_products.BLOCK_CODES, "cpu", 64 * 70)  # several, the last of them smaller
    monkeypatch.setattr(code_products, "multiplies_integers_exactly", lambda: False)
    product = TimesCodes.apply(inputs, codes, False)
    assert product.dtype == dtype
    assert (product - by_integers).abs().max() <= 2 * tolerance * product.abs().max()


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, AttributeError])
def test_a_torch_that_cannot_is_not_asked_again(monkeypatch, error):
    def refuse(*_):
        raise error("no such kernel")

    code_products.multiplies_integers_exactly.cache_clear()
    monkeypatch.setattr(code_products.torch, "_int_mm", refuse)
    try:
        assert not code_products.multiplies_integers_exactly()
        inputs, codes = problem(2, 8)
        torch.testing.assert_close(TimesCodes.apply(inputs, codes, False), inputs @ codes.float().T)
    finally:
        code_products.multiplies_integers_exactly.cache_clear()


def test_a_processor_that_adds_up_in_int16_is_found_out(monkeypatch):
    def saturating(left, right):
        pairs = (left.long()[:, None] * right.long().T[None]).unflatten(-1, (-1, 2)).sum(-1)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(-1).int()

    code_products.multiplies_integers_exactly.cache_clear()
    monkeypatch.setattr(code_products.torch, "_int_mm", saturating)
    try:
        assert not code_products.multiplies_integers_exactly()
    finally:
        code_products.multiplies_integers_exactly.cache_clear()


def test_gradients_are_those_of_float64(by_blocks):
    inputs, codes = problem(3, 16, torch.float64)
    assert torch.autograd.gradcheck(lambda x: TimesCodes.apply(x, codes, False), inputs.requires_grad_())
