"""The model that a run leaves: the trained one, whole, or an error and nothing."""

import pytest
import torch
from conftest import random_ids, tiny_model

from factorized_gpt2 import FactorizedGPT2
from factorized_gpt2.models.verification import probe_logits
from factorized_gpt2.runs.folder import save_model
from factorized_gpt2.text.tokenizers import load_tokenizer


def test_the_finished_model_is_the_trained_one(tmp_path, tokenizer):
    model, probe = tiny_model(), random_ids()
    size = save_model(tmp_path, model, tokenizer, probe, probe_logits(model, probe))
    weights = tmp_path / "model.safetensors"
    assert size == weights.stat().st_size >= 4 * model.num_parameters()
    reloaded = FactorizedGPT2.from_pretrained(tmp_path)
    assert torch.equal(probe_logits(reloaded, probe), probe_logits(model, probe))
    assert load_tokenizer(str(tmp_path)).get_vocab() == tokenizer.get_vocab()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("change", [1.5, -1.5])
def test_a_saved_model_that_is_not_the_trained_one_is_an_error(tmp_path, tokenizer, change):
    """One logit is off by half more than the tolerance, 1e-4 of the largest."""
    model, probe = tiny_model(), random_ids()
    expected = probe_logits(model, probe)
    expected[0, 3, 7] += change * 1e-4 * max(1.0, expected.abs().max().item())
    with pytest.raises(RuntimeError, match="does not equal the model in memory: logits differ by"):
        save_model(tmp_path, model, tokenizer, probe, expected)
    assert not list(tmp_path.glob(".*"))


def test_rounding_is_no_difference(tmp_path, tokenizer):
    model, probe = tiny_model(), random_ids()
    expected = probe_logits(model, probe)
    assert save_model(tmp_path, model, tokenizer, probe, expected + 5e-5) > 0


def test_a_save_that_fails_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(tmp_path, tiny_model(), tokenizer, random_ids(), torch.zeros(1))
    assert not list(tmp_path.iterdir())
