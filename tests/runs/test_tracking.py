"""Weights & Biases, by its own client writing to disk."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from conftest import cut_off_at
from wandb.proto.wandb_internal_pb2 import Record

from factorized_gpt2.runs.results import Results
from factorized_gpt2.runs.run import run_experiment
from factorized_gpt2.runs.settings import parse_run

CONFIG = {
    **{"n_layer": 1, "n_head": 2, "n_embd": 16, "n_embd_wte": 4, "block_size": 16, "max_steps": 4, "do_train": True},
    **{"per_device_train_batch_size": 2, "effective_batch_size": 4, "learning_rate": 1e-2, "disable_tqdm": True},
    **{"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
    **{"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "run_name": "lowrank-scratch-k4"},
    **{"report_to": ["wandb"], "project": "new-small-gpt", "wandb_mode": "offline"},
}
BLOCK = 32768  # of W&B's log files, which are LevelDB's


@pytest.fixture
def run(tmp_path, corpus, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    texts = {
        **{"train_file": [str(corpus / "train.jsonl")], "validation_file": [str(corpus / "validation.jsonl")]},
        **{"tokenizer": str(corpus / "tokenizer"), "output_dir": str(tmp_path / "run")},
    }
    (tmp_path / "run.json").write_text(json.dumps(CONFIG | texts))
    return lambda *words: run_experiment(parse_run(["--config", str(tmp_path / "run.json"), *words]))


def recordings(tmp_path) -> list[Path]:
    return sorted((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))


def records(path: Path) -> Iterator[Record]:
    """Read what the client wrote: chunks of a 7-byte head and a part of a record each, none across a block's end."""
    content = path.read_bytes()
    assert content.startswith(b":W&B")
    at, parts = 7, []
    while at + 7 <= len(content):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(b"".join(parts))
            parts = []


def values(items) -> dict:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_what_the_protocol_tracks_is_on_disk(run, tmp_path):
    results = run()
    wandb.teardown()  # ends the client's own process, which writes behind ours
    (path,) = recordings(tmp_path)
    written = list(records(path))
    (opened,) = (record.run for record in written if record.HasField("run"))
    assert (opened.project, opened.display_name) == ("new-small-gpt", "lowrank-scratch-k4")
    history = [values(record.history.item) for record in written if record.HasField("history")]
    for name, curve in (("train/loss", results.training_curve), ("eval/loss", results.validation_curve)):
        logged = [(row["train/global_step"], row[name]) for row in history if name in row]
        assert dict(logged) == pytest.approx(dict(curve))
        assert len(logged) == len(curve) > 1
    summary = {}
    for record in written:
        if record.HasField("summary"):
            summary |= values(record.summary.update)
    tracked = ("validation_loss", "training_loss", "best_iteration", "best_tokens")
    expected = (results.eval_loss, results.train_loss, results.best_step, results.best_tokens)
    assert tuple(summary[name] for name in tracked) == pytest.approx(expected)
    assert results.best_tokens == results.best_step * 4 * 16
    settings = {}
    for record in written:
        if record.HasField("config"):
            settings |= values(record.config.update)
    assert (settings["max_steps"], settings["n_embd_wte"]) == (4, 4)


@pytest.mark.parametrize("mode", ["offline", "dryrun"])
def test_one_line_says_where_it_is_and_wandb_itself_says_nothing(corpus, mode, tmp_path):
    """In a process of its own: W&B writes to the stream that was there when it was imported."""
    texts = {"train_file": [str(corpus / "train.jsonl")], "validation_file": [str(corpus / "validation.jsonl")]}
    texts |= {"tokenizer": str(corpus / "tokenizer"), "output_dir": str(tmp_path / "run"), "use_cpu": True}
    (tmp_path / "run.json").write_text(json.dumps(CONFIG | texts | {"gradient_checkpointing": True}))
    command = [sys.executable, "-m", "factorized_gpt2.cli.train", "--config", str(tmp_path / "run.json")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"WANDB_MODE": mode})
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("step ")]
    (path,) = recordings(tmp_path)
    assert lines[0] == f"W&B logs offline, to {path.parent}"
    assert [line.split(":")[0] for line in lines[1:]] == [f"Saved and reloaded {tmp_path / 'run'}"]
    assert done.stdout.startswith("lowrank-scratch-k4: validation loss")


def ids(tmp_path) -> list[str]:
    return [path.stem.removeprefix("run-") for path in recordings(tmp_path)]


def test_a_run_keeps_its_id_until_it_is_done(run, tmp_path):
    found = []
    for words in ([], ["--overwrite"]):
        with cut_off_at(3):
            run(*words)
        wandb.finish(exit_code=1)  # as at the end of a process that was cut off
        found.append(set(ids(tmp_path)))
    (cut,), (begun_anew,) = found[0], found[1] - found[0]
    run()
    assert sorted(ids(tmp_path)) == sorted([cut, begun_anew, begun_anew])
    assert Results.read(tmp_path / "run").best_step == 4
    run("--overwrite")
    assert len(set(ids(tmp_path))) == 3


def test_nothing_is_recorded_unless_asked(run, tmp_path):
    run("--report_to", "none")
    assert not (tmp_path / "run/wandb").exists()
