"""Files and folders that are whole or absent: replaced, swept, and refused by a full disk in a line."""

import errno
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from factorized_gpt2.common import files
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.common.files import (
    filling_folder,
    put_in_place,
    read_json,
    remove_folder,
    replacing_file,
    replacing_folder,
    require_space,
    write_json,
)
from factorized_gpt2.common.leftovers import marked_beside, marked_for_all, sweep
from factorized_gpt2.common.weight_files import weight_files


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path, **contents: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_text(content)
    return folder


def left(path: Path, kind: str = "partial", suffix: str = "") -> Path:
    """Name what a process that is no more left beside `path`."""
    return path.with_name(marked_for_all(path.name).removesuffix("partial") + kind + suffix)


def test_a_file_is_replaced_at_the_end(tmp_path):
    path = fill(tmp_path, a="old") / "a"
    with replacing_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert tree(tmp_path) == {"a": "new"}


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = fill(tmp_path / "a", one="old", two="old")
    with replacing_folder(folder, ("t*",)) as temporary:
        fill(temporary, one="new")
        assert tree(folder) == {"one": "old", "two": "old"}
    assert tree(tmp_path) == {"a/one": "new"}


def test_a_folder_is_filled_with_its_last_file_last(tmp_path, monkeypatch):
    folder, moved, replace = fill(tmp_path / "a", notes="mine"), [], os.replace
    monkeypatch.setattr(files.os, "replace", lambda source, to: (moved.append(Path(to).name), replace(source, to)))
    with filling_folder(folder, last="config.json") as temporary:
        fill(temporary, **{"config.json": "new", "model": "new", "a": "new"})
    assert sorted(moved[:2]) == ["a", "model"]
    assert moved[2:] == ["config.json"]
    assert tree(folder) == {"notes": "mine", "config.json": "new", "model": "new", "a": "new"}


def write(writer, name: str, error: BaseException) -> None:
    with writer as temporary:
        (temporary / name if name else temporary).write_text("new")
        raise error


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(143)])
def test_what_ends_badly_leaves_nothing(tmp_path, error):
    folder = fill(tmp_path / "a", one="old")
    for writer, name in (
        (replacing_file(folder / "one"), ""),
        (replacing_folder(folder), "one"),
        (filling_folder(folder, last="one"), "one"),
    ):
        with pytest.raises(type(error)):
            write(writer, name, error)
    assert tree(tmp_path) == {"a/one": "old"}
    assert not list(tmp_path.rglob(".*"))


def replace_until(folder: Path, moment: int) -> None:
    """Replace a folder, and die of it at some change to files."""
    left = moment

    def count_down(event, args):
        nonlocal left
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count_down)
    with replacing_folder(folder) as temporary:
        fill(temporary, one="new", two="new")


def test_a_writer_killed_at_any_change_leaves_the_old_or_the_new(tmp_path):
    found = []
    for moment in range(1, 10):
        root = tmp_path / str(moment)
        fill(root / "a", one="old")
        process = multiprocessing.get_context("fork").Process(target=replace_until, args=(root / "a", moment))
        process.start()
        process.join()
        sweep(root)
        assert tree(root) in ({"a/one": "old"}, {"a/one": "new", "a/two": "new"})
        assert not list(root.glob(".*"))
        found.append((process.exitcode, len(tree(root))))
    assert found[0] == (-signal.SIGKILL, 1)
    assert (-signal.SIGKILL, 2) in found
    assert found[-1] == (0, 2)


NOT_OURS = [
    *(".git", ".old", ".lock", ".bashrc", ".a.partial", ".a.old", ".a.12345678.tmp", "a.12345678.partial"),
    # Backups by date, in the ways that people and their editors name them.
    *(".notes.20231224.old", ".zshrc.20240131.old", ".thesis.20240101.old", ".db.deadbeef.old", ".x.00000000.partial"),
    *(".a.1234abcd.partial", ".a.1234abcd.partial.npy", ".notes.old.20240101", ".notes~", ".#notes", ".notes.swp"),
    *(".photo.20240101.partial.png", ".run.2024-01-01.old", ".gpt_pca_nofinetune_k4.20240101.old"),
    # Near misses of the mark.
    *(".a.fgpt2.old", ".a.fgpt2-1.old", "a.fgpt2-00000000-00000000-0.old", ".a.fgpt2-00000000-00000000-0.bak"),
    *(".fgpt2-00000000-00000000-0.old", ".a.fgpt2-0000000-00000000-0.old", ".a.FGPT2-00000000-00000000-0.old"),
]


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_sweep_leaves_what_is_not_ours(tmp_path, kind):
    (tmp_path / "elsewhere").mkdir()
    root = fill(tmp_path / "home", notes="mine")
    for name in NOT_OURS:
        path = root / name
        if kind == "folder":
            fill(path, x="mine")
        elif kind == "file":
            path.write_text("mine")
        else:
            path.symlink_to(tmp_path / "elsewhere")
    fill(left(root / "a"), x="left")
    left(root / "b.npy", suffix=".npy").write_text("left")
    before = tree(root)
    sweep(root)
    assert sorted(path.name for path in root.iterdir()) == sorted([*NOT_OURS, "notes"])
    assert tree(root) == {name: text for name, text in before.items() if text == "mine"}


