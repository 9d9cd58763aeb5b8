"""Kill commands at chosen and at random moments, give them again, and compare the outcome with an undisturbed one's.

`python tests/soak/kills.py --kills 20 --seed 0` trains tiny models, in full and by LoRA from a PCA start, compresses
one, prints a row for each kill, and fails if a result differs in a bit or anything is left over.
"""

import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from soak.doomed import DOOMED, Doom, Ended, run

from factorized_gpt2 import FactorizedGPT2, FactorizedGPT2Config
from factorized_gpt2.cli.shell import print_table, run_command
from factorized_gpt2.corpus import train_tokenizer
from factorized_gpt2.errors import UserError
from factorized_gpt2.parsing import ManualParser, as_flags
from factorized_gpt2.results import Results

DOCUMENTS = [
    f"Chapter {number}. The {noun} of the {place} was {adjective}, and {number} people saw it.\nThen it went away."
    for number in range(1, 13)
    for noun in ("wife", "dog", "clock")
    for place in ("mill", "harbour")
    for adjective in ("old", "green")
]
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
LORA = TRAINING | {"baseline": "baseline", "n_embd_wte": 6, "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1}
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


@dataclass
class SoakArguments:
    """How much."""

    kills: int = field(
        default=20, metadata={"help": "How often a command is killed, damaged checkpoints not counted."}
    )
    seed: int = field(default=0, metadata={"help": "Of the moments."})
    flows: list[str] | None = field(default=None, metadata={"help": f"Of {', '.join(FLOWS)}. None: all."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder to work in. None: a temporary one."})


class Workshop:
    """Runs flows in folders of their own, which start alike.

    Args:
        root: Empty folder.
    """

    def __init__(self, root: Path):
        self._root = root
        self._start = root / "start"
        prepare(self._start)
        self._undisturbed: dict[str, Ended] = {}
        self._number = 0

    def undisturbed(self, name: str) -> Ended:
        """Run a flow once to its end, in `root/NAME`."""
        if name not in self._undisturbed:
            shutil.copytree(self._start, self._root / name)
            ended = run(FLOWS[name].command, FLOWS[name].words, self._root / name)
            if ended.code != 0:
                raise UserError(f"{name} does not even run undisturbed: {ended.log[-2000:]}")
            self._undisturbed[name] = ended
        return self._undisturbed[name]

    def trial(
        self, name: str, doom: Doom, damage: Callable[[Path], str | None] | None = None, moment: str = ""
    ) -> dict[str, str]:
        """Kill a flow, damage what it left if asked, run it again; return a row of the table.

        Args:
            name: Of the flow.
            doom: When to kill it.
            damage: Takes the folder of the run; says what it did.
            moment: What the moment is called.
        """
        self.undisturbed(name)
        self._number += 1
        folder = self._root / f"{name}-{self._number}"
        shutil.copytree(self._start, folder)
        flow = FLOWS[name]
        killed = run(flow.command, flow.words, folder, doom)
        last = next((line for line in killed.changes if line.startswith(DOOMED)), ["the start", *killed.changes][-1])
        damaged = damage(folder / "models/run") if damage else None
        again = run(flow.command, flow.words, folder)
        complaints = self._complaints(name, folder, doom, killed, again)
        went_on = re.search(r"Going on from \S*(checkpoint-\d+)", again.log)
        if damaged and "damaged" not in again.log:
            complaints.append("nothing is said of the damage")
        if not complaints:
            shutil.rmtree(folder)
        return {
            "flow": name,
            "signal": signal.Signals(doom.signal).name,
            "moment": damaged or moment or "in time",
            "ended with": str(killed.code),
            "went on from": went_on[1] if went_on else "the start" if again.changes else "-",
            "same": ", ".join(complaints) or "yes",
            "at": re.sub("^! |models/|generator/", "", last)[:90],
        }

    def _complaints(self, name: str, folder: Path, doom: Doom, killed: Ended, again: Ended) -> list[str]:
        if killed.code not in _codes(doom.signal):
            return [f"exit code {killed.code}: {killed.log[-1000:]}"]
        if doom.signal != signal.SIGKILL and "Traceback" in killed.log:
            return ["a traceback"]
        if again.code != 0:
            return [f"then exit code {again.code}: {again.log[-1000:]}"]
        expected, found = (outcome(self._root / where / "models") for where in (name, folder.name))
        complaints = [f"{key} differs" for key in expected | found if expected.get(key) != found.get(key)]
        left = [path for path in folder.rglob(".*") if folder / "cache" not in path.parents]
        return complaints + [f"{path.relative_to(folder)} is left" for path in left]


def _codes(number: int) -> tuple[int, ...]:
    """Exit codes after a signal: that of one that came too late, of the command, and before it took hold."""
    return (0, -number) if number == signal.SIGKILL else (0, 128 + number, -number)


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


def dooms(workshop: Workshop, names: list[str], number: int, draw: random.Random) -> list[tuple[str, Doom, str]]:
    """Choose flows, dooms and names of moments: by turns one of the moments that matter, one in time, one change."""
    chosen = []
    matter = [(name, moment) for name in names for moment in FLOWS[name].moments]
    draw.shuffle(matter)
    for index in range(number):
        number_ = draw.choice([signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT])
        name = names[index % len(names)]
        if index % 2 == 0 and matter:
            name, moment = matter.pop()
            change = FLOWS[name].moments[moment]
        elif index % 4 == 1:
            chosen.append((name, Doom(number_, seconds=draw.uniform(0, workshop.undisturbed(name).seconds)), ""))
            continue
        else:
            moment, change = "any change", "^"
        times = sum(bool(re.search(change, line)) for line in workshop.undisturbed(name).changes)
        if not times:
            raise UserError(f"{name} has no moment {moment!r}.")
        chosen.append((name, Doom(number_, change, draw.randint(1, times)), moment))
    return chosen


def _newest(run_folder: Path) -> Path:
    return max(run_folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))


def truncate(name: str) -> Callable[[Path], str]:
    """Make a damage: a file of the newest checkpoint loses its second half."""

    def damage(run_folder: Path) -> str:
        path = _newest(run_folder) / name
        os.truncate(path, path.stat().st_size // 2)
        return f"{name} cut in half"

    return damage


def flip(name: str) -> Callable[[Path], str]:
    """Make a damage: one bit of a file of the newest checkpoint is another."""

    def damage(run_folder: Path) -> str:
        path = _newest(run_folder) / name
        content = bytearray(path.read_bytes())
        content[len(content) * 2 // 3] ^= 16
        path.write_bytes(content)
        return f"{name} with a flipped bit"

    return damage


def lose(name: str) -> Callable[[Path], str]:
    """Make a damage: the newest checkpoint has lost a file."""

    def damage(run_folder: Path) -> str:
        (_newest(run_folder) / name).unlink()
        return f"{name} lost"

    return damage


DAMAGES = [truncate(name) for name in ("model.safetensors", "optimizer.pt", "trainer_state.json")]
DAMAGES += [flip(name) for name in ("model.safetensors", "optimizer.pt")]
DAMAGES += [lose(name) for name in ("optimizer.pt", "rng_state.pth", "files.json")]
AFTER_TWO_CHECKPOINTS = Doom(signal.SIGKILL, "os.mkdir .*/checkpoint-9$")


def soak(argv: list[str]) -> None:
    """Kill as often as asked, damage checkpoints in every way, print the table.

    Raises:
        UserError: Something was lost or left over.
    """
    arguments = ManualParser(SoakArguments, prog="kills.py", description="Kill commands and see what is lost.").parse(
        argv
    )[0]
    names = arguments.flows or list(FLOWS)
    root = Path(arguments.output_dir or tempfile.mkdtemp(prefix="kills-")).absolute()
    workshop, draw, rows = Workshop(root), random.Random(arguments.seed), []
    planned = [(name, doom, None, moment) for name, doom, moment in dooms(workshop, names, arguments.kills, draw)]
    if "full" in names:
        planned += [("full", AFTER_TWO_CHECKPOINTS, damage, "") for damage in DAMAGES]
    for number, (name, doom, damage, moment) in enumerate(planned, 1):
        rows.append(workshop.trial(name, doom, damage, moment))
        sys.stderr.write(f"{number} of {len(planned)}: {' | '.join(rows[-1].values())}\n")
    print_table(rows)
    wrong = [row for row in rows if row["same"] != "yes"]
    if wrong:
        raise UserError(f"{len(wrong)} of {len(rows)} runs came to another end; see {root}.")
    shutil.rmtree(root)


if __name__ == "__main__":
    sys.exit(run_command(soak))
