"""Names of folders that are not there are called missing at once; other names are the Hub's to know."""

import pytest

from factorized_gpt2.common.errors import UserError
from factorized_gpt2.common.model_places import refuse_missing_folder
from factorized_gpt2.models.loading import load_baseline
from factorized_gpt2.text.tokenizers import load_tokenizer


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "gpt").mkdir()


MISSING = ("./gpt2", "../gpt2", "/nowhere/gpt2", "a/b/c", "runs/gpt_baseline", "model_weights/gpt_baseline", "~/gpt2")


@pytest.mark.parametrize("name", MISSING)
@pytest.mark.parametrize("load", [load_baseline, load_tokenizer])
def test_a_missing_folder_is_not_asked_of_the_hub(name, load, monkeypatch):
    monkeypatch.setattr("transformers.utils.hub.cached_files", lambda *_, **__: pytest.fail("the Hub was asked"))
    with pytest.raises(UserError, match=f"The folder {name} does not exist"):
        load(name)


@pytest.mark.parametrize("name", ["gpt", "runs", "openai-community/gpt2", "gpt2", "no such/thing", "x" * 5000])
def test_what_is_there_or_may_be_on_the_hub_is_not_refused(name):
    refuse_missing_folder(name)


def test_what_was_fetched_from_the_hub_may_have_the_name_of_a_folder(monkeypatch):
    monkeypatch.setattr("factorized_gpt2.common.model_places.try_to_load_from_cache", lambda *_: "config.json")
    refuse_missing_folder("runs/gpt2")