def test_a_sweep_of_some_names_leaves_the_others(tmp_path):
    fill(left(tmp_path / "gpt_k4"), x="left")
    fill(left(tmp_path / "run"), x="left")
    sweep(tmp_path, "gpt_*")
    assert [path.name for path in tmp_path.iterdir()] == [left(tmp_path / "run").name]


def test_a_sweep_leaves_what_a_process_at_work_is_writing(tmp_path):
    with replacing_folder(tmp_path / "a") as temporary:
        fill(temporary, x="half")
        sweep(tmp_path)
        assert tree(temporary) == {"x": "half"}
    assert tree(tmp_path) == {"a/x": "half"}


def test_a_process_id_that_came_again_does_not_keep_what_is_left(tmp_path):
    mark = marked_beside(tmp_path / "a", "old").name
    pid, start = (int(number, 16) for number in re.search(r"fgpt2-(\w+)-(\w+)-", mark).groups())
    assert pid == os.getpid()
    fill(tmp_path / mark.replace(f"{start:08x}", f"{start - 3600:08x}"), x="whole")
    sweep(tmp_path)
    assert tree(tmp_path) == {"a/x": "whole"}


def test_what_is_removed_through_a_link_stays_where_it_is(tmp_path):
    fill(tmp_path / "elsewhere", x="mine")
    left(tmp_path / "a").symlink_to(tmp_path / "elsewhere")
    sweep(tmp_path)
    assert tree(tmp_path) == {"elsewhere/x": "mine"}


def test_a_sweep_puts_back_what_was_about_to_be_replaced(tmp_path):
    fill(left(tmp_path / "a", "old"), x="whole")
    fill(left(tmp_path / "b", "old"), x="old")
    fill(tmp_path / "b", x="new")
    sweep(tmp_path)
    assert tree(tmp_path) == {"a/x": "whole", "b/x": "new"}


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path):
    folder = fill(tmp_path / "a", x="old")
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "nowhere", folder)
    assert tree(tmp_path) == {"a/x": "old"}


def remove_and_die(folder: Path) -> None:
    sys.addaudithook(lambda event, args: os._exit(9) if event == "shutil.rmtree" else None)
    remove_folder(folder)


def test_a_removed_folder_is_gone_at_once(tmp_path):
    folder = fill(tmp_path / "a", x="x", y="y")
    process = multiprocessing.get_context("fork").Process(target=remove_and_die, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert not folder.exists()
    assert list(tmp_path.iterdir())
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def flushed(monkeypatch) -> list[str]:
    """Collect the paths that are flushed, and the renames between."""
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(files.os, "replace", lambda source, to: (done.append("rename"), replace(source, to)))
    return [] if done is None else done


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to see which file a descriptor is")
def test_content_is_on_the_disk_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch):
    done = flushed(monkeypatch)
    write_json(tmp_path / "a.json", {})
    content, rename, name = done
    assert re.search(r"\.a\.json\..*\.partial\.json$", content)
    assert rename == "rename"
    assert name == str(tmp_path)
    done.clear()
    with replacing_folder(tmp_path / "b") as folder:
        fill(folder / "deep", x="x")
    before = done[: done.index("rename")]
    assert [path.rpartition(".partial")[2] for path in before] == ["/deep", "/deep/x", ""]
    assert done[-1] == str(tmp_path)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_drive_that_cannot_flush_is_written_to_with_a_warning(tmp_path, monkeypatch, caplog, number):
    files._warn_of_sync.cache_clear()

    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", refuse)
    for name in "ab":
        with replacing_folder(tmp_path / name) as folder:
            fill(folder, x="x")
    assert tree(tmp_path) == {"a/x": "x", "b/x": "x"}
    assert [record.getMessage() for record in caplog.records] == [
        f"This drive cannot flush files to the disk ({os.strerror(number)}); a power cut may lose recent files."
    ]


