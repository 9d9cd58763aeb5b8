"""The results under docs/results/: complete, from committed code, and just what the reports beside them say."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from factorized_gpt2.report.reporting import read_results, write_report
from factorized_gpt2.report.tables import results_table

DOCS = Path(__file__).resolve().parents[2] / "docs"
GRIDS = sorted(path.parent for path in (DOCS / "results").glob("*/report"))


@pytest.fixture(params=GRIDS, ids=lambda path: path.name)
def grid(request) -> Path:
    return request.param


def cells(text: str) -> set[tuple[str, ...]]:
    """List the rows of the tables of a page."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|-")]
    return {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines}


def test_there_is_one():
    assert GRIDS


def test_all_are_there_that_the_page_has(grid):
    results, is_whole = read_results(grid), grid.name != "full"  # there the time for the thirteenth was over
    first = min(row.settings["seed"] for row in results)
    families = Counter(row.family for row in results if row.settings["seed"] == first)
    kinds = {"baseline": 1, "lowrank-scratch": 4, "pca-nofinetune": 4, "pca-lora": 3 + is_whole}
    assert {kind: families[kind] for kind in kinds} == kinds
    page = (DOCS / "results" / f"{grid.name}.md").read_text()
    for commit, _, changes in {row.git_commit.partition("-") for row in results}:
        assert re.fullmatch("[0-9a-f]{40}", commit)
        if changes:  # then the page says which they were
            assert f"commit {commit[:7]} with changes" in page


def test_the_report_follows_from_the_results(grid, tmp_path):
    write_report(read_results(grid), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in (grid / "report").iterdir()}
    for name in ("report.md", "report.html"):
        assert (tmp_path / name).read_text() == (grid / "report" / name).read_text()
    assert len([name for name in names if name.endswith(".svg")]) == 4


def test_the_page_shows_the_table(grid):
    page = (DOCS / "results" / f"{grid.name}.md").read_text()
    assert cells(results_table(read_results(grid), "github")) <= cells(page)


def test_no_local_path_is_published(grid):
    for path in grid.glob("*/results.json"):
        texts = re.findall(r'"([^"]*)"', json.dumps(json.loads(path.read_text())))
        assert not [text for text in texts if text.startswith("/") or "=/" in text]
