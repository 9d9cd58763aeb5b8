"""Fingerprints of weights: the same for the same weights, another for any other, none where there are no weights."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

from factorized_gpt2 import FactorizedGPT2
from factorized_gpt2.common.fingerprints import weights_fingerprint


def save(folder: Path, **overrides) -> str:
    tiny_model(**overrides).save_pretrained(folder)
    return str(folder)


def test_a_fingerprint_identifies_weights(tmp_path):
    one, same, other = save(tmp_path / "one"), save(tmp_path / "same"), save(tmp_path / "other", seed=6)
    fingerprint = weights_fingerprint(one)
    assert re.fullmatch("[0-9a-f]{64}", fingerprint)
    assert weights_fingerprint(same) == fingerprint
    assert weights_fingerprint(other) != fingerprint


def test_a_fingerprint_changes_with_one_weight(tmp_path):
    before = weights_fingerprint(save(tmp_path / "model"))
    model = FactorizedGPT2.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.transformer.wte.weight[3, 4] += 1e-3
    model.save_pretrained(tmp_path / "model")
    assert weights_fingerprint(str(tmp_path / "model")) != before


def test_a_fingerprint_looks_at_every_weight_file(tmp_path):
    before = weights_fingerprint(save(tmp_path / "model"))
    (tmp_path / "model/notes.txt").write_text("not weights")
    assert weights_fingerprint(str(tmp_path / "model")) == before
    shutil.copy(tmp_path / "model/model.safetensors", tmp_path / "model/more.safetensors")
    assert weights_fingerprint(str(tmp_path / "model")) != before


@pytest.mark.parametrize("start", [None, "", "openai-community/gpt2", "nowhere"])
def test_what_is_no_local_folder_has_no_fingerprint(tmp_path, monkeypatch, start):
    monkeypatch.chdir(tmp_path)
    assert weights_fingerprint(start) is None


def test_a_folder_without_weights_has_no_fingerprint(tmp_path):
    assert weights_fingerprint(str(tmp_path)) is None
