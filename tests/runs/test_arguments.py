"""Settings: the protocol's figures, flags over configs, and complaints that name the culprit."""

import json
import re
from dataclasses import fields

import pytest
from transformers import TrainingArguments

from factorized_gpt2.cli.train import train
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.network.blockwise_loss import BACKENDS
from factorized_gpt2.runs.families import run_name as derived_name
from factorized_gpt2.runs.fields import ALL_LINEAR, LORA_TARGETS, LOSS_BACKENDS, AdapterArguments, ModelArguments
from factorized_gpt2.runs.flags import outlined, parser_of
from factorized_gpt2.runs.settings import RunArguments, parse_run
from factorized_gpt2.runs.training_fields import ELSEWHERE, SUPPORTED, refused
from factorized_gpt2.runs.training_outline import training_outline
from factorized_gpt2.settings.parsing import load_config
from factorized_gpt2.settings.setting_values import Range, check_values, limits_of
from factorized_gpt2.settings.text_arguments import DataArguments
from factorized_gpt2.trainer import adapters

RANKS = (64, 128, 256, 512)

SHARED = {
    "per_device_train_batch_size": 4,
    "effective_batch_size": 16,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "cosine_with_min_lr",
    "fp16": True,
    "torch_compile": True,
    "project": "new-small-gpt",
    "block_size": 2048,
    "dropout": 0.1,
    "tie_word_embeddings": True,
    "dataset_name": "Salesforce/wikitext",
    "dataset_config_name": "wikitext-103-raw-v1",
    "load_best_model_at_end": True,
    "report_to": ["wandb"],
}
SCRATCH = SHARED | {
    "tokenizer": "openai-community/gpt2",
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "activation_function": "gelu",
    "max_steps": 10_000,
    "eval_steps": 500,
    "learning_rate": 1e-4,
    "lr_scheduler_kwargs": {"min_lr": 5e-6},
    "warmup_steps": 500,
    "weight_decay": 0.1,
}
LORA = SHARED | {
    "baseline": "model_weights/gpt_baseline",
    "max_steps": 5_000,
    "eval_steps": 200,
    "learning_rate": 5e-5,
    "lr_scheduler_kwargs": {"min_lr": 1e-6},
    "warmup_steps": 100,
    "weight_decay": 0.01,
    "lora_rank": 32,
    "lora_alpha": 64,
    "lora_dropout": 0.1,
    "lora_target_modules": list(LORA_TARGETS),
}
PROTOCOL = {"baseline": ("baseline", "baseline", "gpt_baseline", None, SCRATCH)}
for k in RANKS:
    scratch, plain, lora = f"lowrank_scratch_k{k}", f"pca_nofinetune_k{k}", f"pca_lora_k{k}"
    PROTOCOL[scratch] = ("lowrank-scratch", f"lowrank-scratch-k{k}", f"gpt_{scratch}", k, SCRATCH)
    PROTOCOL[plain] = ("pca-nofinetune", f"pca-nofinetune-k{k}", f"gpt_{plain}", k, {"do_train": False})
    PROTOCOL[lora] = ("pca-lora", f"pca-lora-k{k}-r32", f"gpt_{lora}", k, LORA)


@pytest.mark.parametrize("name", PROTOCOL)
def test_the_protocol_is_in_the_configs(name):
    family, run_name, folder, rank, figures = PROTOCOL[name]
    config = load_config(f"{name}.json")
    assert {key: config[key] for key in figures} == figures
    assert "run_name" not in config  # it follows from the settings
    assert config["output_dir"] == f"model_weights/{folder}"
    assert config.get("n_embd_wte") == rank
    run = parse_run(["--config", name])
    assert run.family(is_factorized=rank is not None) == family
    assert derived_name(family, rank, run.adapter.lora_rank) == run_name
    resolved = run.settings()
    needs_cuda = {"fp16": False, "torch_compile": False}
    here = figures | {key: off for key, off in needs_cuda.items() if key in figures}
    assert {key: resolved[key] for key in figures} == here
    assert resolved["gradient_accumulation_steps"] == 4
    assert resolved["n_embd_wte"] == rank


