"""A few of the kills of `soak/kills.py`, and that it would tell if one did harm."""

import re
import signal
from pathlib import Path

import pytest
from doomed import Doom
from kills import trial
from workshop import FLOWS, Workshop


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("kills") / "work")


KILLS = {
    "in the middle of a checkpoint": ("full", "os.mkdir .*/checkpoint-9$", signal.SIGKILL, "-9", "checkpoint-6"),
    "told to stop": ("full", "os.mkdir .*/checkpoint-6$", signal.SIGTERM, "143", "checkpoint-6"),
    "between two factor files": ("compress", "scale_mats_pca_k4", signal.SIGKILL, "-9", "the start"),
}


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_command_ends_as_one_that_was_not(workshop, kill):
    name, change, number, code, went_on_from = KILLS[kill]
    row = trial(workshop, name, Doom(number, change))
    assert (row["same"], row["ended with"], row["went on from"]) == ("yes", code, went_on_from)


def test_what_is_lost_or_left_is_told(workshop):
    def spoil(run_folder: Path) -> None:
        (run_folder.parent / ".left").touch()
        weights = run_folder.parent.parent / "baseline/model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")

    row = trial(workshop, "compress", Doom(signal.SIGKILL, "scale_mats_pca_k4"), spoil)
    assert "models/.left is left" in row["same"]
    assert "gpt_pca_nofinetune_k4/model.safetensors differs" in row["same"]


def test_every_moment_that_matters_is_there(workshop):
    for name in ("full", "compress"):
        changes = "\n".join(workshop.undisturbed(name).changes)
        for moment, change in FLOWS[name].moments.items():
            assert re.search(change, changes, re.MULTILINE), moment
