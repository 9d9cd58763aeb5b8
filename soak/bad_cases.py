"""Hypothesis strategies for inputs of commands that are bad in one place or a few, by what it is that is bad."""

import io
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from attempts import Case
from hypothesis import strategies as st
from mutations import bad_bytes, bad_json, weird_words

from factorized_gpt2.cli.compress_settings import CalibrationArguments, CompressArguments
from factorized_gpt2.cli.evaluate import EvaluateArguments
from factorized_gpt2.cli.experiments import GridArguments, ScaleArguments
from factorized_gpt2.cli.import_checkpoint import ImportArguments
from factorized_gpt2.cli.report import ReportArguments
from factorized_gpt2.runs.settings import default_settings
from factorized_gpt2.settings.outputs import PublishArguments
from factorized_gpt2.settings.text_arguments import EvaluationArguments

COMPRESSED, FACTORS = "weights/gpt_pca_nofinetune_k4", "weights/pca_factorized"

# A run of one step in this process alone; what would take longer, as it was asked to, is not drawn.
_BRIEF = ["--max_steps=1", "--num_train_epochs=1", "--dataloader_num_workers=0", "--preprocessing_num_workers=1"]
_BRIEF += ["--torch_compile=false", "--per_device_train_batch_size=2"]

_SETTINGS = tuple(sorted(default_settings()))
_PARTS = {
    "compress": (CompressArguments, CalibrationArguments, EvaluationArguments, PublishArguments),
    "evaluate": (EvaluateArguments, EvaluationArguments),
    "import": (ImportArguments,),
    "import factors": (ImportArguments,),
    "report": (ReportArguments,),
    "experiments": (GridArguments, ScaleArguments),
}
_NAMES = {command: [item.name for part in parts for item in fields(part)] for command, parts in _PARTS.items()}
_NAMES |= {"train": list(_SETTINGS), "lora": list(_SETTINGS)}


def cases(material: Path) -> st.SearchStrategy[Case]:
    """Draw cases of every kind."""
    kinds = [_configs, _flags, _texts, _models, _compressed, _checkpoints, _factors, _records, _grids]
    kinds += [_configs, _configs, _models]
    return st.sampled_from(kinds).flatmap(lambda kind: kind(material))


@st.composite
def _configs(draw: st.DrawFn, material: Path) -> Case:
    command = draw(st.sampled_from(("train", "lora")))
    name = "scratch.json" if command == "train" else "lora.json"
    content = (material / name).read_bytes()
    changed = draw(bad_json(content, _SETTINGS) if draw(st.integers(0, 9)) else bad_bytes(content))
    words = ("--print_config",) if draw(st.booleans()) else tuple(_BRIEF)
    return Case("config", command, words, {name: changed})


@st.composite
def _flags(draw: st.DrawFn, material: Path) -> Case:
    command = draw(st.sampled_from(sorted(_NAMES)))
    words = [f"--{draw(st.sampled_from(_NAMES[command]))}={draw(weird_words)}" for _ in range(draw(st.integers(1, 2)))]
    return Case("flags", command, (*words, *(_BRIEF if command in ("train", "lora") else ())))


@st.composite
def _texts(draw: st.DrawFn, material: Path) -> Case:
    name = draw(st.sampled_from(("validation.jsonl", "text.txt", "text.parquet", "train.jsonl")))
    content = (material / name).read_bytes()
    if name.endswith("jsonl") and draw(st.booleans()):
        lines = content.splitlines()
        place = draw(st.integers(0, len(lines) - 1))
        lines[place] = draw(bad_json(lines[place]))
        changed = b"\n".join(lines)
    else:
        changed = draw(bad_bytes(content))
    if name == "train.jsonl":
        return Case("text", "train", (*_BRIEF, f"--streaming={draw(st.booleans())}"), {name: changed})
    words = ("--eval_file", name, *draw(st.sampled_from(((), ("--document_start=T",), ("--text_column=x",)))))
    return Case("text", "evaluate", words, {name: changed})


@st.composite
def _models(draw: st.DrawFn, material: Path) -> Case:
    files = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    command = draw(st.sampled_from(("evaluate", "compress", "lora")))
    name = f"{COMPRESSED if command == 'lora' else 'baseline'}/{draw(st.sampled_from(files))}"
    words = {"evaluate": (), "compress": ("--output_dir", "out"), "lora": tuple(_BRIEF)}[command]
    return Case("model", command, words, {name: draw(_changed(material / name))})