@pytest.mark.parametrize("name", [*PROTOCOL, "tokenwise_lora_k64", "demo/pca_lora_k8"])
def test_the_printed_config_means_the_same_run(tmp_path, capsys, name):
    words = ["--config", name, "--seed", "7", "--wandb_mode=offline"]
    train([*words, "--print_config"])
    printed = capsys.readouterr().out
    (tmp_path / "printed.json").write_text(printed)
    again, run = parse_run(["--config", str(tmp_path / "printed.json")]), parse_run(words)
    assert again.settings() == run.settings()
    config = json.loads(printed)
    assert (config["seed"], config["wandb_mode"]) == (7, "offline")
    assert {key for key, value in load_config(name).items() if value is not None} <= config.keys()
    assert len(config) < 60  # one screen, not all that there is


def test_the_printed_config_is_that_of_a_machine_with_a_gpu(capsys):
    train(["--config", "baseline", "--print_config"])
    config = json.loads(capsys.readouterr().out)
    assert (config["fp16"], config["torch_compile"]) == (True, True)
    train(["--config", "baseline", "--fp16", "False", "--print_config"])
    assert json.loads(capsys.readouterr().out)["fp16"] is False


def test_printing_a_config_touches_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(["--config", "baseline", "--print_config"])
    assert not list(tmp_path.iterdir())
    (tmp_path / "bad.json").write_text('{"print_config": true}')
    with pytest.raises(UserError, match="Unknown config key 'print_config'"):
        parse_run(["--config", "bad.json"])


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 4), (2, 2), (4, 1), (3, None), (8, None), (64, None)])
@pytest.mark.parametrize("name", ["baseline", "pca_lora_k512"])
def test_the_effective_batch_is_16_however_many_processes_there_are(monkeypatch, name, processes, accumulation):
    monkeypatch.setattr(RunArguments, "world_size", processes)
    if accumulation is not None:
        assert parse_run(["--config", name]).training.gradient_accumulation_steps == accumulation
        return
    complaint = (
        f"effective_batch_size=16 is not possible with {processes} device.s. with per_device_train_batch_size=4; "
        "numbers of devices that work: 1, 2, 4\\."
    )
    with pytest.raises(UserError, match=complaint):
        parse_run(["--config", name])
    fits = parse_run(["--config", name, "--per_device_train_batch_size", "2"]) if processes == 8 else None
    assert fits is None or fits.training.gradient_accumulation_steps == 1


def test_words_are_kept_without_what_is_no_setting_of_the_run():
    words = ["--overwrite_output_dir", "True", "--seed=3", "--print_config", "--overwrite-output-dir=True"]
    kept = parse_run(["--config", "baseline", *words]).flags
    assert kept[-1] == "--seed=3"
    assert not [word for word in kept if "overwrite" in word or "print" in word or word == "True"]


def test_there_are_thirteen_experiments():
    assert len(PROTOCOL) == 13


def test_flags_override_the_config(tmp_path):
    run = parse_run(["--config", "pca_lora_k64.json", "--max_steps", "20", "--lora_target_modules", "wte", "q_proj"])
    assert run.training.max_steps == 20
    assert run.training.warmup_steps == 100
    assert run.adapter.lora_target_modules == ["wte", "q_proj"]


def test_a_config_extends_another_beside_it(tmp_path):
    (tmp_path / "base.json").write_text('{"seed": 7, "max_steps": 3, "learning_rate": "1e-4"}')
    (tmp_path / "run.json").write_text('{"extends": "base.json", "max_steps": 4}')
    run = parse_run(
        [f"--config={tmp_path / 'run'}", "--tokenizer=t", "--train_file=a", "--validation_file=b", "--do_train"]
    )
    assert (run.training.seed, run.training.max_steps, run.training.learning_rate) == (7, 4, 1e-4)


