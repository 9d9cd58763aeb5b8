"""What README tells a user to type is what the code understands."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

from factorized_gpt2.cli.compress import check
from factorized_gpt2.cli.compress_settings import CalibrationArguments, CompressArguments
from factorized_gpt2.cli.evaluate import EvaluateArguments
from factorized_gpt2.cli.experiments import GridArguments, ScaleArguments
from factorized_gpt2.cli.experiments import check as check_grid
from factorized_gpt2.cli.import_checkpoint import ImportArguments
from factorized_gpt2.cli.report import ReportArguments
from factorized_gpt2.compress.methods import METHODS
from factorized_gpt2.runs.grid import load_grid, select
from factorized_gpt2.runs.settings import parse_run
from factorized_gpt2.settings.outputs import PublishArguments
from factorized_gpt2.settings.parsing import ManualParser
from factorized_gpt2.settings.text_arguments import EvaluationArguments

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = [README, *(path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "docs").glob("*.md")))]
COMMANDS = [
    line.split("  #")[0].replace("\\\n", " ")
    for page in PAGES
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    words = shlex.split(command)
    if "train_hf.py" in words:
        assert parse_run(words[words.index("train_hf.py") + 1 :]).training.output_dir.startswith("model_weights")
        if "--config_file" in words:
            assert (REPOSITORY / words[words.index("--config_file") + 1]).exists()
    elif "compress.py" in words:
        parts = (CompressArguments, CalibrationArguments, EvaluationArguments, PublishArguments)
        *settings, _ = ManualParser(parts).parse(words[words.index("compress.py") + 1 :])
        check(*settings)
    elif "evaluate_models.py" in words:
        parser = ManualParser((EvaluateArguments, EvaluationArguments))
        assert parser.parse(words[words.index("evaluate_models.py") + 1 :])[0].models
    elif "import_checkpoint.py" in words:
        assert ManualParser(ImportArguments).parse(words[words.index("import_checkpoint.py") + 1 :])[0].output_dir
    elif "run_experiments.py" in words:
        words, _, flags = shlex.join(words[words.index("run_experiments.py") + 1 :]).partition(" -- ")
        arguments, scaling = ManualParser((GridArguments, ScaleArguments)).parse(shlex.split(words))
        check_grid(arguments, scaling.resolve(), shlex.split(flags))
        assert select(load_grid(arguments.grid, scaling.resolve()), arguments.only or ["*"])
    elif "report.py" in words:
        assert ManualParser(ReportArguments).parse(words[words.index("report.py") + 1 :])[0].results
    elif words[:3] == ["python", "-m", "pytest"]:
        assert (REPOSITORY / next(word for word in words if word.endswith(".py"))).exists()
    elif words[0] == "python":
        script = Path(words[1])
        assert (REPOSITORY / script).exists()
        module = importlib.import_module(script.stem)
        ManualParser(getattr(module, f"{script.stem.capitalize()}Arguments")).parse(words[2:])
    elif words[0] == "pip":
        assert words[:2] == ["pip", "install"]
        assert words[2] in (".", ".[all]")
    else:
        assert words[0] == "make"
        assert re.search(rf"^{words[1]}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)


def test_there_are_commands_and_snippets():
    assert len(COMMANDS) >= 12
    assert len(SNIPPETS) >= 2


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_run(snippet, tokenizer, tmp_path, monkeypatch, capsys):
    for folder, rank in (("gpt_pca_lora_k64", 8), ("gpt_baseline", None)):
        model = tiny_model(vocab_size=len(tokenizer), n_embd_wte=rank)
        model.save_pretrained(tmp_path / "model_weights" / folder)
        tokenizer.save_pretrained(tmp_path / "model_weights" / folder)
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(compile(snippet, "README.md", "exec"), namespace)
    if "stock" in namespace:
        ids = torch.arange(2, 12)[None]
        assert (namespace["stock"](ids).logits - namespace["compressed"](ids).logits).abs().max() < 1e-4
    else:
        assert capsys.readouterr().out.startswith("Return a list of")


@pytest.mark.parametrize("path", [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def methods_in(page: str) -> dict[str, list[str]]:
    """Read the rows of a page's tables that begin with a method's name, without that."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    return {name: cells for first, *cells in rows for name in METHODS if first.startswith(f"`{name}`")}


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_tables_say_of_every_method_what_the_list_says(method):
    assert methods_in(README)[method.name][0] == method.summary
    page = (REPOSITORY / "docs" / "factorization.md").read_text(encoding="utf-8").partition("## Derivation")[0]
    needs_text = "yes" if method.needs_text else "no"
    assert methods_in(page)[method.name] == [method.summary, method.source, needs_text, method.by]


def test_readme_is_short():
    assert len(README.splitlines()) <= 130
