"""A part of `gpu.py`: better ways than PCA, from the baseline of the thirteen experiments, trained and untrained.

Each way is one call of `compress.py`, in a process of its own beside the runs that train meanwhile.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench_run import BenchRun
from gpu_parts import Plan

from factorized_gpt2.common.files import read_json
from factorized_gpt2.runs.fields import LORA_TARGETS
from factorized_gpt2.runs.grid import Experiment
from factorized_gpt2.runs.run import run_experiment
from factorized_gpt2.runs.settings import parse_run

REPOSITORY = Path(__file__).resolve().parents[1]
AT_ONCE = 2  # processes that compress
CALIBRATION_TOKENS = 32768
KEPT = "ways.json"
LEAST_STEP = 0.05  # seconds that one takes at least
CODED_LORA = [target for target in LORA_TARGETS if target != "wte"]  # integers take no adapter


@dataclass(frozen=True)
class Way:
    """A call of `compress.py`, apart from the sizes.

    Attributes:
        title: What it does.
        words: That call's own.
        by_bytes: Whether it takes the bytes of the ranks in half precision, as bits a weight, instead of the ranks.
    """

    title: str
    words: tuple[str, ...]
    by_bytes: bool = False


TOKENWISE, CODED = "tokenwise", "coded"
WAYS = {
    "pca": Way("PCA", ()),
    CODED: Way("coded", (), by_bytes=True),
    TOKENWISE: Way("tokenwise", ("--method", "tokenwise")),
    "coded_refined": Way("coded, refined for 48 steps", ("--refine", "48"), by_bytes=True),
    "tokenwise_refined": Way("tokenwise, refined for 100 steps", ("--method", "tokenwise", "--refine", "100")),
}


class Compressions:
    """The ways at work, in the background.

    Args:
        bench_run: Where tables go.
        plan: Device and sizes.
        bundle: Folder of the text.
        root: Folder of the experiments' run folders.
    """

    def __init__(self, bench_run: BenchRun, plan: Plan, bundle: Path, root: Path):
        self._bench_run, self._plan, self._bundle, self.root = bench_run, plan, bundle, root
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._working: dict[str, Future[float]] = {}
        self._processes: list[subprocess.Popen] = []

    def __enter__(self):
        """Start nothing yet."""
        return self

    def __exit__(self, *_):
        """Stop what is not done."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
        self._pool.shutdown(wait=True)

    def start(self, baseline: Experiment, experiments: Sequence[Experiment]) -> None:
        """Compress the baseline, which has just been trained, in every way."""
        ranks = sorted({e.compressed_rank for e in experiments if e.compressed_rank})
        width = baseline.config["n_embd"]
        sizes = {
            False: ["--ranks", *map(str, ranks)],
            True: ["--bits_per_weight", *(f"{16 * rank / width:.3f}" for rank in [ranks[0] / 2, *ranks[:3]])],
        }
        for name, way in WAYS.items():
            words = ["--baseline", str(baseline.folder), *way.words, *sizes[way.by_bytes]]
            words += ["--output_dir", str(self.folder(name)), "--device", self._plan.device]
            words += ["--eval_file", str(self._bundle / "validation.bin")]
            words += ["--tokenizer", str(self._bundle / "tokenizer"), "--json", str(self._json(name))]
            if name != "pca":
                words += ["--calibration_file", str(self._bundle / "train.bin")]
                words += ["--calibration_tokens", str(CALIBRATION_TOKENS)]
            self._working[name] = self._pool.submit(self._call, name, words)

    def folder(self, way: str) -> Path:
        """Where the models of a way are."""
        return self.root.parent / "better" / way

    def _json(self, way: str) -> Path:
        return self.root.parent / f"{way}.json"

    def _call(self, name: str, words: list[str]) -> float:
        threads = max(1, (os.cpu_count() or 1) // (AT_ONCE + 1))
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPOSITORY)}
        began, log = time.monotonic(), self.root.parent / f"{name}.log"
        with log.open("w", encoding="utf-8") as file:
            command = [sys.executable, str(REPOSITORY / "compress.py"), *words]
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
            self._processes.append(process)
            status = process.wait()
        if status:
            last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise RuntimeError(f"compress.py ended with {status}: {' '.join(last)}")
        return time.monotonic() - began

    def has(self, way: str) -> bool:
        """Wait for a way as long as there is time; tell whether it is done."""
        working = self._working.get(way)
        if working is None:
            return False
        done = self._bench_run.attempt(f"compress.py, {way}", lambda: working.result(max(1.0, self._bench_run.left)))
        return done is not None

    def folders(self, way: str) -> list[Path]:
        """List what a way that is done has made, smallest first."""
        return [Path(row["folder"]) for row in read_json(self._json(way))["rows"][:0:-1]]

    def report(self) -> None:
        """Print and keep what every way costs, untrained, as `compress.py` measured it."""
        rows, kept = [], {}
        for name, way in WAYS.items():
            if not self.has(name):
                continue
            found, seconds = read_json(self._json(name)), self._working[name].result()
            kept[name] = found
            self._bench_run.keep(KEPT, kept)
            weights = found["rows"][0]["vocabulary_parameters"]
            for row in found["rows"][1:]:
                # Low ranks are counted in half precision, which costs nothing.
                stored = row["bits_per_weight"] * weights / 8 if way.by_bytes else row["vocabulary_bytes"] / 2
                rows.append(
                    {
                        "way": way.title,
                        "k": row["rank"],
                        "vocabulary, MB": f"{stored / 1e6:.2f}",
                        "bits a weight": f"{8 * stored / weights:.3f}",
                        "loss": f"{row['loss']:.4f}",
                        "increase": f"{row['loss_increase']:+.4f}",
                        "seconds of the call": f"{seconds:.0f}",
                    }
                )
        self._bench_run.table("Ways to compress the baseline, nothing trained", rows)


def heal(
    bench_run: BenchRun, experiments: Sequence[Experiment], words: dict[str, list[str]], compressions: Compressions
) -> None:
    """Train LoRA, as experiments 10 to 13 do, from what the better ways made."""
    adapted = [experiment for experiment in experiments if experiment.config.get("lora_rank")]
    done = [way for way in (TOKENWISE, CODED) if compressions.has(way)]
    starts = {way: compressions.folders(way)[way == CODED :] for way in done}  # of the fewest bytes there are two
    for number, experiment in enumerate(adapted):
        for way in done:
            if number < len(starts[way]):
                _heal(bench_run, experiment, words[experiment.name], way, starts[way][number], compressions.root)


def _heal(bench_run: BenchRun, experiment: Experiment, words: list[str], way: str, start: Path, root: Path) -> None:
    name = f"{start.name.removeprefix('gpt_').replace('_nofinetune', '')}_lora"
    if not bench_run.has_time(LEAST_STEP * experiment.config["max_steps"]):
        bench_run.leave_out(name)
        return
    config = {key: value for key, value in experiment.config.items() if key not in ("baseline", "n_embd_wte")}
    config |= {"compressed": str(start), "output_dir": str(root / f"gpt_{name}"), "run_name": name.replace("_", "-")}
    config |= {"lora_target_modules": CODED_LORA} if way == CODED else {}
    results = bench_run.attempt(name, lambda: run_experiment(parse_run([*Experiment(name, config).flags, *words])))
    if results:
        bench_run.say(f"\n{name}: loss {results.eval_loss:.4f}, {results.seconds:.0f} s.")
