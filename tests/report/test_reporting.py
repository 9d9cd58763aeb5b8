"""Results of a protocol's runs to tables, pictures and a report: what they say, and that they say it whatever ran."""

import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from test_results import BASELINE, LOSSES, PROTOCOL, RANKS, UNTRAINED

from factorized_gpt2.cli.report import report
from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.report.plots import _STYLES, FAMILIES, _pareto_front
from factorized_gpt2.report.reporting import results_table, write_report

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # of matplotlib, about a picture that is wrong

SIZES = (360.8, 373.6, 399.2, 450.4)  # megabytes at these ranks
PICTURES = ("loss_against_rank", "loss_against_size", "training_curves", "spectrum")


def bare(row):
    return replace(row, spectrum=None, training_curve=[], validation_curve=[])


def cells(results, name: str) -> list[str]:
    """Find a row of the table by the run's name."""
    rows = [[cell.strip() for cell in line.split("\t")] for line in results_table(results, "tsv").splitlines()]
    return next(row for row in rows if row[0] == name)


@pytest.mark.parametrize(
    "row",
    [
        "run k loss perplexity gap parameters MB trained best_step tokens/s",
        "baseline - 3.0000 20.09 +0.0000 124,439,808 497.8 124,439,808 1,000 30,123",
        "lowrank-scratch-k64 64 3.4000 29.96 +0.4000 90,200,000 360.8 90,200,000 1,000 30,123",
        "pca-nofinetune-k64 64 7.0000 1096.63 +4.0000 90,200,000 360.8 0 - -",
        "pca-lora-k512 512 2.9800 19.69 -0.0200 112,600,000 450.4 2,345,678 1,000 30,123",
    ],
)
def test_the_table_says_what_the_results_say(row):
    name, *figures = (word.replace("_", " ") for word in row.split())
    assert cells(PROTOCOL, name) == [name, *figures]


def test_the_table_has_a_row_for_every_run_in_order():
    _, _, *rows = results_table(PROTOCOL).splitlines()
    assert [row.split()[0] for row in rows] == [row.run_name for row in PROTOCOL]


def test_without_a_baseline_there_is_no_gap():
    assert cells(PROTOCOL[1:], "pca-lora-k512")[2:6] == ["2.9800", "19.69", "", "112,600,000"]


def test_the_gap_is_to_the_baseline_that_a_run_started_from():
    baseline = next(row for row in PROTOCOL if row.family == "baseline")
    tuned = next(row for row in PROTOCOL if row.run_name == "pca-lora-k512")
    one = replace(baseline, fingerprint="1" * 64)
    two = replace(baseline, run_name="two", fingerprint="2" * 64, eval_loss=5.0)
    rows = [one, two, replace(tuned, start_fingerprint="2" * 64)]
    assert cells(rows, "pca-lora-k512")[4] == f"{tuned.eval_loss - 5.0:+.4f}"
    assert cells([one, *rows[2:]], "pca-lora-k512")[4] == ""
    old = [replace(row, fingerprint=None) for row in rows]
    assert cells(old, "pca-lora-k512")[4] == ""  # which of the two cannot be told
    assert cells(old[1:], "pca-lora-k512")[4] == f"{tuned.eval_loss - 5.0:+.4f}"


@pytest.mark.parametrize("family", ["tokenwise-nofinetune", "pca-lora", "compressed-finetune"])
def test_the_gap_of_a_compressed_start_is_to_what_it_was_compressed_from(family):
    baseline = replace(PROTOCOL[0], fingerprint="1" * 64, content={"model": "one"})
    other = replace(baseline, run_name="other", eval_loss=5.0, content={"model": "two"})
    row = replace(
        PROTOCOL[-1],
        family=family,
        settings=PROTOCOL[-1].settings | {"compressed": "somewhere", "baseline": None},
        start_fingerprint="9" * 64,
        content={"start": "compressed", "made_from": "two"},
    )
    assert cells([baseline, other, row], row.run_name)[4] == f"{row.eval_loss - 5.0:+.4f}"
    assert cells([baseline, row], row.run_name)[4] == ""
    unknown = replace(row, content={"start": "compressed"})
    assert cells([baseline, unknown], row.run_name)[4] == ""


@pytest.mark.parametrize("family", ["lora", "finetune", "evaluation", "pca-lora"])
def test_a_baseline_that_was_edited_after_a_run_started_from_it_is_not_its_baseline(family):
    baseline = replace(PROTOCOL[0], fingerprint="1" * 64, content={"model": "one"})
    row = replace(PROTOCOL[-1], family=family, start_fingerprint="1" * 64, content={"start": "one"})
    assert cells([baseline, row], row.run_name)[4] != ""
    assert cells([baseline, replace(row, content={"start": "of another config"})], row.run_name)[4] == ""


