"""The thirteen experiments and better ways at a sixth of the width, on any seeds: what docs/results/small.md shows.

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
from typing import Any

from baselines import BLOCK_SIZE, BaselineArguments, Texts, prepare_texts, text_words
from gpu_families import CODED_LORA

from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.common.files import replacing_file
from factorized_gpt2.report.reporting import read_results, write_report
from factorized_gpt2.report.tables import results_table
from factorized_gpt2.runs.fields import LORA_TARGETS
from factorized_gpt2.runs.grid import Scale, load_grid
from factorized_gpt2.runs.results import RESULTS_NAME
from factorized_gpt2.settings.flags import as_flags
from factorized_gpt2.settings.parsing import ManualParser

SHARE = 1 / 6  # of the protocol's layers and width
PROTOCOL_STEPS, PROTOCOL_BLOCK, PROTOCOL_RANKS = 10_000, 2048, (64, 128, 256, 512)
ON_A_CPU = ["--fp16=False", "--bf16=True", "--use_cpu=True", "--torch_compile=False", "--report_to=none"]
WHOLE_BATCH = ["--per_device_train_batch_size=16", "--per_device_eval_batch_size=16", "--max_eval_samples=256"]
BITS = (0.333, 0.667, 1.333, 2.667)  # a weight; the last two are the bytes of the two lowest ranks in half precision
HEALED_RANKS = PROTOCOL_RANKS[:2]  # of better starts; above, little is left to heal
HEALED_BITS = 1.333  # loses next to nothing, so that it shows what LoRA brings to any model


@dataclass
class SmallGridArguments(BaselineArguments):
    """Which texts and seeds, and how much at once."""

    text: str = "books"
    output_dir: str = field(default="small_grid", metadata={"help": "Gets a folder for each seed."})
    records: str | None = field(
        default=None,
        metadata={"help": "Folder for a copy of every results.json and the report. Default: in output_dir."},
    )
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
    jobs = [job for seed in arguments.seeds for job in SeedJobs(arguments, texts, seed)]
    failed = run_jobs(jobs, arguments.jobs, root)
    records = Path(arguments.records or root / "records")
    if copy_records(arguments, records):
        results = read_results(records)
        write_report(results, records / "report")
        print(results_table(results, "github"), flush=True)
    if failed:
        raise UserError(
            f"{len(failed)} jobs did not end well: {', '.join(failed)}. Their logs are in {root / 'logs'}."
        )


def copy_records(arguments: SmallGridArguments, folder: Path) -> int:
    """Copy the results of every run, with DATA and SMALL for the folders of this machine; return how many."""
    found = [
        path for seed in arguments.seeds for path in Path(arguments.output_dir).glob(f"seed{seed}/*/{RESULTS_NAME}")
    ]
    for path in found:
        text = (
            path.read_text(encoding="utf-8").replace(arguments.data_dir, "DATA").replace(arguments.output_dir, "SMALL")
        )
        record = folder / f"{path.parts[-3]}-{path.parts[-2]}" / RESULTS_NAME
        record.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(record) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return len(found)


class SeedJobs:
    """Lists the jobs of one seed, those first that others need, and low ranks before high ones.

    Args:
        arguments: Sizes and folders.
        texts: What is trained and measured on.
        seed: Of everything that is drawn.
    """

    def __init__(self, arguments: SmallGridArguments, texts: Texts, seed: int):
        steps, block = arguments.steps / PROTOCOL_STEPS, BLOCK_SIZE / PROTOCOL_BLOCK
        scale = Scale(SHARE, SHARE, block, steps, arguments.learning_rate)
        self._arguments, self._texts, self._seed = arguments, texts, seed
        self._root = Path(arguments.output_dir) / f"seed{seed}"
        self._experiments = {one.name: one for one in load_grid("experiments.json", scale, self._root)}
        self._flags = [*text_words(texts), "--tokenizer", texts.tokenizer, f"--seed={seed}", *ON_A_CPU, *WHOLE_BATCH]

    def __iter__(self) -> Iterator[Job]:
        """List them."""
        ranks = {rank: self._experiments[f"pca_lora_k{rank}"].compressed_rank for rank in PROTOCOL_RANKS}
        yield self._run("baseline")
        yield from self._compressions([str(rank) for rank in ranks.values()])
        for protocol_rank, rank in ranks.items():
            yield self._run(f"pca_nofinetune_k{protocol_rank}", "pca")
            yield self._evaluation("tokenwise", f"gpt_tokenwise_nofinetune_k{rank}")
            yield self._evaluation("tokenwise_refined", f"gpt_tokenwise_refined_k{rank}")
        for bits in BITS:
            yield self._evaluation("coded", f"gpt_coded_nofinetune_b{bits}")
        for protocol_rank in PROTOCOL_RANKS:
            yield self._run(f"lowrank_scratch_k{protocol_rank}")
            yield self._run(f"pca_lora_k{protocol_rank}", "pca")
        for protocol_rank in HEALED_RANKS:
            yield self._healing("tokenwise", f"gpt_tokenwise_nofinetune_k{ranks[protocol_rank]}", LORA_TARGETS)
        yield self._healing("coded", f"gpt_coded_nofinetune_b{HEALED_BITS}", CODED_LORA)

    def _job(self, name: str, command: Sequence[str], after: Sequence[str]) -> Job:
        return Job(f"seed {self._seed}, {name}", tuple(command), tuple(f"seed {self._seed}, {one}" for one in after))

    def _compressions(self, ranks: Sequence[str]) -> Iterator[Job]:
        baseline, texts = self._experiments["baseline"].folder, self._texts
        common = [f"--baseline={baseline}", f"--output_dir={self._root}", f"--seed={self._seed}", "--device=cpu"]
        text = [f"--calibration_file={texts.train_file}", f"--block_size={BLOCK_SIZE}"]
        text += [f"--calibration_tokens={self._arguments.calibration_tokens}"]
        text += [f"--calibration_document_start={texts.document_start}"] if texts.document_start else []
        tokenwise = ["--method=tokenwise", "--ranks", *ranks, *text]
        after = baseline.name
        for name, words in {  # one after the other: only one process may write compressed models into a folder
            "pca": ["--ranks", *ranks],
            "tokenwise": tokenwise,
            "tokenwise_refined": [*tokenwise, f"--refine={self._arguments.refine_steps}"],
            "coded": ["--bits_per_weight", *map(str, BITS), *text],
        }.items():
            yield self._job(name, ["compress.py", *common, *words], [after])
            after = name

    def _run(self, name: str, *after: str) -> Job:
        experiment = self._experiments[name]
        needs = [self._experiments[experiment.needs].folder.name] if experiment.needs else []
        return self._training(experiment.config, [*needs, *after])

    def _evaluation(self, way: str, folder: str) -> Job:
        return self._from_start("pca_nofinetune_k64", way, folder, {"output_dir": str(self._root / folder)})

    def _healing(self, way: str, folder: str, targets: Sequence[str]) -> Job:
        healed = self._root / folder.replace("nofinetune", "lora")
        return self._from_start(
            "pca_lora_k64", way, folder, {"output_dir": str(healed), "lora_target_modules": list(targets)}
        )

    def _from_start(self, pattern: str, way: str, folder: str, changes: dict[str, Any]) -> Job:
        config = self._experiments[pattern].config
        config = {name: value for name, value in config.items() if name not in ("baseline", "n_embd_wte", "run_name")}
        return self._training(config | {"compressed": str(self._root / folder)} | changes, [way])

    def _training(self, config: dict[str, Any], after: Sequence[str]) -> Job:
        tenth = max(1, config.get("max_steps", 0) // 10)
        evaluations = [f"--{name}={tenth}" for name in ("eval_steps", "save_steps") if config["do_train"]]
        command = ["train_hf.py", *as_flags(config), *self._flags, *evaluations]
        return self._job(Path(config["output_dir"]).name, command, after)


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
                print(f"{job.name}: {'done' if code == 0 else f'failed, exit code {code}'}", file=sys.stderr)
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
