"""A grid of runs: its scale, its order, and the command that goes through it; once for real, else with fake runs."""

import json
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from factorized_gpt2.cli import experiments as command
from factorized_gpt2.cli.experiments import run_experiments
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.common.fingerprints import weights_fingerprint
from factorized_gpt2.common.signals import leaving_cleanly
from factorized_gpt2.report.reporting import read_results
from factorized_gpt2.runs.grid import Scale, load_grid, select
from factorized_gpt2.runs.inputs import input_fingerprints
from factorized_gpt2.runs.results import Results
from factorized_gpt2.settings.flags import as_flags
from factorized_gpt2.settings.parsing import CONFIG_FOLDERS, load_config

RANKS = (64, 128, 256, 512)
FAMILIES = ("lowrank_scratch", "pca_nofinetune", "pca_lora")
SCRATCH, PLAIN, LORA = ([f"{family}_k{k}" for k in RANKS] for family in FAMILIES)
NAMES = ["baseline", *SCRATCH, *PLAIN, *LORA]
FOLDERS = ["gpt_baseline", *(f"gpt_{family}_k{k // 4}" for family in FAMILIES for k in RANKS)]  # at a quarter
QUARTER = Scale(0.25, 0.25, 0.25, 0.25, 0.25)


def write_configs(folder: Path, **configs) -> str:
    """Write configs and the list of them; return the list's path."""
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps({"run_name": name, "output_dir": f"runs/{name}"} | config))
    (folder / "grid.json").write_text(json.dumps({"experiments": list(configs)}))
    return str(folder / "grid.json")


def changes(scale: Scale, name: str) -> dict:
    config = load_config(name)
    return {key: value for key, value in scale.apply(config).items() if value != config.get(key)}


STEPS = {"max_steps": 2500, "warmup_steps": 125, "eval_steps": 125, "save_steps": 125, "logging_steps": 12}
RATES = {"learning_rate": 2.5e-5, "lr_scheduler_kwargs": {"min_lr": 1.25e-6}}


def test_figures_and_names_at_another_scale():
    shape = {"n_layer": 3, "n_head": 3, "n_embd": 192, "block_size": 512}
    assert changes(QUARTER, "baseline") == shape | STEPS | RATES
    names = {"output_dir": "model_weights/gpt_pca_lora_k16"}
    sizes = {"n_embd_wte": 16, "lora_rank": 8, "lora_alpha": 16.0, "block_size": 512}
    steps = {"max_steps": 1250, "warmup_steps": 25, "eval_steps": 50, "save_steps": 50, "logging_steps": 12}
    rates = {"learning_rate": 1.25e-5, "lr_scheduler_kwargs": {"min_lr": 2.5e-7}}
    assert changes(QUARTER, "pca_lora_k64") == names | sizes | steps | rates
    names = {"output_dir": "model_weights/gpt_pca_lora_k128"}
    sizes = {"n_embd_wte": 128, "lora_rank": 64, "lora_alpha": 128.0}
    assert changes(Scale(width=2), "pca_lora_k64") == names | sizes


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (Scale(layers=0.5), {"n_layer": 6}),
        (Scale(width=0.5), {"n_head": 6, "n_embd": 384}),
        (Scale(width=0.3), {"n_head": 4, "n_embd": 232}),  # 230.4, made a multiple of the heads
        (Scale(block=0.5), {"block_size": 1024}),
        (Scale(steps=0.25), STEPS),
        (Scale(learning_rate=0.25), RATES),
        (Scale(layers=2, width=2), {"n_layer": 24, "n_head": 24, "n_embd": 1536}),
    ],
)
def test_each_factor_has_its_own_quantities(scale, expected):
    assert changes(scale, "baseline") == expected


@pytest.mark.parametrize("name", [*NAMES, "tokenwise_lora_k64", "demo/baseline", "demo/pca_lora_k8"])
def test_scale_1_changes_nothing(name):
    assert Scale().apply(load_config(name)) == load_config(name)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_is_positive_and_finite(factor):
    for name in ("layers", "width", "block", "steps", "learning_rate"):
        with pytest.raises(UserError, match=f"scale of {name} must be positive, got {factor}"):
            Scale(**{name: factor})


