"""Names of folders that are not there are called missing at once; other names are the Hub's to know."""

import os
from pathlib import Path

import pytest
from huggingface_hub.errors import EntryNotFoundError

from factorized_gpt2.common.errors import UserError
from factorized_gpt2.common.model_places import refuse_missing
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


@pytest.mark.parametrize("name", ["gpt", "runs", "no such/thing", "x" * 5000])
def test_what_is_there_or_is_no_name_at_all_is_not_refused(name):
    refuse_missing(name)


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def answering(monkeypatch, error: Exception | None) -> list[str]:
    """Let the Hub answer with an error, or not at all; return what it was asked for."""
    asked = []

    def answer(url, timeout):
        asked.append(url)
        assert timeout <= 10
        if error is not None:
            raise error

    monkeypatch.setattr("factorized_gpt2.common.model_places.get_hf_file_metadata", answer)
    return asked


@pytest.mark.parametrize("load", [load_baseline, load_tokenizer])
@pytest.mark.parametrize("name", ["some_word", "openai-community/some_word"])
def test_offline_the_line_says_that_the_hub_was_not_asked(load, name, monkeypatch):
    asked = answering(monkeypatch, None)
    with pytest.raises(UserError, match=rf"There is no folder {name}, .* not asked because HF_HUB_OFFLINE is set\."):
        load(name)
    assert not asked


@pytest.mark.parametrize("load", [load_baseline, load_tokenizer])
@pytest.mark.parametrize(
    "error", [ConnectionRefusedError("refused"), TimeoutError("refused"), RuntimeError("refused")]
)
def test_a_hub_that_does_not_answer_is_asked_once_and_the_line_says_both(load, error, online, monkeypatch):
    asked = answering(monkeypatch, error)
    with pytest.raises(
        UserError, match=r"no folder some_word, and the Hub cannot be asked for .* of that name: refused"
    ):
        load("some_word")
    assert len(asked) == 1


@pytest.mark.parametrize("error", [None, EntryNotFoundError("no such entry")])
def test_what_the_hub_knows_is_not_refused(error, online, monkeypatch):
    asked = answering(monkeypatch, error)
    refuse_missing("openai-community/gpt2")
    assert [url.rsplit("/", 4)[-4:] for url in asked] == [["gpt2", "resolve", "main", "config.json"]]


@pytest.mark.parametrize("load", [load_baseline, load_tokenizer])
@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_a_file_is_no_folder_of_a_model(load, kind):
    Path("ckpt.pt").touch() if kind == "file" else os.mkfifo("ckpt.pt")
    with pytest.raises(UserError, match=r"ckpt.pt is a file, not the folder of a model or tokenizer: name the folder"):
        load("ckpt.pt")


def test_what_was_fetched_from_the_hub_may_have_the_name_of_a_folder(monkeypatch):
    monkeypatch.setattr("factorized_gpt2.common.model_places.try_to_load_from_cache", lambda *_: "config.json")
    refuse_missing("runs/gpt2")
