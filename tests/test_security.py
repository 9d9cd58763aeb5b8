"""Strangers' files: whatever they hold, nothing of it runs, and one line says what is wrong."""

import io
import json
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import cut_off_at
from hub_client import TOKEN, reach
from hub_server import HubServer
from jinja2.exceptions import SecurityError
from old_networks import DESCENDANT, OldNet, checkpoint
from strangers import (
    DEEP,
    HUGE,
    Touch,
    change_json,
    code_that_touches,
    holding,
    outcome,
    save_pickle,
    save_torch,
    tree,
)
from transformers import GPT2Config, GPT2LMHeadModel

from factorized_gpt2.cli.compress import compress
from factorized_gpt2.cli.evaluate import evaluate
from factorized_gpt2.cli.import_checkpoint import import_checkpoint
from factorized_gpt2.cli.report import report
from factorized_gpt2.cli.train import train
from factorized_gpt2.hub.repository import publish
from factorized_gpt2.text.tokenizers import load_tokenizer
from factorized_gpt2.trainer.checkpoints import seal


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "it-ran"


@pytest.fixture(scope="module")
def stock(tmp_path_factory, tokenizer) -> Path:
    """Save a stock GPT-2 with its tokenizer."""
    folder = tmp_path_factory.mktemp("stock")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(stock, tmp_path) -> Path:
    return Path(shutil.copytree(stock, tmp_path / "foreign"))


@pytest.fixture
def commands(folder, tmp_path, corpus) -> dict:
    """Every command that takes a model, with the words that make it take the foreign one."""
    text = corpus / "validation.jsonl"
    return {
        "compress": (compress, ["--baseline", folder, "--ranks", 4, "--output_dir", tmp_path / "out"]),
        "evaluate": (evaluate, ["--models", folder, "--eval_file", text]),
        "train": (
            train,
            [
                *("--baseline", folder, "--validation_file", text, "--block_size", 16, "--report_to", "none"),
                *("--output_dir", tmp_path / "out/run"),
            ],
        ),
        "teach": (
            train,
            [
                *("--compressed", tmp_path / "compressed", "--teacher", folder, "--distillation_weight", 0.5),
                *("--train_file", text, "--validation_file", text, "--block_size", 16, "--report_to", "none"),
                *("--do_train", "--max_steps", 1, "--output_dir", tmp_path / "taught"),
            ],
        ),
    }


@pytest.mark.parametrize("save", [save_torch, save_pickle])
def test_what_is_hidden_in_these_files_would_run(save, marker, tmp_path):
    save(tmp_path / "hostile", marker)
    load = partial(torch.load, weights_only=False) if save is save_torch else np.load
    load(tmp_path / "hostile", **({} if save is save_torch else {"allow_pickle": True}))
    assert marker.exists()


def pickle_for_weights(save, folder: Path, marker: Path) -> None:
    (folder / "model.safetensors").unlink()
    save(folder / "pytorch_model.bin", marker)


def adapter(folder: Path, marker: Path, **config) -> None:
    save_torch(folder / "adapter_model.bin", marker)
    lora = {"peft_type": "LORA", "r": 2, "target_modules": ["c_attn"], "base_model_name_or_path": str(folder)}
    (folder / "adapter_config.json").write_text(json.dumps(lora | config))


def module_beside(folder: Path, marker: Path) -> None:
    """Adapter configs may name modules to import."""
    adapter(folder, marker, megatron_config={"a": 1}, megatron_core="evil", auto_mapping={"parent_library": "evil"})


def safetensors_header(header: bytes, folder: Path, marker: Path, length: int | None = None) -> None:
    length = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header)


def code_of_its_own(folder: Path, marker: Path) -> None:
    (folder / "own.py").write_text(code_that_touches(marker))
    auto_map = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.C", "AutoTokenizer": ["own.C", "own.C"]}
    change_json(folder / "config.json", auto_map=auto_map, model_type="own")


def chat_template_elsewhere(folder: Path, marker: Path) -> None:
    templates = [{"name": name, "template": "x"} for name in ("default", f"../../../{marker.name}")]
    change_json(folder / "tokenizer_config.json", chat_template=templates)


