"""`--help` of every command is a page to read, and what it shows is what the parser knows."""

import re
from dataclasses import fields

import pytest
from transformers import TrainingArguments

from factorized_gpt2.cli import compress, demo, evaluate, experiments, import_checkpoint, report, train
from factorized_gpt2.runs.training_fields import SUPPORTED, refused

COMMANDS = {
    "compress.py": compress,
    "evaluate_models.py": evaluate,
    "factorized-gpt2-demo": demo,
    "import_checkpoint.py": import_checkpoint,
    "report.py": report,
    "run_experiments.py": experiments,
    "train_hf.py": train,
}


@pytest.fixture(scope="module")
def pages():
    """Print every page, once."""
    printed = {}
    for name, module in COMMANDS.items():
        with pytest.MonkeyPatch.context() as patch:
            lines = []
            patch.setattr(
                "argparse.ArgumentParser._print_message", lambda self, text, file, out=lines: out.append(text)
            )
            patch.setattr("sys.argv", [name, "--help"])
            with pytest.raises(SystemExit) as ended:
                module.main()
        assert ended.value.code == 0
        printed[name] = "".join(lines)
    return printed


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z]\w+", text))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_begins_with_usage_and_ends_with_exit_status(pages, name):
    lines = pages[name].splitlines()
    assert lines[0].startswith(f"usage: {name} ")
    assert lines[2]
    assert "Exit status: 0 after success; 2 after bad input" in pages[name]
    assert all(len(line) <= 120 or line.lstrip().startswith("--") for line in lines)  # of choices there may be many


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_there_once_and_explained(pages, name):
    shown = re.findall(r"^  (?:-h, )?(--[\w-]+)(.*)\n(.*)", pages[name], re.MULTILINE)
    names = [option for option, _, _ in shown]
    assert len(names) == len(set(names)) >= 2
    assert not [option for option in names if option.startswith("--no_") or "-" in option.removeprefix("--")]
    for option, rest, following in shown:
        assert re.search(r" {2,}\w", rest) or following.startswith(" " * 20), option


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_that_say_nothing_are_not_told(pages, name):
    for nothing in ("None", "==SUPPRESS==", r"\[\]", r"\{\}"):
        assert not re.search(rf"Default:\s+{nothing}\.", pages[name])
    assert "(default:" not in pages[name]


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "factorized-gpt2-demo"])
def test_examples_use_options_that_exist(pages, name):
    examples = re.findall(r"^  python (.*)$", pages[name], re.MULTILINE)
    assert examples
    for example in examples:
        own, _, of_every_run = example.partition(" -- ")
        assert own.startswith(name)
        assert options(own) <= options(pages[name].partition("Examples:")[0])
        assert options(of_every_run) <= options(pages["train_hf.py"].partition("Examples:")[0])


def test_headings_lead_through_the_options_of_a_run(pages):
    headings = re.findall(r"^(\w.*):$", pages["train_hf.py"], re.MULTILINE)
    assert headings[:5] == ["options", "Model", "LoRA adapters", "Distillation", "Text"]


def test_the_page_of_a_run_shows_what_a_run_honours(pages):
    shown = {name.removeprefix("--") for name in options(pages["train_hf.py"])}
    assert not shown & (refused().keys() - {"debug"})
    assert {item.name for item in fields(TrainingArguments)} & SUPPORTED <= shown
