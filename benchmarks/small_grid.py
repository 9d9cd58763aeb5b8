"""The thirteen experiments and better ways at a sixth of the width, on two seeds: what docs/results/small.md shows.

`python benchmarks/small_grid.py --data_dir DATA --output_dir small --seeds 0 1`. Every job is a call of `train_hf.py`
or `compress.py` that stands by itself. The same command again goes on where it was stopped, and repeats nothing.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from baselines import BLOCK_SIZE, BaselineArguments, Texts, prepare_texts, text_words

from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.report.reporting import read_results, write_report
from factorized_gpt2.runs.fields import LORA_TARGETS
from factorized_gpt2.runs.grid import Experiment, Scale, load_grid
from factorized_gpt2.settings.parsing import ManualParser

PROTOCOL_STEPS, PROTOCOL_BLOCK = 10_000, 2048
NO_TRAINING = {"do_train": False, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
ON_A_CPU = ["--fp16=False", "--bf16=True", "--use_cpu=True", "--torch_compile=False", "--report_to=none"]
WHOLE_BATCH = ["--per_device_train_batch_size=16", "--per_device_eval_batch_size=16", "--max_eval_samples=256"]
BITS = (1 / 3, 2 / 3, 4 / 3, 8 / 3)  # a weight; the last two are the bytes of the two lowest ranks in half precision
HEALED_BITS = BITS[1:3]


@dataclass
class SmallGridArguments(BaselineArguments):
    """Which texts and seeds, and how much at once."""

    text: str = "books"
    output_dir: str = field(default="small_grid", metadata={"help": "Gets a folder for each seed, and the report."})
    steps: int = field(
        default=2500, metadata={"help": "Of 4,096 tokens, for training from scratch; LoRA takes half as many."}
    )
    learning_rate: float = field(default=10, metadata={"help": "Factor on the protocol's learning rates."})
    refine_steps: int = field(default=200, metadata={"help": "Of 2,048 tokens, for refined factors."})
    jobs: int = field(default=2, metadata={"help": "Processes at once; each takes its share of the cores."})


@dataclass(frozen=True)
class Job:
    """A command, and the jobs that must have ended before it, by name."""

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()


def main(argv: list[str]) -> None:
    """Run what is not done yet, then write the report of all seeds."""
    arguments = ManualParser(SmallGridArguments, prog="small_grid.py", description=__doc__).parse(argv)[0]
    root = Path(arguments.output_dir)
    texts = prepare_texts(replace(arguments, work_dir=str(root)))
    failed = run_jobs(
        [job for seed in arguments.seeds for job in jobs_of(arguments, texts, seed)], arguments.jobs, root
    )
    runs = [results for seed in arguments.seeds for results in read_results(root / f"seed{seed}", missing_ok=True)]
    if runs:
        print(f"Report: {write_report(runs, root / 'report')}")
    if failed:
        raise UserError(
            f"{len(failed)} jobs did not end well: {', '.join(failed)}. Their logs are in {root / 'logs'}."
        )


def jobs_of(arguments: SmallGridArguments, texts: Texts, seed: int) -> Iterator[Job]:
    """List the jobs of a seed, those first that others need."""
    root = Path(arguments.output_dir) / f"seed{seed}"
    scale = Scale(1 / 6, 1 / 6, BLOCK_SIZE / PROTOCOL_BLOCK, arguments.steps / PROTOCOL_STEPS, arguments.learning_rate)
    experiments = {experiment.name: experiment for experiment in load_grid("experiments.json", scale, root)}
    flags = [*text_words(texts), "--tokenizer", texts.tokenizer, f"--seed={seed}", *ON_A_CPU, *WHOLE_BATCH]

    def train(experiment: Experiment, needs: Sequence[str] = ()) -> Job:
        tenth = max(1, experiment.config.get("max_steps", 0) // 10)
        evaluations = [f"--{name}={tenth}" for name in ("eval_steps", "save_steps") if experiment.config["do_train"]]
        command = ("train_hf.py", *experiment.flags, *flags, *evaluations)
        return Job(f"seed {seed}, {experiment.folder.name}", command, tuple(f"seed {seed}, {name}" for name in needs))

    needed = {name: [experiments[e.needs].folder.name] if e.needs else [] for name, e in experiments.items()}
    baseline, ranks = experiments["baseline"], sorted({e.compressed_rank for e in experiments.values()} - {None})
    own = {
        "pca": ["--ranks", *map(str, ranks)],
        "tokenwise": ["--method=tokenwise", "--ranks", *map(str, ranks)],
        "tokenwise_refined": ["--method=tokenwise", f"--refine={arguments.refine_steps}", "--ranks", *map(str, ranks)],
        "coded": ["--bits_per_weight", *(f"{bits:.3f}" for bits in BITS)],
    }
    common = [f"--baseline={baseline.folder}", f"--output_dir={root}", f"--block_size={BLOCK_SIZE}", "--device=cpu"]
    text = [f"--calibration_file={texts.train_file}", f"--calibration_tokens={arguments.calibration_tokens}"]
    text += [f"--calibration_document_start={texts.document_start}"] if texts.document_start else []
    yield train(baseline)
    for way, words in own.items():
        command = ("compress.py", *common, *words, *(() if way == "pca" else text), f"--seed={seed}")
        yield Job(f"seed {seed}, {way}", command, (f"seed {seed}, {baseline.folder.name}",))
    starts = {
        "tokenwise": [f"gpt_tokenwise_nofinetune_k{rank}" for rank in ranks],
        "tokenwise_refined": [f"gpt_tokenwise_refined_k{rank}" for rank in ranks],
    }
    starts["coded"] = [f"gpt_coded_nofinetune_b{bits:.3f}" for bits in BITS]
    lora, evaluation = experiments["pca_lora_k64"], experiments["pca_nofinetune_k64"]
    for name, experiment in experiments.items():
        if experiment != baseline and not (name.startswith("pca_lora") or name.startswith("lowrank")):
            yield train(experiment, [*needed[name], "pca"])
    for way, folders in starts.items():
        for folder in folders:
            yield train(_from_start(evaluation, root / folder, root / folder, NO_TRAINING), [way])
    pairs = [
        experiments[f"{kind}_k{rank}"] for rank in (64, 128, 256, 512) for kind in ("pca_lora", "lowrank_scratch")
    ]
    for experiment in pairs:
        yield train(experiment, [*needed[experiment.name], "pca"] if experiment.compressed_rank else [])
    for folder in starts["tokenwise"]:
        yield train(_from_start(lora, root / folder, root / folder.replace("nofinetune", "lora"), {}), ["tokenwise"])
    coded = {"lora_target_modules": [target for target in LORA_TARGETS if target != "wte"]}  # integers take no adapter
    for folder in (f"gpt_coded_nofinetune_b{bits:.3f}" for bits in HEALED_BITS):
        yield train(_from_start(lora, root / folder, root / folder.replace("nofinetune", "lora"), coded), ["coded"])


def _from_start(pattern: Experiment, start: Path, folder: Path, changes: dict) -> Experiment:
    """Make an experiment like another one, from a compressed model."""
    config = {name: value for name, value in pattern.config.items() if name not in ("baseline", "n_embd_wte")}
    name = folder.name.removeprefix("gpt_").replace("_", "-")
    return Experiment(name, config | {"compressed": str(start), "output_dir": str(folder), "run_name": name} | changes)


def run_jobs(jobs: Sequence[Job], at_once: int, root: Path) -> list[str]:
    """Run commands, several at once, each as soon as what it needs is done; return the names of those that failed.

    What a job prints goes to `root/logs`. An empty file `root/done/NAME` says that a job has ended well.
    """
    for folder in ("logs", "done"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    waiting, ended, failed = list(jobs), set(), []
    change = threading.Condition()

    def work() -> None:
        while True:
            with change:
                while True:
                    for job in [job for job in waiting if set(job.needs) & set(failed)]:
                        waiting.remove(job)
                        failed.append(job.name)
                    job = next((job for job in waiting if ended.issuperset(job.needs)), None)
                    if job or not waiting:
                        break
                    change.wait()
                if job is None:
                    return
                waiting.remove(job)
            code = _run(job, max(1, (os.cpu_count() or 1) // at_once), root)
            with change:
                ended.add(job.name) if code == 0 else failed.append(job.name)
                print(f"{job.name}: {'done' if code == 0 else f'failed, exit code {code}'}", flush=True)
                change.notify_all()

    workers = [threading.Thread(target=work) for _ in range(at_once)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return failed


def _run(job: Job, threads: int, root: Path) -> int:
    name = job.name.replace(", ", "-").replace(" ", "")
    done = root / "done" / name
    if done.exists():
        return 0
    script = Path(__file__).resolve().parents[1] / job.command[0]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with (root / "logs" / f"{name}.log").open("a", encoding="utf-8") as log:
        process = subprocess.run(
            [sys.executable, str(script), *job.command[1:]], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
    if process.returncode == 0:
        done.touch()
    return process.returncode


if __name__ == "__main__":
    sys.exit(run_command(main))
