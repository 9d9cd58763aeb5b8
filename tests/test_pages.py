"""Tables of the docs are those of the records that they name, and the commands behind them can be given."""

import importlib
import json
import re
import shlex
import sys

import pages
import pytest

from factorized_gpt2.common.errors import UserError
from factorized_gpt2.settings.parsing import ManualParser

RECORD = "    python x.py\n\nToday.\n\n|   a | b    |\n|-----|------|\n|   1 | c, d |\n\n| e |\n|---|\n| 2 |\n"
COMMANDS = [command for commands in pages.PAGES.values() for command in commands.values()]


@pytest.mark.parametrize("page", list(pages.pages()), ids=lambda page: page.stem)
def test_tables_are_those_of_their_records(page):
    text = page.read_text(encoding="utf-8")
    assert pages.renewed(text) == text


def test_every_record_of_a_page_is_used_or_at_hand():
    for page, commands in pages.PAGES.items():
        for name in commands:
            assert (pages.DOCS / "results" / page / f"{name}.md").is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_can_be_given(command):
    script, *words = shlex.split(command)
    assert (pages.ROOT / script).is_file()
    module = importlib.import_module(script.removeprefix("benchmarks/").removesuffix(".py"))
    (arguments,) = [
        value
        for name, value in vars(module).items()
        if re.fullmatch(r"\w+Arguments", name) and value.__module__ == module.__name__
    ]
    ManualParser(arguments).parse(words)


def test_the_readme_rounds_what_the_record_says():
    record = json.loads((pages.DOCS / "results/coding/budgets/pretrained.json").read_text())
    rows = {(row["name"].split(",")[0], f"{row['bits_per_weight']:.2f}"): row["increase"][0] for row in record["ways"]}
    readme = (pages.ROOT / "README.md").read_text().replace("*", "")
    shown = re.findall(r"^\| (coded|int\d|GPTQ int\d|PCA)\W.* \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", readme, re.M)
    assert len(shown) == 7
    for name, megabytes, bits, increase in shown:
        digits = len(increase.partition(".")[2])
        assert f"{rows[name, bits]:.{digits}f}" == increase
        assert float(megabytes) == pytest.approx(float(bits) * 49152 * 576 / 8e6, abs=0.06)


@pytest.fixture
def docs(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results/r.md").write_text(RECORD)
    return tmp_path


def test_a_table_is_replaced_below_its_mark(docs):
    page = "One.\n\n<!-- table 1 of results/r.md -->\n| old |\n| --- |\n| 0 |\n\nTwo.\n\n| stays |\n| --- |\n"
    new = pages.renewed(page)
    assert new == page.replace("| old |\n| --- |\n| 0 |\n", "| a | b |\n| --- | --- |\n| 1 | c, d |\n")
    assert pages.renewed(new) == new


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("<!-- table 3 of results/r.md -->\n| a |\n", "no table 3"),
        ("<!-- table 1 of results/s.md -->\n| a |\n", "no table 1"),
        ("<!-- table 1 of results/r.md -->\n\n| a |\n", "No table stands below"),
    ],
)
def test_a_mark_without_its_table_is_refused(docs, page, complaint):
    with pytest.raises(UserError, match=complaint):
        pages.renewed(page)


def test_records_name_no_folder_of_the_machine(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "show.py").write_text("import sys; print(sys.argv[1:])")
    printed = pages.run("show.py DATA/books DATASET WORK", {"DATA": "/some/where", "WORK": "/some/where/else"})
    assert printed == "['DATA/books', 'DATASET', 'WORK']\n"
    assert "/some/where/books" in capfd.readouterr().out


def test_a_command_that_fails_leaves_no_record(docs, monkeypatch, capfd):
    monkeypatch.setattr(pages, "ROOT", docs)
    monkeypatch.setattr(pages, "PAGES", {"scaling": {"arithmetic": "missing.py"}})
    with pytest.raises(UserError, match="failed"):
        pages.main(["--page", "scaling"])
    assert not (docs / "results/scaling").exists()


def test_a_folder_that_is_not_named_is_asked_for(monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stderr)
    with pytest.raises(UserError, match="--data, --small"):
        pages.main(["--page", "factorization"])