@pytest.mark.parametrize("factor", [0.0001, 0.013, 0.1, 0.37, 0.71, 1.3, 3.0])
def test_at_any_scale_heads_divide_the_width_and_nothing_vanishes(factor):
    for name in ("baseline", "lowrank_scratch_k64", "pca_lora_k64"):
        scaled = Scale(factor, factor, factor, factor).apply(load_config(name))
        counts = [value for key, value in scaled.items() if key.startswith("n_") or key.endswith(("_size", "_steps"))]
        assert len(counts) >= 8
        assert min(counts) >= 1
        assert {type(count) for count in counts} == {int}
        assert scaled.get("n_embd", 0) % scaled.get("n_head", 1) == 0
        assert scaled.get("lora_alpha", 2) / scaled.get("lora_rank", 1) == 2


def test_the_thirteen_come_after_what_they_start_from_and_can_be_moved(tmp_path):
    experiments = load_grid("experiments.json")
    assert [experiment.name for experiment in experiments] == NAMES
    assert {e.name: e.needs for e in experiments if e.needs} == dict.fromkeys(PLAIN + LORA, "baseline")
    assert [e.config for e in experiments] == [load_config(name) for name in NAMES]
    assert [e.compressed_rank for e in experiments] == [None] * 5 + [*RANKS] * 2

    experiments = load_grid("experiments.json", QUARTER, tmp_path)
    assert [e.folder for e in experiments] == [tmp_path / folder for folder in FOLDERS]
    assert {e.start for e in experiments} == {None, str(tmp_path / "gpt_baseline")}
    assert [e.needs for e in experiments] == [None] * 5 + ["baseline"] * 8


def test_only_what_stands_beside_a_run_moves_with_it(tmp_path):
    configs = {"hub": {"baseline": "openai-community/gpt2"}, "beside": {"compressed": "runs/refined"}}
    hub, beside = load_grid(write_configs(tmp_path, **configs), root=Path("elsewhere"))
    assert (hub.start, hub.needs) == ("openai-community/gpt2", None)
    assert (beside.start, beside.needs) == ("elsewhere/refined", None)


def test_the_order_of_the_list_may_be_any(tmp_path):
    configs = {"c": {"compressed": "runs/b"}, "a": {"baseline": "runs/z"}, "b": {"baseline": "runs/z"}, "z": {}}
    experiments = load_grid(write_configs(tmp_path, **configs))
    names = [experiment.name for experiment in experiments]
    assert names[0] == "z"
    assert names.index("b") < names.index("c")
    assert {e.name: e.needs for e in experiments} == {"z": None, "a": "z", "b": "z", "c": "b"}
    assert [e.name for e in select(experiments, ["c"])] == ["z", "b", "c"]  # all that it goes back to


def test_lists_that_make_no_grid(tmp_path):
    with pytest.raises(UserError, match="baseline lists no experiments"):
        load_grid("baseline")
    circle = {"a": {"compressed": "runs/b"}, "b": {"compressed": "runs/c"}, "c": {"compressed": "runs/a"}}
    with pytest.raises(UserError, match=r"Experiments start from each other in a circle: (\w, ){3}\w\."):
        load_grid(write_configs(tmp_path, **circle))
    (tmp_path / "b.json").unlink()
    with pytest.raises(UserError, match=r"There is no config '.*/b'"):
        load_grid(str(tmp_path / "grid.json"))


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["*"], NAMES),
        (["pca_lora_k64.json", "lowrank_scratch_k512"], ["baseline", "lowrank_scratch_k512", "pca_lora_k64"]),
        (["lowrank_*"], SCRATCH),
        (["*_k?4"], ["baseline", "lowrank_scratch_k64", "pca_nofinetune_k64", "pca_lora_k64"]),
    ],
)
def test_experiments_are_chosen_with_what_they_start_from(patterns, names):
    assert [experiment.name for experiment in select(load_grid("experiments.json"), patterns)] == names


