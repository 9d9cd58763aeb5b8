"""The results under docs/results/: complete, from committed code, and just what the reports beside them say."""

import json
import re
from pathlib import Path

import pytest

from factorized_gpt2.report.reporting import read_results, write_report
from factorized_gpt2.report.tables import results_table

DOCS = Path(__file__).resolve().parents[2] / "docs"
GRIDS = sorted(path.parent for path in (DOCS / "results").glob("*/report"))


@pytest.fixture(params=GRIDS, ids=lambda path: path.name)
def grid(request) -> Path:
    return request.param


def test_there_is_one():
    assert GRIDS


def test_all_are_there_that_the_page_has(grid):
    results, is_whole = read_results(grid), grid.name != "full"  # there the time for the thirteenth was over
    families = ["baseline", *["lowrank-scratch"] * 4, *["pca-nofinetune"] * 4, *["pca-lora"] * (3 + is_whole)]
    assert [row.family for row in results] == families
    assert len({row.git_commit for row in results}) == 1
    commit, _, changes = results[0].git_commit.partition("-")
    assert re.fullmatch("[0-9a-f]{40}", commit)
    if changes:  # then the page says which they were
        assert f"commit {commit[:7]} with changes" in (DOCS / "results" / f"{grid.name}.md").read_text()
    assert len({row.settings["seed"] for row in results}) == 1


def test_the_report_follows_from_the_results(grid, tmp_path):
    write_report(read_results(grid), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in (grid / "report").iterdir()}
    for name in ("report.md", "report.html"):
        assert (tmp_path / name).read_text() == (grid / "report" / name).read_text()
    assert len([name for name in names if name.endswith(".svg")]) == 4


def test_the_page_shows_the_table(grid):
    assert results_table(read_results(grid), "github") in (DOCS / "results" / f"{grid.name}.md").read_text()


def test_no_local_path_is_published(grid):
    for path in grid.glob("*/results.json"):
        texts = re.findall(r'"([^"]*)"', json.dumps(json.loads(path.read_text())))
        assert not [text for text in texts if text.startswith("/") or "=/" in text]


def test_the_page_of_experiments_rounds_what_the_results_say():
    results = {(row.family, row.n_embd_wte): row for row in read_results(DOCS / "results/quarter")}
    baseline = results["baseline", None]
    page = (DOCS / "experiments.md").read_text()
    families = ("pca-nofinetune", "pca-lora", "lowrank-scratch")
    for rank in (16, 32, 64, 128):
        gaps = [f"{results[family, rank].eval_loss - baseline.eval_loss:.3f}" for family in families]
        size = f"{results['pca-lora', rank].bytes / 1e6:.1f}"
        assert f"| {rank} | {' | '.join(gaps)} | {size} |" in page
    assert f"{baseline.eval_loss:.3f} nats" in page
