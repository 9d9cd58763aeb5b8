"""`import_checkpoint.py`: the folder it makes, and its complaints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import RANK, VOCAB_SIZE, tiny_model
from old_networks import NANO, Hostile, OldNet, assert_same_logits, checkpoint

from factorized_gpt2.cli.import_checkpoint import import_checkpoint
from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.models.loading import load_baseline, load_compressed
from factorized_gpt2.nanogpt.factor_files import write_old_factors


def run_import(*words) -> int:
    return run_command(import_checkpoint, [str(word) for word in words])


def test_the_command(tmp_path, corpus, tokenizer, ids, caplog):
    options = NANO | {"vocab_size": len(tokenizer) + 5}
    net = OldNet(options)
    path = checkpoint(net, options, tmp_path / "ckpt.pt")
    words = ["--checkpoint", path, "--output_dir", tmp_path / "model", "--tokenizer", corpus / "tokenizer"]
    assert run_import(*words) == 0
    assert "The last 5 rows of the vocabulary have no tokens" in caplog.text
    model = load_baseline(str(tmp_path / "model")).model
    assert_same_logits(model, net, ids)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert (tmp_path / "model" / "tokenizer.json").exists()

    assert run_import(*words, "--cut_vocabulary", True) == 2
    (tmp_path / "model/notes.txt").write_text("mine")
    (tmp_path / "model/model-00001-of-00002.safetensors").touch()
    assert run_import(*words, "--cut_vocabulary", True, "--overwrite", True) == 0
    assert (tmp_path / "model/notes.txt").read_text() == "mine"
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 1
    cut = load_baseline(str(tmp_path / "model")).model
    assert cut.config.vocab_size == len(tokenizer)
    torch.testing.assert_close(cut(ids).logits, net(ids)[..., : len(tokenizer)], atol=1e-5, rtol=1e-5)


def test_the_command_with_factors(tmp_path, ids):
    path = checkpoint(OldNet(NANO), NANO, tmp_path / "ckpt.pt")
    files = {"wte_npy": tmp_path / "wte.npy", "scale_npz": tmp_path / "scales.npz"}
    write_old_factors(tiny_model(scale_up_bias=False), **files)
    words = [word for name, file in files.items() for word in (f"--{name}", file)]
    assert run_import("--checkpoint", path, "--output_dir", tmp_path / "model", *words) == 0
    assert load_compressed(str(tmp_path / "model")).config.n_embd_wte == RANK


def test_what_else_is_beside_the_model_stays(tmp_path):
    path = checkpoint(OldNet(NANO), NANO, tmp_path / "ckpt.pt")
    for name in (".notes.20231224.old", ".gpt_nano.20240101.partial", ".thesis.20240101.old/chapter.tex"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = set(tmp_path.rglob("*"))
    assert run_import("--checkpoint", path, "--output_dir", tmp_path / "gpt_nano") == 0
    assert {found for found in tmp_path.rglob("*") if "gpt_nano" not in found.parts} == before


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "the following arguments are required"),
        (["--checkpoint", "nowhere.pt", "--output_dir", "model"], "nowhere.pt cannot be read as a checkpoint"),
        (["--checkpoint", "x", "--output_dir", "full"], "full exists"),
        (["--checkpoint", "x", "--output_dir", "full/file", "--overwrite", "True"], "output_dir=full/file is a file"),
        (
            ["--checkpoint", "x", "--output_dir", "full", "--overwrite", "True"],
            "full contains other things than a model",
        ),
        (["--checkpoint", "x", "--output_dir", "m", "--cut_vocabulary", "True"], "cut_vocabulary needs a tokenizer"),
        (["--checkpoint", "x", "--output_dir", "m", "--tokenizer", "nowhere"], "There is no folder nowhere"),
    ],
)
def test_the_command_complains_in_one_line(words, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert run_import(*words) == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize("option", ["checkpoint", "wte_npy", "scale_npz"])
def test_a_pipe_in_a_file_s_place_is_not_waited_for(option, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    path = checkpoint(OldNet(NANO), NANO, tmp_path / "ckpt.pt")
    write_old_factors(tiny_model(scale_up_bias=False), tmp_path / "wte.npy", tmp_path / "scales.npz")
    files = {"checkpoint": path, "wte_npy": tmp_path / "wte.npy", "scale_npz": tmp_path / "scales.npz"}
    words = [word for name, file in (files | {option: tmp_path / "pipe"}).items() for word in (f"--{name}", file)]
    assert run_import(*words, "--output_dir", tmp_path / "model") == 2
    assert "pipe is a pipe, a device or the like" in capsys.readouterr().err.splitlines()[-1]


def test_a_tokenizer_that_is_too_large(tmp_path, corpus, capsys):
    path = checkpoint(OldNet(NANO), NANO, tmp_path / "ckpt.pt")
    words = ["--checkpoint", path, "--output_dir", tmp_path / "model", "--tokenizer", corpus / "tokenizer"]
    assert run_import(*words) == 2
    assert f"only {VOCAB_SIZE}" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_the_script(tmp_path):
    torch.save({"model": Hostile(tmp_path / "touched"), "model_args": NANO}, tmp_path / "ckpt.pt")
    script = Path(__file__).resolve().parents[2] / "import_checkpoint.py"
    words = [sys.executable, script, "--checkpoint", "ckpt.pt", "--output_dir", "model"]
    finished = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1].startswith("error: ckpt.pt holds more than weights")
    assert "Traceback" not in finished.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