class FakeRuns:
    """Stands in for processes: notes what is launched, and leaves in a run's folder what a run would."""

    def __init__(self, root: Path):
        self.root, self.launched, self.failing, self.reported, self.reading = root, [], set(), [], {}

    def run(self, words: list[str]) -> int:
        self.launched.append(words)
        if "factorized_gpt2.cli.compress" in words:
            return int("compress" in self.failing)
        at = words.index("--config") + 1
        config, flags = json.loads(Path(words[at]).read_text()), words[at + 1 :]
        folder = Path(config["output_dir"])
        folder.mkdir(exist_ok=True)
        (folder / "run.json").write_text("{}")
        if folder.name in self.failing:
            return 1
        kept = as_flags(config) + [flag for flag in flags if not flag.startswith("--overwrite")]
        (folder / "model.safetensors").write_text(" ".join(kept))
        start = config.get("baseline")
        kind = ("lowrank-scratch" if config.get("n_embd_wte") else "baseline") if start is None else "pca-nofinetune"
        figures = (config.get("n_embd_wte"), 1.0, 2.7, 1, 1, 4, 4)
        settings = config | {name: [path] if name.endswith("file") else path for name, path in self.reading.items()}
        results = Results(kind, kind, *figures, settings, {}, kept, content=input_fingerprints(settings))
        replace(results, start_fingerprint=weights_fingerprint(start)).write(folder)
        return 0

    def __call__(self, *words: str) -> list[str]:
        """Run the command on a quarter of the thirteen; return the folders' names of the runs that it launched."""
        self.launched.clear()
        run_experiments(["--output_dir", str(self.root), "--scale", "0.25", *words])
        return self.trained

    def of(self, command: str) -> list[list[str]]:
        return [words for words in self.launched if f"factorized_gpt2.cli.{command}" in words]

    @property
    def trained(self) -> list[str]:
        return [Path(words[words.index("--config") + 1]).stem for words in self.of("train")]


@pytest.fixture
def grid(tmp_path, monkeypatch) -> FakeRuns:
    fake = FakeRuns(tmp_path / "weights")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(command, "run_process", fake.run)
    monkeypatch.setattr(command, "write_report", lambda results, folder: fake.reported.append((len(results), folder)))
    return fake


def table(capsys) -> dict[str, list[str]]:
    rows = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    return {row[-2]: row for row in rows if len(row) == 8 and row[-2] in NAMES}


def states(capsys) -> dict[str, str]:
    return {name: row[5] for name, row in table(capsys).items()}


def test_runs_are_launched_in_order_each_with_its_resolved_config(grid, capsys):
    grid.failing = {"compress"}  # which stops nothing: a run can factorize by itself
    assert grid() == FOLDERS
    assert states(capsys) == dict.fromkeys(NAMES, "done")
    assert grid.reported == [(13, grid.root / "report")]
    for experiment in load_grid("experiments.json", Scale(0.25, 0.25, 0.25, 0.25), grid.root):
        written = grid.root / "configs" / f"{experiment.folder.name}.json"
        assert json.loads(written.read_text()) == experiment.config
        assert [sys.executable, "-m", "factorized_gpt2.cli.train", "--config", str(written)] in grid.launched
    # All ranks at once, before the first run that needs one, in one process.
    words = ["--baseline", str(grid.root / "gpt_baseline"), "--output_dir", str(grid.root)]
    words += ["--ranks", "16", "32", "64", "128", "--overwrite", "False"]
    assert grid.of("compress") == [[sys.executable, "-m", "factorized_gpt2.cli.compress", *words]]
    assert grid.launched.index(grid.of("compress")[0]) == 5


def test_only_what_is_not_finished_in_just_this_way_is_run_again(grid, capsys):
    grid()
    capsys.readouterr()
    assert grid() == grid.launched == []
    assert states(capsys) == dict.fromkeys(NAMES, "finished before")
    assert grid.reported == [(13, grid.root / "report")] * 2
    (grid.root / "gpt_baseline/model.safetensors").write_text("others")
    assert grid() == FOLDERS[5:]
    assert grid("--", "--seed=3") == FOLDERS
    assert grid("--", "--seed=3") == []
    assert grid("--only", "lowrank_scratch_k64", "--scale_steps", "0.5", "--", "--seed=3") == [FOLDERS[1]]
    assert grid() == FOLDERS


