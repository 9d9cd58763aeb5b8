"""Errors of libraries become one line that names what was given; defects of this package stay what they are."""

import json

import pytest

from factorized_gpt2.common import files
from factorized_gpt2.common.errors import UNCHECKED, UserError, blaming, first_line
from factorized_gpt2.models import loading as baseline


def ours(code: str):
    """Run code as if a module of the package held it."""
    return lambda: exec(code, {"__name__": "factorized_gpt2.made_up", "json": json})


@pytest.mark.parametrize("code", ["None.weight", "{}['k']", "[][0]", "len(3)"])
def test_a_defect_of_ours_is_not_blamed_on_what_was_given(code):
    with pytest.raises(UNCHECKED), blaming("x cannot be read", ValueError, *UNCHECKED):
        ours(code)()


@pytest.mark.parametrize("code", ["json.loads(None)", "json.loads('{')"])
def test_what_a_library_raises_is(code):
    with pytest.raises(UserError, match=r"^x cannot be read: "), blaming("x cannot be read", ValueError, *UNCHECKED):
        ours(code)()


def test_an_error_that_was_not_meant_passes():
    with pytest.raises(RuntimeError), blaming("x cannot be read", ValueError):
        raise RuntimeError("boom")


def test_a_defect_while_a_model_is_converted_shows_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(baseline, "load_complete", lambda name: None)
    with pytest.raises(UNCHECKED):
        baseline.load_baseline("anything")


def test_a_full_disk_is_no_excuse_for_a_defect(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_free_bytes", lambda folder: 0)
    with pytest.raises(KeyError), files.explaining_refusals(tmp_path / "model"):
        raise KeyError("wte")
    with pytest.raises(UserError, match="No space left"), files.explaining_refusals(tmp_path / "model"):
        raise RuntimeError("unexpected pos 64 vs 0")


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("One sentence.\nAnother.", "One sentence."),
        ("They must match, but found\n\t- a: no\n\t- b: steps", "They must match, but found - a: no - b: steps"),
        (
            "Cannot be instantiated:\none of\n(1) a file,\n(2) a name.\nMore",
            "Cannot be instantiated: one of (1) a file, (2) a name.",
        ),
        ("/a/path.jsonl\nIf it is private, log in.", "/a/path.jsonl"),
        ("Said\n\nand explained", "Said"),
        ("", "ValueError('')"),
    ],
)
def test_a_line_ends_where_its_sentence_does(message, line):
    assert first_line(ValueError(message)) == line
