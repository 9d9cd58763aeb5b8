"""What is read off a baseline: frequencies, hidden states, gradients, draws; and the head that makes up for errors."""

import copy

import numpy as np
import pytest
import torch
from conftest import NO_DROPOUT, VOCAB_SIZE, WIDTH, tiny_model
from datasets import Dataset
from torch.nn import functional

from factorized_gpt2 import factorize, from_gpt2
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.compress import calibration as module
from factorized_gpt2.compress.calibration import DRAWS, calibrate, compensated_head, count_tokens, spread_blocks

COUNTS = np.arange(VOCAB_SIZE)


def random_blocks(count: int, length: int = 12, seed: int = 0) -> Dataset:
    ids = np.random.default_rng(seed).integers(2, VOCAB_SIZE, (count, length), dtype=np.int32)
    return Dataset.from_dict({"input_ids": list(ids)})


def baseline(**overrides):
    return tiny_model(n_embd_wte=None, **overrides)


def ids_of(blocks: Dataset) -> torch.Tensor:
    return torch.tensor(blocks["input_ids"][:])


def hidden_states(model, blocks: Dataset) -> torch.Tensor:
    """Final hidden states of all positions in evaluation mode, (N, d)."""
    with torch.no_grad():
        return copy.deepcopy(model).eval().transformer(ids_of(blocks)).last_hidden_state.flatten(0, 1)


def arrays_of(use) -> dict[str, np.ndarray]:
    sides = {"input": use.input_side, "output": use.output_side}
    names = ("vectors", "tokens", "sources", "weights")
    return {f"{name} of {side}": getattr(value, name) for side, value in sides.items() for name in names}


# 2500 rows are more than are counted at once; the last block of a text may be short.
@pytest.mark.parametrize("lengths", [[3] * 2500, [7, 7, 2], [1]])
def test_tokens_are_counted(lengths):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, VOCAB_SIZE - 9, length, dtype=np.int32) for length in lengths]
    counts = count_tokens(Dataset.from_dict({"input_ids": rows}), VOCAB_SIZE)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, np.bincount(np.concatenate(rows), minlength=VOCAB_SIZE))


@pytest.mark.parametrize("chosen", [[3, 39, 17], range(5, 9)], ids=["scattered", "adjacent"])
def test_tokens_of_chosen_blocks_alone_are_counted(chosen):
    blocks = random_blocks(40)
    tokens = np.array(blocks["input_ids"][:])[list(chosen)].ravel()
    counts = count_tokens(blocks.select(chosen), VOCAB_SIZE)
    np.testing.assert_array_equal(counts, np.bincount(tokens, minlength=VOCAB_SIZE))


@pytest.mark.parametrize(
    ("there", "tokens", "chosen"),
    [(30, 48, 4), (30, 49, 5), (30, 24, 2), (30, 29 * 12, 29), (30, 360, 30), (30, 10**6, 30), (1, 48, 1), (7, 72, 6)],
)
def test_blocks_are_spread_evenly(there, tokens, chosen):
    blocks = Dataset.from_dict({"input_ids": [[index] * 12 for index in range(there)]})
    places = [row["input_ids"][0] for row in spread_blocks(blocks, tokens)]
    assert len(set(places)) == len(places) == chosen
    assert places[0] == 0
    assert places[-1] == there - 1
    gaps = np.diff(places)
    assert gaps.max(initial=1) - gaps.min(initial=there) <= 1


def test_at_least_one_block_is_chosen():
    assert list(spread_blocks(random_blocks(9), 1)) == [random_blocks(9)[0]]


# A text has blocks enough that the rows of logits at once, here 5, neither divide them nor hold them.
@pytest.mark.parametrize("rows_at_once", [5, 512])
@pytest.mark.parametrize("tied", [True, False])
def test_hidden_states_and_gradients_are_the_models_own(monkeypatch, tied, rows_at_once):
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", rows_at_once)
    model, blocks = baseline(tie_word_embeddings=tied), random_blocks(3)
    use = calibrate(model, blocks, COUNTS)
    np.testing.assert_array_equal(use.token_counts, COUNTS)
    np.testing.assert_allclose(use.output_side.vectors, hidden_states(model, blocks), atol=1e-5)

    ids = ids_of(blocks)
    embedded = model.transformer.wte(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits.flatten(0, 1)
    draws = torch.from_numpy(use.output_side.tokens).view(-1, DRAWS)
    functional.cross_entropy(logits, draws[:, 0], reduction="sum").backward()
    gradients = embedded.grad.flatten(0, 1)
    np.testing.assert_allclose(use.input_side.vectors, gradients, atol=1e-5 * gradients.abs().max().item())

    np.testing.assert_array_equal(use.input_side.tokens, ids.flatten())
    np.testing.assert_array_equal(use.input_side.sources, np.arange(36))
    np.testing.assert_array_equal(use.input_side.weights, 1)
    np.testing.assert_array_equal(use.output_side.sources, np.repeat(np.arange(36), DRAWS))
    variances = 1 - logits.softmax(-1).gather(1, draws).detach()
    np.testing.assert_allclose(use.output_side.weights.reshape(-1, DRAWS) * DRAWS, variances, atol=1e-5)
    for name, array in arrays_of(use).items():
        assert array.dtype == (np.int64 if "tokens" in name or "sources" in name else np.float32), name


def test_draws_follow_the_models_distribution():
    repeats = 150
    model, block = baseline(), random_blocks(1)
    blocks = block.select([0] * repeats)
    tokens = calibrate(model, blocks, COUNTS).output_side.tokens.reshape(repeats, 12, DRAWS)
    draws = repeats * DRAWS
    with torch.no_grad():
        expected = model(ids_of(block)).logits[0].softmax(-1).double().numpy()
    found = np.stack(
        [np.bincount(tokens[:, position].ravel(), minlength=VOCAB_SIZE) / draws for position in range(12)]
    )
    spread = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(found - expected) < 5 * spread + 5 / draws).all()
    # Were they the same in every pass, repeating would have added nothing; and the first is as good as the others.
    assert len({tuple(tokens[index].ravel()) for index in range(repeats)}) == repeats
    first = np.stack([np.bincount(tokens[:, position, 0], minlength=VOCAB_SIZE) / repeats for position in range(12)])
    assert (np.abs(first - expected) < 5 * np.sqrt(expected * (1 - expected) / repeats) + 5 / repeats).all()


