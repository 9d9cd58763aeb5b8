"""Tiny trainings and a compression, run in folders that start alike, and what of their outcome must not differ."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from doomed import Doom, Ended, run
from texts import chapters

from factorized_gpt2 import FactorizedGPT2, FactorizedGPT2Config
from factorized_gpt2.cli.shell import print_table
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.runs.results import Results
from factorized_gpt2.settings.flags import as_flags
from factorized_gpt2.text.demo_corpus import train_tokenizer

DOCUMENTS = chapters(12)
TEXTS = {
    **{"train_file": ["train.jsonl"], "validation_file": ["validation.jsonl"], "block_size": 16},
    **{"report_to": ["none"], "use_cpu": True},
}
TRAINING = TEXTS | {
    **{"do_train": True, "max_steps": 12, "learning_rate": 1e-2, "output_dir": "models/run", "dropout": 0.1},
    **{"per_device_train_batch_size": 2, "effective_batch_size": 4, "logging_steps": 1, "disable_tqdm": True},
    **{"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2},
    **{"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False},
}
FULL = TRAINING | {"tokenizer": "tokenizer", "n_layer": 2, "n_head": 2, "n_embd": 24, "n_embd_wte": 6}
LORA = TRAINING | {
    **{"baseline": "baseline", "n_embd_wte": 6, "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1},
    **{"learning_rate": 3e-2, "lr_scheduler_type": "constant"},  # so large that the last weights are not the best
}
COMPRESS = {"baseline": "baseline", "ranks": [4, 6], "output_dir": "models", "eval_file": ["validation.jsonl"]}


@dataclass(frozen=True)
class Flow:
    """A command, and moments in it that matter.

    Attributes:
        command: `train` or `compress`.
        words: Its flags.
        moments: Regular expressions of changes to files, by what they are a part of.
    """

    command: str
    words: list[str]
    moments: dict[str, str]


_TRAINED = {
    "writing a checkpoint": r"run/\.checkpoint\.",
    "sealing a checkpoint": r"files\.json$",
    "placing a checkpoint": r"os\.rename .* models/run/checkpoint-\d+$",
    "removing an old checkpoint": r"run/\.checkpoint-\d+\.|os\.remove [^/]*$",
    "writing the model": r"run/\.config\.json\.",
    "placing the model": r"os\.rename models/run/\.config\.json\.\S+ ",
    "writing results": r"results\.json",
}
_FACTORED = {"writing factors": r"pca_factorized/", "writing a compressed model": r"gpt_pca_nofinetune_k"}
FLOWS = {
    "full": Flow("train", as_flags(FULL), _TRAINED),
    "lora": Flow("train", as_flags(LORA), _TRAINED | _FACTORED | {"writing the adapter, merging": r"run/\.?adapter"}),
    "compress": Flow("compress", as_flags(COMPRESS), _FACTORED | {"plotting": r"\.png|\.svg"}),
}


class Workshop:
    """Runs flows in folders of their own, which start alike.

    Args:
        root: Empty folder.
    """

    def __init__(self, root: Path):
        self._root, self._start = root, root / "start"
        prepare(self._start)
        self._undisturbed: dict[str, Ended] = {}

    def begin(self, name: str, folder: Path | None = None) -> Path:
        """Make a folder as flows start in, `folder` or one of that name, and return it."""
        folder = folder or self._root / name
        shutil.copytree(self._start, folder, dirs_exist_ok=True)
        return folder

    def run(self, name: str, folder: Path, doom: Doom | None = None) -> Ended:
        """Run a flow in a folder."""
        return run(FLOWS[name].command, FLOWS[name].words, folder, doom)

    def undisturbed(self, name: str) -> Ended:
        """Run a flow once to its end, in a folder of its name."""
        if name not in self._undisturbed:
            ended = self.run(name, self.begin(name))
            if ended.code != 0:
                raise UserError(f"{name} does not even run undisturbed: {ended.log[-2000:]}")
            self._undisturbed[name] = ended
        return self._undisturbed[name]

    def complaints(self, name: str, folder: Path, again: Ended) -> list[str]:
        """Compare what a flow came to, when it was run again at last, with the undisturbed one's outcome."""
        if again.code != 0:
            return [f"at last exit code {again.code}: {again.log[-1000:]}"]
        expected, found = outcome(self._root / name / "models"), outcome(folder / "models")
        differing = sorted(key for key in expected | found if expected.get(key) != found.get(key))
        left = [path for path in folder.rglob(".*") if folder / "cache" not in path.parents]
        return [
            *(f"{key} differs" for key in differing),
            *(f"{path.relative_to(folder)} is left" for path in left),
        ]


def outcome(models: Path) -> dict[str, object]:
    """Collect what a flow makes that must not depend on what befell it: every weight to the bit, and its losses."""
    made: dict[str, object] = {}
    for path in sorted(models.rglob("*")):
        name = path.relative_to(models).as_posix()
        if path.suffix in (".safetensors", ".npy", ".npz", ".svg") and "checkpoint-" not in name:
            made[name] = path.read_bytes()
    if (models / "run").exists():
        results = Results.read(models / "run")
        made["losses"] = results and (results.eval_loss, results.best_step, results.validation_curve)
    return made


def prepare(folder: Path) -> None:
    """Write texts, a tokenizer, and a baseline that was never trained."""
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer(DOCUMENTS, 300)
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, texts in (("train", DOCUMENTS[8:]), ("validation", DOCUMENTS[:8])):
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    torch.manual_seed(0)
    tokens = {f"{name}_token_id": tokenizer.eos_token_id for name in ("bos", "eos")}
    config = FactorizedGPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=24, n_layer=2, n_head=2, **tokens)
    FactorizedGPT2(config).save_pretrained(folder / "baseline")
    tokenizer.save_pretrained(folder / "baseline")


def conclude(rows: list[dict[str, str]], root: Path) -> None:
    """Print what came of the runs, and remove the folder that they were in if all came to the same end.

    Raises:
        UserError: One did not.
    """
    print_table(rows)
    wrong = [row for row in rows if row["same"] != "yes"]
    if wrong:
        raise UserError(f"{len(wrong)} of {len(rows)} runs came to another end; see {root}.")
    shutil.rmtree(root)
