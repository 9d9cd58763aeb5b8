"""Measure the figures of a page of the docs anew: `python benchmarks/pages.py --page scaling`.

`pages.json` lists the commands of each page. What a command prints is kept in `docs/results/PAGE/NAME.md`, with the
command, the commit and the machine. A line `<!-- table 2 of results/PAGE/NAME.md -->` in a page says that the table
below it is the second one of that record, and the table is replaced. Times need a machine that does nothing else.
"""

import datetime
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from side_by_side import machine

from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.common.files import replacing_file
from factorized_gpt2.settings.parsing import ManualParser

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MARK = re.compile(r"<!-- table (\d+) of (results/[\w./-]+\.md) -->\n")
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)

PAGES: dict[str, dict[str, str]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
"""Commands by page and by name of their record; words in capitals stand for folders."""


@dataclass
class PagesArguments:
    """Which page, and where what it is measured on lies."""

    page: str = field(metadata={"help": "Page of docs/.", "choices": list(PAGES)})
    only: list[str] | None = field(default=None, metadata={"help": "Run only these of its commands.", "nargs": "+"})
    data: str | None = field(
        default=None, metadata={"help": "DATA: folder with books/, wikitext-103/, gpt2-tokenizer/."}
    )
    smollm2: str | None = field(default=None, metadata={"help": "SMOLLM2: folder of that model."})
    small: str | None = field(default=None, metadata={"help": "SMALL: folder that small_grid.py filled."})
    nanogpt: str | None = field(default=None, metadata={"help": "NANOGPT: a checkout of it."})
    work: str | None = field(default=None, metadata={"help": "WORK: folder for what takes long to compute."})
    dry_run: bool = field(default=False, metadata={"help": "Print the commands, and run none."})


def main(argv: list[str]) -> None:
    """Run the page's commands, keep what they print, renew the tables of all pages."""
    arguments = ManualParser(PagesArguments, prog="pages.py", description=__doc__).parse(argv)[0]
    places = {name.upper(): getattr(arguments, name) for name in ("data", "smollm2", "small", "nanogpt", "work")}
    commands = {n: c for n, c in PAGES[arguments.page].items() if arguments.only is None or n in arguments.only}
    if not commands:
        raise UserError(f"The page {arguments.page} has the commands {', '.join(PAGES[arguments.page])}.")
    missing = [name for name, place in places.items() if place is None and re.search(rf"\b{name}\b", str(commands))]
    if arguments.dry_run:
        print("\n".join(f"{name}: python {command}" for name, command in commands.items()))
        return
    if missing:
        raise UserError(f"Name {', '.join(f'--{name.lower()}' for name in missing)}: see --help.")
    for name, command in commands.items():
        print(f"\n== {name}: python {command}", flush=True)
        record = DOCS / "results" / arguments.page / f"{name}.md"
        printed = run(command, places)
        record.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(record) as path:
            path.write_text(f"    python {command}\n\n{origin()}\n\n{printed}", encoding="utf-8")
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = renewed(text, f"results/{arguments.page}/")
        if new != text:
            with replacing_file(page) as path:
                path.write_text(new, encoding="utf-8")


def run(command: str, places: dict[str, str | None]) -> str:
    """Run a command with places for their names, show what it prints, and return that with the names again.

    Raises:
        UserError: It failed.
    """
    named = re.compile(rf"\b({'|'.join(places)})\b")
    words = [named.sub(lambda match: str(places[match[1]]), word) for word in shlex.split(command)]
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout or ():
        print(line, end="", flush=True)
        lines.append(line)
    if process.wait() != 0:
        raise UserError(f"`python {command}` failed.")
    printed = "".join(lines)
    for name, place in sorted(places.items(), key=lambda item: -len(item[1] or "")):
        printed = printed.replace(place, name) if place else printed
    return printed


def origin() -> str:
    """Say when, from what code and on which machine a record is."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)

    commit = git("rev-parse", "--short", "HEAD").stdout.strip() or "unknown"
    changes = (
        " with changes" if git("diff", "--quiet", "HEAD", "--", "factorized_gpt2", "benchmarks").returncode else ""
    )
    return f"{datetime.date.today()}, commit {commit}{changes}; {machine()}"


def pages() -> Iterator[Path]:
    """List the pages that may hold tables of records."""
    yield ROOT / "README.md"
    yield from sorted(DOCS.glob("*.md"))
    yield from sorted(DOCS.glob("results/*.md"))


def renewed(text: str, records: str = "") -> str:
    """Return a page's text with the tables of the records that it names.

    Args:
        text: The page.
        records: How the names begin of the records that matter.

    Raises:
        UserError: There is no such record or table, or no table below the line that names it.
    """
    parts, at = [], 0
    for mark in MARK.finditer(text):
        if not mark[2].startswith(records):
            continue
        below = TABLE.match(text, mark.end())
        if below is None:
            raise UserError(f"No table stands below {mark[0].strip()}.")
        parts += [text[at : mark.end()], table(DOCS / mark[2], int(mark[1]))]
        at = below.end()
    return "".join(parts) + text[at:]


def table(record: Path, number: int) -> str:
    """Read a record's table, counted from 1, its columns as narrow as they may be.

    Raises:
        UserError: There is none.
    """
    tables = TABLE.findall(record.read_text(encoding="utf-8")) if record.is_file() else []
    if not 1 <= number <= len(tables):
        raise UserError(f"{record} has no table {number}.")
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in tables[number - 1].splitlines()]
    rows[1] = ["---"] * len(rows[0])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    sys.exit(run_command(main))
