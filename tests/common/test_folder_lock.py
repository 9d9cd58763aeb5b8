"""One at a time in a folder: refused at once or made to wait, and free again however the holder ended."""

import errno
import multiprocessing
import os
from pathlib import Path

import pytest

from factorized_gpt2.common.errors import UserError
from factorized_gpt2.common.folder_lock import compress_alone, run_alone
from factorized_gpt2.common.leftovers import marked_for_all


def _hold(kind, folder: Path, pipe) -> None:
    with kind(folder):
        pipe.send("held")
        pipe.poll(None)  # until it is closed


class Holder:
    """Another process, which holds a folder until it is released or killed."""

    def __init__(self, kind, folder: Path):
        context = multiprocessing.get_context("fork")
        self.pipe, pipe = context.Pipe()
        self.process = context.Process(target=_hold, args=(kind, folder, pipe), daemon=True)
        self.process.start()
        assert self.pipe.recv() == "held"

    def release(self) -> None:
        self.pipe.send("done")
        self.process.join()


@pytest.fixture
def hold():
    """Return a function that has another process hold a folder."""
    holders = []

    def start(kind, folder: Path) -> Holder:
        holders.append(Holder(kind, folder))
        return holders[-1]

    yield start
    for holder in holders:
        holder.process.kill()
        holder.process.join()


def test_a_folder_is_held_by_one_process(tmp_path, hold):
    folder = tmp_path / "models/run"
    holder = hold(run_alone, folder)
    with (
        pytest.raises(UserError, match=r"Another process is using .*run: .* another --output_dir"),
        run_alone(folder),
    ):
        pytest.fail("two at once")
    with run_alone(tmp_path / "models/other"), compress_alone(tmp_path / "models"):
        pass  # others do not matter
    holder.release()
    with run_alone(folder):
        pass
    assert not list(tmp_path.glob("*/.*"))


def test_a_lock_dies_with_its_holder(tmp_path, hold):
    holder = hold(run_alone, tmp_path / "run")
    holder.process.kill()
    holder.process.join()
    assert (tmp_path / ".run.lock").exists()
    with run_alone(tmp_path / "run"):
        pass
    assert not list(tmp_path.iterdir())


def test_who_compresses_is_refused_or_waits(tmp_path, hold, caplog, monkeypatch):
    holder = hold(compress_alone, tmp_path)
    with pytest.raises(UserError, match="Another process is writing compressed models into"), compress_alone(tmp_path):
        pytest.fail("two at once")
    caplog.set_level("INFO", "factorized_gpt2")
    monkeypatch.setattr(caplog.handler, "emit", lambda record: holder.release())  # when it says that it waits
    with compress_alone(tmp_path, wait=True):
        assert holder.process.exitcode == 0
    assert not list(tmp_path.iterdir())


def test_what_killed_writers_left_is_swept(tmp_path):
    for name in ("gpt_k4", "spectrum_pca.png", "run", "thesis", "pca_factorized/wte_pca_k4.npy", "run/adapter"):
        place = tmp_path / name
        (place.parent / marked_for_all(place.name)).mkdir(parents=True)
    with compress_alone(tmp_path):
        left = {path.relative_to(tmp_path).as_posix().split(".fgpt2")[0] for path in tmp_path.rglob("*.partial")}
    assert left == {".run", ".thesis", "run/.adapter"}  # not what this command writes


USERS = ("notes", "zshrc", "thesis")


@pytest.mark.parametrize("kind", [compress_alone, run_alone])
def test_backups_of_the_user_stay(tmp_path, kind):
    for name in USERS:
        (tmp_path / f".{name}.20240101.old").mkdir()
        (tmp_path / f".{name}.20240101.old/chapter.tex").write_text("mine")
    (tmp_path / "thesis").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for folder in (tmp_path, tmp_path / "models"):
        with kind(folder):
            pass
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_work_goes_on_with_a_warning(tmp_path, monkeypatch, caplog, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    left = tmp_path / marked_for_all("gpt_k4")
    left.mkdir()
    with run_alone(tmp_path / "run") as is_alone:
        assert not is_alone
    with compress_alone(tmp_path):
        assert left.exists()  # perhaps another machine's
    assert [path.name for path in tmp_path.iterdir()] == [left.name]
    assert (
        f"does not support locks ({os.strerror(number)}): make sure that no other process writes there." in caplog.text
    )


def test_what_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file"), run_alone(tmp_path / "file"):
        pytest.fail("held")
    for folder in (tmp_path / "file/run", tmp_path / "file/models/run"):
        with (
            pytest.raises(UserError, match=r"cannot be written: (File exists|Not a directory)"),
            run_alone(folder),
        ):
            pytest.fail("held")


def test_a_folder_in_one_that_is_not_ours_is_held_from_within(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setattr("factorized_gpt2.common.folder_lock.os.access", lambda path, mode: path != tmp_path)
    with run_alone(folder):
        assert [path.name for path in folder.iterdir()] == [".lock"]
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_refused_run_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="no"), run_alone(tmp_path / "models/run"):
        raise UserError("no")
    assert not list(tmp_path.iterdir())
