"""Strangers' names: none leads out of the output folder, none is markup in a report or in a card."""

import html
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import tiny_config
from markdown_it import MarkdownIt
from strangers import outcome, tree
from test_model_card import RECIPE, RESULTS

from factorized_gpt2.cli.compress import compress
from factorized_gpt2.cli.experiments import run_experiments
from factorized_gpt2.cli.report import report
from factorized_gpt2.cli.train import train
from factorized_gpt2.common.errors import one_line
from factorized_gpt2.common.markdown import code, escaped
from factorized_gpt2.hub.model_card import Figures, History, Measurement, adapter_card, model_card
from factorized_gpt2.report import reporting
from factorized_gpt2.report.reporting import write_report
from factorized_gpt2.report.studies import shortened
from factorized_gpt2.runs.folder import write_identity
from factorized_gpt2.runs.settings import parse_run
from factorized_gpt2.text.source import TextSource

MARKUP = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a|b",
    "a\\|b",
    "[click](https://evil.example)",
    "![spy](https://evil.example/x.png)",
    "<https://evil.example>",
    "`code`",
    "**bold** _soft_ __init__ ~~gone~~",
    "&lt;b&gt; &#124;",
    "two\nlines\r\n\n# and a title",
    "back\\slash\\",
    "a_name.with-all 1/2 (of) it, as usual: 100%",
]
MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


def texts(token) -> list[str]:
    """List the kinds of tokens in a line, having seen that nothing but text is in it."""
    assert {child.type for child in token.children} <= {"text", "text_special"}, token.content
    return "".join(child.content for child in token.children)


@pytest.mark.parametrize("text", MARKUP)
def test_escaped_text_is_shown_as_it_is(text):
    table = f"| {escaped(text)} | {escaped(text)} |\n| --- | --- |\n"
    for source, times in ((f"So {escaped(text)}", 1), (table, 2)):
        lines = [texts(token) for token in MARKDOWN.parse(source) if token.type == "inline"]
        assert [line.removeprefix("So ") for line in lines] == [one_line(text)] * times


@pytest.mark.parametrize("text", MARKUP)
def test_code_ends_where_it_should(text):
    (line,) = (token for token in MARKDOWN.parse(f"So {code(text)} it is") if token.type == "inline")
    assert [child.type for child in line.children] == ["text", "code_inline", "text"]
    assert line.children[1].content == one_line(text).replace("`", "'")


def test_what_a_terminal_would_obey_is_left_out():
    assert one_line("a\x1b[31mb\x07\u202ec\td\n") == "a [31mb  c d"


@pytest.mark.parametrize("text", MARKUP)
def test_a_report_shows_names_as_they_are(text, tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "_draw", lambda *args: {})
    settings = RESULTS.settings | {"validation_file": [f"/data/{text}"], "max_steps": text}
    write_report(
        [replace(RESULTS, run_name=text, git_commit=text, settings=settings, versions={text: text})], tmp_path
    )
    lines = [texts(token) for token in MARKDOWN.parse((tmp_path / "report.md").read_text()) if token.type == "inline"]
    assert lines.count(one_line(text)) == 5  # run, steps, code, and a version with its name
    page = (tmp_path / "report.html").read_text()
    assert {name.split()[0] for name in re.findall(r"<([^>]*)>", page)} <= TAGS
    assert html.escape(one_line(text)) in page.replace("&#39;", "&#x27;")


@pytest.mark.parametrize("text", MARKUP)
def test_a_report_of_several_baselines_shows_their_names_as_they_are(text, tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "_draw", lambda *args: {})
    folders = [f"/data/{text}", f"{text}/b"]
    write_report(
        [replace(RESULTS, family="baseline", settings=RESULTS.settings | {"output_dir": name}) for name in folders],
        tmp_path,
    )
    lines = [texts(token) for token in MARKDOWN.parse((tmp_path / "report.md").read_text()) if token.type == "inline"]
    headings = [one_line(f"baseline {shortened(name)}") for name in folders]
    assert [line for line in lines if line.startswith("baseline ")] == headings
    page = (tmp_path / "report.html").read_text()
    assert {name.split()[0] for name in re.findall(r"<([^>]*)>", page)} <= TAGS | {"h3", "/h3"}


