"""What can go wrong on the way to the Hub: one line, no token in it, nothing half done, and the way out works."""

import re

import pytest
from conftest import tiny_model
from hub_client import READER_TOKEN, TOKEN, WRONG_TOKEN, reach, refusal
from hub_server import HubServer
from huggingface_hub import constants
from transformers import GPT2Config, GPT2LMHeadModel

from factorized_gpt2.hub.repository import publish, publish_adapter
from factorized_gpt2.trainer.adapters import add_lora


@pytest.fixture(scope="module")
def hub():
    with HubServer({TOKEN: "me", READER_TOKEN: "reader"}) as server:
        yield server


@pytest.fixture(autouse=True)
def _reach(hub, monkeypatch):
    reach(hub, monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failures") / "tiny"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("path", "status", "count"),
    [
        ("repos/create", 500, 1),
        ("validate-yaml", 503, 1),
        ("/preupload/", 502, 99),
        ("objects/batch", 401, 1),
        ("PUT /storage", 500, 99),
        ("POST /verify", 403, 1),
        ("/commit/", 500, 1),
        ("/commit/", 401, 1),
    ],
)
def test_a_failure_on_the_way(hub, folder, path, status, count, caplog):
    name = "me/failed-" + re.sub(r"\W+", "-", f"{path} {status}").strip("-").lower()
    hub.stored.clear()
    hub.fail_next(status, count, path, message=f"It went wrong\nwith {TOKEN}")
    message = refusal(lambda: publish(folder, name, token=TOKEN))
    assert f"the Hub answers {status}, It went wrong with ***" in message
    assert str(folder) in message
    assert name in message
    assert message.endswith("Nothing local was lost: mend that, run the same command again.")
    assert TOKEN not in caplog.text
    assert name not in hub.repos or set(hub.repos[name].files()) == {".gitattributes"}
    hub.heal()
    publish(folder, name, token=TOKEN)
    assert len(hub.repos[name].log) == 2
    assert "model.safetensors" in hub.repos[name].files()


def test_a_passing_failure_is_got_over(hub, folder):
    hub.stored.clear()
    hub.fail_next(503, 2, "PUT /storage")
    publish(folder, "me/patient", token=TOKEN)
    assert len(hub.repos["me/patient"].log) == 2


@pytest.mark.parametrize(
    ("repo_id", "token", "complaint"),
    [
        ("me/denied", None, "There is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN"),
        ("me/denied", WRONG_TOKEN, "answers 401, Invalid credentials.*the token is not valid: log in"),
        ("me/denied", READER_TOKEN, "answers 403, .*choose a name of your own"),
        ("me/de nied", TOKEN, "'me/de nied' is no name for the Hub, such as USER/NAME"),
        ("a/b/c", TOKEN, "'a/b/c' is no name for the Hub"),
    ],
)
def test_what_is_not_allowed(hub, folder, repo_id, token, complaint):
    assert re.search(complaint, refusal(lambda: publish(folder, repo_id, token=token)))
    assert repo_id not in hub.repos


def test_no_hub(folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "Connection refused" in refusal(lambda: publish(folder, "me/nowhere", token=TOKEN))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(lambda: publish(folder, "me/nowhere", token=TOKEN))


def test_who_may_only_read(hub, folder):
    publish(folder, "me/guarded", token=TOKEN)
    assert "answers 403" in refusal(lambda: publish(folder, "me/guarded", token=READER_TOKEN))
    assert len(hub.repos["me/guarded"].log) == 2


def test_a_public_repository_does_not_pass_for_a_private_one(hub, folder):
    hub.add("me/open")
    message = refusal(lambda: publish(folder, "me/open", token=TOKEN, private=True))
    assert "me/open exists and is public" in message
    assert len(hub.repos["me/open"].log) == 1
    for _ in range(2):
        publish(folder, "me/hidden", token=TOKEN, private=True)
    assert hub.repos["me/hidden"].private


@pytest.mark.parametrize("broken", ["nothing", "no config", "no weights", "damaged weights", "another model"])
def test_folders_that_are_no_models(hub, tmp_path, broken):
    if broken == "another model":
        config = GPT2Config(vocab_size=9, n_positions=4, n_embd=4, n_layer=1, n_head=1)
        GPT2LMHeadModel(config).save_pretrained(tmp_path)
    elif broken != "nothing":
        tiny_model().save_pretrained(tmp_path)
    if broken == "no config":
        (tmp_path / "config.json").unlink()
    if broken == "no weights":
        (tmp_path / "model.safetensors").unlink()
    if broken == "damaged weights":
        (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    message = refusal(lambda: publish(tmp_path, "me/broken", token=TOKEN))
    assert str(tmp_path) in message
    assert ("weights" in broken) == ("The weights of" in message or "the files of weights" in message)
    assert (broken == "another model") == ("holds a 'gpt2' model" in message)
    assert "me/broken" not in hub.repos


def test_adapters_that_cannot_be_published(hub, tmp_path):
    message = refusal(lambda: publish_adapter(tmp_path, "me/adapter", "me/not-there", token=TOKEN))
    assert "no adapter_config.json" in message
    add_lora(tiny_model(), 2, 4, 0.0, ["q_proj"]).save_pretrained(tmp_path)
    message = refusal(lambda: publish_adapter(tmp_path, "me/adapter", "me/not-there", token=TOKEN))
    assert "me/not-there is not on the Hub; publish the model" in message
    message = refusal(lambda: publish_adapter(tmp_path, "me/adapter", "/a/folder", token=TOKEN))
    assert "'/a/folder' is no name for the Hub" in message
    assert "me/adapter" not in hub.repos
