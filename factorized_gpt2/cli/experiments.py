"""`run_experiments.py`: run a grid of experiments in order, then report. A run that fails does not stop the others."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from ..common.errors import REFUSED_SETTINGS, UserError, blaming
from ..common.files import read_json, replacing_file
from ..common.fingerprints import weights_fingerprint
from ..common.run_record import SETTINGS_NAME
from ..report.reporting import read_results, write_report
from ..runs.flags import check_flags, with_current_names
from ..runs.grid import Experiment, Scale, load_grid, select
from ..runs.inputs import input_fingerprints
from ..runs.results import RESULTS_NAME, Results
from ..settings.devices import launched_processes
from ..settings.parsing import ManualParser, find_config
from ..settings.setting_values import OUTPUT_FOLDER
from .shell import print_table, run_command


@dataclass
class GridArguments:
    """Which experiments to run, where to, and how they are launched."""

    grid: str = field(
        default="experiments.json",
        metadata={"help": "JSON file that lists the experiments: a path, or a name under configs/."},
    )
    only: list[str] | None = field(
        default=None,
        metadata={
            "help": "Run only these experiments, and those whose models they start from. * stands for any text."
        },
    )
    output_dir: Annotated[str, OUTPUT_FOLDER] | None = field(
        default=None,
        metadata={
            "help": "Folder that gets one subfolder for each run. Default: model_weights. With a scale it must be "
            "given."
        },
    )
    accelerate_config: str | None = field(
        default=None,
        metadata={
            "help": "Config of accelerate with which every run is launched, for several GPUs or machines: a path, or "
            "a name under configs/. Default: each run is one process."
        },
    )
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Start interrupted experiments, and those that ran with other settings, from the beginning and "
            "replace what they left. Finished ones are still skipped."
        },
    )
    dry_run: bool = field(default=False, metadata={"help": "Show what would run, without running it."})


@dataclass
class ScaleArguments:
    """Factors that make all experiments smaller or larger."""

    _argument_group_name = "Smaller or larger experiments"

    scale: float = field(
        default=1.0,
        metadata={"help": "Multiply layers, width (with heads and ranks), block size and steps by this factor."},
    )
    scale_layers: float | None = field(
        default=None, metadata={"help": "Factor for the number of layers, instead of scale."}
    )
    scale_width: float | None = field(
        default=None, metadata={"help": "Factor for width, heads, ranks k and LoRA ranks, instead of scale."}
    )
    scale_block: float | None = field(default=None, metadata={"help": "Factor for the block size, instead of scale."})
    scale_steps: float | None = field(
        default=None,
        metadata={"help": "Factor for steps of training and warm-up and between evaluations, instead of scale."},
    )
    scale_learning_rate: float = field(
        default=1.0, metadata={"help": "Factor for the learning rate, at its peak and at its end."}
    )

    def resolve(self) -> Scale:
        """Return the factors, with `scale` for those that are not set."""
        parts = {name: getattr(self, f"scale_{name}") for name in ("layers", "width", "block", "steps")}
        parts = {name: self.scale if factor is None else factor for name, factor in parts.items()}
        return Scale(**parts, learning_rate=self.scale_learning_rate)


def run_experiments(argv: list[str]) -> None:
    """Run the experiments that are not finished, print how each ended, write the report.

    Raises:
        UserError: A flag is wrong, or, at the end, runs failed.
    """
    at = argv.index("--") if "--" in argv else len(argv)
    own, flags = argv[:at], with_current_names(argv[at + 1 :])
    arguments, scaling = ManualParser(
        (GridArguments, ScaleArguments),
        prog="run_experiments.py",
        description="Run the experiments that configs/experiments.json lists, then write a report.\nFinished runs are "
        "skipped; interrupted runs are resumed.",
        usage="%(prog)s [option ...] [-- option of train_hf.py ...]",
        examples=(
            "run_experiments.py --dry_run",
            "run_experiments.py --only 'pca_lora_*' --accelerate_config configs/accelerate/two_gpus.yaml",
            "run_experiments.py --output_dir half --scale 0.5 -- --train_file train.txt --validation_file test.txt",
        ),
        remark="Options after -- are passed to train_hf.py, for every run.",
    ).parse(own)
    scale = scaling.resolve()
    check(arguments, scale, flags)
    root = Path(arguments.output_dir or "model_weights")
    experiments = load_grid(arguments.grid, scale, root)
    experiments = select(experiments, arguments.only or ["*"])
    for experiment in experiments:
        try:
            check_flags(experiment.flags)
        except UserError as error:
            raise UserError(f"{experiment.name}: {error}") from error
    grid = _Grid(root, arguments, flags)
    if arguments.dry_run:
        print_table([_row(experiment, grid.state(experiment)) for experiment in experiments])
        return
    outcomes = grid.run(experiments)
    print()
    print_table([_row(experiment, outcomes[experiment.name]) for experiment in experiments])
    failed = [name for name, outcome in outcomes.items() if outcome not in (DONE, FINISHED)]
    complaint = f"{len(failed)} of {len(experiments)} experiments did not finish: {', '.join(failed)}."
    try:
        results = read_results(root, missing_ok=True)
        if results:
            print(f"\nReport: {write_report(results, root / 'report')}")
    except UserError as error:
        raise UserError(f"No report was written: {error}" + (f" Also: {complaint}" if failed else "")) from error
    if failed:
        raise UserError(complaint)


def check(arguments: GridArguments, scale: Scale, flags: Sequence[str]) -> None:
    """Check the flags, before any file is read.

    Raises:
        UserError: The command was started by a launcher, the launcher's config is missing, a scale is given without a
            folder, or a flag after `--` is unknown to train_hf.py or is set by the grid itself.
    """
    if launched_processes() > 1:
        raise UserError(
            "run_experiments.py launches every run itself: start it with python and name the launcher's config, such "
            "as --accelerate_config configs/accelerate/two_gpus.yaml."
        )
    if arguments.accelerate_config is not None:
        found = find_config(arguments.accelerate_config)
        if found is None:
            raise UserError(f"There is no accelerate config {arguments.accelerate_config!r}.")
        from accelerate.commands.config.config_args import load_config_from_file

        with blaming(f"{arguments.accelerate_config} is not a valid config of accelerate", *REFUSED_SETTINGS):
            load_config_from_file(str(found))
    if scale != Scale() and not arguments.output_dir:
        raise UserError("A scaled grid needs a folder of its own: set --output_dir.")
    taken = {"config", "print_config", "output_dir", "run_name", "overwrite", "baseline", "compressed"}
    for name in check_flags(flags):
        if name in taken:
            raise UserError(f"--{name} after -- cannot be set for all runs: the grid sets it for each.")


DONE, FINISHED = "done", "finished before"


class _Grid:
    """Runs experiments, each in its own processes, so that a failure cannot affect the next one."""

    def __init__(self, root: Path, arguments: GridArguments, flags: Sequence[str]):
        self.root, self.flags, self.overwrite = root, list(flags), arguments.overwrite
        self.launcher = [sys.executable]
        if arguments.accelerate_config:
            config = str(find_config(arguments.accelerate_config))
            self.launcher += ["-m", "accelerate.commands.launch", "--config_file", config]

    def run(self, experiments: Sequence[Experiment]) -> dict[str, str]:
        """Run the experiments that are not finished; return how each ended, by name."""
        for experiment in experiments:
            self._refuse_other_config(experiment)
        outcomes: dict[str, str] = {}
        factorized: set[Path] = set()
        for number, experiment in enumerate(experiments, 1):
            needed = outcomes.get(experiment.needs, FINISHED)
            if needed not in (DONE, FINISHED):
                outcomes[experiment.name] = f"not run: {experiment.needs} did not finish"
            elif self.state(experiment) == FINISHED:
                outcomes[experiment.name] = FINISHED
            else:
                print(f"\n== {number} of {len(experiments)}: {experiment.name}", flush=True)
                start = Path(experiment.config.get("baseline") or "")
                if experiment.compressed_rank and start not in factorized:
                    factorized.add(start)
                    self._factorize(start, experiments)
                outcomes[experiment.name] = self._train(experiment)
        return outcomes

    def state(self, experiment: Experiment) -> str:
        """Return the state of a run.

        A run counts as finished if it had exactly these flags and if what it read is unchanged. `train_hf.py` decides
        about other finished runs, because it compares the meaning of the flags. Here that would occupy a GPU.
        """
        if not (experiment.folder / RESULTS_NAME).exists():
            return "was begun" if (experiment.folder / SETTINGS_NAME).exists() else "not begun"
        try:
            results = Results.read(experiment.folder)
            read_now = input_fingerprints(results.settings)
        except UserError:
            return "results cannot be read"
        is_same = results.words == experiment.flags + self.flags
        is_same = is_same and results.start_fingerprint == weights_fingerprint(experiment.start)
        if is_same and all(results.content.get(kind, content) == content for kind, content in read_now.items()):
            return FINISHED
        return "finished otherwise"

    def _factorize(self, start: Path, experiments: Sequence[Experiment]) -> None:
        """Compress a baseline for all runs that need it at once. If this fails, each run does it itself."""
        ranks = sorted({e.compressed_rank for e in experiments if e.config.get("baseline") == str(start)} - {None})
        arguments = ["--baseline", str(start), "--output_dir", str(self.root), "--ranks", *map(str, ranks)]
        arguments += ["--overwrite", str(self.overwrite)]
        run_process([sys.executable, "-m", "factorized_gpt2.cli.compress", *arguments])

    def _config(self, experiment: Experiment) -> Path:
        return self.root / "configs" / f"{experiment.folder.name}.json"

    def _refuse_other_config(self, experiment: Experiment) -> None:
        """Refuse to overwrite a config that was written for another run."""
        path = self._config(experiment)
        if path.exists() and read_json(path).get("output_dir") != experiment.config["output_dir"]:
            raise UserError(
                f"{path} was not written for {experiment.folder}: move it away, or choose another --output_dir."
            )

    def _train(self, experiment: Experiment) -> str:
        config = self._config(experiment)
        with replacing_file(config) as temporary:
            temporary.write_text(json.dumps(experiment.config, indent=2) + "\n", encoding="utf-8")
        arguments = ["-m", "factorized_gpt2.cli.train", "--config", str(config), *self.flags]
        if self.overwrite:
            arguments.append("--overwrite=True")
        code = run_process([*self.launcher, *arguments])
        return DONE if code == 0 else f"failed: exit code {code}"


def run_process(command: Sequence[str]) -> int:
    """Run a command and return its exit code. On a signal to stop, wait until it has saved.

    SIGTERM is passed on to it. Ctrl-C reaches it from the terminal.
    """
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except (KeyboardInterrupt, SystemExit) as stop:
            if isinstance(stop, SystemExit):
                process.terminate()
            process.wait()
            raise


def _row(experiment: Experiment, state: str) -> dict[str, str]:
    config = experiment.config
    trains = config.get("do_train", False)
    return {
        "k": str(config.get("n_embd_wte") or "-"),
        "LoRA rank": str(config.get("lora_rank") or "-"),
        "block": str(config.get("block_size", "-")),
        "steps": str(config.get("max_steps", "-")) if trains else "-",
        "learning rate": f"{config['learning_rate']:g}" if trains and "learning_rate" in config else "-",
        "state": state,
        "experiment": experiment.name,
        "folder": str(experiment.folder),
    }


def main() -> None:
    """Entry point of the console command and of `run_experiments.py`."""
    sys.exit(run_command(run_experiments))
