"""The record of a run, as a file that is whole or refused, and what it says of code, libraries and machine."""

import json
import math
import os
import platform
import random
import subprocess
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from factorized_gpt2.common.errors import UserError
from factorized_gpt2.report.reporting import read_results
from factorized_gpt2.runs import provenance
from factorized_gpt2.runs.results import Results

RANKS = (64, 128, 256, 512)
LOSSES = {
    "lowrank-scratch": (3.4, 3.3, 3.2, 3.1),
    "pca-nofinetune": (7.0, 6.0, 5.0, 4.0),
    "pca-lora": (3.6, 3.25, 3.05, 2.98),
}
SCRATCH = {"n_layer": 12, "n_head": 12, "n_embd": 768, "max_steps": 10_000}
SETTINGS = {"pca-nofinetune": {"max_steps": -1}, "pca-lora": {"n_layer": None, "max_steps": 5_000}}


def outcome(family: str, rank: int | None, loss: float) -> Results:
    """Make the results of a run: float32, and where it trains with two points on each curve."""
    parameters = 87_000_000 + 50_000 * rank if rank else 124_439_808
    training = {
        "train_loss": loss + 0.2,
        "best_step": 1000,
        "best_tokens": 32_768_000,
        "trained_parameters": 2_345_678 if family == "pca-lora" else parameters,
        "train_seconds": 500.1,
        "tokens_per_second": 30_123.4,
        "training_curve": [[500, loss + 0.7], [1000, loss + 0.2]],
        "validation_curve": [[500, loss + 0.5], [1000, loss]],
    }
    return Results(
        run_name=f"{family}-k{rank}" if rank else family,
        family=family,
        n_embd_wte=rank,
        eval_loss=loss,
        perplexity=math.exp(loss),
        parameters=parameters,
        vocabulary_parameters=50_257 * (rank or 768),
        bytes=4 * parameters,
        vocabulary_bytes=4 * 50_257 * (rank or 768),
        settings={"seed": 42, "validation_file": ["held_out.txt"]} | SETTINGS.get(family, SCRATCH),
        versions={"python": "3.13.1", "torch": "2.13.0"},
        words=["--seed=42"],
        git_commit="c" * 40,
        start_fingerprint="f" * 64 if family.startswith("pca") else None,
        device="cpu",
        processes=2,
        disk_bytes=4 * parameters + 8000,
        peak_memory_bytes=2_500_000_000 + (rank or 0),
        seconds=600.25,
        spectrum=[kept / 768 for kept in range(1, 769)] if family.startswith("pca") else None,
        **({} if family == "pca-nofinetune" else training),
    )


PROTOCOL = [outcome("baseline", None, 3.0)] + [
    outcome(family, *pair) for family, losses in LOSSES.items() for pair in zip(RANKS, losses, strict=True)
]
BASELINE, *_ = PROTOCOL
UNTRAINED, TRAINED = outcome("pca-nofinetune", 64, 7.0), outcome("pca-lora", 512, 2.98)
REQUIRED = {item.name: getattr(UNTRAINED, item.name) for item in fields(Results)[:11]}


@pytest.mark.parametrize("results", [UNTRAINED, TRAINED], ids=["untrained", "trained"])
def test_results_are_read_as_they_were_written(tmp_path, results):
    results.write(tmp_path / "run")
    assert Results.read(tmp_path / "run") == results
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["results.json"]


