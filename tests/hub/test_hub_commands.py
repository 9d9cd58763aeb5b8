"""Publishing as the commands do it, against the stand-in for the Hub."""

import json

import pytest
from hub_client import TOKEN, reach
from hub_server import HubServer
from huggingface_hub import HfApi
from old_networks import NANO, OldNet, checkpoint

from factorized_gpt2.cli import compressing
from factorized_gpt2.cli.compress import compress
from factorized_gpt2.cli.import_checkpoint import import_checkpoint
from factorized_gpt2.cli.train import train
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.trainer.trainer import FactorizedTrainer

SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 16}
CONFIG = {
    **{"block_size": 16, "max_steps": 2, "do_train": True, "per_device_train_batch_size": 2, "save_strategy": "no"},
    **{"report_to": ["none"], "disable_tqdm": True, "learning_rate": 1e-2},
}


@pytest.fixture
def hub(monkeypatch):
    with HubServer({TOKEN: "me"}) as server:
        reach(server, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture(scope="module")
def root(tmp_path_factory, corpus):
    """Train a tiny baseline, and write the config of a LoRA run from it."""
    root = tmp_path_factory.mktemp("published")
    texts = {
        **{"train_file": [str(corpus / "train.jsonl")], "validation_file": [str(corpus / "validation.jsonl")]},
        **{"tokenizer": str(corpus / "tokenizer")},
    }
    lora = {"baseline": str(root / "baseline"), "n_embd_wte": 4, "lora_rank": 2, "lora_alpha": 4}
    for name, config in (("baseline", SHAPE), ("lora", lora)):
        (root / f"{name}.json").write_text(json.dumps(CONFIG | texts | config | {"output_dir": str(root / name)}))
    train(["--config", str(root / "baseline.json")])
    return root


def files(repo_id: str) -> set[str]:
    return set(HfApi(token=TOKEN).list_repo_files(repo_id))


def test_every_rank_has_its_repository(hub, root, corpus, tmp_path, capsys):
    words = ["--baseline", str(root / "baseline"), "--output_dir", str(tmp_path), "--ranks", "4", "8"]
    words += ["--eval_file", str(corpus / "validation.jsonl"), "--push_to_hub", "me/small", "--private", "True"]
    compress(words)
    printed = capsys.readouterr().out
    for rank in (4, 8):
        assert {"model.safetensors", "README.md", "modeling_factorized_gpt2.py"} <= files(f"me/small-k{rank}")
        assert HfApi(token=TOKEN).model_info(f"me/small-k{rank}").private
        assert f"Published: {hub.url}/me/small-k{rank}" in printed


def test_a_lora_run_publishes_its_model_and_over_a_published_base_its_adapter(hub, root, capsys, monkeypatch):
    compressed = ["--baseline", str(root / "baseline"), "--output_dir", str(root), "--ranks", "4"]
    compress([*compressed, "--push_to_hub", "me/base"])
    asked = ["--config", str(root / "lora.json"), "--push_to_hub", "me/healed"]
    train([*asked[:2], "--hub_base_model_id", "me/base", *asked[2:]])
    assert {"model.safetensors", "results.json", "README.md"} <= files("me/healed")
    assert {"adapter_model.safetensors", "README.md"} <= files("me/healed-adapter")
    assert not any(name.startswith("checkpoint") for name in files("me/healed"))
    assert capsys.readouterr().out.count("Published: ") == 3
    monkeypatch.setattr(FactorizedTrainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    train([*asked[:-1], "True", "--hub_model_id", "me/again"])  # the same run under another name: nothing to train
    assert "model.safetensors" in files("me/again")


def test_a_failing_upload_leaves_what_was_made_and_can_be_repeated(hub, root, tmp_path):
    words = ["--baseline", str(root / "baseline"), "--output_dir", str(tmp_path), "--ranks", "4"]
    hub.fail_next(500, 1)
    with pytest.raises(UserError, match="run the same command again"):
        compress([*words, "--push_to_hub", "me/late"])
    assert (tmp_path / "gpt_pca_nofinetune_k4/model.safetensors").exists()
    compress([*words, "--push_to_hub", "me/late"])
    assert "model.safetensors" in files("me/late")


def test_what_cannot_be_published_is_found_before_the_work(hub, root, tmp_path, monkeypatch):
    monkeypatch.setattr(compressing, "load_baseline", lambda *args: pytest.fail("work was begun"))
    monkeypatch.setattr(FactorizedTrainer, "train", lambda *args, **kwargs: pytest.fail("work was begun"))
    lora = ["--config", str(root / "lora.json"), "--output_dir", str(tmp_path / "run"), "--push_to_hub"]
    with pytest.raises(UserError, match="push_to_hub needs the name of a repository: --push_to_hub USER/NAME"):
        train(lora)
    with pytest.raises(UserError, match="is no name for the Hub"):
        train([*lora, "a/b/c"])
    monkeypatch.delenv("HF_TOKEN")
    for ask in (
        lambda: train([*lora, "--hub_model_id", "me/x"]),
        lambda: compress(["--baseline", str(root / "baseline"), "--ranks", "4", "--push_to_hub", "me/x"]),
    ):
        with pytest.raises(UserError, match="There is no token for the Hub"):
            ask()
    assert not (tmp_path / "run").exists()


def test_an_imported_checkpoint_is_published(hub, tmp_path, capsys):
    path = checkpoint(OldNet(NANO), NANO, tmp_path / "ckpt.pt")
    words = ["--checkpoint", str(path), "--output_dir", str(tmp_path / "model")]
    import_checkpoint([*words, "--push_to_hub", "me/nano", "--private", "--dtype", "bfloat16"])
    assert f"Published: {hub.url}/me/nano" in capsys.readouterr().out
    assert {"model.safetensors", "README.md", "modeling_factorized_gpt2.py"} <= files("me/nano")
    assert HfApi(token=TOKEN).model_info("me/nano").private
    with pytest.raises(UserError, match="is no name for the Hub"):
        import_checkpoint([*words[:3], str(tmp_path / "other"), "--push_to_hub", "a/b/c"])
    assert not (tmp_path / "other").exists()