TAGS = {
    "!doctype",
    "meta",
    "title",
    "/title",
    "style",
    "/style",
    "h1",
    "/h1",
    "h2",
    "/h2",
    "table",
    "/table",
    "p",
    "/p",
}
TAGS |= {"thead", "/thead", "tbody", "/tbody", "tr", "/tr", "th", "/th", "td", "/td"}


@pytest.mark.parametrize(
    "text", [*MARKUP, "x\n---\n\nlicense: mit\n", "x: {y", "- z", "'", '"', "!!python/object:os.x"]
)
def test_a_card_shows_names_as_they_are(text):
    calibration = {"text": text, "tokens": 9}
    recipe = RECIPE | {"baseline": f"/data/{text}", "method": text, "refine_steps": text, "calibration": calibration}
    settings = RESULTS.settings | {"train_file": [text], "lora_rank": text}
    history = History(recipe, replace(RESULTS, run_name=text, settings=settings))
    measured = Measurement(5.25, TextSource(files=(text,)), Figures("baseline", None, 1, 4, 5.0))
    lora = {"r": text, "lora_alpha": text, "target_modules": [text, "wte"]}
    for written in (
        model_card("me/tiny", tiny_config(), (1, 4), history, measured, license=text, plots=[f"{text}.png"]),
        adapter_card("me/tiny", "me/base", lora, history, license=text),
    ):
        _, front, body = re.split(r"^---$", str(written), maxsplit=2, flags=re.MULTILINE)
        data = yaml.safe_load(front)
        assert set(data) <= {"base_model", "library_name", "license", "model-index", "pipeline_tag", "tags"}
        assert data["license"] == text
        links = ["/me/base"] if "base_model" in data else []
        for token in MARKDOWN.parse(body):
            assert token.type != "html_block"
            for child in token.children or ():
                assert child.type != "html_inline"
                assert child.type != "link_open" or child.attrs["href"] in links
                assert child.type != "image" or "/" not in child.attrs["src"].removesuffix(".png")


def test_a_branch_stays_within_its_quotes():
    text = model_card("me/tiny", tiny_config(), (1, 4), History(RECIPE, None), revision='x", evil="').text
    assert text.count(r'from_pretrained("me/tiny", revision="x\", evil=\""') == 3


RUN = {
    **{"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "max_steps": 1, "do_train": True},
    **{"save_strategy": "no", "report_to": ["none"], "disable_tqdm": True},
}


@pytest.fixture
def config(tmp_path, corpus) -> Path:
    """Write the config of a run that works in `inside/run`."""
    texts = {f"{split}_file": [str(corpus / f"{split}.jsonl")] for split in ("train", "validation")}
    places = {"tokenizer": str(corpus / "tokenizer"), "output_dir": str(tmp_path / "inside/run")}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(RUN | texts | places))
    return path


@pytest.mark.parametrize("folder", ["a/..", "..", "../..", ".", "/", "./"])
def test_no_experiment_works_outside_of_the_grids_folder(folder, config, tmp_path, capsys):
    (tmp_path / "one.json").write_text(json.dumps({"extends": "run.json", "output_dir": folder}))
    (tmp_path / "grid.json").write_text(json.dumps({"experiments": ["one.json"]}))
    before = tree(tmp_path)
    words = ["--grid", tmp_path / "grid.json", "--output_dir", tmp_path / "inside"]
    code, line = outcome(run_experiments, words, capsys)
    assert code == 2
    assert "does not name a folder" in line
    assert tree(tmp_path) == before


