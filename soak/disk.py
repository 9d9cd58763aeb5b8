"""Let the disk of a run be full, or read-only, at some time; then give it room, and the same command again.

`python soak/disk.py` needs the right to mount, of a system administrator on Linux. It prints a row for each size
of the disk, and fails unless every one is told of in a line, and every result is an undisturbed run's to the bit.
"""

import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from workshop import FLOWS, Workshop, conclude

from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.settings.parsing import ManualParser

PAGE = 4096  # bytes, in which a disk in memory counts


@dataclass
class DiskArguments:
    """How much."""

    sizes: int = field(default=10, metadata={"help": "How many sizes of the disk to try."})
    seed: int = field(default=0, metadata={"help": "Of the sizes."})


@contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """Mount a disk in memory, of any size at first."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=False).returncode != 0:
        raise UserError("Disks of some size can be tried by those only who may mount.")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def remount(folder: Path, options: str) -> None:
    """Give a disk another size, or take or give the right to write."""
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def pages(folder: Path) -> int:
    """Count what is used of a disk."""
    usage = shutil.disk_usage(folder)
    return usage.used // PAGE


def trial(workshop: Workshop, root: Path, name: str, pages_more: int | None) -> dict[str, str]:
    """Run a flow on a disk with so many pages more than at its start, or that cannot be written; then again."""
    with disk(root / "disk") as folder:
        workshop.begin(name, folder)
        limit = "ro" if pages_more is None else f"size={(pages(folder) + pages_more) * PAGE}"
        remount(folder, limit)
        first = workshop.run(name, folder)
        remount(folder, "rw" if pages_more is None else "size=1g")
        again = workshop.run(name, folder)
        complaints = workshop.complaints(name, folder, again)
    told = re.findall("^error: .*", first.log, re.MULTILINE)
    if first.code not in (0, 2) or "Traceback" in first.log or len(told) != (first.code == 2):
        complaints.append(f"ended with {first.code}: {first.log[-1000:]}")
    went_on = re.search(r"Going on from \S*(checkpoint-\d+)", again.log)
    return {
        "flow": name,
        "room": "read-only" if pages_more is None else f"{pages_more * PAGE / 1024:.0f} kB",
        "ended with": str(first.code),
        "went on from": went_on[1] if went_on else "the start" if again.changes else "-",
        "same": ", ".join(complaints) or "yes",
        "told": "".join(told)[:140],
    }


def soak(argv: list[str]) -> None:
    """Try sizes, spread over what a run uses in all.

    Raises:
        UserError: A run that was not told of, or that came to another end.
    """
    (arguments,) = ManualParser(DiskArguments, prog="disk.py", description="See what a full disk does.").parse(argv)
    root, draw, rows = Path(tempfile.mkdtemp(prefix="disk-")), random.Random(arguments.seed), []
    workshop = Workshop(root / "work")
    names = list(FLOWS)
    for index in range(arguments.sizes):
        name = names[index % len(names)]
        workshop.undisturbed(name)
        used = sum(-(-path.stat().st_size // PAGE) for path in (root / "work" / name).rglob("*") if path.is_file())
        rows.append(trial(workshop, root, name, None if index < 2 else draw.randrange(10, used)))
        sys.stderr.write(f"{' | '.join(rows[-1].values())}\n")
    conclude(rows, root)


if __name__ == "__main__":
    sys.exit(run_command(soak))
