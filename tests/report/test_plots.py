"""Pictures of results: what is drawn where, and that it is told apart in grey."""

from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from test_results import BASELINE, LOSSES, PROTOCOL, RANKS, UNTRAINED
from test_tables import coded, seeds

from factorized_gpt2.report.drawing import STYLES
from factorized_gpt2.report.reporting import write_report
from factorized_gpt2.runs.families import FAMILIES

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # of matplotlib, about a picture that is wrong

SIZES = (360.8, 373.6, 399.2, 450.4)  # megabytes at these ranks


def draw(results, folder: Path) -> dict[str, list]:
    """Draw the pictures of a report; return the axes of each by file name."""
    axes = {}

    def keep(self, path, **_):
        self.draw_without_rendering()
        name = Path(path).name.split(".")[1]  # of a temporary name such as .spectrum.png.12ab.partial.png
        axes[name] = [one for one in self.axes if one.get_xlabel() != "rank k"]
        Path(path).touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        write_report(results, folder)
    return axes


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw(PROTOCOL, tmp_path_factory.mktemp("drawn"))


def lines(axes) -> dict:
    return {line.get_label(): line for line in axes.lines}


def legend(axes) -> list[str]:
    (found,) = axes.figure.legends
    return [text.get_text() for text in found.get_texts()]


