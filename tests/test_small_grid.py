"""The grid of small experiments: its jobs are commands that can be given, each after the one that it needs."""

import baselines
import healing
import pages
import pytest
import small_grid
from baselines import Texts
from small_grid import Job, SeedJobs, SmallGridArguments, run_jobs

from factorized_gpt2.cli.compress import check
from factorized_gpt2.cli.compress_settings import CalibrationArguments, CompressArguments
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.runs.settings import parse_run
from factorized_gpt2.settings.devices import DeviceArguments
from factorized_gpt2.settings.parsing import ManualParser
from factorized_gpt2.settings.text_arguments import EvaluationArguments

TEXTS = Texts("train.parquet", "validation.parquet", "tokenizer", "# Title: ")


@pytest.fixture(scope="module")
def jobs():
    return list(SeedJobs(SmallGridArguments(output_dir="small"), TEXTS, 3))


def test_every_job_follows_what_it_needs(jobs):
    names = [job.name for job in jobs]
    untrained, trained, healed = 4 * 4, 2 * 4, 2 + 1  # of four kinds and of two at four sizes; from better starts
    assert len(set(names)) == len(names) == 1 + 4 + untrained + trained + healed  # beside baseline and compressions
    for number, job in enumerate(jobs):
        assert set(job.needs) <= set(names[:number])


def test_runs_can_be_asked_for(jobs):
    runs = {job.name: parse_run(list(job.command[1:])) for job in jobs if job.command[0] == "train_hf.py"}
    assert {run.training.seed for run in runs.values()} == {3}
    assert runs["seed 3, gpt_baseline"].model.n_embd == 128
    assert runs["seed 3, gpt_lowrank_scratch_k85"].training.max_steps == 2500
    healed = runs["seed 3, gpt_tokenwise_lora_k11"]
    assert healed.training.max_steps == 1250
    assert healed.model.compressed == "small/seed3/gpt_tokenwise_nofinetune_k11"
    assert "wte" not in runs["seed 3, gpt_coded_lora_b1.333"].adapter.lora_target_modules


def test_compressions_can_be_asked_for(jobs):
    parts = (CompressArguments, CalibrationArguments, EvaluationArguments, DeviceArguments)
    for job in (job for job in jobs if job.command[0] == "compress.py"):
        settings, *others = ManualParser(parts).parse(list(job.command[1:]))[:3]
        check(settings, *others)
        assert settings.output_dir == "small/seed3"


def test_what_needs_a_failed_job_is_not_run(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(small_grid, "_run", lambda job, threads, root: ran.append(job.name) or int(job.name == "b"))
    jobs = [Job("a", ()), Job("b", (), ("a",)), Job("c", (), ("b",)), Job("d", (), ("c",)), Job("e", (), ("a",))]
    assert sorted(run_jobs(jobs, 2, tmp_path)) == ["b", "c", "d"]
    assert sorted(ran) == ["a", "b", "e"]


def test_a_job_that_is_done_is_not_repeated(tmp_path, monkeypatch, capsys):
    done = iter([0, 1])
    monkeypatch.setattr(small_grid.subprocess, "run", lambda *_, **__: type("", (), {"returncode": next(done)}))
    assert run_jobs([Job("a", ("x.py",))], 1, tmp_path) == []
    assert run_jobs([Job("a", ("x.py",)), Job("b", ("x.py",))], 1, tmp_path) == ["b"]


def test_failed_jobs_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(small_grid, "prepare_texts", lambda arguments: TEXTS)
    monkeypatch.setattr(small_grid, "SeedJobs", lambda *_: [Job("seed 0, x", ("missing.py",))])
    with pytest.raises(UserError, match="1 jobs did not end well: seed 0, x"):
        small_grid.main(["--output_dir", str(tmp_path)])


def test_records_name_no_folder_of_the_machine(tmp_path):
    run = tmp_path / "out/seed3/gpt_baseline"
    run.mkdir(parents=True)
    (run / "results.json").write_text(f'{{"a": "--x={tmp_path}/texts/b", "c": "{run}"}}')
    arguments = SmallGridArguments(data_dir=f"{tmp_path}/texts", output_dir=f"{tmp_path}/out", seeds=[3])
    assert small_grid.copy_records(arguments, tmp_path / "kept") == 1
    record = (tmp_path / "kept/seed3-gpt_baseline/results.json").read_text()
    assert record == '{"a": "--x=DATA/b", "c": "SMALL/seed3/gpt_baseline"}'


def test_baselines_are_one_for_each_seed(tmp_path):
    arguments = baselines.BaselineArguments(seeds=[0, 1], baselines=["a"], work_dir=str(tmp_path))
    with pytest.raises(UserError, match="1 folders for 2 seeds"):
        next(baselines.benches(arguments))


def test_losses_are_read_off_a_curve():
    curve = [(0.0, 6.0), (10.0, 5.0), (20.0, 5.5)]
    assert [healing.at(curve, tokens) for tokens in (0, 5, 10, 15, 21)] == [6.0, 5.5, 5.0, 5.25, None]
    assert [healing.reached(curve, loss) for loss in (7, 6, 5.5, 5, 4.9)] == [0.0, 0.0, 5.0, 10.0, None]


def test_healing_of_the_published_runs(capsys):
    healing.main(["--results", str(pages.DOCS / "results/full"), "--rivals", "lowrank-scratch"])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: line[1:] for line in lines if line}
    assert rows["run"] == ["before", "0.5 M", "1 M", "2 M", "4 M", "at the end", "reaches lowrank-scratch"]
    assert rows["pca-lora-k64-r32"][0] == "+0.380"
    assert [rows[f"pca-lora-k{rank}-r32"][-1] for rank in (64, 128, 256)] == ["0.67 M", "not reached", "not reached"]
