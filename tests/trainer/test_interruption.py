"""Told to stop: at once, or after the step and a checkpoint; several processes at the same step."""

import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.common import signals
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.common.signals import PostponedStop, leave, leaving_cleanly
from factorized_gpt2.trainer import interruption
from factorized_gpt2.trainer.interruption import StopWhenSaved


def tell(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def _handlers_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_sigterm_unwinds_a_command(capsys):
    cleared = []

    def command(words):
        try:
            tell(signal.SIGTERM)
        finally:
            cleared.append(True)

    with pytest.raises(SystemExit) as ended:
        run_command(command, [])
    assert ended.value.code == 143
    assert cleared
    assert capsys.readouterr().err == ""


def test_ctrl_c_unwinds_a_command(capsys):
    assert run_command(lambda words: tell(signal.SIGINT), []) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "/cache/x.arrow"), "error: /cache/x.arrow: No space left on device."),
        (PermissionError(13, "Permission denied", "/cache"), "error: /cache: Permission denied."),
        (OSError(30, "Read-only file system"), "error: Read-only file system."),
    ],
)
def test_what_the_system_refuses_is_a_line(capsys, error, line):
    def command(words):
        raise error

    assert run_command(command, []) == 2
    assert capsys.readouterr().err == f"{line} Fix that, then give the same command again.\n"


def test_a_defect_is_still_a_traceback():
    with pytest.raises(FileNotFoundError):
        run_command(lambda words: os.stat("nowhere"), [])


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_stop_is_postponed_to_the_end(number, raised, capfd):
    reached = []

    def work():
        with PostponedStop() as stop:
            assert stop.received is None
            tell(number)
            tell(number)  # a launcher's, passed on
            assert stop.received == number
            reached.append("the end")

    with pytest.raises(raised):
        work()
    assert reached == ["the end"]
    assert capfd.readouterr().err.count("Saving after this step") == 1


def test_a_second_stop_leaves_at_once(monkeypatch):
    clock = iter([0.0, signals.REPEAT_SECONDS + 0.1])
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(clock))

    def work():
        with PostponedStop():
            tell(signal.SIGTERM)
            tell(signal.SIGINT)
            pytest.fail("went on")

    with pytest.raises(KeyboardInterrupt):
        work()


def test_an_error_is_not_hidden_by_a_stop():
    def work():
        with PostponedStop():
            tell(signal.SIGTERM)
            raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"):
        work()


def test_signals_that_are_ignored_stay_so(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with PostponedStop() as stop, leaving_cleanly():
            tell(signal.SIGINT)
        assert stop.received is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_signals_are_the_main_threads():
    left = []

    def work():
        with PostponedStop(), leaving_cleanly():
            left.append("quietly")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert left == ["quietly"]


def test_exit_codes():
    with pytest.raises(KeyboardInterrupt):
        leave(signal.SIGINT)
    with pytest.raises(SystemExit, match="143"):
        leave(signal.SIGTERM)


class Process:
    """One of several processes that train in step: a callback, and what it asks of its Trainer."""

    def __init__(self, others: "Together", number: int):
        self.stop = SimpleNamespace(received=None)
        accelerator = SimpleNamespace(num_processes=number, device="cpu", reduce=others.add)
        self.callback = StopWhenSaved(self.stop, accelerator)
        self.args = SimpleNamespace(overwrite=False)

    def at(self, event: str, step: int) -> bool:
        """Tell the callback of an event; return whether it has a checkpoint saved."""
        control = TrainerControl()
        getattr(self.callback, f"on_{event}")(self.args, TrainerState(global_step=step), control)
        return control.should_save


class Together:
    """Sums over processes that are called one after the other: each is asked twice, first for its part."""

    def __init__(self, number: int):
        self.parts, self.total = [], None
        self.processes = [Process(self, number) for _ in range(number)]

    def add(self, part: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "sum"
        if self.total is None:
            self.parts.append(part)
            raise StopIteration
        return self.total

    def at(self, event: str, step: int) -> list[bool]:
        self.parts.clear()
        states = [dict(vars(process.callback)) for process in self.processes]
        for process in self.processes:
            try:
                process.at(event, step)
            except StopIteration:
                continue
        assert len(self.parts) in (0, len(self.processes))  # all come together or none
        self.total = torch.stack(self.parts).sum(0) if self.parts else torch.zeros(3)
        for process, state in zip(self.processes, states, strict=True):
            vars(process.callback).update(state)
        saves = [process.at(event, step) for process in self.processes]
        self.total = None
        return saves


def test_processes_stop_at_the_same_step_though_one_was_told(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: clock[0])
    together, consulted = Together(2), []
    for step in range(1, 60):
        clock[0] += 0.125
        saves = together.at("step_end", step)
        assert saves == [False, False]
        if together.parts:
            consulted.append(step)
    assert consulted == [1, 3, 7, 15, 23, 31, 39, 47, 55]  # once a second, after a start
    together.processes[1].stop.received = signal.SIGTERM
    for step in range(60, 63):
        assert together.at("step_end", step) == [False, False]
    assert together.at("step_end", 63) == [True, True]
    for process in together.processes:
        with pytest.raises(SystemExit, match="143"):
            process.at("save", 63)


def test_slow_steps_are_each_consulted_and_evaluations_too(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: clock[0])
    together = Together(2)
    for step in range(1, 6):
        clock[0] += 5
        together.at("step_end", step)
        assert together.parts
    together.processes[0].stop.received = signal.SIGINT
    assert together.at("evaluate", 5) == [True, True]
    with pytest.raises(KeyboardInterrupt):
        together.processes[1].at("save", 5)


def test_one_process_stops_at_its_next_step(caplog):
    process = Process(SimpleNamespace(add=None), 1)
    assert not process.at("step_end", 1)
    process.at("save", 1)  # saves as it does every so often
    process.stop.received = signal.SIGTERM
    assert process.at("step_end", 2)
    with pytest.raises(SystemExit, match="143"):
        process.at("save", 2)
    assert caplog.messages == ["Stopped by SIGTERM, with step 2 saved: the same command goes on from there."]
