"""A part of `gpu.py`: the thirteen experiments, by their configs, with as many steps as there is time for."""

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import numpy as np
from bench_run import BenchRun, release_memory
from gpu_families import Compressions, heal
from gpu_parts import Plan

from factorized_gpt2.common.errors import UserError
from factorized_gpt2.common.files import read_json
from factorized_gpt2.report.reporting import read_results
from factorized_gpt2.report.tables import results_table
from factorized_gpt2.runs.grid import Experiment, Scale, load_grid
from factorized_gpt2.runs.results import RESULTS_NAME, Results
from factorized_gpt2.runs.run import run_experiment
from factorized_gpt2.runs.settings import parse_run
from factorized_gpt2.text.demo_corpus import train_tokenizer
from factorized_gpt2.text.token_file import write_token_file

GRID = "experiments.json"
BASELINE, LORA = "baseline", "pca_lora_k64"  # the pilots
KEPT = "experiments.json"
LEAST_STEPS = 10  # of training from scratch, below which results would say nothing
PILOT_STEPS = (4, 12)  # the first of two runs compiles, the second is timed
EVALUATIONS = 10
HELD_OUT = 64  # blocks of the held-out text that all are measured on
RESERVE = 0.15  # share of the time that is not planned for


@dataclass(frozen=True)
class Pace:
    """What runs take, in seconds.

    Attributes:
        step: An optimizer step.
        lora_step: One with LoRA.
        run: All of a run but its steps.
    """

    step: float
    lora_step: float
    run: float

    def of_steps(self, experiment: Experiment) -> float:
        """Estimate what the steps of an experiment take."""
        return (self.lora_step if experiment.config.get("lora_rank") else self.step) * _steps(experiment)


def thirteen_experiments(bench_run: BenchRun, plan: Plan) -> None:
    """Plan equal steps for the time that is left, run the grid, and keep its results and its table."""
    logging.getLogger("factorized_gpt2").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        if not plan.is_small and not (plan.bundle / "train.bin").is_file():
            raise UserError(f"There is no {plan.bundle / 'train.bin'}: `make gpu-bundle` collects the text.")
        bundle = Path(folder) / "text"
        if plan.is_small:
            _miniature(bundle)
        else:
            _first_blocks(plan, bundle)
        flags = _flags(plan, bundle)
        root = Path(folder) / "runs"
        longest = max(map(_steps, load_grid(GRID)))
        pace, factor = Pace(0.0, 0.0, 0.0), (plan.steps or 0) / longest
        if plan.steps is None:
            pace = _pace(bench_run, plan, Path(folder) / "pilots", flags)
            if pace is None:
                bench_run.leave_out("the experiments: no time to find out how long they take")
                return
            whole = load_grid(GRID, _scale(plan, 1.0), root)
            spare = (1 - RESERVE) * bench_run.left - pace.run * len(whole)
            factor = min(1.0, spare / sum(map(pace.of_steps, whole)))
            if factor * longest < LEAST_STEPS:
                left_out = f"time for {max(0, int(factor * longest))} of {longest} steps alone"
                bench_run.leave_out(f"the experiments: {left_out}")
                return
        experiments = load_grid(GRID, _scale(plan, factor), root)
        lengths = sorted({_steps(experiment) for experiment in experiments} - {0}, reverse=True)
        bench_run.say(
            f"\nSteps of a run: {' or '.join(map(str, lengths))}, {factor:.1%} of the protocol's; learning rates "
            f"{plan.learning_rate:g} times its."
        )
        words = run_words(experiments, flags)
        with Compressions(bench_run, plan, bundle, root) as compressions:
            _run(bench_run, experiments, pace, words, compressions.start)
            compressions.report()
            heal(bench_run, experiments, words, compressions)
        results = read_results(root, missing_ok=True)
        _keep(bench_run, root)
        if results:
            bench_run.say(f"\n{results_table(results, 'github')}")


