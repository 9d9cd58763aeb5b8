"""Bad input of every kind: one line that names the culprit, exit code 2, nothing left behind; and thousands at random.

`soak/bad_inputs.py` tries 2,000; here is a table of the kinds that are known, and a sample of the others.
"""

import io
import json
import os
import shutil

import numpy as np
import pytest
import torch
from attempts import Case, attempt, judge
from bad_inputs import try_cases
from material import COMMANDS, RANK, make_material
from safetensors.torch import load_file, save

from factorized_gpt2.cli.shell import run_command


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    make_material(folder)
    return folder


def npy(array, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def spoilt_weights(material, change) -> bytes:
    weights = load_file(material / "baseline/model.safetensors")
    return save(change(weights), metadata={"format": "pt"})


def poisoned(value: float):
    def change(weights):
        weights["transformer.wpe.weight"][3, 2] = value
        return weights

    return change


def configured(material, name: str, **changes) -> bytes:
    return json.dumps(json.loads((material / name).read_text()) | changes).encode()


def with_prefix(tokenizer: str) -> bytes:
    content = json.loads(tokenizer)
    content["model"]["continuing_subword_prefix"] = "long"
    return json.dumps(content).encode()


def with_token(material, number: int) -> bytes:
    content = json.loads((material / "tokenizer/tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": number, "content": "<new>"})
    content["model"]["vocab"]["<new>"] = number
    return json.dumps(content).encode()


OUT = ("--output_dir", "out")
# command, further words, files made of the material, what the line must hold
TABLE = {
    "unknown key": (
        "train",
        (),
        lambda m: {"scratch.json": configured(m, "scratch.json", lerning_rate=1)},
        "learning_rate",
    ),
    "unknown flag": ("train", ("--max_stepz", "3"), None, "max_steps"),
    "wrong type": (
        "train",
        (),
        lambda m: {"scratch.json": configured(m, "scratch.json", max_steps="many")},
        "max_steps",
    ),
    "broken config": ("train", (), lambda m: {"scratch.json": b'{"max_steps": 1'}, "scratch.json"),
    "contradiction": ("lora", ("--baseline", "baseline"), None, "contradicts"),
    "NaN learning rate": ("train", ("--learning_rate", "nan"), None, "learning_rate"),
    "infinite weight decay": ("train", ("--weight_decay", "inf"), None, "weight_decay"),
    "dropout above 1": ("train", ("--dropout", "1.5"), None, "dropout"),
    "negative steps": ("train", ("--max_steps", "-5"), None, "max_steps"),
    "rank 0": ("compress", ("--ranks", "0", *OUT), None, "rank"),
    "negative rank": ("compress", ("--ranks", "-3", *OUT), None, "rank"),
    "rank above d": ("compress", ("--ranks", "1000", *OUT), None, "1000"),
    "repeated rank": ("compress", ("--ranks", "3", "3", *OUT), None, "twice"),
    "rank of a run above d": ("train", ("--n_embd_wte", "1000"), None, "n_embd_wte"),
    "no baseline": ("compress", ("--baseline", "nowhere", *OUT), None, "nowhere"),
    "truncated baseline": (
        "compress",
        OUT,
        lambda m: {"baseline/model.safetensors": (m / "baseline/model.safetensors").read_bytes()[:500]},
        "baseline",
    ),
    "NaN in the weights": (
        "compress",
        OUT,
        lambda m: {"baseline/model.safetensors": spoilt_weights(m, poisoned(float("nan")))},
        "wpe.weight",
    ),
    "infinity in the weights": (
        "compress",
        OUT,
        lambda m: {"baseline/model.safetensors": spoilt_weights(m, poisoned(float("inf")))},
        "wpe.weight",
    ),
    "a weight missing": (
        "compress",
        OUT,
        lambda m: {
            "baseline/model.safetensors": spoilt_weights(
                m, lambda w: {k: v for k, v in w.items() if k != "transformer.ln_f.bias"}
            )
        },
        "ln_f.bias",
    ),
    "wrong architecture": (
        "compress",
        OUT,
        lambda m: {"baseline/config.json": json.dumps({"model_type": "bert"}).encode()},
        "bert",
    ),
    "compressed already": ("compress", ("--baseline", "weights/gpt_pca_nofinetune_k4", *OUT), None, "factorized"),
    "no such tokenizer": ("evaluate", ("--tokenizer", "larger"), None, "larger"),
    "a tokenizer at which its library panics": (
        "evaluate",
        (),
        lambda m: {"baseline/tokenizer.json": with_prefix((m / "baseline/tokenizer.json").read_text())},
        "No tokenizer can be loaded from 'baseline'",
    ),
    "a tokenizer larger than the vocabulary": (
        "evaluate",
        ("--tokenizer", "tokenizer"),
        lambda m: {"tokenizer/tokenizer.json": with_token(m, 270)},
        "271",
    ),
    "a token beyond the vocabulary": (
        "lora",
        (),
        lambda m: {f"weights/gpt_pca_nofinetune_k{RANK}/tokenizer.json": with_token(m, 5000)},
        "5001",
    ),
    "blocks longer than positions": ("evaluate", ("--block_size", "4000"), None, "4000"),
    "empty text": ("train", (), lambda m: {"train.jsonl": b""}, "train.jsonl"),
    "text that is not UTF-8": (
        "evaluate",
        ("--eval_file", "text.txt"),
        lambda m: {"text.txt": b"\xff\xfe\x00abc"},
        "text.txt",
    ),
    "a row that is null": (
        "evaluate",
        (),
        lambda m: {"validation.jsonl": b" null\n" + (m / "validation.jsonl").read_bytes()},
        "line 1 is no object",
    ),
    "a row that is null after rows of text": (
        "train",
        ("--streaming", "True"),
        lambda m: {"train.jsonl": (m / "train.jsonl").read_bytes() + b"\n\tnull\n"},
        "line 20 is no object",
    ),
    "a row without the column": (
        "train",
        (),
        lambda m: {"train.jsonl": (m / "train.jsonl").read_bytes() + b'{"words": "a"}\n'},
        "line 19 has no column 'text'; its columns are words",
    ),
    "a list where text was": (
        "train",
        (),
        lambda m: {"train.jsonl": (m / "train.jsonl").read_bytes() * 1000 + b'{"text": ["a"]}\n'},
        "line 18001: the column 'text' does not hold text",
    ),
    "half of a surrogate pair": (
        "train",
        (),
        lambda m: {"train.jsonl": b'{"text": "\\ud800"}\n'},
        "train.jsonl",
    ),
    "an element that is null": (
        "evaluate",
        ("--eval_file", "text.json"),
        lambda m: {"text.json": b'[{"text": "a"}, null]'},
        "text.json: element 2",
    ),
    "too little text for a block": (
        "train",
        ("--train_file", "text.txt"),
        lambda m: {"text.txt": b"one line\n"},
        "too few for one block",
    ),
    "no such column": ("train", ("--text_column", "words"), None, "words"),
    "no such text": ("train", ("--train_file", "gone.jsonl"), None, "gone.jsonl"),
    "objects in a factor file": (
        "import factors",
        (),
        lambda m: {"wte.npy": npy(np.array([{"a": 1}], dtype=object), allow_pickle=True)},
        "wte.npy",
    ),
    "a factor of the wrong shape": ("import factors", (), lambda m: {"wte.npy": npy(np.zeros((3, 2)))}, "has shape"),
    "factors that are no archive": ("import factors", (), lambda m: {"scales.npz": b"nothing"}, "scales.npz"),
    "a model of another baseline": ("compress", ("--baseline", "other"), None, "was not made from other"),
    "a checkpoint cut off": ("import", (), lambda m: {"ckpt.pt": (m / "ckpt.pt").read_bytes()[:300]}, "ckpt.pt"),
    "results that are none": ("report", (), lambda m: {"runs/baseline/results.json": b"[]"}, "results.json"),
    "a path that no file can have": (
        "experiments",
        ("--accelerate_config", 5000 * "x"),
        None,
        "There is no accelerate config",
    ),
    "an empty name of a config": ("train", ("--config", ""), None, "There is no config ''"),
    "a folder for a config": ("train", ("--config", "."), None, "There is no config '.'"),
    "the root for a folder": ("train", ("--output_dir", "/"), None, "output_dir=/ is the root folder"),
    "a file in a model's place": (
        "compress",
        ("--output_dir", "."),
        lambda m: {f"gpt_pca_nofinetune_k{RANK}": b"notes"},
        f"gpt_pca_nofinetune_k{RANK}, where the model of rank {RANK} belongs, is a file",
    ),
    "a file for the factors": (
        "compress",
        ("--output_dir", "."),
        lambda m: {"pca_factorized": b""},
        "pca_factorized",
    ),
    "a grid without runs": ("experiments", (), lambda m: {"experiments.json": b"{}"}, "experiments"),
}


@pytest.mark.parametrize("kind", TABLE)
def test_it_is_refused_in_one_line(kind, material):
    command, words, files, culprit = TABLE[kind]
    outcome, wrong = judge(material, Case(kind, command, words, files(material) if files else {}))
    assert not wrong
    assert outcome.code == 2, outcome.error
    assert culprit in outcome.error


@pytest.mark.parametrize("name", COMMANDS)
def test_good_input_is_not(name, material):
    outcome, wrong = judge(material, Case("nothing", name, OUT if name == "compress" else ()))
    assert (outcome.code, wrong) == (0, [])


def test_debug_shows_the_traceback(capsys):
    words = ["--baseline", "nowhere", "--ranks", "4"]
    assert run_command(COMMANDS["compress"][0], [*words, "--debug"]) == 2
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert told.splitlines()[-1].startswith("error: ")


def test_what_is_no_refusal_is_told():
    """The judge itself: an error that is no line, a hang, a file that stays."""

    def fail(words):
        raise RuntimeError("a defect")

    def hang(words):
        while True:
            pass

    assert "a defect" in attempt(fail, []).failure
    assert attempt(hang, [], seconds=1).failure


def test_a_sample_of_bad_inputs(material):
    failures = []

    def each(case):
        _, wrong = judge(material, case)
        if wrong:
            failures.append((case, wrong))

    try_cases(material, 60, each)
    assert not failures


def test_torch_is_as_it_was():
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.fixture
def odd_paths(material, tmp_path, monkeypatch):
    """Work in a copy of the material, among paths that lead to no plain file or folder."""
    folder = shutil.copytree(material, tmp_path / "work")
    (folder / "text.jsonl").mkdir()
    (folder / "tokens.bin").mkdir()
    for name in ("pipe.jsonl", "pipe.bin"):
        os.mkfifo(folder / name)
    (folder / "broken").symlink_to("gone")
    monkeypatch.chdir(folder)


@pytest.mark.usefixtures("odd_paths")
@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("evaluate", ["--eval_file", "text.jsonl"], "text.jsonl is a folder, not a file"),
        ("evaluate", ["--eval_file", "tokens.bin"], "tokens.bin is a folder, not a file"),
        ("evaluate", ["--eval_file", "pipe.jsonl"], "pipe.jsonl is a pipe"),
        ("evaluate", ["--eval_file", "pipe.bin"], "pipe.bin is a pipe"),
        ("evaluate", ["--eval_file", "broken"], "The file broken does not exist"),
        ("evaluate", ["--models", "pipe.bin"], "pipe.bin is a file, not the folder of a model"),
        ("compress", ["--output_dir", "broken"], "output_dir=broken is a link to a folder that does not exist"),
        ("report", ["--output_dir", "broken"], "output_dir=broken is a link to a folder that does not exist"),
        ("experiments", ["--accelerate_config", ""], "There is no accelerate config ''"),
    ],
)
def test_a_path_that_leads_to_something_else_is_named_for_what_it_is(command, words, said):
    main, good = COMMANDS[command]
    outcome = attempt(main, [*good, *words], seconds=30)
    assert (outcome.failure, outcome.code) == ("", 2)
    assert outcome.error.strip().splitlines()[-1].startswith(f"error: {said}")