def test_half_precision_falls_back_without_cuda(monkeypatch, caplog):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run = parse_run(["--config", "baseline"])
    assert not run.training.ddp_find_unused_parameters
    assert not run.training.logging_nan_inf_filter
    assert not run.training.fp16
    assert not run.training.torch_compile
    assert parse_run(["--config", "baseline", "--use_cpu", "True", "--fp16", "False"]).training.torch_compile
    assert [record.message for record in caplog.records if record.name.startswith("factorized")] == [
        "No CUDA on this machine: training in float32, without compiling."
    ]


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"max_step": 3}, "Unknown config key 'max_step'. Did you mean 'max_steps'?"),
        ({"zzz": 3}, "Unknown config key 'zzz'."),
        ({"max_steps": "many"}, "max_steps.*invalid int value: 'many'"),
        ({"max_steps": 2.5}, "max_steps.*invalid int value: '2.5'"),
        ({"fp16": "perhaps"}, "fp16.*perhaps"),
        ({"optim": "magic"}, "optim.*invalid choice: 'magic'"),
        ({"wandb_mode": "loud"}, "wandb_mode.*invalid choice"),
        ({"n_embd_wte": "x"}, "n_embd_wte"),
        ({"baseline": "b"}, "n_layer contradicts baseline"),
        ({"lora_rank": 4}, "lora_rank must be 0"),
        ({"block_size": 1}, "block_size must be at least 2"),
        ({"max_eval_samples": 0}, "max_eval_samples must be at least 1, got 0"),
        ({"streaming": True, "max_steps": -1, "num_train_epochs": 1}, "streaming needs max_steps"),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be at least 1"),
        ({"loss_backend": "cut_cross_entropy"}, "needs CUDA, fp16 or bf16, and the package"),
        ({"loss_backend": "attention"}, "loss_backend=attention needs a head that is not trained"),
        ({"loss_backend": "none"}, "loss_backend.*invalid choice"),
        ({"effective_batch_size": 6}, "effective_batch_size=6 is not possible"),
        ({"dataset_name": None, "train_file": ["x"]}, "No validation text"),
        ({"dataset_name": None, "validation_file": ["x"]}, "No training text"),
        ({"tokenizer": None}, "tokenizer must name one"),
        ({"do_train": False}, "Nothing to do"),
    ],
)
def test_a_bad_config_is_one_line(tmp_path, config, complaint):
    (tmp_path / "bad.json").write_text(json.dumps(load_config("baseline.json") | config))
    with pytest.raises(UserError, match=complaint) as caught:
        parse_run(["--config", str(tmp_path / "bad.json")])
    assert "\n" not in str(caught.value)


def test_every_option_of_the_trainer_is_supported_or_refused():
    known = {item.name for item in fields(TrainingArguments)}
    assert known == (SUPPORTED & known) | refused().keys()
    assert not SUPPORTED & refused().keys()
    assert {"save_only_model", "prediction_loss_only", "label_names", "hub_strategy", "debug"} <= refused().keys()
    assert {"learning_rate", "save_steps", "fsdp", "seed", "report_to"} <= SUPPORTED & known


@pytest.mark.parametrize(
    ("name", "value", "default"),
    [
        ("save_only_model", True, False),
        ("fp16_full_eval", True, False),
        ("prediction_loss_only", True, False),
        ("hub_strategy", "checkpoint", "every_save"),
        ("enable_jit_checkpoint", True, False),
        ("label_names", ["labels"], None),
        ("eval_accumulation_steps", 2, None),
        ("include_for_metrics", ["loss"], None),
        ("trackio_space_id", "me/space", None),
        ("ignore_data_skip", True, False),
        ("use_liger_kernel", True, False),
        ("resume_from_checkpoint", "checkpoint-3", None),
        ("debug", "underflow_overflow", ""),
        ("remove_unused_columns", False, True),
        ("deepspeed", "ds.json", None),
    ],
)
def test_what_would_do_nothing_is_refused_unless_it_is_the_default(tmp_path, name, value, default):
    config = tmp_path / "run.json"
    config.write_text(json.dumps(load_config("baseline.json") | {name: value}))
    with pytest.raises(UserError, match=f"^{name} is not accepted: .*\\.$") as caught:
        parse_run(["--config", str(config)])
    assert "\n" not in str(caught.value)
    config.write_text(json.dumps(load_config("baseline.json") | {name: default}))
    parse_run(["--config", str(config)])


