"""The commands as a user types them, in processes of their own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from factorized_gpt2.cli.demo import demo
from factorized_gpt2.report.reporting import read_results
from factorized_gpt2.text.demo_corpus import hold_out, python_documents, write_python_corpus

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*words, cwd) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("script", "words", "complaint"),
    [
        ("train_hf.py", ["--config", "pca_lora_k46.json"], "error: There is no config 'pca_lora_k46.json'"),
        ("compress.py", ["--baseline", "nowhere", "--ranks", "4"], "error: There is no folder nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, script, words, complaint):
    finished = run(REPOSITORY / script, *words, cwd=tmp_path)
    assert finished.returncode == 2
    assert complaint in finished.stderr.splitlines()[-1]
    assert "Traceback" not in finished.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["train_hf.py", "compress.py"])
def test_help(tmp_path, script):
    finished = run(REPOSITORY / script, "--help", cwd=tmp_path)
    assert finished.returncode == 0
    assert re.search(r"--baseline \w+ Folder or Hub id of (a|the) trained", " ".join(finished.stdout.split()))


def test_the_demos_corpus_is_real_and_repeatable():
    documents = python_documents()
    training, validation = hold_out(documents)
    assert documents == python_documents()
    assert sorted(training + validation) == sorted(documents)
    assert set(training).isdisjoint(validation)
    assert len(set(documents)) == len(documents) > 1000
    assert any("lambda" in text for text in documents)


def test_the_demo_runs_to_its_end(tmp_path, capsys, drawn_pictures):
    write_python_corpus(tmp_path / "demo/corpus", vocab_size=512, every=600)
    demo(["--output_dir", str(tmp_path / "demo"), "--max_steps", "2"])
    printed = capsys.readouterr().out
    results = read_results(tmp_path / "demo/model_weights")
    assert [row.family for row in results] == (
        ["baseline"] + ["lowrank-scratch"] * 3 + ["pca-nofinetune"] * 3 + ["pca-lora"] * 3
    )
    assert (tmp_path / "demo/loss_against_rank.png").read_bytes().startswith(b"\x89PNG")
    for row in results:
        assert f"{row.eval_loss:.4f}" in printed
    assert re.search(r"will take about \d+ (s|min) on this machine", printed)
    assert re.search(r"\[#+\.+\] 5 of 9, .* left: Refining", printed)
    assert "gpt_coded_nofinetune_b2" in printed
    sentences = re.findall(r"  gpt_\w+: ['\"]Return a list of", printed)
    assert len(sentences) == 2
