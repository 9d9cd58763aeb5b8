"""The benchmark scripts, in miniature: they run and print the tables that the documentation shows."""

import json
import re
from dataclasses import replace
from pathlib import Path

import ablation
import baselines
import coded_table
import decoding
import gpu
import gpu_experiments
import gpu_families
import gpu_parts
import loss
import methods
import pytest
import scaling
import speed
import text
import torch
import training
from bench_run import BenchRun
from conftest import DOCUMENTS

from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.text import demo_corpus as corpus_module

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = ["--baseline_steps", "4", "--calibration_tokens", "512", "--eval_tokens", "512"]


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture
def words(work_dir, monkeypatch):
    monkeypatch.setattr(baselines, "VOCAB_SIZE", 300)
    monkeypatch.setattr(corpus_module, "python_documents", lambda: DOCUMENTS)
    return ["--text", "python", "--work_dir", str(work_dir), *SMALL]


def table(capsys) -> list[list[str]]:
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|-")]


def test_methods(words, capsys):
    methods.main([*words, "--refine_steps", "2", "--seeds", "0", "1"])
    head, *rows = table(capsys)
    assert head == ["method", *(f"k = {rank}" for rank in (16, 32, 64, 128)), "seconds"]
    assert [row[0] for row in rows] == ["pca", "weighted", "joint", "tokenwise", "tokenwise, refined 2"]
    assert all(cell.endswith("(0%)") for cell in rows[0][1:-1])


def test_ablation(words, capsys):
    ablation.main([*words, "--rank_index", "0"])
    head, *rows = table(capsys)
    assert head == ["variant", "k = 16"]
    assert len(rows) > 20
    assert all(re.fullmatch(r"-?[\d.]+%", cell) for _, cell in rows)
    figures = dict(rows)
    assert figures["tokenwise"] != figures["tokenwise, head not compensated"] != figures["joint"]


def test_speed(capsys, monkeypatch):
    monkeypatch.setattr(speed, "BY_RANK", ("pca", "tokenwise"))
    speed.main(["--vocab_size", "200", "--width", "24", "--ranks", "4", "8", "--tokens", "64"])
    head, *rows, sharing_head, sharing = table(capsys)
    assert head == ["method", "seconds", "peak memory, GB", "of it before, GB"]
    assert [row[0] for row in rows] == ["pca", "tokenwise"]
    assert all(float(row[2]) > 0 for row in rows)
    assert sharing_head[-1] == "one for all / one for each"
    assert RATIO.fullmatch(sharing[-1])


RATIO = re.compile(r"\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)")

SHAPE = ["--ranks", "4", "--width", "64", "--vocab_size", "99"]


def test_loss(capsys):
    words = [*SHAPE, "--rows", "32", "--rounds", "2"]
    loss.main(words)
    rows = [row for row in table(capsys) if row[0] == "4"]
    assert [row[1] for row in rows] == ["float32", "bfloat16", *["frozen", "trained"] * 2]
    assert all(0 <= float(cell) < 1e-4 for cell in rows[0][2:])
    assert float(rows[2][4]) >= 0
    assert all(RATIO.fullmatch(cell) for row in rows[4:] for cell in row[4:])


