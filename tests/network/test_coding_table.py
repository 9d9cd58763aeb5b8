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


def test_errors_are_less_than_those_of_a_step(problem):
    table = encode_table(*problem, 5.0)
    weight, metric, row_weights = problem
    errors = table.dense() - weight
    cost = np.einsum("vi,ij,vj->v", errors, metric, errors)
    # Every second code may come next: as many bits as two steps take, whose errors would be 4 / 12.
    assert 0.85 < row_weights @ (cost / table.steps**2) / (WIDTH * 4 / 12) < 0.97


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
    plain, relations = replace(table, trellis_columns=0), table.relations
    alone = np.zeros_like(relations.parent)
    row_spread, column_spread = measure_spreads(table.codes, relations.step_index, alone, alone)
    unpredicted = RowRelations(relations.step_index, alone, alone, row_spread, column_spread)
    assert (relations.share > 0).mean() > 0.4
    assert plain.nbytes < 0.98 * replace(plain, relations=unpredicted).nbytes
    unpredicted = replace(relations, share=alone)
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


def test_the_trellis_saves_near_a_bit_a_code(problem):
    table = encode_table(*problem, 5.0)
    assert table.trellis_columns == WIDTH
    assert table.nbytes < replace(table, trellis_columns=0).nbytes - 0.9 * VOCAB * WIDTH / 8


@pytest.mark.parametrize("width", [1, 3, 31])
def test_rows_of_any_width_come_back(width):
    rows = np.random.default_rng(0).normal(size=(3000, width)).astype(np.float32)
    table = encode_table(rows, np.eye(width), np.full(len(rows), 1 / len(rows)), 12.0)
    read = CodedTable.from_bytes(table.to_bytes())
    assert read.trellis_columns == table.trellis_columns == width < table.codes.shape[1]
    assert np.array_equal(read.codes, table.codes)


def test_codes_that_left_the_trellis_are_stored_all_the_same(problem):
    table = encode_table(*problem, 3.0)
    codes = table.codes.copy()
    codes[7, 0] ^= 1
    changed = replace(table, codes=codes)
    read = CodedTable.from_bytes(changed.to_bytes())
    assert np.array_equal(read.codes, codes)
    assert read.trellis_columns == 0


_BEFORE_THE_TRELLIS = """
e4d9d40b0300000002000000030000000000803e0000003c00bc00380034003800344494505652000000010000001d0000000000000078da3bcfc0c0
c0c8c0e0304a0e1e92916626ffff3f18fdfb17afab582830997534450d439295214c948121148a21624c0cabb5403c4e0606050654a0f0ef3f1bc36a
2e10f3bffc6a2e100b611a007d32406db4c913000266
"""


def test_a_file_from_before_the_trellis_is_read_and_stays_as_it_is():
    data = bytes.fromhex(_BEFORE_THE_TRELLIS)
    table = CodedTable.from_bytes(data)
    assert table.codes.tolist() == [[5, -1], [4, 0], [-3, 1]]
    np.testing.assert_allclose(table.steps, 0.25 * np.exp2([0, 0.5, 1]), rtol=1e-6)
    assert table.scale_codes.tolist() == [[3, -2, 1], [1, 1, 2]]
    again = table.to_bytes()
    assert again[4:34] == data[4:34]  # what follows is deflated
    assert np.array_equal(CodedTable.from_bytes(again).dense(), table.dense())
