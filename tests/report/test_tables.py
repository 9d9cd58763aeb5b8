"""Results to tables: what a row says, to which baseline its gap is, which is the best at its size."""

from dataclasses import replace

import pytest
from test_results import BASELINE, PROTOCOL, RANKS, outcome

from factorized_gpt2.report.studies import front
from factorized_gpt2.report.tables import SEEDS_LEGEND, legend, results_rows, results_table


def cells(results, name: str) -> list[str]:
    """Find a row of the table by the run's name."""
    rows = [[cell.strip() for cell in line.split("\t")] for line in results_table(results, "tsv").splitlines()]
    return next(row for row in rows if row[0] == name)


@pytest.mark.parametrize(
    "row",
    [
        "run k loss perplexity gap parameters MB MB_on_disk best_at_size trained best_step tokens/s",
        "baseline - 3.0000 20.09 +0.0000 124,439,808 497.8 497.8 . 124,439,808 1,000 30,123",
        "lowrank-scratch-k64 64 3.4000 29.96 +0.4000 90,200,000 360.8 360.8 yes 90,200,000 1,000 30,123",
        "pca-nofinetune-k64 64 7.0000 1096.63 +4.0000 90,200,000 360.8 360.8 . 0 - -",
        "pca-lora-k512 512 2.9800 19.69 -0.0200 112,600,000 450.4 450.4 yes 2,345,678 1,000 30,123",
    ],
)
def test_the_table_says_what_the_results_say(row):
    name, *figures = ("" if word == "." else word.replace("_", " ") for word in row.split())
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


def coded(bits: float, loss: float, run_name: str = "coded-nofinetune"):
    """Make the results of a coded vocabulary: a byte a weight in memory, a few bits on disk."""
    row = outcome("pca-nofinetune", 768, loss)
    disk_bytes = 330_000_000 + int(50_257 * 768 * bits / 8)
    changes = {"bits_per_weight": bits, "disk_bytes": disk_bytes, "bytes": 370_000_000, "spectrum": None}
    return replace(row, family="coded-nofinetune", run_name=f"{run_name}-b{bits:g}", **changes)


def test_a_coded_vocabulary_has_its_bits_and_its_bytes_on_disk():
    rows = [*PROTOCOL, coded(2, 3.2), coded(4.5, 3.01)]
    assert cells(rows, "run")[:4] == ["run", "k", "bits", "loss"]
    assert cells(rows, "coded-nofinetune-b4.5")[:4] == ["coded-nofinetune-b4.5", "768", "4.5", "3.0100"]
    assert cells(rows, "coded-nofinetune-b2")[7:10] == ["370.0", "339.6", "yes"]  # the smallest of all, on disk
    assert cells(rows, "lowrank-scratch-k64")[9] == ""  # which it was without them
    assert cells(rows, "baseline")[2] == "-"


def test_the_best_at_a_size_is_below_all_of_at_most_its_megabytes():
    heavier = replace(PROTOCOL[1], run_name="header", disk_bytes=PROTOCOL[1].disk_bytes + 100, eval_loss=3.39)
    assert cells([*PROTOCOL, heavier], "header")[8] == "yes"
    assert cells([*PROTOCOL, heavier], PROTOCOL[1].run_name)[8] == ""  # some bytes of a file's header are no size
    assert cells([BASELINE], "baseline")[8] == ""  # of one, there is nothing to say


def test_the_front_holds_what_no_other_point_beats():
    points = [(5, 1.0), (1, 9.0), (2, 9.5), (3, 4.0), (3, 3.0), (4, 3.0), (6, 1.0), (7, 0.5), (8, 2.0)]
    assert front([*points, (0, float("nan")), (9, float("nan"))]) == [1, 4, 0, 7]


def seeds(*losses: float, row=BASELINE):
    return [
        replace(row, eval_loss=loss, settings=row.settings | {"seed": seed, "output_dir": f"r/{seed}"})
        for seed, loss in enumerate(losses)
    ]


def test_seeds_are_a_row_with_their_mean_and_spread():
    rows = [*seeds(3.0, 3.1, 3.5), *seeds(3.3, row=PROTOCOL[1])]
    assert cells(rows, "run")[2:7] == ["loss", "seeds", "lowest", "highest", "perplexity"]
    assert cells(rows, "baseline")[2:6] == ["3.2000", "3", "3.0000", "3.5000"]
    assert cells(rows, PROTOCOL[1].run_name)[2:8] == ["3.3000", "1", "3.3000", "3.3000", "29.96", "+0.1000"]
    assert SEEDS_LEGEND in legend(rows)
    assert SEEDS_LEGEND not in legend(PROTOCOL)
    assert "seeds" not in results_table(PROTOCOL)


def test_several_baselines_are_several_tables():
    small = [replace(row, settings=row.settings | {"n_embd": 96}) for row in PROTOCOL[:3]]
    for style, heads in (("simple", ("d = 768:", "d = 96:")), ("html", ("<h3>d = 768</h3>", "<h3>d = 96</h3>"))):
        first, second = heads
        above, text = results_table([*PROTOCOL[:5], *small], style).split(second)
        assert above.startswith(first)
        assert (above.count("lowrank-scratch"), text.count("lowrank-scratch")) == (4, 2)


def test_rows_for_programs_are_of_runs():
    rows = results_rows([*seeds(3.0, 3.4), *seeds(3.5, row=PROTOCOL[RANKS.index(64) + 1])])
    assert [(row["loss"], row["seed"], row["study"]) for row in rows] == [
        (3.0, 0, None),
        (3.4, 1, None),
        (3.5, 0, None),
    ]
    assert [row["gap"] for row in rows] == [0.0, 0.0, pytest.approx(0.3)]
    assert [row["best"] for row in rows] == [True, True, True]
