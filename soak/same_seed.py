"""Everything that has a seed, done once in this process: `same_seed.py OUTPUT.json` writes a digest of each result.

`load.py` runs it twice, in two processes, and compares.
"""

import hashlib
import os
import random
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import set_seed

from factorized_gpt2 import FactorizedGPT2, FactorizedGPT2Config
from factorized_gpt2.cli.compress import compress
from factorized_gpt2.common.files import write_json
from factorized_gpt2.common.fingerprints import weights_fingerprint
from factorized_gpt2.compress.methods import METHODS
from factorized_gpt2.runs.run import run_experiment
from factorized_gpt2.runs.settings import parse_run
from factorized_gpt2.settings.flags import as_flags
from factorized_gpt2.text.demo_corpus import train_tokenizer

TINY = {"vocab_size": 512, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_embd_wte": 16}

RUN = {
    **{"train_file": ["train.jsonl"], "validation_file": ["validation.jsonl"], "tokenizer": "tokenizer"},
    **{"block_size": 32, "per_device_train_batch_size": 4, "max_steps": 10, "learning_rate": 1e-3, "do_train": True},
    **{"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5},
    **{"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"},
    **{"report_to": ["none"], "disable_tqdm": True, "use_cpu": True},
}
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 64}
RANK = 16


def tiny_model(**overrides: float) -> FactorizedGPT2:
    """Make a random model of some 120,000 parameters, always the same, that does not end a text early."""
    torch.manual_seed(0)
    return FactorizedGPT2(FactorizedGPT2Config(**TINY, bos_token_id=0, eos_token_id=None, pad_token_id=1, **overrides))


def write_text(folder: Path) -> None:
    """Write `train.jsonl`, `validation.jsonl` and `tokenizer/`."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 8))) for _ in range(300)]
    texts = [" ".join(draw.choices(words, k=60)) for _ in range(120)]
    for name, part in (("train", texts[20:]), ("validation", texts[:20])):
        Dataset.from_dict({"text": part}).to_json(folder / f"{name}.jsonl")
    train_tokenizer(texts, 400).save_pretrained(folder / "tokenizer")


def train(name: str, **settings) -> str:
    """Do a run."""
    run_experiment(parse_run(as_flags(RUN | {"output_dir": name} | settings)))
    return weights_fingerprint(name)


def compress_by(method: str, *words: str) -> str:
    """Compress the baseline."""
    folder = Path(f"by_{method}")
    text = ["--calibration_file", "train.jsonl", "--calibration_tokens", "1024"] if METHODS[method].needs_text else []
    options = ["--ranks", str(RANK), "--method", method, "--output_dir", str(folder), *text, *words]
    compress(["--baseline", "baseline", *options])
    return weights_fingerprint(str(next(folder.glob(f"gpt_*_k{RANK}"))))


def sample() -> str:
    """Generate by sampling, after seeding this process's generator."""
    model = FactorizedGPT2.from_pretrained("scratch").eval()
    set_seed(7)
    prompt = torch.arange(5, 13).repeat(4, 1)
    tokens = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=True, top_k=50
    )
    return hashlib.sha256(str(tokens.tolist()).encode()).hexdigest()


def main(output: Path) -> None:
    """Do it all in a folder of its own."""
    output = output.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_text(Path(folder))
        made = {
            "baseline": train("baseline", **SHAPE),
            "scratch": train("scratch", **SHAPE, n_embd_wte=RANK),
            "LoRA": train("lora", baseline="baseline", n_embd_wte=RANK, lora_rank=4, lora_alpha=8),
            "compressed, pca": compress_by("pca"),
            "compressed, joint": compress_by("joint"),
            "compressed, tokenwise, refined": compress_by("tokenwise", "--refine", "3"),
            "sampled text": sample(),
        }
        os.chdir(output.parent)
    write_json(output, made)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