REFUSED = {
    "weights that are a pickle": partial(pickle_for_weights, save_pickle),
    "weights of torch that are a pickle": partial(pickle_for_weights, save_torch),
    "an adapter that is a pickle": adapter,
    "an adapter that names a module": module_beside,
    "code of its own": code_of_its_own,
    "an activation that is code": lambda folder, marker: change_json(
        folder / "config.json", activation_function=f"__import__('os').mkdir({str(marker)!r})"
    ),
    "attention by another's kernel": lambda folder, marker: change_json(
        folder / "config.json", attn_implementation="evil/kernel"
    ),
    "a deep config": lambda folder, marker: (folder / "config.json").write_text(f'{{"model_type":"gpt2","a":{DEEP}}}'),
    "a huge number": lambda folder, marker: (folder / "config.json").write_text(f'{{"vocab_size": {HUGE}}}'),
    "a large number": lambda folder, marker: change_json(folder / "config.json", vocab_size=10**30),
    "a config that is a list": lambda folder, marker: (folder / "config.json").write_text("[1]"),
    "a deep tokenizer": lambda folder, marker: (folder / "tokenizer.json").write_text(f'{{"a": {DEEP}}}'),
    "a deep tokenizer config": lambda folder, marker: (folder / "tokenizer_config.json").write_text(
        f'{{"a": {DEEP}}}'
    ),
    "a chat template to be saved elsewhere": chat_template_elsewhere,
    "a deep generation config": lambda folder, marker: (folder / "generation_config.json").write_text(DEEP),
    "a header larger than the file": partial(safetensors_header, b"{}", length=2**63 - 1),
    "a deep header": partial(safetensors_header, f'{{"a": {DEEP}}}'.encode()),
    "a header that points beyond the file": partial(
        safetensors_header, b'{"transformer.wte.weight": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}'
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_foreign_model_is_refused_and_runs_nothing(kind, folder, marker, commands, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))  # to whatever a library might ask
    REFUSED[kind](folder, marker)
    before = tree(tmp_path)
    for command, words in (commands[name] for name in ("compress", "evaluate", "train")):
        code, line = outcome(command, words, capsys)
        assert not marker.exists()
        assert code == 2
        assert str(folder) in line
    assert tree(tmp_path) == before


def generation_code(folder: Path, marker: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(code_that_touches(marker))


def code_that_is_not_needed(folder: Path, marker: Path) -> None:
    code_of_its_own(folder, marker)
    change_json(folder / "config.json", model_type="gpt2")
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.C", "own.C"]})


def template_that_is_code(folder: Path, marker: Path) -> None:
    template = f"{{{{ cycler.__init__.__globals__.os.mkdir('{marker}') }}}}"
    (folder / "chat_template.jinja").write_text(template)


@pytest.mark.parametrize("strange", [generation_code, code_that_is_not_needed, template_that_is_code])
def test_a_foreign_model_that_does_without_its_code_is_taken_without(strange, folder, marker, commands, capsys):
    strange(folder, marker)
    for command, words in (commands[name] for name in ("compress", "evaluate", "train")):
        assert outcome(command, words, capsys)[0] == 0
        assert not marker.exists()


def test_a_strangers_code_is_not_passed_on(folder, marker, commands, corpus, tmp_path, capsys, monkeypatch):
    """Whoever trusts a folder that was made here, or a repository, trusts no one else."""
    foreign = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForX"), "evil/repo--own.C")
    for name in ("config.json", "tokenizer_config.json"):
        change_json(folder / name, auto_map=foreign | {"AutoTokenizer": ["evil/repo--own.C", None]})
    pipelines = {"text-generation": {"impl": "evil/repo--own.C"}}
    change_json(folder / "config.json", custom_pipelines=pipelines)
    assert outcome(*commands["compress"], capsys)[0] == 0
    made = tmp_path / "out/gpt_pca_nofinetune_k4"
    assert not holding(tmp_path / "out", "evil")
    for name in ("config.json", "tokenizer_config.json"):  # as of a stranger's compressed model
        own = json.loads((made / name).read_text()).get("auto_map", {})
        change_json(made / name, auto_map=foreign | own | {"AutoTokenizer": ["evil/repo--own.C", None]})
    command, words = commands["teach"]
    shutil.copytree(made, tmp_path / "compressed")
    change_json(
        tmp_path / "compressed/config.json", custom_pipelines={"text-generation": {"impl": "evil/repo--own.C"}}
    )
    assert outcome(command, [*words, "--save_strategy", "steps", "--save_steps", 1], capsys)[0] == 0
    assert (tmp_path / "taught/checkpoint-1/config.json").exists()
    assert not holding(tmp_path / "taught", "evil")
    with HubServer({TOKEN: "me"}) as hub:
        reach(hub, monkeypatch)
        publish(tmp_path / "compressed", "me/healed", token=TOKEN)
        assert {"config.json", "tokenizer_config.json"} <= hub.repos["me/healed"].files().keys()
        assert not [name for name, content in hub.repos["me/healed"].files().items() if b"evil" in content]


def test_a_chat_template_has_no_way_out_of_its_sandbox(folder, marker):
    template_that_is_code(folder, marker)
    with pytest.raises(SecurityError):
        load_tokenizer(str(folder)).apply_chat_template([{"role": "user", "content": "x"}])
    assert not marker.exists()


def test_a_foreign_teacher_and_a_foreign_compressed_model(stock, folder, marker, commands, tmp_path, capsys):
    words = ["--baseline", stock, "--ranks", 4, "--output_dir", tmp_path]
    assert outcome(compress, words, capsys)[0] == 0
    (tmp_path / "gpt_pca_nofinetune_k4").rename(tmp_path / "compressed")
    pickle_for_weights(save_torch, folder, marker)
    code, line = outcome(*commands["teach"], capsys)
    assert (code, marker.exists()) == (2, False)
    assert "pickle file with more than weights" in line
    pickle_for_weights(save_torch, tmp_path / "compressed", marker)
    code, line = outcome(*commands["teach"], capsys)
    assert (code, marker.exists()) == (2, False)
    assert str(tmp_path / "compressed") in line


def replaced(path: Path, **changes) -> None:
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **(arrays | changes))


WTE, SCALES, MODEL = "pca_factorized/wte_pca_k4.npy", "pca_factorized/scale_mats_pca_k4.npz", "gpt_pca_nofinetune_k4"
MADE_BEFORE = {
    "objects for wte": lambda root, marker: np.save(root / WTE, np.array([[Touch(marker)]], dtype=object)),
    "objects for scale_up": lambda root, marker: replaced(
        root / SCALES, scale_up=np.array([[Touch(marker)]], dtype=object)
    ),
    "a pickle for wte": lambda root, marker: save_pickle(root / WTE, marker),
    "a pickle for the scales": lambda root, marker: save_pickle(root / SCALES, marker),
    "another shape": lambda root, marker: np.save(root / WTE, np.zeros((3, 4), np.float32)),
    "no numbers": lambda root, marker: replaced(root / SCALES, mean=np.full(16, np.nan, np.float32)),
    "whole numbers": lambda root, marker: replaced(root / SCALES, mean=np.zeros(16, np.int64)),
    "a shape that no memory holds": lambda root, marker: (root / WTE).write_bytes(
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999999, 4), }".ljust(118)
    ),
    "a pickle for the model": lambda root, marker: pickle_for_weights(save_torch, root / MODEL, marker),
    "a deep record": lambda root, marker: (root / MODEL / "compression.json").write_text(f'{{"a": {DEEP}}}'),
}


