"""The folder of a run: checked, written to, refused and replaced."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import tiny_model
from test_results import UNTRAINED

from factorized_gpt2.common.errors import UserError
from factorized_gpt2.common.fingerprints import _digest, weights_fingerprint
from factorized_gpt2.common.leftovers import marked_for_all
from factorized_gpt2.runs.folder import check_folder, least_bytes, write_identity
from factorized_gpt2.runs.run import run_experiment
from factorized_gpt2.runs.settings import Run, RunArguments, parse_run
from factorized_gpt2.settings.flags import as_flags
from factorized_gpt2.trainer.checkpoints import seal

COMMON = {
    "do_train": True,
    "max_steps": 6,
    "block_size": 16,
    "per_device_train_batch_size": 2,
    "tokenizer": "tokenizer",
    "train_file": ["train.txt"],
    "validation_file": ["validation.txt"],
    "report_to": ["none"],
}


def parse(folder: Path, **settings) -> Run:
    return parse_run(as_flags(COMMON | {"output_dir": str(folder)} | settings))


def save(folder: Path, **overrides) -> str:
    tiny_model(**overrides).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Name a run's folder that is not there yet."""
    return tmp_path / "run"


def test_an_unclaimed_folder_is_anyones(folder):
    assert check_folder(parse(folder)) is None
    assert not folder.exists()  # a check by itself leaves nothing


def test_a_run_claims_its_folder_again(folder):
    write_identity(parse(folder))
    assert check_folder(parse(folder)) is None
    UNTRAINED.write(folder)
    assert check_folder(parse(folder)) == UNTRAINED


