"""What the launcher, the environment and a model's own files say: counted, mended, or refused before any training."""

import json
from types import SimpleNamespace

import pytest
from conftest import tiny_model

from factorized_gpt2 import FactorizedGPT2
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.models.loading import load_baseline
from factorized_gpt2.runs import tracking
from factorized_gpt2.runs.rehearsal import rehearse
from factorized_gpt2.runs.settings import parse_run
from factorized_gpt2.settings.parsing import find_config

WORDS = ("--config", "baseline", "--use_cpu", "True", "--fp16", "False", "--torch_compile", "False")


def training(*words):
    return parse_run([*WORDS, *words]).training


def test_the_launchers_precision_is_recorded(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    found = training()
    assert (found.bf16, found.mixed_precision) == (True, "bf16")
    assert parse_run(list(WORDS)).settings()["bf16"]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert training("--bf16", "True").mixed_precision == "bf16"
    assert training().mixed_precision == "no"


def test_the_launchers_precision_without_a_device_for_it_is_neither_used_nor_recorded(monkeypatch, caplog):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    found = training("--use_cpu", "False")
    assert (found.bf16, found.mixed_precision) == (False, "no")
    assert "No CUDA on this machine: training in float32" in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp8", "mixed_precision fp8; only no, fp16 and bf16 are supported"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "The launcher asks for DeepSpeed"),
    ],
)
def test_what_a_launcher_cannot_have_is_refused(monkeypatch, name, value, complaint):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=complaint):
        training()


def test_wandb_is_off_where_the_environment_says_so(monkeypatch, caplog):
    caplog.set_level("INFO", "factorized_gpt2")
    assert training().report_to == ["wandb"]
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert training().report_to == []
    assert "WANDB_DISABLED is set" in caplog.text


@pytest.mark.parametrize(("project", "expected"), [(None, "new-small-gpt"), ("my own", "my own")])
def test_the_project_of_the_environment_counts(monkeypatch, tmp_path, caplog, project, expected):
    opened = []
    monkeypatch.setattr("wandb.init", lambda **words: opened.append(words) or OPENED)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    if project:
        monkeypatch.setenv("WANDB_PROJECT", project)
    caplog.set_level("INFO", "factorized_gpt2")
    tracking.start_tracking(training("--output_dir", str(tmp_path / "run")))
    assert f"W&B: {OPENED.url}" in caplog.text
    assert [words["project"] for words in opened] == [expected]


def test_a_mode_that_wandb_does_not_have_is_refused_before_any_work(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "of line")
    with pytest.raises(UserError, match="WANDB_MODE is 'of line' in the environment; W&B knows online, offline, "):
        training()
    assert training("--report_to", "none").report_to == []


OPENED = SimpleNamespace(offline=False, url="https://wandb.example/me/runs/1")


def test_blocks_of_another_model_are_refused_before_they_are_sharded(monkeypatch):
    model = tiny_model()
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "GPT2Block")
    rehearse(training("--report_to", "none"), model)  # the launcher does not shard
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="names GPT2Block, but the layers of this model are FactorizedGPT2Block"):
        rehearse(training("--report_to", "none"), model)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "FactorizedGPT2Block")
    rehearse(training("--report_to", "none"), model)


@pytest.mark.parametrize("key", ["transformer_layer_cls_to_wrap", "fsdp_transformer_layer_cls_to_wrap"])
@pytest.mark.parametrize("way", ["file", "text", "config"])
def test_so_are_those_that_the_settings_name(key, way, tmp_path):
    def settings(block):
        config = {key: block}
        (tmp_path / "fsdp.json").write_text(json.dumps(config))
        run = {"extends": str(find_config("baseline.json").absolute()), "fsdp": True, "fsdp_config": config}
        (tmp_path / "run.json").write_text(json.dumps(run))
        words = {
            "file": ("--fsdp", "True", "--fsdp_config", str(tmp_path / "fsdp.json")),
            "text": ("--fsdp", "--fsdp_config", json.dumps(config)),
            "config": ("--config", str(tmp_path / "run.json")),
        }
        return training(*words[way], "--report_to", "none")

    rehearse(settings("FactorizedGPT2Block"), tiny_model())
    with pytest.raises(UserError, match="names GPT2Block, but the layers of this model are FactorizedGPT2Block"):
        rehearse(settings(["FactorizedGPT2Block", "GPT2Block"]), tiny_model())


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--fsdp_config", "fsdp.json"), "fsdp_config has no effect without fsdp"),
        (("--fsdp", "False", "--fsdp_config", "fsdp.json"), "fsdp_config has no effect without fsdp"),
        (("--fsdp", "True", "--fsdp_config", "fsdp.json"), "fsdp.json cannot be read as JSON: .*No such file"),
        (("--fsdp", "True", "--fsdp_config", "{"), "The settings cannot be used"),
        (("--fsdp", "nonsense"), "Unknown `fsdp` option: nonsense"),
        (("--fsdp_transformer_layer_cls_to_wrap", "GPT2Block"), "it is a key of fsdp_config"),
    ],
)
def test_sharding_that_nobody_can_do_is_refused_in_a_line(words, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=complaint):
        training(*words)


def test_a_launcher_that_does_not_shard_may_name_any_block(monkeypatch):
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "GPT2Block")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    rehearse(training("--report_to", "none"), tiny_model())


def edit_generation_config(folder, **changes) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_generation_config_that_would_not_be_saved_again_is_mended_and_said(tmp_path, caplog):
    tiny_model(n_embd_wte=None).save_pretrained(tmp_path / "base")
    edit_generation_config(tmp_path / "base", temperature=0.7, top_p=0.9, early_stopping=True)
    model = load_baseline(str(tmp_path / "base")).model
    assert "base sets temperature, top_p, early_stopping, which has no effect there: it is left out" in caplog.text
    model.generation_config.pad_token_id = 0  # as the Trainer does
    model.save_pretrained(tmp_path / "again")
    assert FactorizedGPT2.from_pretrained(tmp_path / "again").generation_config.do_sample in (None, False)


def test_a_generation_config_that_samples_is_kept(tmp_path, caplog):
    tiny_model(n_embd_wte=None).save_pretrained(tmp_path / "base")
    edit_generation_config(tmp_path / "base", temperature=0.7, do_sample=True)
    assert load_baseline(str(tmp_path / "base")).model.generation_config.temperature == 0.7
    assert not caplog.text


def test_a_generation_config_that_cannot_be_mended_is_refused(tmp_path):
    tiny_model(n_embd_wte=None).save_pretrained(tmp_path / "base")
    edit_generation_config(tmp_path / "base", pad_token_id=-1)
    with pytest.raises(UserError, match=r"The generation_config.json of .*base is not valid; fix or remove it: "):
        load_baseline(str(tmp_path / "base"))
