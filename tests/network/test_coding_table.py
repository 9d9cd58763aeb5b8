import zlib
from dataclasses import replace

import numpy as np
import pytest

from factorized_gpt2.compress.quantizer import coding_weights, encode_table
from factorized_gpt2.network.coded_table import CodedTable
from factorized_gpt2.network.prediction import RowRelations, measure_spreads

VOCAB, WIDTH = 6000, 32


@pytest.fixture(scope="module")
def problem():
    """Rows of a falling spectrum, the later half much like the earlier; a metric; weights as Zipf has them."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(VOCAB, WIDTH)) * 0.9 ** np.arange(WIDTH)
    rows[VOCAB // 2 :] = 0.99 * rows[: VOCAB // 2] + 0.14 * rows[VOCAB // 2 :]
    rotation = np.linalg.qr(generator.normal(size=(WIDTH, WIDTH)))[0]
    factor = generator.normal(size=(WIDTH, WIDTH))
    metric = factor @ factor.T / WIDTH + 0.1 * np.eye(WIDTH)
    row_weights = 1 / (np.arange(VOCAB) + 3.0)
    return (rows @ rotation + 0.5).astype(np.float32), metric, row_weights / row_weights.sum()


def _cost(problem, table: CodedTable) -> float:
    weight, metric, row_weights = problem
    errors = table.dense() - weight
    return float(row_weights @ np.einsum("vi,ij,vj->v", errors, metric, errors))


@pytest.mark.parametrize("bits", [1.5, 2.5, 6.0])
def test_bytes_are_the_budget_and_come_back(problem, bits):
    table = encode_table(*problem, bits)
    data = table.to_bytes()
    assert 0.97 * bits <= table.bits_per_weight <= bits
    assert len(data) == table.nbytes
    read = CodedTable.from_bytes(data)
    assert np.array_equal(read.codes, table.codes)
    assert np.array_equal(read.dense(), table.dense())
    assert np.array_equal(read.steps, table.steps)
    assert read.to_bytes() == data


def test_errors_are_those_of_a_step(problem):
    table = encode_table(*problem, 5.0)
    weight, metric, row_weights = problem
    errors = table.dense() - weight
    cost = np.einsum("vi,ij,vj->v", errors, metric, errors)
    assert row_weights @ (cost / table.steps**2) == pytest.approx(WIDTH / 12, rel=0.1)


def test_two_bits_more_cost_less_than_an_eighth(problem):
    low, high = (_cost(problem, encode_table(*problem, bits)) for bits in (4.0, 6.0))
    assert low / 17 < high < low / 8  # a sixteenth, but for the tables of a coder, which a small matrix feels


@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_units_of_the_metric_do_not_matter(problem, unit):
    weight, metric, row_weights = problem
    table = encode_table(weight, unit * metric, row_weights, 2.0)
    assert _cost(problem, table) == pytest.approx(_cost(problem, encode_table(*problem, 2.0)), rel=0.02)


def test_frequent_rows_have_finer_steps(problem):
    steps = encode_table(*problem, 3.0).steps
    expected = problem[2] ** -0.25
    np.testing.assert_allclose(steps / steps[0], expected / expected[0], rtol=0.15)


def test_components_fall_away_at_few_bits(problem):
    few, many = (encode_table(*problem, bits) for bits in (1.0, 5.0))
    assert few.codes.shape[1] < many.codes.shape[1]
    assert few.scale_up.shape == (few.codes.shape[1], WIDTH)
    assert np.array_equal(few.scale_down, few.scale_up.T)


def test_like_rows_make_the_file_smaller(problem):
    weight, metric, row_weights = problem
    table = encode_table(weight, metric, row_weights, 4.0)
    relations = table.relations
    alone = np.zeros_like(relations.parent)
    row_spread, column_spread = measure_spreads(table.codes, relations.step_index, alone, alone)
    unpredicted = RowRelations(relations.step_index, alone, alone, row_spread, column_spread)
    assert (relations.share > 0).mean() > 0.4
    assert table.nbytes < 0.98 * replace(table, relations=unpredicted).nbytes


def test_codes_beyond_eight_bits_take_two_columns(problem):
    weight, metric, row_weights = problem
    outlier = weight.copy()
    outlier[:, 0] += 300 * np.random.default_rng(0).normal(size=VOCAB).astype(np.float32)
    table = encode_table(outlier, metric, row_weights, 6.0)
    assert table.codes.dtype == np.int8
    assert table.codes.shape[1] > WIDTH
    assert np.abs(table.dense() - outlier).max() < 1
    assert np.array_equal(CodedTable.from_bytes(table.to_bytes()).codes, table.codes)


def test_any_damage_is_one_error(problem):
    data = encode_table(*problem, 2.0).to_bytes()
    damaged = [data[:end] for end in (0, 3, 19, len(data) - 1)] + [data + b"\0"]
    for place in np.random.default_rng(0).integers(len(data), size=20):
        damaged.append(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
    for data in damaged:
        with pytest.raises(ValueError, match="damaged"):
            CodedTable.from_bytes(data)


def test_a_shape_that_its_numbers_do_not_fill_is_refused(problem):
    data = bytearray(encode_table(*problem, 2.0).to_bytes())
    data[4:8] = (2**31).to_bytes(4, "little")
    data[:4] = zlib.crc32(data[4:]).to_bytes(4, "little")
    with pytest.raises(ValueError, match="damaged"):
        CodedTable.from_bytes(bytes(data))


def test_too_small_a_budget_is_refused(problem):
    with pytest.raises(ValueError, match="do not hold"):
        encode_table(*problem, 0.01)


def test_equal_inputs_give_equal_bytes(problem):
    assert encode_table(*problem, 2.0).to_bytes() == encode_table(*problem, 2.0).to_bytes()


def test_rows_weigh_by_both_uses():
    counts, heard = np.array([100, 100, 1, 0]), np.array([10.0, 1.0, 10.0, 0.0])
    weights = coding_weights(counts, heard)
    assert weights.sum() == pytest.approx(1)
    assert weights[0] / weights[1] == pytest.approx(10**0.375)
    assert weights[0] / weights[2] == pytest.approx((100.5 / 1.5) ** 0.375)
    assert 0 < weights[3] < weights[1:3].min()