NANOGPT = """
import torch
from dataclasses import dataclass
print("a line to stdout")
@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head = torch.nn.Embedding(config.vocab_size, config.vocab_size)
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate)
    def forward(self, idx, targets):
        logits = self.head(idx)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def test_training(capsys, tmp_path):
    (tmp_path / "model.py").write_text(NANOGPT)
    words = [*SHAPE, "--n_layer", "1", "--block_size", "16", "--rounds", "2", "--nanogpt", str(tmp_path)]
    training.main(words)
    head, *rows = table(capsys)
    assert head[3:] == ["nanoGPT / this", "stock / this", "unfactorized / this"]
    assert [row[0] for row in rows] == ["nanoGPT", "stock", "unfactorized", "k = 4", "k = 4, LoRA"]
    assert all(RATIO.fullmatch(cell) for row in rows for cell in row[3:])
    with pytest.raises(UserError, match="There is no"):
        training.main([*words[:-1], str(tmp_path / "nowhere")])


def test_decoding(capsys):
    decoding.main([*SHAPE, "--n_layer", "1", "--tokens", "3", "--rounds", "2", "--compile", "False"])
    head, plain, factorized, ways_head, *ways = table(capsys)
    assert head[:4] == ["k", "float32, ms", "bfloat16, ms", "int8 trunk, ms"]
    assert plain[0] == "-"
    assert all(RATIO.fullmatch(cell) for cell in factorized[4:])
    assert ways_head[2] == "generate / bare"
    assert [row[0] for row in ways] == ["-", "4"]


def test_text(capsys, corpus):
    words = ["--text_file", str(corpus / "train.jsonl"), "--block_size", "16", "--processes", "1"]
    text.main([*words, "--tokenizer", str(corpus / "tokenizer")])
    _, row = table(capsys)
    assert row[0] == "1"
    assert float(row[6]) >= float(row[5]) >= float(row[4]) > 0
    with pytest.raises(UserError, match="needs a --tokenizer"):
        text.main(words)


def test_scaling(capsys):
    words = ["--ranks", "4", "--n_layer", "1", "--width", "64", "--vocab_size", "97", "--block_size", "16"]
    words += ["--lora_rank", "2", "--gpus", "2", "8", "--flops", "1e9", "--bandwidth", "1e6"]
    scaling.main([*words, "--rounds", "1", "--timed_layers", "1", "--timed_block_size", "8"])
    rows = table(capsys)
    names = ["not factorized", "k = 4", "k = 4, LoRA"]
    assert [row[0] for row in rows] == ["", *names, "", *names, "", "stock", "unfactorized", *names[1:]]
    block = 12 * 64 * 64 + 13 * 64  # matrices, biases, norms
    whole = 97 * 64 + 16 * 64 + block + 2 * 64
    reduced = 2 * (7 / 8) * 4 * whole
    flops = 6 * (whole - 16 * 64) + 6 * 16 * 64
    assert rows[1][1:4] == [f"{whole / 1e6:.1f} M", f"{flops / 1e6:.0f}", f"{16 * whole / 1e9:.2f}"]
    assert rows[1][5] == f"{reduced / 1e6:.0f}"
    # 16 blocks on 8 GPUs: two blocks of 16 tokens each
    assert rows[5][2] == f"{flops * 32 / 1e9 * 1000:.0f} + {reduced / 1e6 * 1000:.0f}"
    for row in rows[9:]:
        assert all(int(figure) > 0 for figure in row[1:3])


@pytest.fixture
def two_experiments(tmp_path, monkeypatch):
    """Let two experiments stand for the thirteen, and be planned for a machine so slow that their steps are few."""
    for name in ("baseline", "pca_lora_k64"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"extends": str(CONFIGS / f"{name}.json")}))
    (tmp_path / "grid.json").write_text(json.dumps({"experiments": ["baseline", "pca_lora_k64"]}))
    monkeypatch.setattr(gpu_experiments, "GRID", str(tmp_path / "grid.json"))
    monkeypatch.setattr(gpu_experiments, "PILOT_STEPS", (2,))
    monkeypatch.setattr(gpu_experiments, "LEAST_STEPS", 4)
    measure = gpu_experiments._pace

    def slow(*arguments):
        pace = measure(*arguments)
        assert min(pace.step, pace.lora_step, pace.run) > 0
        return gpu_experiments.Pace(step=100, lora_step=100, run=1)

    monkeypatch.setattr(gpu_experiments, "_pace", slow)


@pytest.fixture
def less(monkeypatch):
    """Rehearse with fewer models and rounds."""
    small, models = replace(gpu.SMALL, batches=(3,), rounds=1, steps=1), training.models
    for module in (gpu, gpu_parts):
        monkeypatch.setattr(module, "SMALL", small)
    monkeypatch.setattr(training, "models", lambda arguments: list(models(arguments))[1:3])
    monkeypatch.setattr(gpu_families, "WAYS", {"coded": gpu_families.WAYS["coded"]})


@pytest.mark.usefixtures("two_experiments", "less")
def test_gpu(tmp_path, capsys):
    words = ["--device", "cpu", "--small", "True", "--output_dir", str(tmp_path / "out")]
    gpu.main([*words, "--seconds", "1000"])
    printed = capsys.readouterr().out
    assert "Failed: nothing." in printed
    assert (tmp_path / "out/gpu.md").read_text() == printed
    found = json.loads((tmp_path / "out/gpu.json").read_text())
    ways = [row["way"] for row in found["tables"]["k = 16, frozen head, 64 tokens, V = 503, bfloat16"]]
    assert ways[:2] == ["materialised", "blockwise"]
    assert {row["form"] for row in found["tables"]["Decoding, batch 3, bfloat16, 4 new tokens"]} == {
        *("eager", "static cache, compiled")
    }
    names = ["unfactorized", "k = 8"]
    for dtype in ("bfloat16", "float32"):
        rows = found["tables"][f"Training, {dtype}, 2 x 32 tokens, compiled"]
        assert [row["model"] for row in rows] == names
    compressed = found["tables"]["Ways to compress the baseline, nothing trained"]
    assert [row["way"] for row in compressed] == [
        "coded",
        "coded",
    ]  # at the bytes of the one rank, and at half of them
    baseline, healed, lora = json.loads((tmp_path / "out/experiments.json").read_text())
    assert (baseline["run_name"], lora["run_name"]) == ("baseline", "pca-lora-k5-r3")
    assert healed["run_name"].startswith("coded-b1.25")
    steps, lora_steps = (run["settings"]["max_steps"] for run in (baseline, lora))
    assert 4 <= steps <= 6  # of 150 s for both, in what the other parts leave of 1000
    assert lora_steps == -(-steps // 2)


@pytest.fixture
def bench_run(tmp_path):
    """Make a run of 100 seconds whose clock is a list's last number."""
    times = [0.0]
    return BenchRun(tmp_path / "out", 100, "here", lambda: times[-1]), times