@pytest.mark.parametrize(
    ("name", "successor"),
    [
        ("evaluation_strategy", "it is eval_strategy"),
        ("no_cuda", "set use_cpu"),
        ("fp16_backend", "fp16 or bf16"),
        ("fp16_opt_level", "fp16 or bf16"),
        ("save_safetensors", "always saved as safetensors"),
        ("logging_dir", "TENSORBOARD_LOGGING_DIR"),
        ("warmup_ratio", "warmup_steps"),
        ("max_iters", "it is max_steps"),
        ("eval_interval", "it is eval_steps"),
        ("eval_iters", "max_eval_samples"),
        ("batch_size", "it is per_device_train_batch_size"),
        ("min_lr", "lr_scheduler_kwargs"),
        ("lr_decay_iters", "max_steps"),
        ("grad_clip", "it is max_grad_norm"),
        ("lora_r", "it is lora_rank"),
    ],
)
def test_a_name_from_elsewhere_is_translated(tmp_path, name, successor):
    (tmp_path / "run.json").write_text(json.dumps({name: 1}))
    for words in (["--config", str(tmp_path / "run.json")], ["--config", "baseline", f"--{name}=1"]):
        unknown = rf"Unknown (config key '|argument '--){name}'"
        with pytest.raises(UserError, match=f"^({unknown}|{name} is not accepted): .*{successor}") as caught:
            parse_run(words)
        assert "Did you mean" not in str(caught.value)


def test_what_names_from_elsewhere_lead_to_exists():
    known = {
        item.name for part in (RunArguments, DataArguments, ModelArguments, AdapterArguments) for item in fields(part)
    }
    for name, successor in ELSEWHERE.items():
        assert name not in known - set(refused())
        for word in re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", successor):
            assert word in known | {"cosine_with_min_lr", "min_lr"} - {"hub_token"}, successor


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("{", "cannot be read as JSON"), ("[1]", "must hold a JSON object"), ('{"learning_rate": NaN}', "NaN")],
)
def test_a_file_that_is_no_config(tmp_path, text, complaint):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match=complaint):
        parse_run(["--config", str(tmp_path / "bad.json")])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--config", "pca_lora_k65"], "no config 'pca_lora_k65'.*Did you mean 'pca_lora_k64.json'"),
        (["--config", "baseline", "--max_stepz=3"], "Unknown argument '--max_stepz'. Did you mean 'max_steps'?"),
        (["--config", "baseline", "stray"], "Unknown argument 'stray'"),
        (["--config", "baseline", "--seed"], "seed.*expected one argument"),
    ],
)
def test_bad_words(words, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_run(words)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["--overwrite_output_dir", "True"], ["--overwrite", "True"]),
        (["--overwrite-output-dir=True"], ["--overwrite=True"]),
        (["--hub_private_repo"], ["--private"]),
        (["--push_to_hub", "--hub_model_id", "me/x"], ["--push_to_hub", "me/x"]),
        (["--hub_model_id", "me/x", "--push_to_hub=True"], ["--push_to_hub", "me/x"]),
        (["--push_to_hub", "False", "--hub_model_id", "me/x"], []),
        (["--hub_model_id", "me/x"], []),
    ],
)
def test_old_names_are_taken_with_a_line_that_says_the_new_one(caplog, before, after):
    old = parse_run(["--config", "baseline", *before]).training
    assert caplog.text.count("the old name works until the next release") == (before[1:2] != ["False"])
    new = parse_run(["--config", "baseline", *after]).training
    for name in ("overwrite", "private", "push_to_hub"):
        assert getattr(old, name) == getattr(new, name)