def test_wherever_an_experiment_would_work_it_works_in_the_grids_folder(config, tmp_path, capsys):
    (tmp_path / "one.json").write_text(json.dumps({"extends": "run.json", "output_dir": "/etc/../../etc/passwd"}))
    (tmp_path / "grid.json").write_text(json.dumps({"experiments": [str(tmp_path / "x/../one.json")]}))
    words = ["--grid", tmp_path / "grid.json", "--output_dir", tmp_path / "inside", "--dry_run"]
    (tmp_path / "x").mkdir()
    assert outcome(run_experiments, words, capsys)[0] == 0


@pytest.mark.parametrize("listed", ["one.json", [1], [["one.json"]], {}, None, [], ["/etc/passwd"], ["../../none"]])
def test_what_is_no_grid_is_refused(listed, config, tmp_path, capsys):
    (tmp_path / "grid.json").write_text(json.dumps({"experiments": listed}))
    before = tree(tmp_path)
    assert outcome(run_experiments, ["--grid", tmp_path / "grid.json"], capsys)[0] == 2
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("parent", "complaint"),
    [
        ("run.json", "extends itself"),
        ("b.json", "extends itself"),
        ("../../../../../../../../etc/passwd", "etc/passwd cannot be read as JSON|no config"),
        ("/etc/passwd", "/etc/passwd cannot be read as JSON|no config"),
        (["run.json"], "extends must name a config"),
        (7, "extends must name a config"),
    ],
)
def test_configs_that_extend_what_they_cannot(parent, complaint, tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps({"extends": parent}))
    (tmp_path / "b.json").write_text(json.dumps({"extends": "run.json"}))
    before = tree(tmp_path)
    code, line = outcome(train, ["--config", tmp_path / "run.json"], capsys)
    assert code == 2
    assert re.search(complaint, line)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["../out", "me/..", "me/../../x", "/etc/x", "me/x/../y", "me/x\ny", "me/a--b", "~/x"])
def test_names_for_the_hub_are_checked_first(name, config, tmp_path, capsys):
    before = tree(tmp_path)
    code, line = outcome(train, ["--config", config, "--push_to_hub", name], capsys)
    assert code == 2
    assert "is no name for the Hub" in line
    words = ["--baseline", tmp_path, "--ranks", 4, "--push_to_hub", name, "--output_dir", tmp_path / "inside"]
    assert outcome(compress, words, capsys)[0] == 2
    assert tree(tmp_path) == before


@pytest.fixture
def tracked(config, monkeypatch) -> list:
    monkeypatch.setenv("WANDB_MODE", "offline")
    return ["--config", config, "--report_to", "wandb", "--project", "p"]


def test_a_name_for_a_run_leads_nowhere(tracked, tmp_path, capsys):
    before = tree(tmp_path)
    name = "../../../../<script>|\x1b[31m"
    assert outcome(train, [*tracked, "--run_name", name], capsys)[0] == 0
    assert json.loads((tmp_path / "inside/run/results.json").read_text())["run_name"] == name
    assert all(path.is_relative_to(tmp_path / "inside") for path in tree(tmp_path) - before)
    assert list((tmp_path / "inside/run/wandb").glob("offline-run-*"))
    assert outcome(report, ["--results", tmp_path / "inside"], capsys)[0] == 0


@pytest.mark.parametrize("kept", [None, "../../../../x", 5])
def test_names_that_wandb_does_not_take(kept, tracked, tmp_path, capsys):
    if kept is not None:  # as the id of a run that was cut off
        (tmp_path / "inside/run/wandb").mkdir(parents=True)
        (tmp_path / "inside/run/wandb/wandb-resume.json").write_text(json.dumps({"run_id": kept}))
        write_identity(parse_run([str(word) for word in tracked]))
    before = tree(tmp_path)
    code, line = outcome(train, [*tracked, *(["--project", "../../x"] if kept is None else [])], capsys)
    assert code == 2
    assert "W&B does not accept this project or run_name" in line
    assert all(path.is_relative_to(tmp_path / "inside") for path in tree(tmp_path) - before)