def test_what_was_not_measured_is_null(tmp_path):
    UNTRAINED.write(tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content == asdict(UNTRAINED)
    nulls = {name for name, value in content.items() if value is None}
    of_training = {"train_loss", "best_step", "best_tokens", "train_seconds", "tokens_per_second"}
    assert nulls == {"fingerprint", "bits_per_weight"} | of_training


def test_what_an_earlier_version_did_not_write_has_its_default(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(REQUIRED))
    results = Results.read(tmp_path)
    assert results == Results(**REQUIRED)
    assert (results.processes, results.words, results.spectrum) == (1, [], None)


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_a_folder_without_results_has_none(tmp_path, folder):
    assert Results.read(tmp_path / folder) is None


def _without(name: str) -> dict:
    return {key: value for key, value in REQUIRED.items() if key != name}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (json.dumps(REQUIRED | {"colour": "red"}), "does not hold the results of a run: .*'colour'"),
        (json.dumps(_without("eval_loss")), "does not hold the results of a run: .*'eval_loss'"),
        (json.dumps(REQUIRED)[:-1], "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
        (json.dumps(REQUIRED | {"eval_loss": float("nan")}), "NaN is not a number"),
        (json.dumps(REQUIRED | {"perplexity": float("inf")}), "Infinity is not a number"),
        ("[1]", "must hold a JSON object, not a list"),
    ],
)
def test_a_file_that_holds_no_results_is_named(tmp_path, text, complaint):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint) as caught:
        Results.read(tmp_path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def _stop_halfway(path: Path, text: str, **kwargs) -> None:
    path.write_bytes(text[: len(text) // 2].encode())
    raise OSError("disk full")


@pytest.mark.parametrize("is_first", [True, False])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, is_first):
    if not is_first:
        UNTRAINED.write(tmp_path)
    monkeypatch.setattr(Path, "write_text", _stop_halfway)
    with pytest.raises(OSError, match="disk full"):
        TRAINED.write(tmp_path)
    assert Results.read(tmp_path) == (None if is_first else UNTRAINED)
    assert len(list(tmp_path.iterdir())) == (0 if is_first else 1)


def test_results_are_replaced(tmp_path):
    UNTRAINED.write(tmp_path)
    TRAINED.write(tmp_path)
    assert Results.read(tmp_path) == TRAINED


def test_results_are_read_by_family_and_rank(tmp_path):
    order = random.Random(1).sample(range(13), 13)
    for number, row in zip(order, PROTOCOL, strict=True):
        row.write(tmp_path / f"run{number:02}")
    (tmp_path / "unfinished").mkdir()
    assert read_results(tmp_path) == PROTOCOL


def test_no_results_are_an_error_unless_they_may_be_missing(tmp_path):
    with pytest.raises(UserError, match=f"No results under {tmp_path}: no run has finished there."):
        read_results(tmp_path)
    assert read_results(tmp_path, missing_ok=True) == []


def test_versions_are_those_installed():
    versions = provenance.versions()
    assert versions["python"] == platform.python_version()
    assert torch.__version__.startswith(versions["torch"].split("+")[0])
    assert versions["transformers"] == version("transformers")
    assert all(versions.values())


class Checkout:
    """A git repository with one commit of a file, named as the module that asks for its commit."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / "provenance.py"
        self.git("init", "--quiet")
        self.file.write_text("print()\n")
        self.git("add", self.file.name)
        self.git("commit", "--quiet", "--message=one")
        self.commit = self.git("rev-parse", "HEAD")

    def git(self, *words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        # In a git hook, these would point at another repository.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        finished = subprocess.run(
            ["git", *identity, *words], cwd=self.folder, env=environment, check=True, capture_output=True, text=True
        )
        return finished.stdout.strip()


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


def test_the_commit_is_that_of_the_code_whatever_folder_it_runs_in(checkout, monkeypatch):
    here = provenance.git_commit()
    monkeypatch.chdir(checkout.folder)
    assert provenance.git_commit() == here
    assert here != checkout.commit


def test_a_commit_is_dirty_where_files_differ_from_it(checkout, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(checkout.file))
    checkout.git("tag", "--annotate", "v1", "--message=tags do not matter")
    assert len(checkout.commit) == 40
    assert provenance.git_commit() == checkout.commit
    checkout.file.write_text("print(1)\n")
    assert provenance.git_commit() == f"{checkout.commit}-dirty"


def test_code_that_a_checkout_does_not_track_has_no_commit(checkout, monkeypatch):
    installed = checkout.folder / "venv"
    installed.mkdir()
    (installed / "provenance.py").write_text("print()\n")
    monkeypatch.setattr(provenance, "__file__", str(installed / "provenance.py"))
    assert provenance.git_commit() is None


def test_code_outside_a_checkout_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.git_commit() is None


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_commit() is None


def test_peak_memory_is_in_bytes_and_never_falls():
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    before = provenance.peak_memory_bytes(torch.device("cpu"))
    assert 5e7 < before < installed  # with torch loaded, over 50 MB: kilobytes would be too small
    torch.zeros(1 << 20)
    assert provenance.peak_memory_bytes(torch.device("cpu")) >= before


def test_the_cpu_is_called_cpu():
    assert provenance.device_name(torch.device("cpu")) == "cpu"