def test_old_names_are_taken_in_configs(tmp_path, caplog):
    old = {"overwrite_output_dir": True, "push_to_hub": True, "hub_model_id": "me/x", "hub_private_repo": True}
    (tmp_path / "old.json").write_text(json.dumps(load_config("baseline.json") | old))
    training = parse_run(["--config", str(tmp_path / "old.json")]).training
    assert (training.overwrite, training.push_to_hub, training.private) == (True, "me/x", True)
    for name in ("--overwrite.", "--push_to_hub me/x.", "--private;"):
        assert name.rstrip(".;") in caplog.text


def test_a_run_takes_the_names_that_other_commands_have():
    run = parse_run(["--config", "baseline", "--eval_file", "a.txt", "b.txt", "--eval_batch_size=3"])
    assert run.data.validation_file == ["a.txt", "b.txt"]
    assert run.training.per_device_eval_batch_size == 3


def test_null_takes_back_what_a_config_that_is_extended_or_a_flag_before_has_set(tmp_path):
    (tmp_path / "base.json").write_text('{"seed": 7, "block_size": 64, "ddp_find_unused_parameters": true}')
    (tmp_path / "run.json").write_text(
        '{"extends": "base.json", "seed": null, "block_size": null, "ddp_find_unused_parameters": null}'
    )
    words = ["--tokenizer=t", "--train_file=a", "--validation_file=b", "--do_train", "--max_steps=1"]
    run = parse_run([f"--config={tmp_path / 'run'}", *words])
    assert run.data.block_size is None
    assert run.training.ddp_find_unused_parameters is None  # whose default is False
    assert run.training.seed == 42  # which has no null, and so its default
    assert parse_run([f"--config={tmp_path / 'run'}", *words, "--block_size", "32"]).data.block_size == 32
    assert parse_run([f"--config={tmp_path / 'base'}", *words, "--block_size", "null"]).data.block_size is None


def test_the_outline_of_the_trainers_options_is_theirs():
    outline, real = fields(training_outline()), fields(TrainingArguments)
    assert training_outline() is not TrainingArguments
    assert [item.name for item in outline] == [item.name for item in real]
    assert [item.metadata for item in outline] == [item.metadata for item in real]
    differing = {ours.name for ours, theirs in zip(outline, real, strict=True) if ours.default != theirs.default}
    assert differing <= {"optim"}  # computed from the installed torch
    words = ["--optim", "sgd", "--eval_strategy=steps", "--lr_scheduler_kwargs", '{"min_lr": 1e-6}', "--seed=3"]
    shallow, deep = (vars(parser_of(kind).parse_known_args(words)[0]) for kind in (outlined(), RunArguments))
    assert {name: value for name, value in shallow.items() if name != "optim"} == {
        name: value for name, value in deep.items() if name != "optim"
    }


def test_another_layout_of_the_trainers_source_costs_time_and_nothing_else(monkeypatch):
    monkeypatch.setattr("factorized_gpt2.runs.training_outline._CLASS", "Renamed")
    assert training_outline.__wrapped__() is TrainingArguments


def test_names_that_stand_twice_are_the_same():
    assert LOSS_BACKENDS == BACKENDS
    assert ALL_LINEAR == adapters.ALL_LINEAR


def test_limits_stand_in_the_types_of_fields():
    assert limits_of(ModelArguments)["n_layer"] == Range(1)
    assert limits_of(RunArguments)["seed"] == Range(0, 2**32 - 1)
    with pytest.raises(UserError, match=r"^n_layer must be at least 1, got 0\.$"):
        check_values({"n_layer": 0, "seed": 3}, limits_of(ModelArguments))