def _pace(bench_run: BenchRun, plan: Plan, folder: Path, flags: Sequence[str]) -> Pace | None:
    """Run the baseline and a LoRA run twice each, shortly; `None` if the time is over before that."""
    for steps in PILOT_STEPS:
        scale = _scale(plan, steps / max(map(_steps, load_grid(GRID))))
        pilots = [pilot for pilot in load_grid(GRID, scale, folder / str(steps)) if pilot.name in (BASELINE, LORA)]
        words = run_words(pilots, flags)
        results = [_results(pilot, words[pilot.name]) for pilot in pilots if bench_run.has_time()]
        if len(results) < len(pilots):
            return None
    step, lora_step = (result.train_seconds / _steps(pilot) for pilot, result in zip(pilots, results, strict=True))
    pace = Pace(step, lora_step, max(result.seconds - result.train_seconds for result in results))
    bench_run.say(f"\nA step takes {step:.3f} s, one with LoRA {lora_step:.3f} s, a run {pace.run:.1f} s more.")
    return pace


def _run(
    bench_run: BenchRun,
    experiments: Sequence[Experiment],
    pace: Pace,
    words: dict[str, list[str]],
    after_baseline: Callable[[Experiment, Sequence[Experiment]], None],
) -> None:
    done = set()
    for experiment in experiments:
        if experiment.needs and experiment.needs not in done:
            bench_run.leave_out(f"{experiment.name}, which starts from {experiment.needs}")
        elif not bench_run.has_time(pace.run + pace.of_steps(experiment)):
            bench_run.leave_out(experiment.name)
        else:
            results = bench_run.attempt(experiment.name, lambda: _results(experiment, words[experiment.name]))  # noqa: B023
            if results:
                done.add(experiment.name)
                _keep(bench_run, experiment.folder.parent)
                bench_run.say(f"\n{experiment.name}: loss {results.eval_loss:.4f}, {results.seconds:.0f} s.")
                if experiment.name == BASELINE:
                    after_baseline(experiment, experiments)


def _keep(bench_run: BenchRun, root: Path) -> None:
    bench_run.keep(KEPT, [read_json(path) for path in sorted(root.glob(f"*/{RESULTS_NAME}"))])


def _results(experiment: Experiment, words: Sequence[str]) -> Results:
    release_memory()
    return run_experiment(parse_run([*experiment.flags, *words]))


def _steps(experiment: Experiment) -> int:
    return experiment.config["max_steps"] if experiment.config["do_train"] else 0


def _scale(plan: Plan, steps: float) -> Scale:
    small = {"layers": 1 / 6, "width": 1 / 12, "block": 1 / 64} if plan.is_small else {}
    return Scale(steps=steps, learning_rate=plan.learning_rate, **small)


def run_words(experiments: Sequence[Experiment], flags: Sequence[str]) -> dict[str, list[str]]:
    """Collect, by name, what every run is told beside its config: all the same, and ten evaluations on its way."""
    return {
        experiment.name: [*flags, *(["--eval_steps", str(max(1, steps // EVALUATIONS))] if steps else [])]
        for experiment in experiments
        for steps in [_steps(experiment)]
    }


def _flags(plan: Plan, bundle: Path) -> list[str]:
    """What every run is told beside its config: the text at hand, and to keep no checkpoints."""
    words = {
        "train_file": bundle / "train.bin",
        "validation_file": bundle / "validation.bin",
        "tokenizer": bundle / "tokenizer",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 16,  # of no accumulation: the host, not the GPU, is what four blocks wait for
        "torch_compile_backend": plan.compiler,
    }
    if plan.device == "cpu":
        words |= {"use_cpu": True, "fp16": False}
    return [f"--{name}={value}" for name, value in words.items()]


def _first_blocks(plan: Plan, folder: Path) -> None:
    """Lay out the bundle with as much of the held-out text as all runs are measured on."""
    folder.mkdir()
    for name in ("train.bin", "tokenizer"):
        (folder / name).symlink_to((plan.bundle / name).resolve())
    ids = np.frombuffer((plan.bundle / "validation.bin").read_bytes(), "<u2")[: HELD_OUT * plan.sizes.block_size]
    write_token_file(folder / "validation.bin", [ids], plan.sizes.vocab_size)


def _miniature(folder: Path) -> None:
    """Make a small bundle of the language reference that every Python carries."""
    texts = [text for _, text in sorted(topics.topics.items())][:40]
    tokenizer = train_tokenizer(texts, 400)
    tokenizer.save_pretrained(folder / "tokenizer")
    ids = [np.array(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]) for text in texts]
    write_token_file(folder / "train.bin", ids[4:], len(tokenizer))
    write_token_file(folder / "validation.bin", ids[:4], len(tokenizer))
