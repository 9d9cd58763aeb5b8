"""A grid of runs: which there are, what each starts from, and the same grid at another scale. No run happens here."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..settings.parsing import load_config
from ..settings.setting_values import check_values
from ..settings.words import as_flags
from .words import limits

_SCALED = {  # settings by the factor of `Scale` that multiplies them
    "layers": ("n_layer",),
    "width": ("n_head", "n_embd_wte", "lora_rank"),
    "block": ("block_size",),
    "steps": ("max_steps", "warmup_steps", "eval_steps", "save_steps", "logging_steps"),
}


@dataclass(frozen=True)
class Scale:
    """By how much a grid is smaller or larger than its configs say; 1 leaves a quantity as it is.

    Attributes:
        layers: Factor on `n_layer`.
        width: Factor on `n_embd`, and so on the number of heads, the ranks k, and LoRA's rank and alpha.
        block: Factor on `block_size`.
        steps: Factor on `max_steps`, `warmup_steps`, and the intervals of evaluating, saving and logging.
        learning_rate: Factor on `learning_rate` and the `min_lr` it falls to.
    """

    layers: float = 1.0
    width: float = 1.0
    block: float = 1.0
    steps: float = 1.0
    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        for name, factor in vars(self).items():
            if not 0 < factor < float("inf"):
                raise UserError(f"The scale of {name} must be positive, got {factor}.")

    def apply(self, config: dict[str, Any]) -> dict[str, Any]:
        """Scale the quantities that a config sets; heads keep their width, alpha / rank stays as it is."""
        scaled = dict(config)
        for quantity, names in _SCALED.items():
            factor = getattr(self, quantity)
            # Below 1 stand those that are off, and intervals that are shares of the steps.
            given = [name for name in names if (config.get(name) or 0) >= 1]
            scaled |= {name: max(1, round(config[name] * factor)) for name in given}
        if config.get("n_embd"):
            heads = scaled.get("n_head") or 1
            scaled["n_embd"] = heads * max(1, round(config["n_embd"] * self.width / heads))
        if config.get("lora_alpha") and scaled.get("lora_rank") != config.get("lora_rank"):
            scaled["lora_alpha"] = config["lora_alpha"] * scaled["lora_rank"] / config["lora_rank"]
        if config.get("learning_rate"):
            scaled["learning_rate"] = config["learning_rate"] * self.learning_rate
        schedule = config.get("lr_scheduler_kwargs") or {}
        if "min_lr" in schedule:
            scaled["lr_scheduler_kwargs"] = schedule | {"min_lr": schedule["min_lr"] * self.learning_rate}
        return _renamed(scaled, config)


@dataclass(frozen=True)
class Experiment:
    """One run of a grid.

    Attributes:
        name: Its config's name, without `.json`.
        config: What it is told.
        needs: Name of the experiment whose model it starts from; `None` where it starts from none of the grid.
    """

    name: str
    config: dict[str, Any]
    needs: str | None = None

    @property
    def folder(self) -> Path:
        """Where the run works."""
        return Path(self.config["output_dir"])

    @property
    def start(self) -> str | None:
        """The model it starts from; `None` for a random start."""
        return self.config.get("compressed") or self.config.get("baseline")

    @property
    def words(self) -> list[str]:
        """The config as `train_hf.py` takes it."""
        return as_flags(self.config)

    @property
    def compressed_rank(self) -> int | None:
        """The rank at which PCA compresses its baseline first; `None` for other starts."""
        return self.config.get("n_embd_wte") if self.config.get("baseline") else None


def load_grid(name: str, scale: Scale | None = None, root: Path | None = None) -> list[Experiment]:
    """Read the experiments that a file lists, each after the one whose model it starts from.

    Args:
        name: JSON file with a list `experiments` of configs beside it; a path, or a name under `configs/`.
        scale: What to multiply their quantities with; `None`: they stay.
        root: Folder of the run folders instead of the configs' own.

    Raises:
        UserError: There is no such file or config, one names no folder, two would share one at this scale, or they
            start from each other.
    """
    listed = load_config(name).get("experiments")
    if not (isinstance(listed, list) and listed and all(isinstance(entry, str) for entry in listed)):
        raise UserError(f"{name} lists no experiments.")
    folder = Path(name).parent
    scale = scale or Scale()
    configs = {entry.removesuffix(".json"): _typed(entry, load_config(str(folder / entry))) for entry in listed}
    for entry, config in configs.items():
        if not config.get("output_dir"):
            raise UserError(f"{entry} of {name} has no output_dir: set one in its config.")
        if Path(config["output_dir"]).name in ("", ".."):  # the run would work outside of the grid's folder
            raise UserError(f"{entry} of {name}: output_dir {config['output_dir']!r} does not name a folder.")
    owners = {Path(config["output_dir"]): entry for entry, config in configs.items()}
    scaled = {entry: _moved(scale.apply(config), root) for entry, config in configs.items()}
    folders = [Path(config["output_dir"]) for config in scaled.values()]
    shared = next((path for path in folders if folders.count(path) > 1), None)
    if shared:
        raise UserError(
            f"Two experiments of {name} have the folder {shared}, because their ranks are equal at this scale."
        )
    experiments = []
    for entry, config in scaled.items():
        start = next((key for key in ("compressed", "baseline") if config.get(key)), None)
        needs = owners.get(Path(configs[entry][start])) if start else None
        if needs:
            config[start] = scaled[needs]["output_dir"]
        elif start:
            config[start] = _beside(Path(config[start]), Path(configs[entry]["output_dir"]).parent, root)
        experiments.append(Experiment(entry, config, needs))
    return _in_order(experiments)


def select(experiments: Sequence[Experiment], patterns: Sequence[str]) -> list[Experiment]:
    """Choose experiments by name, with those that they start from.

    Args:
        experiments: In order.
        patterns: Names, in which `*` and `?` stand for others, as in `pca_lora_*`.

    Raises:
        UserError: A pattern that fits no experiment.
    """
    by_name = {experiment.name: experiment for experiment in experiments}
    chosen: set[str] = set()
    for pattern in patterns:
        fitting = [name for name in by_name if fnmatchcase(name, pattern.removesuffix(".json"))]
        if not fitting:
            raise UserError(f"No experiment is called {pattern!r}; there are {', '.join(by_name)}.")
        for name in fitting:
            while name is not None:
                chosen.add(name)
                name = by_name[name].needs
    return [experiment for experiment in experiments if experiment.name in chosen]


def _typed(entry: str, config: dict[str, Any]) -> dict[str, Any]:
    """Give a config's quantities as numbers, which may stand there as text, and see that its names are text."""
    typed = dict(config)
    for name in ("output_dir", "run_name", "baseline", "compressed"):
        if not isinstance(config.get(name), str | None):
            raise UserError(f"{entry}: {name} must be text, got {config[name]!r}.")
    for name in (*chain(*_SCALED.values()), "n_embd", "lora_alpha", "learning_rate"):
        if config.get(name) is not None:
            typed[name] = _number(entry, name, config[name])
    schedule = config.get("lr_scheduler_kwargs")
    if not isinstance(schedule, dict | None):
        raise UserError(f"{entry}: lr_scheduler_kwargs must be a JSON object, got {schedule!r}.")
    if schedule and "min_lr" in schedule:
        typed["lr_scheduler_kwargs"] = schedule | {"min_lr": _number(entry, "min_lr", schedule["min_lr"])}
    return typed


