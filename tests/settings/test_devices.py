"""Devices by name: what is taken, what is refused, and that it reaches whatever computes."""

import pytest
import torch
from conftest import VOCAB_SIZE, tiny_model
from datasets import Dataset

from factorized_gpt2.cli.compress import compress
from factorized_gpt2.cli.evaluate import evaluate
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.compress import refinement
from factorized_gpt2.compress.compressor import Compressor
from factorized_gpt2.compress.recipe import CalibrationText, Recipe
from factorized_gpt2.models.loading import Baseline
from factorized_gpt2.settings.devices import find_device, present_devices


def machine(monkeypatch, gpus: int, has_mps: bool = False) -> None:
    """Let torch say that the machine has these devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)


@pytest.mark.parametrize(
    ("gpus", "has_mps", "name", "found"),
    [
        (0, False, "auto", "cpu"),
        (0, True, "auto", "cpu"),
        (2, False, "auto", "cuda:0"),
        (2, False, "cuda", "cuda:0"),
        (2, False, "cuda:1", "cuda:1"),
        (2, False, "cpu", "cpu"),
        (0, True, "mps", "mps"),
    ],
)
def test_a_device_is_found_by_name(monkeypatch, gpus, has_mps, name, found):
    machine(monkeypatch, gpus, has_mps)
    assert find_device(name) == torch.device(found)


@pytest.mark.parametrize("name", ["cuda:2", "mps", "cuda:-1", "cuda:01", "gpu", "CPU", "", "cuda:x"])
def test_a_device_that_is_not_there_is_a_line_that_names_those_that_are(monkeypatch, name):
    machine(monkeypatch, 2)
    with pytest.raises(UserError, match=f"^device={name} is not there: this machine has cpu, cuda:0, cuda:1.$"):
        find_device(name)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (compress, ["--baseline", "nowhere", "--ranks", "4"]),
        (evaluate, ["--models", "nowhere", "--eval_file", "x.txt"]),
    ],
)
def test_commands_refuse_it_before_anything_else(monkeypatch, tmp_path, command, words):
    monkeypatch.chdir(tmp_path)
    machine(monkeypatch, 0)
    with pytest.raises(UserError, match=r"device=cuda is not there: this machine has cpu\."):
        command([*words, "--device", "cuda"])
    assert not list(tmp_path.iterdir())


def material():
    baseline = tiny_model(n_embd_wte=None)
    ids = torch.randint(2, VOCAB_SIZE, (8, 48), generator=torch.Generator().manual_seed(0))
    return baseline, Dataset.from_dict({"input_ids": ids.tolist()})


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_the_device_of_a_compressor_reaches_refinement(monkeypatch, tmp_path, device):
    baseline, blocks = material()
    trained_on = []

    def refine_and_note(vocabulary, trunk, teacher, held_out, *args):
        tensors = (*vocabulary.parameters(), teacher.weight, teacher.ids, trunk(teacher.weight[None, :2]))
        trained_on.extend(tensor.device for tensor in tensors)
        return plain(vocabulary, trunk, teacher, held_out, *args)

    plain = refinement.refine_vocabulary
    monkeypatch.setattr(refinement, "refine_vocabulary", refine_and_note)
    recipe = Recipe("tokenwise", refine_steps=1)
    text = CalibrationText(blocks, tokens=96, name="text")
    Compressor(Baseline(baseline, "b", "f"), recipe, tmp_path, None, text, device=device).make(4)
    assert set(trained_on) == {torch.device("cpu")}


def test_a_machine_always_has_a_cpu():
    assert present_devices()[0] == "cpu"
