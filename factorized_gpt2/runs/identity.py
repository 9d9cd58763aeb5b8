"""The identity of a run: the settings and file contents that its result depends on, recorded and compared."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..common.errors import silenced
from ..common.fingerprints import weights_fingerprint
from .inputs import input_fingerprints, teacher_asked
from .settings import Run, default_settings
from .training_fields import MATERIAL, MATERIAL_FOR_THE_BEST

# These are compared by content if that is known on both sides, otherwise by the settings that name them.
_NAMED_BY = {
    "start": ("baseline", "compressed"),
    "teacher": ("teacher",),
    "tokenizer": ("tokenizer",),
    "train_file": ("train_file",),
    "validation_file": ("validation_file",),
    "dataset": ("dataset_name", "dataset_config_name"),
    "dataset_files": ("dataset_name",),
}
_BATCH = ("effective_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")
_OWN_IMMATERIAL = ("preprocessing_num_workers", "wandb_mode", "hub_base_model_id")
_WITHOUT_TRAINING = frozenset(("do_train", "bf16", "fp16", "tf32"))
_SCHEDULES_BY_LOSS = ("reduce_lr_on_plateau", "greedy")


@dataclass(frozen=True)
class Differences:
    """The differences between a run and a recorded one.

    Attributes:
        material: Descriptions of differences that change the result.
        harmless: Names of settings that differ but do not change the result.
        unknown: Descriptions of inputs that cannot be compared because they were not recorded.
    """

    material: list[str]
    harmless: list[str]
    unknown: list[str]


def run_fingerprints(run: Run, with_dataset: bool = False) -> dict[str, str]:
    """Return the fingerprints of the inputs of a run; inputs that cannot be identified are left out.

    Args:
        run: The settings.
        with_dataset: Whether to look up the commit of a dataset on the Hub, which needs a connection.
    """
    found = input_fingerprints(run.settings())
    if with_dataset and _reads_dataset(run) and "dataset_files" not in found:
        commit = _dataset_commit(run.data.dataset_name, run.data.dataset_config_name)
        found |= {} if commit is None else {"dataset": commit}
    return found


def identity(run: Run) -> dict[str, Any]:
    """Return the record of a run, for `differences` to compare with. Its `id` hashes all that affects the result."""
    start, settings = weights_fingerprint(run.start), _settings(run)
    read = {"blocks_a_step": _blocks_a_step(run), "content": run_fingerprints(run, with_dataset=True)}
    material = {name: settings.get(name) for name in sorted(_material(run))} | read
    return {
        **settings,
        **read,
        **({} if start is None else {"start_fingerprint": start}),
        "id": hashlib.sha256(json.dumps(material, sort_keys=True, default=str).encode()).hexdigest(),
    }


def differences(stored: Mapping[str, Any], run: Run, with_dataset: bool = False) -> Differences:
    """Compare a run with a record that `identity` made, in this or an earlier version.

    Args:
        stored: The record.
        run: The settings.
        with_dataset: As for `run_fingerprints`.
    """
    asked, defaults = _settings(run), default_settings()
    # A setting that the record does not have, because it is newer, counts as having had its default.
    differing = {name for name, value in asked.items() if stored.get(name, defaults.get(name)) != value}
    material: list[str] = []
    unknown: list[str] = []
    compared: set[str] = set()
    before, now = stored.get("content"), run_fingerprints(run, with_dataset)
    for kind, names in _NAMED_BY.items():
        if isinstance(before, dict) and kind in before and kind in now:
            compared.update(names)
            if before[kind] != now[kind]:
                material.append(_named(kind, run))
        elif kind in now and not isinstance(before, dict) and not differing.intersection(names):
            unknown.append(_named(kind, run))
    if not isinstance(before, dict) and stored.get("start_fingerprint") not in (None, weights_fingerprint(run.start)):
        material.append(_named("start", run))
    material += _batch_differences(stored, run, differing)
    counting = _material(run) - compared
    material += sorted(differing & counting)
    return Differences(material, sorted(differing - counting - set(material)), unknown)


def _settings(run: Run) -> dict[str, Any]:
    settings = run.settings()
    if run.training.effective_batch_size is not None:
        settings.pop("gradient_accumulation_steps")  # computed from the number of processes
    settings.pop("output_dir")  # a folder can be moved
    return settings


def _material(run: Run) -> set[str]:
    training = run.training
    if not training.do_train:
        names = set(_WITHOUT_TRAINING)
    else:
        names = set(MATERIAL)
        keeps_best = training.load_best_model_at_end or training.save_strategy == "best"
        if keeps_best or training.lr_scheduler_type in _SCHEDULES_BY_LOSS:
            names |= MATERIAL_FOR_THE_BEST
        if training.max_steps > 0:
            names.discard("num_train_epochs")
    if not training.auto_find_batch_size:
        names -= set(_BATCH)  # compared by the batch that results
    own = {
        "loss_backend",
        *(name for part in (run.model, run.adapter, run.distillation, run.data) for name in vars(part)),
    }
    if not run.data.streaming:
        own.discard("shuffle_buffer")
    return (names | own) - set(_OWN_IMMATERIAL)


def _batch_differences(stored: Mapping[str, Any], run: Run, differing: set[str]) -> list[str]:
    if not run.training.do_train:
        return []
    before, now = stored.get("blocks_a_step"), _blocks_a_step(run)
    if before is None:  # written by an earlier version, which did not know the number of processes
        before = stored.get("effective_batch_size")
        if before is None:
            before = (stored.get(_BATCH[1]) or 0) * (stored.get(_BATCH[2]) or 0)
            now = now // run.training.world_size
    if before == now:
        return []
    return [next((name for name in _BATCH if name in differing), "number of processes")]


def _blocks_a_step(run: Run) -> int:
    training = run.training
    return training.train_batch_size * training.gradient_accumulation_steps * training.world_size


def _named(kind: str, run: Run) -> str:
    data = run.data
    return {
        "start": f"the model in {run.start}",
        "teacher": f"the teacher in {teacher_asked(run.settings())}",
        "tokenizer": f"the tokenizer in {data.tokenizer or run.start}",
        "train_file": f"the text of {', '.join(data.train_file or ())}",
        "validation_file": f"the text of {', '.join(data.validation_file or ())}",
        "dataset": f"the dataset {data.dataset_name}",
        "dataset_files": f"the files of the dataset {data.dataset_name}",
    }[kind]


def _reads_dataset(run: Run) -> bool:
    """Whether a dataset provides a split that is not replaced by local files."""
    has_files = run.data.validation_file and (run.data.train_file or not run.training.do_train)
    return bool(run.data.dataset_name) and not has_files


def _dataset_commit(name: str, config: str | None) -> str | None:
    try:
        import datasets  # not needed for runs from files of token ids

        with silenced(datasets.logging):
            return datasets.load_dataset_builder(name, config).hash
    except (ImportError, OSError, ValueError):  # no such package; no connection, and nothing in the cache
        return None