@pytest.mark.parametrize(
    ("name", "x", "y"),
    [
        ("loss_against_rank", "rank k of the token embedding", "validation loss [nats / token]"),
        ("loss_against_size", "weights, in memory and on disk [MB]", "validation loss [nats / token]"),
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
    assert len({(line.get_marker(), line.get_markerfacecolor()) for line in families}) == 3
    assert len({line.get_linestyle() for line in families} - {"None"}) == 3


def test_every_family_has_a_look_of_its_own_without_colours():
    def look(style):
        fill = style.get("fillstyle"), style.get("markerfacecolor")
        return style["marker"], style["linestyle"], *fill

    assert STYLES.keys() == FAMILIES.keys() - {"baseline"}
    assert len(set(map(look, STYLES.values()))) == len(STYLES)


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
        assert (tuple(sizes), tuple(drawn_losses)) == (pytest.approx(SIZES, abs=0.01), losses)
    assert lines(axes)["baseline"].get_xydata().tolist() == [[497.767232, 3.0]]
    front = lines(axes)["no model is better on both"].get_xydata().tolist()
    assert front == [[360.808, 3.4], [373.608, 3.25], [399.208, 3.05], [450.408, 2.98]]
    (above,) = axes.child_axes
    assert [text.get_text() for text in above.get_xticklabels()] == [*map(str, RANKS)]
    assert above.get_xticks().tolist() == pytest.approx(SIZES, abs=0.01)
    assert legend(axes) == ["no model is better on both", *(FAMILIES[family] for family in LOSSES), "baseline"]


def test_curves_are_drawn_against_tokens(drawn):
    scratch, lora = drawn["training_curves"]
    assert (scratch.get_title(), lora.get_title()) == ("from a random start", FAMILIES["pca-lora"])
    every = ["not factorized", *(f"k = {rank}" for rank in RANKS), "baseline (not factorized)"]
    assert legend(lora) == every
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


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """Draw the protocol beside a small baseline with one run of its own, and a run whose baseline is not there."""
    own = [
        replace(
            row, content={"start": "a"} if row.start_fingerprint else {}, settings=row.settings | {"baseline": None}
        )
        for row in PROTOCOL[1:]
    ]
    first = replace(BASELINE, content={"model": "a"}, settings=BASELINE.settings | {"output_dir": "b/a"})
    small = replace(
        BASELINE, eval_loss=3.5, settings=BASELINE.settings | {"output_dir": "b/small", "n_embd": 96, "n_layer": 2}
    )
    spectrum = [kept / 96 for kept in range(1, 97)]
    its = replace(UNTRAINED, eval_loss=8.0, spectrum=spectrum, settings=UNTRAINED.settings | {"baseline": "b/small"})
    lost = replace(its, eval_loss=9.0, content={"start": "of none"}, settings=its.settings | {"baseline": "b/$lost$"})
    small = replace(small, content={"model": "small"})
    its = replace(its, content={"start": "small"})
    return draw([first, small, *own, its, lost], tmp_path_factory.mktemp("apart"))


LABELS = ["d = 768, 12 layers", "d = 96, 2 layers", r"from b/\$lost\$, no baseline with this text here"]


def test_runs_of_several_baselines_are_drawn_apart(apart):
    for name in ("loss_against_rank", "loss_against_size", "spectrum"):
        assert [axes.get_title() for axes in apart[name]] == LABELS
    losses = [lines(axes)["PCA, no training"].get_ydata().tolist() for axes in apart["loss_against_rank"]]
    assert losses == [list(LOSSES["pca-nofinetune"]), [8.0], [9.0]]
    levels = [lines(axes).get("baseline (not factorized)") for axes in apart["loss_against_rank"]]
    assert [level and level.get_ydata() for level in levels] == [[3.0, 3.0], [3.5, 3.5], None]
    assert [axes.get_title().split("\n") for axes in apart["training_curves"]] == [
        [LABELS[0], "from a random start"],
        [LABELS[0], FAMILIES["pca-lora"]],
        [LABELS[1], "from a random start"],
    ]


def test_the_spectra_of_several_baselines_mark_a_rank_alike(apart):
    first, second, _ = apart["spectrum"]
    assert [len(axes.lines[0].get_xdata()) for axes in (first, second)] == [767, 95]
    assert lines(second)["k = 64"].get_xydata().tolist() == [[64, 1 - 64 / 96]]
    assert lines(first)["k = 64"].get_marker() == lines(second)["k = 64"].get_marker()
    assert legend(first) == [f"k = {rank}" for rank in RANKS]


def test_seeds_are_drawn_as_their_mean_with_a_bar_and_a_band(tmp_path):
    pca = next(row for row in PROTOCOL if row.family == "pca-nofinetune")
    lora = next(row for row in PROTOCOL if row.family == "pca-lora")
    axes = draw([*seeds(3.0, 3.2), *seeds(7.0, 7.5, row=pca), *seeds(3.5, 3.9, row=lora)], tmp_path)
    (rank,) = axes["loss_against_rank"]
    assert lines(rank)["PCA, no training"].get_ydata().tolist() == [7.25]
    assert lines(rank)["baseline (not factorized)"].get_ydata() == [pytest.approx(3.1)] * 2
    (size,) = axes["loss_against_size"]
    for drawn in (rank, size):
        bars = [bar.get_segments()[0][:, 1].tolist() for bar in drawn.collections]
        assert [7.0, 7.5] in bars
        assert [pytest.approx(3.5), pytest.approx(3.9)] in bars
    band = rank.patches[0]
    assert (band.get_y(), band.get_height()) == (3.0, pytest.approx(0.2))
    assert all(panel.collections for panel in axes["training_curves"])  # bands about the curves


def test_a_coded_vocabulary_stands_at_its_bytes_on_disk_and_at_no_rank(tmp_path):
    axes = draw([*PROTOCOL, coded(2, 3.2), coded(4, 3.01)], tmp_path)
    label = "coded, no training"
    assert label not in lines(axes["loss_against_rank"][0])
    memory, disk = axes["loss_against_size"]
    assert (memory.get_xlabel(), disk.get_xlabel()) == ("parameters in memory [MB]", "files of weights on disk [MB]")
    assert lines(memory)[label].get_xdata().tolist() == [370.0, 370.0]
    assert lines(disk)[label].get_xdata().tolist() == pytest.approx([339.6, 349.3], abs=0.1)
    assert [text.get_text() for text in disk.texts] == ["2 bits", "4 bits"]
    assert not memory.texts


def test_without_bytes_on_disk_the_size_is_that_in_memory(tmp_path):
    rows = [replace(row, disk_bytes=None) for row in PROTOCOL]
    (axes,) = draw(rows, tmp_path / "none")["loss_against_size"]
    assert axes.get_xlabel() == "parameters in memory [MB]"
    _, disk = draw([*PROTOCOL[:-1], rows[-1]], tmp_path / "one")["loss_against_size"]
    assert len(lines(disk)[FAMILIES["pca-lora"]].get_xdata()) == len(RANKS) - 1


def test_runs_of_one_family_and_size_are_lines_of_their_own(tmp_path):
    lora = [row for row in PROTOCOL if row.family == "pca-lora"]
    both = [replace(row, settings=row.settings | {"lora_rank": r}) for row in lora for r in (8, 32)]
    axes = draw([BASELINE, *both], tmp_path)
    assert {"PCA + LoRA, r = 8", "PCA + LoRA, r = 32"} <= lines(axes["loss_against_rank"][0]).keys()
    _, curves = axes["training_curves"]
    assert lines(curves)["k = 64, r = 8"].get_linestyle() != lines(curves)["k = 64, r = 32"].get_linestyle()


def test_a_rank_beyond_the_spectrum_is_not_marked(tmp_path):
    assert write_report([replace(UNTRAINED, spectrum=[0.5, 1.0])], tmp_path).exists()


def test_what_tells_lines_apart_is_said_in_words_before_names_of_settings(tmp_path):
    lora = [row for row in PROTOCOL if row.family == "pca-lora"]
    steps = {5: {"max_steps": 5, "warmup_steps": 1}, 9: {"max_steps": 9, "warmup_steps": 2}}
    both = [replace(row, settings=row.settings | steps[count]) for row in lora for count in steps]
    (axes,) = draw([BASELINE, *both], tmp_path / "steps")["loss_against_rank"]
    assert {"PCA + LoRA, 5 steps", "PCA + LoRA, 9 steps"} <= lines(axes).keys()
    both = [replace(row, settings=row.settings | {"dropout": rate}) for row in lora for rate in (0.0, 0.25)]
    (axes,) = draw([BASELINE, *both], tmp_path / "dropout")["loss_against_rank"]
    assert {"PCA + LoRA, dropout = 0", "PCA + LoRA, dropout = 0.25"} <= lines(axes).keys()


def test_runs_that_diverged_are_no_defect(tmp_path):
    lost = [replace(row, eval_loss=float("nan"), perplexity=float("nan")) for row in PROTOCOL]
    coded_too = coded(2, float("nan"))
    draw([*lost, coded_too], tmp_path / "all")
    axes = draw([*seeds(3.0, float("nan")), *PROTOCOL[1:], lost[3], coded_too], tmp_path / "some")
    assert len(axes["loss_against_size"]) == 2
