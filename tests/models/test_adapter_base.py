"""An adapter that was moved together with its base finds it; others are read as PEFT reads them."""

import json
import os
import shutil

import pytest
import torch
from conftest import random_ids, tiny_model
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from test_peft import randomise

from factorized_gpt2 import FactorizedGPT2
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.models.adapter_base import WAY_NAME, whole_path
from factorized_gpt2.models.adapter_folder import complete_adapter
from factorized_gpt2.trainer.adapters import add_lora

BASE = "base_model_name_or_path"


def save_adapter(folder, base: str) -> torch.Tensor:
    """Save an adapter as a run does; return the adapted model's logits."""
    model = tiny_model()
    model.name_or_path = whole_path(base)
    adapted = randomise(add_lora(model, 2, 4, 0.0, ["q_proj"]))
    adapted.save_pretrained(folder)
    complete_adapter(folder, folder)
    return logits_of(adapted)


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=random_ids()).logits


@pytest.fixture
def tree(tmp_path):
    """Make a folder with a base and, in a folder of a run, an adapter on it."""
    tiny_model().save_pretrained(tmp_path / "tree/base")
    return tmp_path / "tree"


@pytest.fixture
def expected(tree):
    return save_adapter(tree / "run/adapter", str(tree / "base"))


def base_of(adapter) -> str:
    return PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path


def test_it_is_found_from_any_folder_before_and_after_a_move(tree, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.testing.assert_close(logits_of(AutoPeftModelForCausalLM.from_pretrained("tree/run/adapter")), expected)
    os.rename(tree, tmp_path / "moved")
    for folder in (tmp_path, tmp_path / "moved", tmp_path / "moved/run"):
        monkeypatch.chdir(folder)
        adapter = os.path.relpath(tmp_path / "moved/run/adapter")
        loaded = AutoPeftModelForCausalLM.from_pretrained(adapter)
        assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "moved/base")
        torch.testing.assert_close(logits_of(loaded), expected)


def test_what_is_still_there_is_taken_from_there(tree, expected, tmp_path):
    shutil.copytree(tree, tmp_path / "copied")
    assert base_of(tmp_path / "copied/run/adapter") == str(tree / "base")


def test_an_adapter_that_left_its_base_names_what_it_named(tree, expected, tmp_path):
    os.rename(tree / "run", tmp_path / "run")
    os.rename(tree, tmp_path / "elsewhere")
    base = FactorizedGPT2.from_pretrained(tmp_path / "elsewhere/base")
    assert base_of(tmp_path / "run/adapter") == str(tree / "base")
    torch.testing.assert_close(logits_of(PeftModel.from_pretrained(base, tmp_path / "run/adapter")), expected)


def test_an_adapter_whose_base_was_renamed_by_hand_keeps_the_new_name(tree, expected, tmp_path):
    path = tree / "run/adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {BASE: "me/base"}))
    assert base_of(path.parent) == "me/base"


def test_the_way_leads_to_models_only(tree, expected, tmp_path):
    os.rename(tree, tmp_path / "moved")
    (tmp_path / "moved/base/config.json").unlink()
    assert base_of(tmp_path / "moved/run/adapter") == str(tree / "base")


def test_adapters_of_others_are_read_as_they_are(tree, expected):
    adapter = tree / "run/adapter"
    (adapter / WAY_NAME).unlink()
    os.rename(tree / "base", tree / "renamed")
    assert base_of(adapter) == str(tree / "base")


def test_a_damaged_way_is_named(tree, expected, tmp_path):
    os.rename(tree, tmp_path / "moved")
    (tmp_path / "moved/run/adapter" / WAY_NAME).write_text("{")
    with pytest.raises(UserError, match=rf"{WAY_NAME} cannot be read as JSON"):
        base_of(tmp_path / "moved/run/adapter")


def test_the_way_is_the_same_through_a_link(tree, tmp_path):
    (tree / "link").symlink_to(tmp_path, target_is_directory=True)
    save_adapter(tree / "link/adapter", str(tree / "base"))
    assert json.loads((tmp_path / "adapter" / WAY_NAME).read_text())["from_here"] == "../tree/base"


def test_its_readme_names_no_folder_of_this_machine(tree, expected, tmp_path):
    text = (tree / "run/adapter/README.md").read_text()
    assert ModelCard(text).data.base_model is None
    assert str(tmp_path) not in text
    assert "A LoRA adapter of rank 2, alpha 4, on `q_proj` of the model in `../../base`" in text


def test_its_readme_names_a_base_on_the_hub(tmp_path):
    save_adapter(tmp_path / "adapter", "me/base")
    card = ModelCard((tmp_path / "adapter/README.md").read_text())
    assert card.data.base_model == "me/base"
    assert card.data.library_name == "peft"
    assert not (tmp_path / "adapter" / WAY_NAME).exists()
    assert base_of(tmp_path / "adapter") == "me/base"