def test_a_run_that_read_what_has_changed_since_is_run_again(grid, tmp_path, monkeypatch):
    """All that a run reads counts: its tokenizer and texts, the config of what it starts from."""
    monkeypatch.chdir(tmp_path)
    names = {"tokenizer": "words/tokenizer.json", "train_file": "train.txt", "validation_file": "held_out.txt"}
    for name in names.values():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    flags = ["--tokenizer=words", "--train_file=train.txt", "--validation_file=held_out.txt"]
    grid.reading = {name: path.split("/")[0] for name, path in names.items()}
    assert grid("--", *flags) == FOLDERS
    assert grid("--", *flags) == []
    for name in names.values():
        (tmp_path / name).write_text('{"edited": true}')
        assert set(FOLDERS) - set(grid("--", *flags)) <= set(FOLDERS[5:9] if name == "train.txt" else [])
        assert grid("--", *flags) == []
    config = grid.root / "gpt_baseline/config.json"
    config.write_text(json.dumps({"layer_norm_epsilon": 0.1}))
    assert grid("--", *flags) == FOLDERS[5:]


def test_a_failed_run_does_not_stop_the_others_and_is_tried_again(grid, capsys):
    grid.failing = {"gpt_pca_nofinetune_k32", "gpt_lowrank_scratch_k128"}
    with pytest.raises(UserError, match=r"^2 of 13 experiments .*: lowrank_scratch_k512, pca_nofinetune_k128\.$"):
        grid()
    assert grid.trained == FOLDERS
    ends = dict.fromkeys(NAMES, "done") | dict.fromkeys((SCRATCH[3], PLAIN[1]), "failed: exit code 1")
    assert states(capsys) == ends
    assert grid.reported == [(11, grid.root / "report")]
    grid.failing = set()
    assert grid() == ["gpt_lowrank_scratch_k128", "gpt_pca_nofinetune_k32"]


def test_without_its_baseline_nothing_starts_from_it_and_the_rest_goes_on(grid, capsys):
    grid.failing = {"gpt_baseline"}
    with pytest.raises(UserError, match=r"^1 of 1 experiments did not finish: baseline\.$"):
        grid("--only", "baseline")
    assert grid.reported == []  # nothing to report
    capsys.readouterr()
    with pytest.raises(UserError, match=f"^9 of 13 .* did not finish: {', '.join(['baseline', *PLAIN, *LORA])}.$"):
        grid()
    assert grid.trained == FOLDERS[:5]
    assert grid.of("compress") == []
    expected = {"baseline": "failed: exit code 1"} | dict.fromkeys(SCRATCH, "done")
    assert states(capsys) == expected | dict.fromkeys(PLAIN + LORA, "not run: baseline did not finish")
    assert grid.reported == [(4, grid.root / "report")]


def test_overwriting_reaches_every_command_and_is_no_difference_in_itself(grid):
    grid()
    assert grid("--overwrite") == []
    assert grid("--overwrite", "--", "--seed=3") == FOLDERS
    assert {tuple(words[-2:]) for words in grid.of("train")} == {("--seed=3", "--overwrite=True")}
    assert [words[-2:] for words in grid.of("compress")] == [["--overwrite", "True"]]
    assert grid("--", "--seed=3") == []


def test_a_config_of_someone_else_in_a_run_s_place_is_refused_and_stays(grid):
    path = grid.root / "configs/gpt_baseline.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"output_dir": "elsewhere"}')
    with pytest.raises(
        UserError, match=r"gpt_baseline.json was not written for .*gpt_baseline: move it away, or choose"
    ):
        grid()
    assert path.read_text() == '{"output_dir": "elsewhere"}'
    assert not grid.trained


def test_a_dry_run_only_shows_what_would_run(grid, capsys):
    assert grid("--dry_run", "--scale_steps", "0.5", "--scale_learning_rate", "0.5") == []
    assert grid.launched == grid.reported == []
    assert not grid.root.exists()
    rows = table(capsys)
    assert list(rows) == NAMES
    start = [str(grid.root / name) for name in FOLDERS]
    assert rows["baseline"] == ["-", "-", "512", "5000", "5e-05", "not begun", "baseline", start[0]]
    assert rows["pca_nofinetune_k64"] == ["16", "-", "512", "-", "-", "not begun", "pca_nofinetune_k64", start[5]]
    assert rows["pca_lora_k64"] == ["16", "8", "512", "2500", "2.5e-05", "not begun", "pca_lora_k64", start[9]]