def test_a_disk_that_fails_to_flush_is_a_refusal(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(UserError, match="a cannot be written: Input/output error"):
        write_json(tmp_path / "a", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_refusal_of_the_system_is_a_line(tmp_path, number):
    with (
        pytest.raises(UserError, match=f"a cannot be written: {os.strerror(number)}. Fix"),
        replacing_file(tmp_path / "a"),
    ):
        raise OSError(number, os.strerror(number))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "room"),
    [
        (RuntimeError("unexpected pos 576 vs 534"), 0),
        (OSError("1000000 requested and 262112 written"), 0),
        (ValueError("I/O error: No space left on device (os error 28)"), 10**9),
    ],
)
def test_a_full_disk_is_recognised_whatever_a_library_says(tmp_path, monkeypatch, error, room):
    monkeypatch.setattr(files, "_free_bytes", lambda folder: room)
    with (
        pytest.raises(UserError, match="a cannot be written: No space left on device"),
        replacing_folder(tmp_path / "a"),
    ):
        raise error


def test_other_errors_pass(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"), replacing_folder(tmp_path / "a"):
        raise RuntimeError("a bug")
    with pytest.raises(UserError, match="mine"), replacing_folder(tmp_path / "a"):
        raise UserError("mine")


def test_a_file_where_a_folder_should_be(tmp_path):
    fill(tmp_path, a="a file")
    with (
        pytest.raises(UserError, match=r"a/b\.json cannot be written: File exists"),
        replacing_file(tmp_path / "a/b.json") as path,
    ):
        path.write_text("")


def test_too_little_room_is_said_before(tmp_path):
    require_space(tmp_path / "not/there/yet", 1, "the run")
    with pytest.raises(UserError, match=r"yet has [\d.]+ GB of room, and the run needs 1000000000.00 GB: make room"):
        require_space(tmp_path / "not/there/yet", 10**18, "the run")


def test_other_files_in_a_folder_outlive_its_replacement(tmp_path):
    folder = fill(tmp_path / "a", config="old", shard_2="old", notes="mine")
    fill(folder / "mine", x="mine")
    fill(folder / "templates", old="old")
    (folder / "mine/link").symlink_to("nowhere")
    (folder / "notes").chmod(0o400)
    with replacing_folder(folder, ("config", "shard_*", "templates/")) as temporary:
        fill(temporary, config="new", shard_1="new")
    assert tree(folder) == {"config": "new", "shard_1": "new", "notes": "mine", "mine/x": "mine"}
    assert os.readlink(folder / "mine/link") == "nowhere"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_other_files_are_kept_where_a_file_can_have_one_name_alone(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(files.os, "link", refuse)
    folder = fill(tmp_path / "a", notes="mine")
    fill(folder / "deep", x="mine")
    with replacing_folder(folder) as temporary:
        fill(temporary / "deep", y="new")
    assert tree(folder) == {"notes": "mine", "deep/x": "mine", "deep/y": "new"}


def test_a_folder_in_a_file_s_place_is_refused_and_stays(tmp_path):
    place = fill(tmp_path / "a", config="old") / "model"
    fill(place, x="mine")
    before = tree(tmp_path)
    for writer, write in (
        (replacing_file(place), lambda path: path.write_text("new")),
        (replacing_folder(tmp_path / "a"), lambda path: fill(path, model="new")),
        (filling_folder(tmp_path / "a", last="config"), lambda path: fill(path, model="new", config="new", a="new")),
    ):
        with pytest.raises(UserError, match="model is a folder, but a file must be written there"), writer as path:
            write(path)
        assert tree(tmp_path) == before
        assert not list(tmp_path.glob(".*"))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(UserError, match=r"run\.json is a pipe"):
        read_json(tmp_path / "run.json")
    os.mkfifo(tmp_path / "model.safetensors")
    assert weight_files(tmp_path) == []


def test_a_file_in_a_folder_s_place_is_refused_and_stays(tmp_path):
    place = fill(tmp_path, a="mine") / "a"
    with pytest.raises(UserError, match="a is a file, but a folder must be written there"), replacing_folder(place):
        pytest.fail("nothing may be made")
    assert tree(tmp_path) == {"a": "mine"}


def test_a_folder_that_may_not_be_looked_into_is_named_and_no_temporary_name(tmp_path, monkeypatch):
    """The refusal is of the file that was to be written, not of clearing away what was never there."""
    is_dir = Path.is_dir

    def refuse(path, *args, **options):
        if "partial" in path.name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", refuse)
    with (
        pytest.raises(UserError, match="a cannot be written: Permission denied"),
        replacing_file(tmp_path / "a"),
    ):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