@pytest.mark.parametrize("kind", MADE_BEFORE)
def test_what_stands_in_an_output_folder_is_as_foreign(kind, stock, marker, tmp_path, capsys):
    words = ["--baseline", stock, "--ranks", 4, "--output_dir", tmp_path]
    assert outcome(compress, words, capsys)[0] == 0
    MADE_BEFORE[kind](tmp_path, marker)
    if "model" not in kind and "record" not in kind:
        shutil.rmtree(tmp_path / MODEL)  # to be made again, of these factors
    before = tree(tmp_path)
    code, line = outcome(compress, words, capsys)
    assert (code, marker.exists()) == (2, False)
    assert str(tmp_path) in line
    assert tree(tmp_path) == before


@pytest.fixture
def begun(tmp_path, corpus) -> list:
    """Begin a run and cut it off behind its first checkpoint; these words go on with it."""
    config = {
        **{"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "max_steps": 3, "do_train": True},
        **{"save_strategy": "steps", "save_steps": 1, "report_to": ["none"], "output_dir": str(tmp_path / "run")},
        **{"tokenizer": str(corpus / "tokenizer"), "validation_file": [str(corpus / "validation.jsonl")]},
        **{"train_file": [str(corpus / "train.jsonl")], "disable_tqdm": True},
    }
    (tmp_path / "run.json").write_text(json.dumps(config))
    with cut_off_at(2):
        train(["--config", str(tmp_path / "run.json")])
    return ["--config", tmp_path / "run.json"]


@pytest.mark.parametrize("save", [save_torch, save_pickle])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_a_checkpoint_with_a_hostile_pickle(name, save, begun, marker, tmp_path, capsys):
    (folder,) = (tmp_path / "run").glob("checkpoint-1")
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    save(folder / name, marker)
    seal(folder)  # without that it passes for damaged, and is not looked at
    code, line = outcome(train, begun, capsys)
    assert (code, marker.exists()) == (2, False)
    assert f"{folder} holds what no run has written" in line


def test_a_checkpoint_with_a_deep_record(begun, tmp_path, capsys):
    (tmp_path / "run/checkpoint-1/trainer_state.json").write_text(f'{{"a": {DEEP}}}')
    seal(tmp_path / "run/checkpoint-1")
    code, line = outcome(train, begun, capsys)
    assert code == 2
    assert "checkpoint-1 holds what no run has written" in line


def test_the_settings_in_a_checkpoint_are_not_looked_at(begun, marker, tmp_path, capsys):
    save_torch(tmp_path / "run/checkpoint-1/training_args.bin", marker)
    seal(tmp_path / "run/checkpoint-1")
    assert outcome(train, begun, capsys)[0] == 0
    assert not marker.exists()


@pytest.mark.parametrize("save", [save_torch, save_pickle])
@pytest.mark.parametrize("word", ["--checkpoint", "--wte_npy", "--scale_npz"])
def test_a_foreign_checkpoint_is_refused(word, save, marker, tmp_path, capsys):
    words = {"--checkpoint": checkpoint(OldNet(DESCENDANT), DESCENDANT, tmp_path / "ckpt.pt")}
    words |= {word: tmp_path / "hostile", "--output_dir": tmp_path / "out"}
    save(tmp_path / "hostile", marker)
    code, line = outcome(import_checkpoint, [part for pair in words.items() for part in pair], capsys)
    assert (code, marker.exists()) == (2, False)
    assert str(tmp_path / "hostile") in line
    assert not (tmp_path / "out").exists()


def dataset_script(folder: Path, marker: Path) -> None:
    (folder / f"{folder.name}.py").write_text(code_that_touches(marker))


def dataset_of_pickles(folder: Path, marker: Path) -> None:
    save_pickle(folder / "validation.pkl", marker)
    split = "configs:\n- config_name: default\n  data_files:\n  - {split: validation, path: validation.pkl}\n"
    (folder / "README.md").write_text(f"---\n{split}---\n")


def dataset_of_yaml_objects(folder: Path, marker: Path) -> None:
    (folder / "validation.txt").write_text("text")
    (folder / "README.md").write_text(f"---\na: !!python/object/apply:os.mkdir ['{marker}']\n---\n")


@pytest.mark.parametrize("strange", [dataset_script, dataset_of_pickles, dataset_of_yaml_objects])
def test_a_foreign_dataset_runs_nothing(strange, stock, marker, tmp_path, capsys):
    (tmp_path / "dataset").mkdir()
    strange(tmp_path / "dataset", marker)
    code, line = outcome(evaluate, ["--models", stock, "--dataset_name", tmp_path / "dataset"], capsys)
    assert (code, marker.exists()) == (2, False)
    assert str(tmp_path / "dataset") in line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("deep.jsonl", b'{"text": ' + b"[" * 2_000 + b"]" * 2_000 + b"}\n"),
        ("footer.parquet", b"PAR1" + b"\xff" * 100 + b"PAR1"),
    ],
)
def test_foreign_text_is_refused(name, content, stock, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    code, line = outcome(evaluate, ["--models", stock, "--eval_file", tmp_path / name], capsys)
    assert code == 2
    assert name in line


@pytest.mark.parametrize(
    "content",
    [f'{{"a": {DEEP}}}', "[1]", f'{{"parameters": {HUGE}}}', '{"run_name": 1}', "\x00", '{"__class__": "x"}'],
)
def test_a_foreign_record_of_a_run_is_refused(content, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/results.json").write_text(content)
    code, line = outcome(report, ["--results", tmp_path], capsys)
    assert code == 2
    assert "run/results.json" in line