def test_a_dry_run_says_how_far_each_is(grid, capsys):
    grid.failing = {"gpt_lowrank_scratch_k16"}
    with pytest.raises(UserError):
        grid("--only", "lowrank_*", "pca_nofinetune_*")
    (grid.root / "gpt_lowrank_scratch_k32/results.json").write_text("{")
    (grid.root / "gpt_lowrank_scratch_k64/results.json").write_text('{"run_name": "of an older version"}')
    capsys.readouterr()
    grid("--dry_run")
    expected = dict.fromkeys(["baseline", *SCRATCH, *PLAIN], "finished before") | {"lowrank_scratch_k64": "was begun"}
    expected |= dict.fromkeys(SCRATCH[1:3], "results cannot be read")
    assert states(capsys) == expected | dict.fromkeys(LORA, "not begun")
    grid("--dry_run", "--only", "baseline", "--", "--seed=3")
    assert states(capsys) == {"baseline": "finished otherwise"}


def test_only_some_run_with_what_they_start_from_and_flags_reach_them_all(grid):
    flags = ["--train_file", "a.jsonl", "b.jsonl", "--seed=3"]
    folders = ["gpt_baseline", "gpt_lowrank_scratch_k128", "gpt_pca_lora_k16"]
    assert grid("--only", "pca_lora_k64", "lowrank_*_k512.json", "--", *flags) == folders
    assert [words[-4:] for words in grid.of("train")] == [flags] * 3
    assert grid.of("compress")[0][-4:] == ["--ranks", "16", "--overwrite", "False"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--scale_steps", "0"], "The scale of steps must be positive, got 0.0"),
        (["--grid", "experimants.json"], "Did you mean 'experiments.json'"),
        (["--accelerate_config", "nowhere.yaml"], "There is no accelerate config 'nowhere.yaml'"),
        (["--seed=3"], "Unknown argument '--seed'"),
        (["--scale_width", "0.004"], "have the folder .*_scratch_k1, because their ranks are equal at this scale"),
        (["--only", "baseline", "pca_k64"], "No experiment is called 'pca_k64'; there are baseline, lowrank"),
        (["--", "--seed=3", "--output_dir=x"], "^--output_dir after -- cannot be set for all runs"),
        *((["--", f"--{name}=x"], f"^--{name} after -- cannot be set") for name in ("config", "run_name", "baseline")),
        (["--", "--compressed=x"], "^--compressed after -- cannot be set"),
        (["--", "--overwrite"], "^--overwrite after -- cannot be set"),
        (["--", "--print_config"], "^--print_config after -- cannot be set"),
        (["--", "--max_stepz=5"], "Unknown argument '--max_stepz'. Did you mean 'max_steps'"),
        (["--", "--max_steps=many"], "max_steps.*invalid int value: 'many'"),
    ],
)
def test_mistakes_are_found_before_anything_runs(grid, words, complaint):
    with pytest.raises(UserError, match=complaint):
        grid(*words)
    assert grid.launched == []
    assert not grid.root.exists()


def test_a_launcher_is_named_not_used_from_outside(grid, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"start it with python.*--accelerate_config configs/accelerate/two_gpus.yaml"):
        grid()
    assert grid.launched == []
    monkeypatch.setenv("WORLD_SIZE", "1")
    config = str(CONFIG_FOLDERS[1] / "accelerate/two_gpus.yaml")
    assert grid("--accelerate_config", config) == FOLDERS
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    assert {tuple(words[:7]) for words in grid.of("train")} == {(*launcher, "-m", "factorized_gpt2.cli.train")}
    assert grid.of("compress")[0][:3] == [sys.executable, "-m", "factorized_gpt2.cli.compress"]