@pytest.mark.parametrize("name", ["dataset_name", "max_eval_samples"])
def test_there_is_no_gap_where_settings_name_another_text(name):
    baseline, *others = PROTOCOL
    tuned = replace(others[-1], settings=others[-1].settings | {name: "another"})
    assert cells([baseline, tuned], tuned.run_name)[4] == ""


def test_there_is_no_gap_to_a_loss_on_another_text():
    baseline, *others = PROTOCOL
    tuned = replace(others[-1], content={"validation_file": "a"})
    assert cells([replace(baseline, content={"validation_file": "b"}), tuned], tuned.run_name)[4] == ""
    assert cells([replace(baseline, content={"validation_file": "a"}), tuned], tuned.run_name)[4] != ""


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


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Draw the protocol's pictures; return the axes of each by file name."""
    axes = {}

    def keep(self, path, **_):
        axes[Path(path).name.split(".")[1]] = self.axes  # of a temporary name such as .spectrum.png.12ab.partial.png
        Path(path).touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        write_report(PROTOCOL, tmp_path_factory.mktemp("drawn"))
    return axes


def lines(axes) -> dict:
    return {line.get_label(): line for line in axes.lines}


def legend(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize(
    ("name", "x", "y"),
    [
        ("loss_against_rank", "rank k of the token embedding", "validation loss [nats / token]"),
        ("loss_against_size", "parameters [MB]", "validation loss [nats / token]"),
        ("training_curves", "training tokens [millions]", "loss [nats / token]"),
        ("spectrum", "rank k of the token embedding", "share of the variance left out"),
    ],
)
def test_axes_are_labelled(drawn, name, x, y):
    assert {axes.get_xlabel() for axes in drawn[name]} == {x}
    assert drawn[name][0].get_ylabel() == y


@pytest.mark.parametrize("name", ["loss_against_rank", "loss_against_size"])
def test_families_can_be_told_apart_in_grey(drawn, name):
    families = [lines(drawn[name][0])[FAMILIES[family]] for family in LOSSES]
    assert len({line.get_marker() for line in families} - {"None"}) == 3
    assert len({line.get_linestyle() for line in families} - {"None"}) == 3
    assert len({style["marker"] for style in _STYLES.values()}) == len(_STYLES)


def test_the_loss_is_drawn_against_the_rank(drawn):
    (axes,) = drawn["loss_against_rank"]
    for family, losses in LOSSES.items():
        ranks, drawn_losses = lines(axes)[FAMILIES[family]].get_data()
        assert (tuple(ranks), tuple(drawn_losses)) == (RANKS, losses)
    baseline = lines(axes)["baseline (not factorized)"]
    assert baseline.get_xydata().tolist() == [[0, 3.0], [1, 3.0]]  # a level: x in parts of the axes' width
    assert baseline.get_transform() == axes.get_yaxis_transform(which="grid")
    assert legend(axes) == [*(FAMILIES[family] for family in LOSSES), "baseline (not factorized)"]
    assert (axes.get_xscale(), [text.get_text() for text in axes.get_xticklabels()]) == ("log", [*map(str, RANKS)])


def test_the_loss_is_drawn_against_the_size(drawn):
    (axes,) = drawn["loss_against_size"]
    for family, losses in LOSSES.items():
        sizes, drawn_losses = lines(axes)[FAMILIES[family]].get_data()
        assert (tuple(sizes), tuple(drawn_losses)) == (SIZES, losses)
    assert lines(axes)["baseline"].get_xydata().tolist() == [[497.759232, 3.0]]
    front = lines(axes)["no model is better on both"].get_xydata().tolist()
    assert front == [[360.8, 3.4], [373.6, 3.25], [399.2, 3.05], [450.4, 2.98]]
    assert [text.get_text() for text in axes.texts] == [f"k = {rank}" for rank in RANKS]
    assert legend(axes) == ["no model is better on both", *(FAMILIES[family] for family in LOSSES), "baseline"]


def test_the_front_holds_what_no_other_point_beats():
    points = [(5, 1.0), (1, 9.0), (2, 9.5), (3, 4.0), (3, 3.0), (4, 3.0), (6, 1.0), (7, 0.5), (8, 2.0)]
    assert _pareto_front(points) == [(1, 9.0), (3, 3.0), (5, 1.0), (7, 0.5)]


def test_curves_are_drawn_against_tokens(drawn):
    scratch, lora = drawn["training_curves"]
    assert (scratch.get_title(), lora.get_title()) == ("from a random start", FAMILIES["pca-lora"])
    assert legend(scratch) == ["not factorized", *(f"k = {rank}" for rank in RANKS)]
    assert legend(lora) == [*(f"k = {rank}" for rank in RANKS), "baseline (not factorized)"]
    assert (len(scratch.lines), len(lora.lines)) == (2 * 5, 2 * 4 + 1)
    assert len({line.get_marker() for line in scratch.lines}) == len({*RANKS, "baseline", "training"})
    training = [line.get_xydata().tolist() for line in lora.lines if line.get_marker() == "None"]
    assert lines(lora)["k = 512"].get_xydata().tolist() == [[16.384, 2.98 + 0.5], [32.768, 2.98]]
    assert [[16.384, 2.98 + 0.7], [32.768, 2.98 + 0.2]] in training
    assert lines(lora)["baseline (not factorized)"].get_ydata() == [3.0, 3.0]


def test_the_spectrum_is_what_each_rank_leaves_out(drawn):
    (axes,) = drawn["spectrum"]
    ranks, left_out = axes.lines[0].get_data()
    assert list(ranks) == list(range(1, 768))  # with all 768, nothing is left out
    assert list(left_out) == pytest.approx([1 - rank / 768 for rank in range(1, 768)])
    assert legend(axes) == ["k = 64: 0.083 kept", "k = 128: 0.167 kept", "k = 256: 0.333 kept", "k = 512: 0.667 kept"]
    assert [line.get_xydata().tolist() for line in axes.lines[1:]] == [[[k, 1 - k / 768]] for k in RANKS]
    assert axes.get_yscale() == "log"


OTHER_WIDTH = [
    replace(BASELINE, eval_loss=3.5, settings=BASELINE.settings | {"output_dir": "b/small"}),
    replace(
        UNTRAINED,
        eval_loss=8.0,
        spectrum=[kept / 96 for kept in range(1, 97)],
        settings=UNTRAINED.settings | {"baseline": "b/small"},
    ),
]


@pytest.fixture
def of_two_baselines():
    own = [
        replace(row, settings=row.settings | ({"output_dir": "b/$a$"} if row is BASELINE else {"baseline": "b/$a$"}))
        for row in PROTOCOL
    ]
    return own + OTHER_WIDTH


def test_runs_of_two_baselines_are_drawn_apart(of_two_baselines, tmp_path, monkeypatch):
    axes = {}

    def keep(self, path, **_):
        self.draw_without_rendering()
        axes[Path(path).name.split(".")[1]] = self.axes[0]
        Path(path).touch()

    monkeypatch.setattr(Figure, "savefig", keep)
    write_report(of_two_baselines, tmp_path)
    spectrum = lines(axes["spectrum"])
    assert [len(spectrum[label].get_xdata()) for label in ("d = 768", "d = 96")] == [767, 95]
    assert spectrum["k = 64: 0.667 kept"].get_xydata().tolist() == [[64, 1 - 64 / 96]]
    assert {"k = 64: 0.083 kept", "k = 512: 0.667 kept"} <= set(legend(axes["spectrum"]))
    drawn = lines(axes["loss_against_rank"])
    assert drawn["PCA, no training, from b/small"].get_xydata().tolist() == [[64, 8.0]]
    assert len(drawn[r"PCA, no training, from b/\$a\$"].get_xdata()) == len(RANKS)
    assert {r"baseline b/\$a\$ (not factorized)", "baseline b/small (not factorized)"} <= drawn.keys()


def test_the_gap_of_several_baselines_is_to_a_runs_own(of_two_baselines):
    rows = [line.split("\t") for line in results_table(of_two_baselines, "tsv").splitlines()]
    gaps = {(row[2].strip(), row[4].strip()) for row in rows}
    assert {("3.0000", "+0.0000"), ("3.5000", "+0.0000"), ("7.0000", "+4.0000"), ("8.0000", "+4.5000")} <= gaps


def test_a_rank_beyond_the_spectrum_is_not_marked(tmp_path):
    assert write_report([replace(UNTRAINED, spectrum=[0.5, 1.0])], tmp_path).exists()


def test_the_command_prints_the_table_and_where_the_report_is(tmp_path, capsys):
    bare(BASELINE).write(tmp_path / "gpt_baseline")
    assert run_command(report, ["--results", str(tmp_path)]) == 0
    table = results_table([BASELINE])
    assert capsys.readouterr().out == f"{table}\n\nReport: {tmp_path}/report/report.md\n"
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
