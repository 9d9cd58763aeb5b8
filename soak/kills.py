"""Kill commands at chosen and at random moments, give them again, and compare the outcome with an undisturbed one's.

`python soak/kills.py --kills 20 --seed 0` trains tiny models, in full and by LoRA from a PCA start, compresses
one, prints a row for each kill, and fails if a result differs in a bit or anything is left over.
"""

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

from doomed import DOOMED, Doom
from workshop import FLOWS, Workshop, conclude

from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.settings.parsing import ManualParser


@dataclass
class SoakArguments:
    """How much."""

    kills: int = field(default=20, metadata={"help": "How often a command is killed, besides damages."})
    seed: int = field(default=0, metadata={"help": "Of the moments."})
    flows: list[str] | None = field(default=None, metadata={"help": f"Of {', '.join(FLOWS)}. None: all."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder to work in. None: a temporary one."})


def trial(
    workshop: Workshop, name: str, doom: Doom, damage: Callable[[Path], str | None] | None = None, moment: str = ""
) -> dict[str, str]:
    """Kill a flow, damage what it left if asked, run it again; return a row of the table.

    Args:
        workshop: Where.
        name: Of the flow.
        doom: When to kill it.
        damage: Takes the folder of the run; says what it did.
        moment: What the moment is called.
    """
    workshop.undisturbed(name)
    folder = workshop.begin(f"{name}-killed")
    killed = workshop.run(name, folder, doom)
    last = next((line for line in killed.changes if line.startswith(DOOMED)), ["the start", *killed.changes][-1])
    damaged = damage(folder / "models/run") if damage else None
    again = workshop.run(name, folder)
    complaints = workshop.complaints(name, folder, again)
    # Of a signal that came too late, of one that was handled, of one before there was a handler.
    if killed.code not in (0, 128 + doom.signal, -doom.signal) or "Traceback" in killed.log:
        complaints.append(f"ended with {killed.code}: {killed.log[-1000:]}")
    if damaged and "damaged" not in again.log:
        complaints.append("nothing is said of the damage")
    if complaints:
        folder.rename(tempfile.mkdtemp(prefix="kept-", dir=folder.parent))
    else:
        shutil.rmtree(folder)
    went_on = re.search(r"Going on from \S*(checkpoint-\d+)", again.log)
    return {
        "flow": name,
        "signal": signal.Signals(doom.signal).name,
        "moment": damaged or moment or "in time",
        "ended with": str(killed.code),
        "went on from": went_on[1] if went_on else "the start" if again.changes else "-",
        "same": ", ".join(complaints) or "yes",
        "at": re.sub("^! |models/|generator/", "", last)[:90],
    }


def dooms(workshop: Workshop, names: list[str], number: int, draw: random.Random) -> list[tuple[str, Doom, str]]:
    """Choose flows, dooms and names of moments: by turns one of the moments that matter, one in time, one change."""
    chosen = []
    matter = [(name, moment) for name in names for moment in FLOWS[name].moments]
    draw.shuffle(matter)
    for index in range(number):
        sent = draw.choice([signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT])
        name = names[index % len(names)]
        if index % 2 == 0 and matter:
            name, moment = matter.pop()
            change = FLOWS[name].moments[moment]
        elif index % 4 == 1:
            chosen.append((name, Doom(sent, seconds=draw.uniform(0, workshop.undisturbed(name).seconds)), ""))
            continue
        else:
            moment, change = "any change", "^"
        times = sum(bool(re.search(change, line)) for line in workshop.undisturbed(name).changes)
        if not times:
            raise UserError(f"{name} has no moment {moment!r}.")
        chosen.append((name, Doom(sent, change, draw.randint(1, times)), moment))
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
    (arguments,) = ManualParser(SoakArguments, prog="kills.py", description="See what is lost by kills.").parse(argv)
    names = arguments.flows or list(FLOWS)
    root = Path(arguments.output_dir or tempfile.mkdtemp(prefix="kills-")).absolute()
    workshop, draw, rows = Workshop(root), random.Random(arguments.seed), []
    planned = [(name, doom, None, moment) for name, doom, moment in dooms(workshop, names, arguments.kills, draw)]
    if "full" in names:
        planned += [("full", AFTER_TWO_CHECKPOINTS, damage, "") for damage in DAMAGES]
    for number, (name, doom, damage, moment) in enumerate(planned, 1):
        rows.append(trial(workshop, name, doom, damage, moment))
        sys.stderr.write(f"{number} of {len(planned)}: {' | '.join(rows[-1].values())}\n")
    conclude(rows, root)


if __name__ == "__main__":
    sys.exit(run_command(soak))