@st.composite
def _compressed(draw: st.DrawFn, material: Path) -> Case:
    factors = (f"{FACTORS}/wte_pca_k4.npy", f"{FACTORS}/scale_mats_pca_k4.npz")
    name = draw(st.sampled_from((f"{COMPRESSED}/compression.json", f"{COMPRESSED}/model.safetensors", *factors)))
    if name in factors:
        gone = {f"{COMPRESSED}/{path.name}": None for path in (material / COMPRESSED).iterdir()}
        return Case("factors of a baseline", "compress", (), gone | {name: draw(_arrays(material / name))})
    return Case("compressed model", "compress", (), {name: draw(_changed(material / name))})


@st.composite
def _factors(draw: st.DrawFn, material: Path) -> Case:
    name = draw(st.sampled_from(("wte.npy", "scales.npz")))
    return Case("factor files", "import factors", (), {name: draw(_arrays(material / name))})


@st.composite
def _checkpoints(draw: st.DrawFn, material: Path) -> Case:
    path = material / "ckpt.pt"
    if draw(st.booleans()):
        return Case("checkpoint", "import", (), {path.name: draw(bad_bytes(path.read_bytes()))})
    content = torch.load(path, weights_only=True)
    options = draw(bad_json(json.dumps(content["model_args"]).encode(), ("rotary", "n_embd_wte", "mlp_size")))
    try:
        content["model_args"] = json.loads(options)
    except (ValueError, RecursionError):
        content = options
    file = io.BytesIO()
    torch.save(content, file)
    return Case("checkpoint", "import", (), {path.name: file.getvalue()})


@st.composite
def _records(draw: st.DrawFn, material: Path) -> Case:
    name = f"runs/{draw(st.sampled_from(('baseline', 'pca-lora', 'pca-nofinetune')))}/results.json"
    return Case("results", "report", (), {name: draw(_changed(material / name))})


@st.composite
def _grids(draw: st.DrawFn, material: Path) -> Case:
    name = draw(st.sampled_from(("experiments.json", "scratch.json")))
    changed = draw(bad_json((material / name).read_bytes(), ("extends", *_SETTINGS)))
    scale = draw(st.sampled_from(((), ("--scale=0.5",), ("--scale_width=0.5", "--scale_learning_rate=10"))))
    return Case("grid", "experiments", scale, {name: changed})


@st.composite
def _changed(draw: st.DrawFn, path: Path) -> bytes | None:
    """Change a file; now and then remove it."""
    way = draw(st.integers(0, 19))
    if way == 0:
        return None
    content = path.read_bytes()
    return draw(bad_json(content) if path.suffix == ".json" and way > 3 else bad_bytes(content))


@st.composite
def _arrays(draw: st.DrawFn, path: Path) -> bytes:
    """Change the arrays of a NumPy file: bytes, shapes, types, names, NaN among them."""
    if draw(st.booleans()):
        return draw(bad_bytes(path.read_bytes()))
    loaded = np.load(path)
    arrays = dict(loaded) if path.suffix == ".npz" else {"array": loaded}
    name = draw(st.sampled_from(sorted(arrays)))
    change = draw(st.sampled_from((*_CHANGES, "drop", "rename")))
    array = arrays.pop(name)
    if change in _CHANGES:
        arrays[name] = _CHANGES[change](array)
    elif change == "rename":
        arrays[f"{name}s"] = array
    file = io.BytesIO()
    if path.suffix == ".npz":
        np.savez(file, **arrays)
    else:
        np.save(file, arrays.get(name, np.zeros(0)))
    return file.getvalue()


_CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "transposed": lambda array: array.T,
    "flat": lambda array: array.ravel(),
    "cut": lambda array: np.atleast_1d(array)[:-1],
    "nested": lambda array: array[None],
    "integers": lambda array: np.zeros(array.shape, np.int64),
    "objects": lambda array: np.full(array.shape, None, object),
    "text": lambda array: np.full(array.shape, "x"),
    "complex": lambda array: np.zeros(array.shape, np.complex64),
    "half": lambda array: np.ones(array.shape, np.float16),
    "double": lambda array: np.full(array.shape, 1e300),
    "NaN": lambda array: np.full(array.shape, np.nan, np.float32),
    "infinite": lambda array: np.full(array.shape, np.inf, np.float32),
    "empty": lambda array: np.zeros((0, 0), np.float32),
    "records": lambda array: np.zeros(array.shape, [("a", "f4")]),
}
