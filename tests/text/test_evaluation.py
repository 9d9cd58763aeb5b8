"""Loss over a split, and sizes, against sums made by hand."""

import math

import pytest
import torch
from conftest import RANK, VOCAB_SIZE, WIDTH, random_ids, tiny_model
from datasets import Dataset

from factorized_gpt2.models.sizes import model_size
from factorized_gpt2.text.loss import LossSum, perplexity, sum_loss


@pytest.fixture
def blocks() -> Dataset:
    lengths = [20] * 7 + [5]
    return Dataset.from_dict({"input_ids": [random_ids(1, n, seed=n + i)[0].tolist() for i, n in enumerate(lengths)]})


def test_the_sum_is_that_of_every_predicted_token(model, blocks):
    nats = 0.0
    with torch.no_grad():
        for row in blocks["input_ids"]:
            ids = torch.tensor([row])
            log_probabilities = model(ids).logits[0, :-1].double().log_softmax(-1)
            nats -= log_probabilities.gather(-1, ids[0, 1:, None]).sum().item()
    measured = sum_loss(model, blocks, batch_size=4)
    assert measured.tokens == 7 * 19 + 4
    assert measured.nats == pytest.approx(nats, rel=1e-6)


def test_the_loss_does_not_depend_on_the_batch_size(model, blocks):
    losses = [sum_loss(model, blocks, batch_size).loss for batch_size in (1, 3, 8)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_the_mode_is_restored_and_dropout_off(blocks):
    model = tiny_model(resid_pdrop=0.5).train()
    first, second = (sum_loss(model, blocks, 4).nats for _ in range(2))
    assert first == second
    assert model.training


def test_perplexity():
    assert perplexity(LossSum(math.log(8) * 5, 5).loss) == pytest.approx(8)
    assert perplexity(1e4) == math.inf
    assert math.isnan(LossSum(0.0, 0).loss)


@pytest.mark.parametrize(
    ("overrides", "vocabulary"),
    [
        ({}, VOCAB_SIZE * RANK + 2 * RANK * WIDTH + WIDTH),
        ({"scale_up_bias": False}, VOCAB_SIZE * RANK + 2 * RANK * WIDTH),
        ({"tie_word_embeddings": False}, 2 * VOCAB_SIZE * RANK + 2 * RANK * WIDTH + WIDTH),
        ({"n_embd_wte": None}, VOCAB_SIZE * WIDTH),
    ],
)
def test_sizes_count_shared_weights_once(overrides, vocabulary):
    block = 12 * WIDTH**2 + 13 * WIDTH
    size = model_size(tiny_model(**overrides).to(torch.bfloat16))
    assert size.vocabulary_parameters == vocabulary
    assert size.parameters == vocabulary + 48 * WIDTH + 2 * block + 2 * WIDTH
    assert (size.bytes, size.vocabulary_bytes) == (2 * size.parameters, 2 * vocabulary)