def test_the_seed_decides_the_draws_alone():
    model, blocks = baseline(), random_blocks(2)
    first, again, other = (arrays_of(calibrate(model, blocks, COUNTS, seed)) for seed in (3, 3, 4))
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name], err_msg=name)
    np.testing.assert_array_equal(first["vectors of output"], other["vectors of output"])
    assert (first["tokens of output"] != other["tokens of output"]).mean() > 0.1
    assert np.abs(first["vectors of input"] - other["vectors of input"]).max() > 1e-3


def snapshot(model) -> dict:
    return {name: (weight.dtype, weight.clone()) for name, weight in model.state_dict().items()}


def assert_unchanged(model, before: dict) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, (dtype, weight) in before.items():
        assert after[name][0] == dtype, name
        assert torch.equal(after[name][1], weight), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_left_as_it_was(dtype):
    model, blocks = baseline().to(dtype), random_blocks(2)
    model.transformer.wpe.weight.requires_grad_(False)
    trainable = {name: weight.requires_grad for name, weight in model.named_parameters()}
    before = snapshot(model)
    state = torch.get_rng_state()
    calibrate(model, blocks, COUNTS)
    assert_unchanged(model, before)
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == trainable
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_is_calibrated_in_float32():
    model, blocks = baseline().to(torch.bfloat16), random_blocks(2)
    found, expected = (arrays_of(calibrate(each, blocks, COUNTS)) for each in (model, copy.deepcopy(model).float()))
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_dropout_is_off_even_for_a_model_in_training_mode():
    model, blocks = baseline(**dict.fromkeys(NO_DROPOUT, 0.5)), random_blocks(2)
    use = calibrate(model.train(), blocks, COUNTS)
    np.testing.assert_allclose(use.output_side.vectors, hidden_states(model, blocks), atol=1e-5)


def factorized(model, rank: int = 8):
    factors = factorize(model.transformer.wte.weight.detach().numpy(), rank)
    return from_gpt2(model, factors), factors


@pytest.mark.parametrize("count", [1, 30])
def test_a_head_with_nothing_to_make_up_for_stays(count):
    model = baseline()
    _, factors = factorized(model)
    blocks = random_blocks(count)
    scale_down = compensated_head(model, factors.scale_down, blocks, hidden_states(model, blocks).numpy())
    assert scale_down.dtype == np.float32
    assert scale_down.flags.c_contiguous
    np.testing.assert_allclose(scale_down, factors.scale_down, atol=1e-5)


@pytest.mark.parametrize("count", [1, 4, 60])
@pytest.mark.parametrize("rank", [2, 8, WIDTH - 1])
def test_the_compensated_head_predicts_the_baselines_better(rank, count):
    model, blocks = baseline(), random_blocks(count)
    compressed, factors = factorized(model, rank)
    scale_down = compensated_head(compressed, factors.scale_down, blocks, hidden_states(model, blocks).numpy())
    true, seen = (hidden_states(each, blocks).double().numpy() for each in (model, compressed))
    target = true @ factors.scale_down
    best, *_ = np.linalg.lstsq(seen, target, rcond=None)
    error, uncompensated, least = (
        ((seen @ each - target) ** 2).sum() for each in (scale_down, factors.scale_down, best)
    )
    assert error < 0.95 * uncompensated
    if count == 60:  # with fewer the ridge decides, not the text
        assert error < 1.01 * least


def test_compensation_changes_no_model_and_works_in_half_precision():
    model, blocks = baseline().to(torch.bfloat16), random_blocks(3)
    _, factors = factorized(baseline())
    compressed = from_gpt2(model, factors)
    before = snapshot(compressed)
    states = hidden_states(copy.deepcopy(model).float(), blocks).numpy()
    kept = factors.scale_down.copy()
    scale_down = compensated_head(compressed, factors.scale_down, blocks, states)
    assert_unchanged(compressed, before)
    np.testing.assert_array_equal(factors.scale_down, kept)
    expected = compensated_head(copy.deepcopy(compressed).float(), factors.scale_down, blocks, states)
    np.testing.assert_array_equal(scale_down, expected)


def test_a_baseline_that_overflows_is_refused():
    model = baseline()
    model.transformer.h[1].mlp.mlp_up.weight.data.fill_(1e38)
    with pytest.raises(UserError, match="computes NaN or infinity on the calibration text"):
        calibrate(model, random_blocks(2), COUNTS)