def _number(entry: str, name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
        check_values({name: number}, limits())
    except (TypeError, ValueError, OverflowError, UserError) as error:
        raise UserError(f"{entry}: {name}={value!r} is not a valid number.") from error
    return int(number) if number.is_integer() else number


def _renamed(scaled: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Let run name and folder say the scaled ranks, as in `pca-lora-k16-r8`."""
    changes = [(letter, name) for letter, name in (("k", "n_embd_wte"), ("r", "lora_rank")) if config.get(name)]
    for key in ("run_name", "output_dir"):
        for letter, name in changes:
            old, new = f"{letter}{config[name]}", f"{letter}{scaled[name]}"
            if scaled.get(key):
                scaled[key] = re.sub(rf"(?<=[-_]){old}(?=[-_]|$)", new, scaled[key])
    return scaled


def _moved(config: dict[str, Any], root: Path | None) -> dict[str, Any]:
    """Put the run's folder under `root`."""
    return config if root is None else config | {"output_dir": str(root / Path(config["output_dir"]).name)}


def _beside(start: Path, siblings: Path, root: Path | None) -> str:
    """Move a start that stands beside the run folders along with them."""
    return str(start if root is None or start.parent != siblings else root / start.name)


def _in_order(experiments: list[Experiment]) -> list[Experiment]:
    by_name = {experiment.name: experiment for experiment in experiments}
    graph = {name: [experiment.needs] if experiment.needs else [] for name, experiment in by_name.items()}
    try:
        return [by_name[name] for name in TopologicalSorter(graph).static_order()]
    except CycleError as error:
        raise UserError(f"Experiments start from each other in a circle: {', '.join(error.args[1])}.") from error