def test_a_small_grid_from_end_to_end(tmp_path, corpus, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    common = {"train_file": [str(corpus / "train.jsonl")], "validation_file": [str(corpus / "validation.jsonl")]}
    common |= {"block_size": 16, "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": ["none"]}
    learning = {"do_train": True, "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "disable_tqdm": True}
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "tokenizer": str(corpus / "tokenizer")}
    start = {"baseline": "runs/baseline", "n_embd_wte": 4}
    listed = {
        "pca_lora_k4": common | learning | start | {"lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0.0},
        "gpt_pca_nofinetune_k4": common | start | {"do_train": False},  # where PCA keeps its model
        "baseline": common | learning | shape,
    }
    root = tmp_path / "weights"
    words = ["--grid", write_configs(tmp_path, **listed), "--output_dir", str(root)]
    run_experiments(words)
    rows = read_results(root)
    found = [(row.family, row.n_embd_wte) for row in rows]
    assert found == [("baseline", None), ("pca-nofinetune", 4), ("pca-lora", 4)]
    assert rows[2].start_fingerprint == weights_fingerprint(str(root / "baseline"))
    assert f"Report: {root / 'report/report.md'}" in capsys.readouterr().out
    report = (root / "report/report.md").read_text()
    assert all(re.search(rf"^\| {row.run_name} .*{row.eval_loss:.4f}", report, re.MULTILINE) for row in rows)

    def written() -> dict[str, int]:
        return {name: (root / name / "results.json").stat().st_mtime_ns for name in listed}

    first = written()
    monkeypatch.setattr(command, "write_report", lambda results, folder: folder)  # once is enough
    run_experiments(words)
    assert capsys.readouterr().out.count("finished before") == 3
    assert written() == first

    (root / "pca_lora_k4/results.json").unlink()
    run, launched = command.run_process, []

    def run_trainings(words: list[str]) -> int:
        launched.append(words[2])
        return run(words) if words[2].endswith("train") else 0  # what PCA made is still there

    monkeypatch.setattr(command, "run_process", run_trainings)
    run_experiments(words)
    assert "== 2 of 3: pca_lora_k4\n" in capsys.readouterr().out
    assert launched == ["factorized_gpt2.cli.compress", "factorized_gpt2.cli.train"]
    assert {name for name, time in written().items() if time != first[name]} == {"pca_lora_k4"}
    assert Results.read(root / "pca_lora_k4").eval_loss == rows[2].eval_loss


def test_a_scaled_grid_needs_a_folder_of_its_own(grid):
    with pytest.raises(UserError, match="needs a folder of its own: set --output_dir"):
        run_experiments(["--scale", "0.5", "--dry_run"])


def test_one_damaged_result_does_not_hide_what_failed(grid):
    grid.failing = {"gpt_lowrank_scratch_k32"}
    damaged = grid.root / "gpt_other"
    damaged.mkdir(parents=True)
    (damaged / "results.json").write_text('{"run_name": 1}')
    with pytest.raises(
        UserError, match=r"No report was written: .*gpt_other.* Also: 1 of 2 .* lowrank_scratch_k128\."
    ):
        grid("--only", "baseline", "lowrank_scratch_k128")
    assert grid.trained == ["gpt_baseline", "gpt_lowrank_scratch_k32"]


def test_starts_are_found_however_their_paths_are_spelled_and_follow_the_scale(tmp_path):
    configs = {"a": {"n_embd_wte": 8, "output_dir": "runs/gpt_a_k8"}, "b": {"compressed": "./runs/gpt_a_k8/"}}
    for root, folder in ((None, "runs"), (Path("new"), "new")):
        a, b = load_grid(write_configs(tmp_path, **configs), Scale(width=0.5), root)
        assert (b.needs, b.start, str(a.folder)) == ("a", f"{folder}/gpt_a_k4", f"{folder}/gpt_a_k4")


def test_intervals_that_are_shares_and_what_is_off_keep_their_values():
    config = {"max_steps": -1, "eval_steps": 0.1, "warmup_steps": 0, "output_dir": "a", "lr_scheduler_kwargs": None}
    assert Scale(steps=0.5).apply(config) == config


CHILD = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.kill(os.getppid(), int(sys.argv[1]))
if int(sys.argv[1]) == signal.SIGTERM:
    signal.sigwait([signal.SIGTERM])
open(sys.argv[2], "w").write("saved")
"""


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_grid_that_is_told_to_stop_lets_its_run_save(tmp_path, number, raised):
    """The run tells its parent to stop, as whoever stops a grid does, and waits for what that passes on."""
    with pytest.raises(raised), leaving_cleanly():
        command.run_process([sys.executable, "-c", CHILD, str(int(number)), str(tmp_path / "file")])
    assert (tmp_path / "file").read_text() == "saved"
