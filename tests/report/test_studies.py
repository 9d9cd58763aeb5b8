"""Which runs belong together: a baseline with its own, the seeds of a run, and those whose baseline is not there."""

from dataclasses import replace

import pytest
from test_results import BASELINE, PROTOCOL

from factorized_gpt2.report.studies import studies_of

LORA = next(row for row in PROTOCOL if row.family == "pca-lora")


def run(row, name, start=None, seed=42, **settings):
    """Make a run of known content, that left its name and started from what left another's."""
    settings = row.settings | {"seed": seed, "output_dir": f"r/{name}", "baseline": start and f"r/{start}"} | settings
    content = {"model": name} | ({"start": start} if start else {})
    start_fingerprint = f"weights of {start}" if start else None
    fingerprints = {"fingerprint": f"weights of {name}", "start_fingerprint": start_fingerprint}
    return replace(row, run_name=name, settings=settings, content=content, **fingerprints)


def shape(studies):
    """Name the runs of every study: of the baseline, and of the entries."""
    return [
        (
            [row.run_name for row in study.baseline.runs] if study.baseline else None,
            [[row.run_name for row in entry.runs] for entry in study.others],
        )
        for study in studies
    ]


def test_every_baseline_has_its_own_runs():
    wide, small = run(BASELINE, "wide"), run(BASELINE, "small", n_embd=96)
    scratch = run(PROTOCOL[1], "scratch", n_embd=96)
    rows = [wide, small, scratch, run(LORA, "of small", "small"), run(LORA, "of wide", "wide")]
    studies = studies_of(rows)
    assert shape(studies) == [(["wide"], [["of wide"]]), (["small"], [["scratch"], ["of small"]])]
    assert [study.label for study in studies] == ["d = 768", "d = 96"]


def test_seeds_go_together_with_what_was_made_of_each():
    rows = [run(BASELINE, f"b{seed}", seed=seed) for seed in (1, 2)]
    rows += [run(LORA, f"l{seed}", f"b{seed}", seed=7) for seed in (1, 2)]  # of one seed, from baselines of two
    (study,) = studies_of([replace(row, eval_loss=loss) for row, loss in zip(rows, (3.0, 3.2, 3.5, 3.8), strict=True)])
    assert shape([study]) == [(["b1", "b2"], [["l1", "l2"]])]
    assert study.label == ""
    (entry,) = study.others
    assert (entry.loss, entry.losses, entry.gap) == (pytest.approx(3.65), (3.5, 3.8), pytest.approx(0.55))
    assert entry.name == "pca-lora-k64-r0"  # neither of theirs
    assert replace(entry, runs=entry.runs[:1], gaps=entry.gaps[:1]).name == "l1"


def test_a_compressed_start_of_baselines_of_two_seeds():
    rows = [run(BASELINE, f"b{seed}", seed=seed) for seed in (1, 2)]
    for seed in (1, 2):
        made = run(LORA, f"l{seed}", seed=seed, baseline=None, compressed=f"seed{seed}/gpt_tokenwise_k64")
        content = {"start": f"made {seed}", "made_from": f"b{seed}", "model": f"l{seed}"}
        rows.append(replace(made, family="tokenwise-lora", content=content, start_fingerprint=f"s{seed}"))
    assert shape(studies_of(rows)) == [(["b1", "b2"], [["l1", "l2"]])]
    one_baseline = [replace(row, content=row.content | {"made_from": "b1"}) for row in rows[2:]]
    assert shape(studies_of([rows[0], *one_baseline])) == [(["b1"], [["l1"], ["l2"]])]  # compressed otherwise, perhaps


@pytest.mark.parametrize("changed", [{"learning_rate": 1.0}, {"max_steps": 5}, {"lora_rank": 8}, {"seed": 1}])
def test_what_differs_in_more_than_the_seed_is_no_seed(changed):
    rows = [run(BASELINE, "b"), run(LORA, "one", "b", seed=1), run(LORA, "two", "b", **{"seed": 2} | changed)]
    assert shape(studies_of(rows)) == [(["b"], [["one"], ["two"]])]


def test_texts_are_told_apart_by_their_content():
    def read(row, text, path="train.txt"):
        return replace(row, content=row.content | {"train_file": text}, settings=row.settings | {"train_file": [path]})

    one, two = run(BASELINE, "one", seed=1), run(BASELINE, "two", seed=2)
    assert len(studies_of([read(one, "a"), read(two, "a", "moved.txt")])) == 1
    apart = studies_of([read(one, "a"), read(two, "b")])
    assert [study.label for study in apart] == ["baseline r/one", "baseline r/two"]
    apart = studies_of([read(one, "a", "a.txt"), read(two, "b", "b.txt")])
    assert [study.label for study in apart] == ["trained on a.txt", "trained on b.txt"]


def test_a_random_start_belongs_to_the_baseline_that_differs_in_the_rank_alone():
    rows = [run(BASELINE, "short", max_steps=100), run(BASELINE, "long"), run(PROTOCOL[1], "scratch", n_embd_wte=64)]
    assert shape(studies_of(rows)) == [(["short"], []), (["long"], [["scratch"]])]
    unlike = run(PROTOCOL[1], "scratch", n_embd_wte=64, max_steps=7)
    assert shape(studies_of([*rows[:2], unlike])) == [(["short"], []), (["long"], []), (None, [["scratch"]])]


def test_runs_without_a_baseline_are_shown_by_where_they_come_from():
    rows = [run(LORA, "one", "gone", seed=1), run(LORA, "two", "gone", seed=2), run(LORA, "three", "lost")]
    studies = studies_of([run(BASELINE, "b"), *rows])
    assert shape(studies) == [(["b"], []), (None, [["one", "two"]]), (None, [["three"]])]
    assert [study.label for study in studies] == [
        "baseline r/b",
        "from r/gone, no baseline with this text here",
        "from r/lost, no baseline with this text here",
    ]
    assert shape(studies_of(rows[:2])) == [(None, [["one", "two"]])]


def test_what_is_not_known_is_in_no_label():
    rows = [
        run(BASELINE, "one", n_embd=None),
        run(BASELINE, "two"),
        run(PROTOCOL[1], "scratch", n_embd=None, n_head=1),
    ]
    assert [study.label for study in studies_of(rows)] == [
        "baseline r/one",
        "d = 768, baseline r/two",
        "from scratch, no baseline with this text here",
    ]


def test_the_same_run_twice_is_two():
    studies = studies_of([run(BASELINE, "one"), run(BASELINE, "two")])
    assert shape(studies) == [(["one"], []), (["two"], [])]
    assert [study.label for study in studies_of([BASELINE, BASELINE])] == [
        "baseline baseline (1)",
        "baseline baseline (2)",
    ]