def test_where_and_how_verbosely_it_runs_does_not_matter(folder):
    write_identity(parse(folder))
    assert check_folder(parse(folder, disable_tqdm=True)) is None


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"seed": 3}, r"\(seed\)"),
        ({"n_embd_wte": 6}, r"\(n_embd_wte\)"),
        ({"learning_rate": 1e-3, "block_size": 8}, r"\(block_size, learning_rate\)"),
        ({"train_file": ["train.txt", "more.txt"]}, r"\(train_file\)"),
        ({"lora_target_modules": ["wte"]}, r"\(lora_target_modules\)"),
        ({"per_device_train_batch_size": 1}, r"\(per_device_train_batch_size\)"),
    ],
)
def test_other_settings_are_refused_by_name(folder, settings, names):
    write_identity(parse(folder))
    UNTRAINED.write(folder)
    before = (folder / "run.json").read_bytes()
    with pytest.raises(UserError, match=f"run holds a run with other settings {names}; .*--overwrite"):
        check_folder(parse(folder, **settings))
    assert (folder / "run.json").read_bytes() == before


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Path:
    """Write the texts that runs name, and work where they are."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.txt", "validation.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    return tmp_path


@pytest.mark.parametrize("name", ["train.txt", "validation.txt"])
def test_an_edited_text_is_refused_by_name(folder, texts, name):
    write_identity(parse(folder))
    state = (texts / name).stat()
    assert check_folder(parse(folder)) is None
    (texts / name).write_text((texts / name).read_text().upper())  # as long
    os.utime(texts / name, ns=(state.st_atime_ns, state.st_mtime_ns))
    _digest.cache_clear()  # as in another process
    for finished in (False, True):
        if finished:
            UNTRAINED.write(folder)
        with pytest.raises(UserError, match=rf"other settings \(the text of {name}\); choose another"):
            check_folder(parse(folder))


def test_a_text_that_was_touched_or_moved_is_the_same(folder, texts):
    write_identity(parse(folder))
    os.utime(texts / "train.txt", ns=(1, 1))
    assert check_folder(parse(folder)) is None
    (texts / "train.txt").rename(texts / "moved.txt")
    assert check_folder(parse(folder, train_file=["moved.txt"])) is None


def test_text_that_is_not_trained_on_does_not_matter(folder, texts, tmp_path):
    settings = {"baseline": save(tmp_path / "baseline", n_embd_wte=None), "do_train": False, "tokenizer": None}
    write_identity(parse(folder, **settings))
    (texts / "train.txt").unlink()
    assert check_folder(parse(folder, **settings, learning_rate=1.0)) is None


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"logging_steps": 7}, "logging_steps"),
        ({"save_total_limit": 3, "ddp_timeout": 99}, "ddp_timeout, save_total_limit"),
        ({"eval_strategy": "steps", "eval_steps": 2}, "eval_steps, eval_strategy"),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"effective_batch_size": 2, "per_device_train_batch_size": 1}, "effective_batch_size"),
        ({"run_name": "mine", "num_train_epochs": 5}, "num_train_epochs, run_name"),
        ({"preprocessing_num_workers": 2, "wandb_mode": "offline"}, "preprocessing_num_workers, wandb_mode"),
        ({"shuffle_buffer": 3, "gradient_checkpointing": True}, "gradient_checkpointing, shuffle_buffer"),
    ],
)
def test_settings_that_make_no_difference_are_only_told(folder, caplog, settings, names):
    write_identity(parse(folder))
    caplog.set_level("INFO", "factorized_gpt2")
    assert check_folder(parse(folder, **settings)) is None
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith(f"{folder} was started with another ")
    assert set(names.split(", ")) <= set(re.findall(r"\w+", told))


def test_when_it_is_evaluated_matters_where_the_best_is_kept(folder):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 2}
    write_identity(parse(folder, **best, eval_steps=2))
    with pytest.raises(UserError, match=r"\(eval_steps\)"):
        check_folder(parse(folder, **best, eval_steps=1))


def test_a_folder_of_an_earlier_version_goes_on_and_says_what_it_does_not_know(folder, texts, caplog):
    run = parse(folder)
    write_identity(run)
    stored = json.loads((folder / "run.json").read_text())
    for name in ("content", "blocks_a_step", "logging_steps", "output_dir"):
        stored.pop(name, None)
    (folder / "run.json").write_text(json.dumps(stored))
    assert check_folder(run) is None
    assert "has no record of the content of the text of train.txt, the text of validation.txt" in caplog.text
    with pytest.raises(UserError, match=r"\(per_device_train_batch_size\)"):
        check_folder(parse(folder, per_device_train_batch_size=1))
    write_identity(run)
    caplog.clear()
    assert check_folder(run) is None
    assert not caplog.text


def test_a_tokenizer_is_known_by_its_content(folder, texts, tokenizer):
    tokenizer.save_pretrained(texts / "tokenizer")
    write_identity(parse(folder))
    (texts / "tokenizer").rename(texts / "elsewhere")
    assert check_folder(parse(folder, tokenizer="elsewhere")) is None
    path = texts / "elsewhere/tokenizer.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(UserError, match=r"\(the tokenizer in elsewhere\)"):
        check_folder(parse(folder, tokenizer="elsewhere"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", '{"eos_token": "<|endoftext|>", "add_prefix_space": true}'),
        ("tokenizer_config.json", '{"eos_token": "b"}'),
        ("spiece.model", "other pieces"),
        ("merges.txt", "a b"),
    ],
)
def test_every_file_that_makes_tokens_counts(folder, texts, tokenizer, name, content):
    tokenizer.save_pretrained(texts / "tokenizer")
    (texts / "tokenizer/spiece.model").write_text("pieces")
    write_identity(parse(folder))
    (texts / "tokenizer/README.md").write_text("a note")
    assert check_folder(parse(folder)) is None
    (texts / "tokenizer" / name).write_text(content)
    with pytest.raises(UserError, match=r"\(the tokenizer in tokenizer\)"):
        check_folder(parse(folder))


@pytest.mark.parametrize("name", ["special_tokens_map.json", "config.json"])
def test_an_end_of_text_that_another_file_names_counts(folder, texts, tokenizer, name):
    tokenizer.save_pretrained(texts / "tokenizer")
    (texts / "tokenizer/tokenizer_config.json").write_text("{}")
    (texts / "tokenizer" / name).write_text('{"eos_token": "a", "eos_token_id": 1}')
    write_identity(parse(folder))
    assert check_folder(parse(folder)) is None
    (texts / "tokenizer" / name).write_text('{"eos_token": "b", "eos_token_id": 2}')
    with pytest.raises(UserError, match=r"\(the tokenizer in tokenizer\)"):
        check_folder(parse(folder))


def test_a_pickle_of_weights_counts_whatever_stands_beside_it(tmp_path, folder):
    start = Path(save(tmp_path / "baseline", n_embd_wte=None))
    (start / "model.safetensors").unlink()
    (start / "pytorch_model.bin").write_bytes(b"one")
    (start / "adapter_model.safetensors").write_bytes(b"an adapter")
    run = parse(folder, baseline=str(start))
    write_identity(run)
    assert check_folder(run) is None
    (start / "pytorch_model.bin").write_bytes(b"two")
    _digest.cache_clear()
    with pytest.raises(UserError, match=r"\(the model in .*baseline\)"):
        check_folder(run)


def test_an_edited_dataset_in_a_local_folder_is_refused(folder, texts):
    (texts / "data").mkdir()
    (texts / "data/train.jsonl").write_text('{"text": "one"}')
    run = parse(folder, dataset_name="data", train_file=None, validation_file=None)
    write_identity(run)
    assert check_folder(run) is None
    (texts / "data/train.jsonl").write_text('{"text": "others"}')
    with pytest.raises(UserError, match=r"\(the files of the dataset data\)"):
        check_folder(run)


def test_a_finished_run_whose_weights_are_others_now_is_not_finished(folder):
    write_identity(parse(folder))
    save(folder)
    finished = replace(UNTRAINED, fingerprint=weights_fingerprint(str(folder)))
    finished.write(folder)
    assert check_folder(parse(folder)) == finished
    save(folder, seed=6)
    with pytest.raises(UserError, match="run is finished, but its weights were changed or removed since: choose"):
        check_folder(parse(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="its weights were changed or removed"):
        check_folder(parse(folder))
    assert check_folder(parse(folder, overwrite_output_dir=True)) is None


def test_a_dataset_that_changed_on_the_hub_is_seen_before_the_run_goes_on(folder, monkeypatch):
    class Builder:
        hash = "one"

    monkeypatch.setattr("datasets.load_dataset_builder", lambda *args: Builder)
    run = parse(folder, dataset_name="me/text", train_file=None, validation_file=None)
    write_identity(run)
    write_identity(run)
    Builder.hash = "two"
    with pytest.raises(UserError, match=r"\(the dataset me/text\)"):
        write_identity(run)


def test_a_dataset_that_files_replace_is_not_asked_for(folder, monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *args: asked.append(args))
    write_identity(parse(folder, dataset_name="me/text"))  # beside the files of both splits
    assert not asked


def test_a_start_on_the_hub_is_known_by_its_commit(folder, monkeypatch):
    commit = "a" * 40
    cached = lambda name, file: f"/cache/models--{name}/snapshots/{commit}/{file}"  # noqa: E731
    monkeypatch.setattr("factorized_gpt2.common.fingerprints.try_to_load_from_cache", cached)
    run = parse(folder, baseline="me/gpt2")
    write_identity(run)
    assert check_folder(run) is None
    commit = "b" * 40
    with pytest.raises(UserError, match=r"\(the model in me/gpt2, the tokenizer in tokenizer\)"):
        check_folder(run)


def test_only_five_of_many_other_settings_are_named(folder):
    write_identity(parse(folder))
    settings = {"seed": 3, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 24, "dropout": 0.0, "max_steps": 3}
    with pytest.raises(UserError, match=r"\(block_size, dropout, max_steps, n_embd, n_head\)"):
        check_folder(parse(folder, **settings))


def test_a_broken_mark_is_named(folder):
    folder.mkdir()
    (folder / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json cannot be read as JSON"):
        check_folder(parse(folder))


def test_another_model_in_the_starts_place_is_refused(tmp_path, folder):
    start = save(tmp_path / "baseline", n_embd_wte=None)
    run = parse(folder, baseline=start)
    write_identity(run)
    assert json.loads((folder / "run.json").read_text())["start_fingerprint"] == weights_fingerprint(start)
    assert check_folder(run) is None
    save(tmp_path / "baseline", n_embd_wte=None, seed=6)
    with pytest.raises(UserError, match=r"other settings \(the model in .*baseline\)"):
        check_folder(run)


def test_another_model_in_the_place_of_an_unnamed_teacher_is_refused(tmp_path, folder):
    """A compressed model learns from what it was made from, unless told otherwise."""
    teacher, start = save(tmp_path / "teacher", n_embd_wte=None), save(tmp_path / "start")
    Path(start, "compression.json").write_text(json.dumps({"baseline": teacher}))
    run = parse(folder, compressed=start, distillation_weight=0.5)
    write_identity(run)
    assert check_folder(run) is None
    assert check_folder(parse(folder, compressed=start, distillation_weight=0.5, teacher=teacher)) is None  # the same
    save(tmp_path / "teacher", n_embd_wte=None, seed=6)
    with pytest.raises(UserError, match=r"other settings \(the teacher in .*teacher\)"):
        check_folder(run)


def test_a_random_start_has_no_fingerprint(folder):
    write_identity(parse(folder))
    assert "start_fingerprint" not in json.loads((folder / "run.json").read_text())


@pytest.fixture
def two_processes(monkeypatch):
    """Return a function after which settings are parsed as in one of two processes."""
    return lambda: monkeypatch.setattr(RunArguments, "world_size", property(lambda _: 2))


def test_another_number_of_processes_goes_on_with_the_same_batch(folder, two_processes):
    one = parse(folder, effective_batch_size=4)
    write_identity(one)
    two_processes()
    two = parse(folder, effective_batch_size=4)
    assert (one.training.gradient_accumulation_steps, two.training.gradient_accumulation_steps) == (2, 1)
    assert check_folder(two) is None


def test_another_batch_is_refused(folder, two_processes):
    write_identity(parse(folder, effective_batch_size=4))
    two_processes()
    with pytest.raises(UserError, match=r"\(effective_batch_size\)"):
        check_folder(parse(folder, effective_batch_size=8))


def test_accumulation_that_was_asked_for_matters(folder):
    write_identity(parse(folder, gradient_accumulation_steps=2))
    with pytest.raises(UserError, match=r"\(gradient_accumulation_steps\)"):
        check_folder(parse(folder, gradient_accumulation_steps=1))


def filled(folder: Path) -> set[str]:
    """Fill a marked folder with what a finished run leaves."""
    UNTRAINED.write(folder)
    checkpoints = ("checkpoint-2", "checkpoint-10", "damaged-checkpoint-9")
    for name in (
        *(f"{name}/model.safetensors" for name in checkpoints),
        "config.json",
        "adapter/a.txt",
        "my-notes.txt",
        "checkpoint-notes.txt",
        "checkpoint-good/model.safetensors",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    return {path.name for path in folder.iterdir()}


def test_overwriting_removes_checkpoints_results_and_what_a_model_is_loaded_by(folder):
    write_identity(parse(folder))
    names = filled(folder)
    assert check_folder(parse(folder, seed=3, overwrite=True)) is None
    removed = names - {path.name for path in folder.iterdir()}
    assert removed == {"checkpoint-2", "checkpoint-10", "damaged-checkpoint-9", "results.json", "config.json"}
    assert (folder / "adapter/a.txt").read_text() == "adapter/a.txt"
    assert (folder / "my-notes.txt").read_text() == "my-notes.txt"


def test_overwriting_leaves_an_adapter_that_cannot_be_taken_for_the_new_run_s(folder):
    write_identity(parse(folder))
    (folder / "adapter").mkdir()
    for name in ("adapter_config.json", "notes.txt"):
        (folder / "adapter" / name).write_text("{}")
    assert check_folder(parse(folder, seed=3, overwrite_output_dir=True)) is None
    assert [path.name for path in (folder / "adapter").iterdir()] == ["notes.txt"]


def test_overwriting_leaves_all_as_it_is_where_a_checkpoint_holds_what_the_run_did_not_write(folder):
    write_identity(parse(folder))
    names = filled(folder)
    seal(folder / "checkpoint-10")
    (folder / "checkpoint-10/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"checkpoint-10 holds notes.txt, which was not written by the run: move it"):
        check_folder(parse(folder, seed=3, overwrite_output_dir=True))
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "checkpoint-10/notes.txt").read_text() == "mine"


def test_a_folder_that_is_refused_is_not_swept(folder):
    (folder / "gpt_k4").mkdir(parents=True)
    left = folder / marked_for_all("gpt_k8")
    left.mkdir()
    with pytest.raises(UserError, match="holds gpt_k4 and is not the folder of a run"):
        run_experiment(parse(folder))
    assert left.exists()


def test_only_the_process_that_saves_overwrites(folder, monkeypatch):
    write_identity(parse(folder))
    names = filled(folder)
    monkeypatch.setattr(RunArguments, "should_save", property(lambda _: False))
    assert check_folder(parse(folder, overwrite=True)) is None
    assert {path.name for path in folder.iterdir()} == names


def test_overwriting_nothing_is_fine(folder):
    assert check_folder(parse(folder, overwrite=True)) is None


def test_overwriting_that_is_cut_off_can_be_done_again(folder, monkeypatch):
    """The mark stays until another takes its place: without one, the rest would be someone else's."""
    write_identity(parse(folder))
    filled(folder)
    monkeypatch.setattr("factorized_gpt2.runs.folder.remove_folder", lambda path: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        check_folder(parse(folder, seed=3, overwrite=True))
    monkeypatch.undo()
    assert check_folder(parse(folder, seed=3, overwrite=True)) is None


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["thesis.txt", "model.safetensors", "checkpoint-500/optimizer.pt"])
def test_a_folder_of_something_else_is_refused_and_left_alone(folder, name, overwrite):
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("years of work")
    with pytest.raises(
        UserError, match=f"run holds {name.split('/')[0]} and is not the folder of a run: choose another"
    ):
        check_folder(parse(folder, overwrite=overwrite))
    assert (folder / name).read_text() == "years of work"