def test_a_run_of_benchmarks_keeps_its_budget_and_shares_out_what_is_left(bench_run):
    bench_run, times = bench_run
    with bench_run.part("first", 0.25):
        assert bench_run.left == 25
        seconds = bench_run.in_turns("both", {"slow": lambda: times.append(26) or 1.0, "late": lambda: 2.0}, 3)
        assert seconds == {"slow": [1.0]}
    with bench_run.part("second", 1.0):
        assert bench_run.left == 74
        assert bench_run.has_time(73)
        assert not bench_run.has_time(74)


def test_a_run_of_benchmarks_notes_failures_and_goes_on(bench_run, tmp_path, capsys):
    bench_run, _ = bench_run

    def fail():
        raise ValueError("too large")

    with bench_run.part("first", 0.5):
        assert bench_run.in_turns("both", {"bad": fail, "good": lambda: 1.0}, 2) == {"good": [1.0, 1.0]}
        bench_run.table("Table", [{"a": 1}])
        fail()
    bench_run.wanted("speed", ">= 2", 2.5)
    bench_run.wanted("memory", "<= 0.03", 0.04)
    bench_run.end()
    found = json.loads((tmp_path / "out/gpu.json").read_text())
    assert found["failed"] == ["both, bad: ValueError: too large", "first: ValueError: too large"]
    assert [row[""] for row in found["wanted"]] == ["met", "missed"]
    assert (tmp_path / "out/failures.txt").read_text().count("Traceback") == 2
    assert "Failed: both, bad: ValueError: too large; first: ValueError: too large." in capsys.readouterr().out


def test_without_cuda_gpu_is_a_line_and_exit_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_command(gpu.main, ["--output_dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "error: There is no CUDA here, and nothing was measured; --device cpu --small True rehearses it.\n"
    )
    assert not (tmp_path / "out").exists()


def test_coded_table(capsys):
    coded_table.main(["--vocab_size", "300", "--width", "64", "--n_layer", "1", "--bits", "3", "--rounds", "1"])
    lines = table(capsys)
    assert lines[0][:3] == ["bits a weight", "MB", "columns"]
    assert float(lines[1][0]) == pytest.approx(3, abs=0.1)
    assert lines[3][0] == lines[1][2]
