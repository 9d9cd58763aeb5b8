"""Small inputs of every command, all of them good: what bad ones are made of."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset

from factorized_gpt2 import FactorizedGPT2, FactorizedGPT2Config
from factorized_gpt2.cli.compress import compress
from factorized_gpt2.cli.evaluate import evaluate
from factorized_gpt2.cli.experiments import run_experiments
from factorized_gpt2.cli.import_checkpoint import import_checkpoint
from factorized_gpt2.cli.report import report
from factorized_gpt2.cli.train import train
from factorized_gpt2.compress.compressor import Compressor
from factorized_gpt2.compress.recipe import Recipe
from factorized_gpt2.models.loading import load_baseline
from factorized_gpt2.models.sizes import model_size
from factorized_gpt2.nanogpt.factor_files import write_old_factors
from factorized_gpt2.runs.fields import LORA_TARGETS
from factorized_gpt2.runs.results import Results
from factorized_gpt2.text.demo_corpus import train_tokenizer
from factorized_gpt2.text.tokenizers import load_tokenizer

WIDTH, RANK, POSITIONS, VOCAB_SIZE = 16, 4, 24, 270

SHARED = {
    **{"train_file": ["train.jsonl"], "validation_file": ["validation.jsonl"], "block_size": 16, "output_dir": "out"},
    **{"do_train": True, "max_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "cosine_with_min_lr"},
    **{"lr_scheduler_kwargs": {"min_lr": 1e-5}, "per_device_train_batch_size": 2, "effective_batch_size": 4},
    **{"report_to": ["none"], "save_strategy": "no", "seed": 7, "weight_decay": 0.1, "max_eval_samples": 4},
}
CONFIGS = {
    "scratch": SHARED
    | {"n_layer": 1, "n_head": 2, "n_embd": WIDTH, "n_embd_wte": RANK, "tokenizer": "tokenizer", "dropout": 0.1},
    "lora": SHARED
    | {
        **{"compressed": f"weights/gpt_pca_nofinetune_k{RANK}", "lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0.1},
        **{"lora_target_modules": list(LORA_TARGETS), "distillation_weight": 0.5},
    },
}

# Every command, and words that make it do its work on the material.
COMMANDS = {
    "train": (train, ["--config", "scratch.json"]),
    "lora": (train, ["--config", "lora.json"]),
    "compress": (
        compress,
        ["--baseline", "baseline", "--ranks", str(RANK), "--output_dir", "weights", "--eval_file", "validation.jsonl"],
    ),
    "evaluate": (evaluate, ["--models", "baseline", "--eval_file", "validation.jsonl"]),
    "import": (import_checkpoint, ["--checkpoint", "ckpt.pt", "--output_dir", "out", "--tokenizer", "tokenizer"]),
    "import factors": (
        import_checkpoint,
        ["--checkpoint", "ckpt.pt", "--output_dir", "out", "--wte_npy", "wte.npy", "--scale_npz", "scales.npz"],
    ),
    "report": (report, ["--results", "runs"]),
    "experiments": (run_experiments, ["--grid", "experiments.json", "--output_dir", "out", "--dry_run"]),
}


def make_material(folder: Path) -> None:
    """Fill an empty folder, in which the words of `COMMANDS` then make sense."""
    texts = [f"The {noun} of the {place} was {look}." for noun in ("dog", "mill") for place in "abc" for look in "xyz"]
    for name in ("train", "validation"):
        Dataset.from_dict({"text": texts}).to_json(folder / f"{name}.jsonl")
    Dataset.from_dict({"text": texts}).to_parquet(folder / "text.parquet")
    (folder / "text.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    train_tokenizer(texts, VOCAB_SIZE).save_pretrained(folder / "tokenizer")
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    for seed, name in enumerate(("baseline", "other")):
        torch.manual_seed(seed)
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        shape = {"n_positions": POSITIONS, "n_embd": WIDTH, "n_layer": 1, "n_head": 2, "initializer_range": 0.2}
        FactorizedGPT2(FactorizedGPT2Config(vocab_size=len(tokenizer), **shape, **ids)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    baseline = load_baseline(str(folder / "baseline"))
    ((_, model, _),) = Compressor(baseline, Recipe(), folder / "weights", tokenizer).load_or_make([RANK])
    torch.save({"model": _old_weights(baseline.model), "model_args": _old_options(baseline.model)}, folder / "ckpt.pt")
    model.transformer.scale_up.bias.data.zero_()
    write_old_factors(model, folder / "wte.npy", folder / "scales.npz")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (folder / "experiments.json").write_text('{"experiments": ["scratch.json"]}', encoding="utf-8")
    for family, rank in (("baseline", None), ("pca-nofinetune", RANK), ("pca-lora", RANK)):
        curves = {
            "training_curve": [[1, 5.0], [2, 4.5]],
            "validation_curve": [[2, 4.25]],
            "spectrum": [0.5, 0.75, 0.9, 1.0],
        }
        sizes = asdict(model_size(model)) | {"best_step": 2, "best_tokens": 128, "trained_parameters": 5}
        results = Results(
            **{"run_name": family, "family": family, "n_embd_wte": rank, "eval_loss": 4.25, "perplexity": 70.1},
            **{"settings": CONFIGS["scratch"], "versions": {"python": "3"}, "words": ["--seed=7"], **sizes, **curves},
        )
        results.write(folder / "runs" / family)


def _old_options(model: FactorizedGPT2) -> dict[str, int | bool | float]:
    config = model.config
    shape = {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "vocab_size": config.vocab_size,
    }
    return shape | {"block_size": config.n_positions, "bias": True, "dropout": 0.0}


def _old_weights(model: FactorizedGPT2) -> dict[str, torch.Tensor]:
    """Name a model's weights as nanoGPT does, with q, k and v in one."""
    old, parts = {}, {}
    for name, weight in model.state_dict().items():
        if "_proj." in name and "c_proj" not in name:
            prefix, _, kind = name.rsplit(".", 2)
            parts.setdefault(f"{prefix}.c_attn.{kind}", []).append(weight)
        else:
            old[name.replace("mlp_up", "c_fc").replace("mlp_down", "c_proj")] = weight
    return old | {name: torch.cat(weights) for name, weights in parts.items()}