def test_hidden_files_do_not_matter(folder):
    (folder / ".cache").mkdir(parents=True)
    assert check_folder(parse(folder)) is None


def test_only_the_model_that_an_evaluation_is_about_may_be_there_before(tmp_path):
    compressed = tmp_path / "gpt_pca_nofinetune_k6"
    start = {"baseline": save(tmp_path / "baseline", n_embd_wte=None), "n_embd_wte": 6}
    save(compressed)
    assert check_folder(parse(compressed, **start, do_train=False)) is None
    assert check_folder(parse(compressed, compressed=str(compressed), do_train=False)) is None
    for settings in (start, start | {"n_embd_wte": 5, "do_train": False}, {"do_train": True}):
        with pytest.raises(UserError, match=r"k6 holds \S+ and is not the folder of a run"):
            check_folder(parse(compressed, **settings))


def test_the_least_that_a_run_will_write(folder):
    model = tiny_model()
    size = 4 * model.num_parameters()
    saving = {"save_strategy": "steps", "save_steps": 2}
    for settings, models in (
        ({"save_strategy": "no"}, 1),
        (saving, 1 + 3),
        (saving | {"optim": "sgd"}, 1 + 1),
    ):
        assert least_bytes(model, parse(folder, **settings).training) == models * size
    model.requires_grad_(False)
    model.scale_down.requires_grad_(True)
    trained = 4 * model.scale_down.weight.numel()
    assert least_bytes(model, parse(folder, **saving).training) == size + 3 * trained
