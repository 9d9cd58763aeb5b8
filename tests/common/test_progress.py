"""What long work shows: bars on a terminal, quiet lines in a log."""

import io
import logging

import pytest
from conftest import Terminal
from transformers import TrainerControl, TrainerState, TrainingArguments

from factorized_gpt2.common import progress
from factorized_gpt2.common.progress import Progress
from factorized_gpt2.trainer.progress import LogLines, StepProgress


@pytest.fixture
def clock(monkeypatch):
    """Tell tqdm a time that passes only when the test says so."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_a_bar_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert list(Progress(range(3), desc="Working")) == [0, 1, 2]
    assert "Working:   0%|" in terminal.getvalue()
    assert "\n" not in terminal.getvalue()


def test_short_work_writes_nothing_into_a_log(capsys):
    assert list(Progress(range(3), desc="Working")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_long_work_writes_a_line_a_minute_into_a_log(capsys, clock):
    for _ in Progress(range(100), desc="Working"):
        clock[0] += 6.0
    lines = capsys.readouterr().err.strip().splitlines()
    assert 8 <= len(lines) <= 10
    assert lines[0] == "Working: 10 of 100, 09:00 left"
    assert all(line.startswith("Working: ") for line in lines)


def test_no_description_no_line(capsys, clock):
    for _ in Progress(range(100), disable=True):
        clock[0] += 6.0
    assert capsys.readouterr().err == ""


def test_steps_of_a_trainer(capsys, clock, tmp_path):
    state = TrainerState(max_steps=4, is_world_process_zero=True)
    arguments, control = TrainingArguments(output_dir=tmp_path, use_cpu=True), TrainerControl()
    callback = StepProgress("Refining")
    callback.on_train_begin(arguments, state, control)
    for _ in range(4):
        clock[0] += 61.0
        callback.on_step_end(arguments, state, control)
    callback.on_train_end(arguments, state, control)
    assert "Refining: 2 of 4, 02:02 left\n" in capsys.readouterr().err


def test_what_a_trainer_logs_becomes_a_line(caplog, tmp_path):
    state = TrainerState(global_step=200, max_steps=800, is_world_process_zero=True)
    logs = {"loss": 5.31234, "learning_rate": 9e-4, "epoch": 0.5, "total_flos": 1e12, "num_tokens": 12}
    arguments = TrainingArguments(output_dir=tmp_path, use_cpu=True)
    with caplog.at_level(logging.INFO, logger="factorized_gpt2"):
        LogLines().on_log(arguments, state, TrainerControl(), logs=logs)
        state.is_world_process_zero = False
        LogLines().on_log(arguments, state, TrainerControl(), logs=logs)
    assert [record.message for record in caplog.records] == [
        "step 200 of 800: loss 5.312, learning_rate 0.0009, num_tokens 12"
    ]
    assert "epoch" in logs  # others read it too


@pytest.mark.parametrize(
    ("stream", "expected"), [(io.StringIO(), ["transformers", "datasets", "hub"]), (Terminal(), [])]
)
def test_bars_of_libraries_are_for_terminals(stream, expected, monkeypatch):
    hidden = []
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress.transformers_logging, "disable_progress_bar", lambda: hidden.append("transformers"))
    monkeypatch.setattr("datasets.disable_progress_bars", lambda: hidden.append("datasets"))
    monkeypatch.setattr(progress.huggingface_hub.utils, "disable_progress_bars", lambda: hidden.append("hub"))
    progress.hide_bars_of_libraries()
    assert hidden == expected
