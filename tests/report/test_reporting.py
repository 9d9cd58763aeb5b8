"""Results of a protocol's runs to tables, pictures and a report: what they say, and that they say it whatever ran."""

import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from test_results import BASELINE, PROTOCOL, UNTRAINED

from factorized_gpt2.cli.report import report
from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.report.reporting import write_report
from factorized_gpt2.report.tables import LEGEND, results_table

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # of matplotlib, about a picture that is wrong

PICTURES = ("loss_against_rank", "loss_against_size", "training_curves", "spectrum")


def bare(row):
    return replace(row, spectrum=None, training_curve=[], validation_curve=[])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write the protocol's report once."""
    folder = tmp_path_factory.mktemp("report")
    assert write_report(PROTOCOL, folder) == folder / "report.md"
    return folder


def test_a_report_is_two_texts_and_every_picture_twice(folder):
    pictures = {f"{name}.{kind}" for name in PICTURES for kind in ("png", "svg")}
    assert {path.name for path in folder.iterdir()} == pictures | {"report.md", "report.html"}
    for name in PICTURES:
        pixels = imread(folder / f"{name}.png")
        assert min(pixels.shape[:2]) > 500
        assert pixels[..., :3].std() > 0.01
        assert ElementTree.parse(folder / f"{name}.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_a_report_shows_its_pictures_and_table(folder):
    markdown, page = ((folder / name).read_text(encoding="utf-8") for name in ("report.md", "report.html"))
    assert re.findall(r"!\[[^]]+\]\((.*?)\)", markdown) == [f"{name}.png" for name in PICTURES]
    assert re.findall(r'<img src="(.*?)" alt="[^"]+">', page) == [f"{name}.svg" for name in PICTURES]
    assert results_table(PROTOCOL, "github") in markdown
    assert results_table(PROTOCOL, "html") in page


def origin(folder: Path) -> dict[str, str]:
    """Read from a report where the results come from."""
    text = (folder / "report.md").read_text(encoding="utf-8").partition("## Where they come from")[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    return {name: value for name, value in rows if name and not name.startswith((":", "-"))}


def test_a_report_says_where_the_results_come_from(folder):
    rows = origin(folder)
    assert (rows["seed"], rows["steps"], rows["validation text"]) == ("42", "10000, 5000", "held_out.txt")
    assert (rows["layers, heads, width d"], rows["blocks evaluated"]) == ("12 / 12 / 768", "all")
    assert (rows["device"], rows["processes"], rows["code"]) == ("cpu", "2", "c" * 40)
    assert (rows["seconds in all"], rows["largest peak memory"]) == ("7,803", "2.50 GB")
    assert (rows["python"], rows["torch"]) == ("3.13.1", "2.13.0")


def test_where_runs_differ_the_report_says_every_value(tmp_path):
    one = bare(BASELINE)
    other = replace(one, settings=one.settings | {"seed": 7}, device="H100", processes=1)
    rows = origin(write_report([one, other, one], tmp_path).parent)
    assert (rows["seed"], rows["device"], rows["processes"]) == ("42, 7", "cpu, H100", "2, 1")


def test_the_same_results_give_the_same_report(folder, tmp_path):
    write_report(PROTOCOL, tmp_path)
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_page_escapes_names(tmp_path):
    write_report([replace(bare(BASELINE), run_name="<b>", device="<i>")], tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("&lt;b&gt;") == page.count("&lt;i&gt;") == 1
    assert not re.search("<[bi]>", page)


@pytest.mark.parametrize(
    ("results", "pictures"),
    [
        ([bare(BASELINE)], ()),
        ([BASELINE], ("training_curves",)),
        ([replace(BASELINE, validation_curve=[])], ("training_curves",)),
        ([replace(BASELINE, best_tokens=None)], ()),
        ([UNTRAINED], ("loss_against_rank", "loss_against_size", "spectrum")),
        ([bare(row) for row in PROTOCOL], ("loss_against_rank", "loss_against_size")),
    ],
    ids=[
        "baseline without curves",
        "baseline",
        "never evaluated",
        "tokens not counted",
        "one untrained",
        "all without curves and spectra",
    ],
)
def test_a_report_draws_only_what_there_is(tmp_path, monkeypatch, results, pictures):
    saved = []

    def lay_out(self, path, **kwargs):
        self.draw_without_rendering()
        saved.append(Path(path))
        saved[-1].touch()  # to be put in its place

    monkeypatch.setattr(Figure, "savefig", lay_out)
    text = write_report(results, tmp_path).read_text(encoding="utf-8")
    pairs = [(name, kind) for name in pictures for kind in ("png", "svg")]
    assert [path.suffix for path in saved] == [f".{kind}" for _, kind in pairs]
    assert all((tmp_path / f"{name}.{kind}").exists() for name, kind in pairs)
    assert re.findall(r"\((\w+)\.png\)", text) == list(pictures)


def test_the_command_prints_the_table_and_where_the_report_is(tmp_path, capsys):
    bare(BASELINE).write(tmp_path / "gpt_baseline")
    assert run_command(report, ["--results", str(tmp_path)]) == 0
    table = results_table([BASELINE])
    assert capsys.readouterr().out == f"{table}\n\n{LEGEND}\n\nReport: {tmp_path}/report/report.md\n"
    assert table.split()[-1] in (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert run_command(report, ["--results", str(tmp_path), "--output_dir", str(tmp_path / "a/b")]) == 0
    assert capsys.readouterr().out.endswith(f"\nReport: {tmp_path}/a/b/report.md\n")
    assert (tmp_path / "a/b/report.html").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--results", "nowhere"], "error: No results under nowhere: no run has finished there.\n"),
        (["--result", "nowhere"], "error: Unknown argument '--result'. Did you mean 'results'?\n"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, words, complaint):
    monkeypatch.chdir(tmp_path)
    assert run_command(report, words) == 2
    assert capsys.readouterr() == ("", complaint)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["report.md", "report.html", "loss_against_rank.png"])
def test_what_a_person_wrote_under_a_name_of_the_report_is_refused_and_stays(tmp_path, name):
    (tmp_path / name).write_text("# Results\n\nof my thesis")
    with pytest.raises(UserError, match=f"{name} is of no report that was made before: move it away, or choose"):
        write_report(PROTOCOL, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    (tmp_path / name).rename(tmp_path / "thesis.md")
    write_report(PROTOCOL, tmp_path)
    write_report(PROTOCOL, tmp_path)
    assert (tmp_path / "thesis.md").read_text() == "# Results\n\nof my thesis"


def test_the_result_for_programs(tmp_path):
    for row in (BASELINE, UNTRAINED):
        row.write(tmp_path / row.run_name)
    report(["--results", str(tmp_path), "--json", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["command"] == "report"
    first, second = result["rows"]
    assert (first["run_name"], first["n_embd_wte"], first["gap"]) == (BASELINE.run_name, None, 0.0)
    for row, results in ((first, BASELINE), (second, UNTRAINED)):
        assert row["loss"] == results.eval_loss
        assert row["bytes"] == results.bytes
        assert row["versions"] == results.versions
        assert "training_curve" not in row
