"""Checkpoints: sealed, whole or set aside, the best one found again; runs that go on from them."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import cut_off_at

from factorized_gpt2 import FactorizedGPT2
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.runs.results import Results
from factorized_gpt2.runs.run import run_experiment
from factorized_gpt2.runs.settings import parse_run
from factorized_gpt2.trainer.checkpoints import CheckpointingTrainer, damage, last_whole_checkpoint, seal
from factorized_gpt2.trainer.trainer import FactorizedTrainer

CONFIG = {
    **{"n_layer": 1, "n_head": 2, "n_embd": 16, "n_embd_wte": 4, "block_size": 16, "max_steps": 8, "do_train": True},
    **{"per_device_train_batch_size": 2, "effective_batch_size": 4, "learning_rate": 1e-2, "disable_tqdm": True},
    **{"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
    **{"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "report_to": ["none"]},
}


def checkpoint(output_dir: Path, step: int) -> Path:
    folder = output_dir / f"checkpoint-{step}"
    (folder / "shards").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(100)))
    (folder / "shards/optimizer.pt").write_bytes(b"moments")
    (folder / "trainer_state.json").write_text("{}")
    seal(folder)
    return folder


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {
    "model.safetensors is not what was written": (flip_a_bit, "model.safetensors"),
    "shards/optimizer.pt is not what was written": (flip_a_bit, "shards/optimizer.pt"),
    "model.safetensors has 50 bytes instead of 100": (cut, "model.safetensors"),
    "trainer_state.json has 1 bytes instead of 2": (cut, "trainer_state.json"),
    "shards/optimizer.pt is missing": (Path.unlink, "shards/optimizer.pt"),
    "it has no files.json": (Path.unlink, "files.json"),
    "it cannot be read": (cut, "files.json"),
}


@pytest.mark.parametrize("problem", DAMAGES)
def test_every_damage_is_named(tmp_path, problem):
    folder = checkpoint(tmp_path, 3)
    assert damage(folder) is None
    harm, name = DAMAGES[problem]
    harm(folder / name)
    assert damage(folder).startswith(problem)


def test_the_last_whole_checkpoint_counts_and_later_ones_are_set_aside(tmp_path, caplog):
    for step in (2, 4, 6, 10):
        checkpoint(tmp_path, step)
    for step in (6, 10):
        flip_a_bit(tmp_path / f"checkpoint-{step}/model.safetensors")
    (tmp_path / "damaged-checkpoint-6").mkdir()  # of an earlier damage
    caplog.set_level("INFO", "factorized_gpt2")
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert [record.message.removeprefix(str(tmp_path)) for record in caplog.records] == [
        f"/checkpoint-{step} is damaged (model.safetensors is not what was written): it is set aside as "
        f"damaged-checkpoint-{step}."
        for step in (10, 6)
    ] + [f"Going on from {tmp_path}/checkpoint-4"]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-2", "checkpoint-4", "damaged-checkpoint-10", "damaged-checkpoint-6"]
    assert (tmp_path / "damaged-checkpoint-6/model.safetensors").exists()


def test_without_a_whole_checkpoint_the_run_starts_anew(tmp_path, caplog):
    assert last_whole_checkpoint(tmp_path) is None
    assert not caplog.records
    cut(checkpoint(tmp_path, 2) / "model.safetensors")
    assert last_whole_checkpoint(tmp_path) is None
    assert caplog.records[-1].message == f"{tmp_path} has no whole checkpoint: the run starts anew."


def test_a_checkpoint_with_other_files_is_not_removed(tmp_path, caplog):
    trainer = object.__new__(CheckpointingTrainer)
    trainer.args = SimpleNamespace(save_total_limit=1)
    trainer.state = SimpleNamespace(best_model_checkpoint=None)
    for step in (2, 4, 6):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-2/shards/notes.txt").write_text("mine")
    for _ in range(2):
        trainer._remove_old_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-6"]
    stays = "checkpoint-2 stays: it holds shards/notes.txt, which was not written by the run."
    assert [message.rpartition("/checkpoint")[2] for message in caplog.messages] == [stays.removeprefix("checkpoint")]
    (tmp_path / "damaged-checkpoint-6").mkdir()
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "damaged-checkpoint-6", dirs_exist_ok=True)
    cut(tmp_path / "checkpoint-6/model.safetensors")
    with pytest.raises(
        UserError, match=r"damaged-checkpoint-6 holds shards/notes.txt, which was not .*: move it away"
    ):
        last_whole_checkpoint(tmp_path)
    assert (tmp_path / "damaged-checkpoint-6/shards/notes.txt").exists()


@pytest.fixture
def run(tmp_path, corpus, monkeypatch):
    """Return a function that runs in `tmp_path`, in a folder of a given name, with words over the config."""
    monkeypatch.chdir(tmp_path)
    texts = {f"{split}_file": [str(corpus / f"{split}.jsonl")] for split in ("train", "validation")}
    Path("run.json").write_text(json.dumps(CONFIG | texts | {"tokenizer": str(corpus / "tokenizer")}))
    return lambda name, *words: run_experiment(parse_run(["--config", "run.json", "--output_dir", name, *words]))


def cut_run(run, name: str, step: int, *words: str) -> None:
    with cut_off_at(step):
        run(name, *words)


def weights(name: str) -> dict[str, torch.Tensor]:
    return FactorizedGPT2.from_pretrained(name).state_dict()


def same_end(one: str, other: str) -> bool:
    """Compare two runs' models to the bit, and what was measured."""
    ours, theirs = weights(one), weights(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (Results.read(Path(name)) for name in (one, other))
    assert (ours.eval_loss, ours.best_step, ours.validation_curve) == (
        *(theirs.eval_loss, theirs.best_step),
        theirs.validation_curve,
    )
    return True


def losses_at(monkeypatch, **by_step: float) -> None:
    """Have evaluations find given losses, by step as in `step4=1.5`, where that step is evaluated in training."""
    evaluate = FactorizedTrainer.evaluation_loop

    def pretend(self, *args, **kwargs):
        output = evaluate(self, *args, **kwargs)
        if self.is_in_train:
            output.metrics["eval_loss"] = by_step.get(f"step{self.state.global_step}", 9.0)
        return output

    monkeypatch.setattr(FactorizedTrainer, "evaluation_loop", pretend)


def test_a_run_goes_on_from_before_a_damage_to_the_same_end(run, caplog):
    run("whole")
    cut_run(run, "cut", 7)
    flip_a_bit(Path("cut/checkpoint-6/optimizer.pt"))
    run("cut")
    assert "cut/checkpoint-6 is damaged (optimizer.pt is not what was written)" in caplog.text
    assert same_end("cut", "whole")


def test_a_checkpoint_of_another_run_is_not_gone_on_from(run, caplog):
    caplog.set_level("INFO", "factorized_gpt2")
    run("whole")
    cut_run(run, "cut", 3, "--logging_steps=1")
    cut_run(run, "other", 7, "--seed=3")
    shutil.copytree("other/checkpoint-6", "cut/checkpoint-6")
    shutil.copytree("cut", "moved")
    run("cut", "--logging_steps=2")  # which makes no difference
    assert "cut/checkpoint-6 is damaged (it is of another run)" in caplog.text
    assert "Going on from cut/checkpoint-2" in caplog.text
    run("moved")
    assert same_end("moved", "whole")


def test_a_run_cut_after_its_last_step_takes_no_more(run):
    run("whole")
    shutil.copytree("whole", "cut")
    Path("cut/results.json").unlink()
    run("cut")
    assert same_end("cut", "whole")
    assert max(Path("cut").glob("checkpoint-*")).name == "checkpoint-8"


def test_a_checkpoint_is_seen_only_when_it_is_whole(run, monkeypatch):
    seen = []
    save = FactorizedTrainer._save_rng_state

    def look(self, output_dir):
        save(self, output_dir)
        seen.append(sorted(path.name for path in Path("run").glob("checkpoint-*")))

    monkeypatch.setattr(FactorizedTrainer, "_save_rng_state", look)
    run("run")
    assert seen == [[f"checkpoint-{step}" for step in range(2, now, 2)] for now in (2, 4, 6, 8)]
    assert all(damage(path) is None for path in Path("run").glob("checkpoint-*"))
    assert not list(Path("run").glob(".*"))


@pytest.mark.parametrize(("limit", "kept"), [(1, [4, 8]), (2, [4, 8]), (3, [4, 6, 8])])
def test_the_last_and_the_best_are_kept(run, monkeypatch, limit, kept):
    losses_at(monkeypatch, step4=1.0)
    monkeypatch.setattr(FactorizedTrainer, "_finalize_training", lambda *args: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        run("run", f"--save_total_limit={limit}")
    assert sorted(path.name for path in Path("run").glob("checkpoint-*")) == [f"checkpoint-{step}" for step in kept]


def test_the_best_is_found_where_the_folder_is_now(run, monkeypatch):
    losses_at(monkeypatch, step4=1.0)
    whole = run("whole")
    assert (whole.best_step, whole.eval_loss) == (4, 1.0)
    cut_run(run, "cut", 7)
    Path("cut").rename("moved")
    shutil.copytree("whole", "cut")  # whose checkpoint-4 must not be taken for it
    flip_a_bit(Path("cut/checkpoint-4/model.safetensors"))
    run("moved")
    assert same_end("moved", "whole")


def test_a_best_that_is_damaged_is_noticed_when_the_run_goes_on(run, monkeypatch, caplog):
    losses_at(monkeypatch, step4=1.0, step8=2.0)
    cut_run(run, "cut", 7)
    flip_a_bit(Path("cut/checkpoint-4/model.safetensors"))
    results = run("cut")
    assert "cut/checkpoint-4, the best so far, is damaged (model.safetensors is not" in caplog.text
    assert (results.best_step, results.eval_loss) == (8, 2.0)


def test_a_best_that_is_damaged_is_noticed_at_the_end(run, monkeypatch, caplog):
    losses_at(monkeypatch, step4=1.0)
    finalize = FactorizedTrainer._finalize_training

    def harm(self, *args):
        flip_a_bit(Path("run/checkpoint-4/model.safetensors"))
        return finalize(self, *args)

    monkeypatch.setattr(FactorizedTrainer, "_finalize_training", harm)
    results = run("run")
    assert "run/checkpoint-4, the best, is damaged" in caplog.text
    assert results.best_step == 8
    assert results.eval_loss not in (1.0, 9.0)  # measured anew, of the weights that were kept


def test_a_best_that_was_not_saved_is_not_claimed(run, monkeypatch):
    losses_at(monkeypatch, step4=2.0, step6=1.0)
    results = run("run", "--save_steps=4")
    assert results.best_step == 4  # the best of those that were saved
    assert results.eval_loss not in (1.0, 2.0, 9.0)


def test_a_full_disk_leaves_what_was_saved_before(run, monkeypatch):
    run("whole")
    save = torch.save

    def fail(content, path, *args, **kwargs):
        if "checkpoint-6/optimizer" in str(path):
            save(content, path)
            cut(Path(path))
            raise RuntimeError("unexpected pos 576 vs 534")
        save(content, path, *args, **kwargs)

    complaint = r"cut/checkpoint-6 cannot be written: No space left on device\. Fix that"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        patch.setattr(
            "factorized_gpt2.common.files._free_bytes", lambda folder: 0 if list(folder.glob(".ch*")) else 10**12
        )
        with pytest.raises(UserError, match=complaint):
            run("cut")
    assert sorted(path.name for path in Path("cut").glob("*checkpoint*")) == ["checkpoint-2", "checkpoint-4"]
    assert not list(Path("cut").glob(".*"))
    run("cut")
    assert same_end("cut", "whole")
