"""The benchmark scripts, in miniature: they run and print the tables that the documentation shows."""

import re

import ablation
import baselines
import lora
import methods
import pytest
import speed
from conftest import DOCUMENTS

from factorized_gpt2 import corpus

SMALL = ["--baseline_steps", "4", "--calibration_tokens", "512", "--eval_tokens", "512"]


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture
def words(work_dir, monkeypatch):
    monkeypatch.setattr(baselines, "VOCAB_SIZE", 300)
    monkeypatch.setattr(corpus, "python_documents", lambda: DOCUMENTS)
    return ["--text", "python", "--work_dir", str(work_dir), *SMALL]


def table(capsys) -> list[list[str]]:
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|-")]


def test_methods(words, capsys):
    methods.main([*words, "--refine_steps", "2", "--seeds", "0", "1"])
    head, *rows = table(capsys)
    assert head == ["k", "method", "MB", "loss", "gap closed", "range", "seconds"]
    names = ["pca", "weighted", "joint", "tokenwise", "tokenwise, refined 2"]
    assert [row[:2] for row in rows] == [[str(rank), name] for rank in (16, 32, 64, 128) for name in names]
    assert {row[4] for row in rows if row[1] == "pca"} == {"0.0%"}
    assert len({row[2] for row in rows if row[0] == "32"}) == 1


def test_ablation(words, capsys):
    ablation.main([*words, "--rank_index", "0"])
    head, *rows = table(capsys)
    assert head == ["variant", "k = 16"]
    assert len(rows) > 20
    assert all(re.fullmatch(r"-?[\d.]+%", cell) for _, cell in rows)
    figures = dict(rows)
    assert figures["tokenwise"] != figures["tokenwise, head not compensated"] != figures["joint"]


def test_lora(words, capsys):
    lora.main([*words, "--steps", "2", "--refine_steps", "1", "--rank_index", "0"])
    head, *rows = table(capsys)
    assert head == ["k", "start", "KL weight", "step 0", "1", "2"]
    assert [row[1] for row in rows] == [
        "pca",
        "pca",
        "joint",
        "tokenwise",
        "tokenwise, refined 1",
        "tokenwise, refined 1",
    ]
    assert rows[0][3] == rows[1][3] != rows[3][3]


def test_speed(capsys, monkeypatch):
    monkeypatch.setattr(speed, "METHODS", ("pca", "tokenwise"))
    speed.main(["--vocab_size", "200", "--width", "24", "--ranks", "4", "8", "--tokens", "64"])
    head, *rows = table(capsys)
    assert head == ["method", "seconds", "peak memory, GB", "of it before, GB"]
    assert [row[0] for row in rows] == ["pca", "tokenwise"]
    assert all(float(row[2]) > 0 for row in rows)
