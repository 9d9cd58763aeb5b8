"""Packages that only some of the work needs: loaded by that work alone, and the rest goes well without them."""

import ast
import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import factorized_gpt2
from factorized_gpt2 import FactorizedGPT2, FactorizedGPT2Config
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.runs import provenance
from factorized_gpt2.text.blocks import load_blocks, token_stream
from factorized_gpt2.text.source import TextSource
from factorized_gpt2.text.token_file import write_token_file
from factorized_gpt2.text.tokenizers import vocabulary_size

PACKAGE = Path(factorized_gpt2.__file__).parent
OPTIONAL = ("datasets", "sklearn", "wandb", "matplotlib", "pandas", "pyarrow")

WITHOUT = """
import importlib.machinery, sys

def find(name, path=None, target=None, whole=importlib.machinery.PathFinder.find_spec):
    return None if name.partition(".")[0] in absent else whole(name, path, target)

importlib.machinery.PathFinder.find_spec = staticmethod(find)
absent = set({packages})
"""

WHOLE_PATH = """
import json
import re
import sys
from pathlib import Path

import factorized_gpt2
from factorized_gpt2 import FactorizedGPT2, FactorizedGPT2Config
from factorized_gpt2.cli.compress import compress
from factorized_gpt2.cli.evaluate import evaluate
from factorized_gpt2.cli.report import report
from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.cli.train import train

text, root = json.loads(sys.argv[1]), Path("models")
baseline, held_out = f"--baseline={root}/gpt_baseline", f"--eval_file={text[1].partition('=')[2]}"
for command, words in (
    (train, ["--config=baseline.json", *text, "--tokenizer=tokenizer", f"--output_dir={root}/gpt_baseline"]),
    (train, ["--config=lora.json", *text, baseline, f"--output_dir={root}/gpt_pca_lora_k4"]),
    (compress, [baseline, "--ranks=5", f"--output_dir={root}", held_out]),
    (evaluate, [f"--models={root}/gpt_pca_lora_k4", held_out]),
):
    assert run_command(command, words) == 0, words
absent.remove("matplotlib")
assert "matplotlib" not in sys.modules
assert run_command(report, [f"--results={root}"]) == 0
assert run_command(train, ["--config=baseline.json", "--train_file=text.txt", *text[1:], "--tokenizer=tokenizer",
                           "--output_dir=other"]) == 2
"""

COMMON = {
    **{"do_train": True, "max_steps": 4, "block_size": 16, "per_device_train_batch_size": 4, "report_to": ["none"]},
    **{"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "use_cpu": True},
    **{"load_best_model_at_end": True, "learning_rate": 1e-2, "logging_steps": 1, "max_eval_samples": 8},
    "document_start": "^ = [^=]",  # which the protocol's configs have for its text
}
CONFIGS = {
    "baseline": COMMON | {"n_layer": 1, "n_head": 2, "n_embd": 16, "run_name": "baseline"},
    "lora": COMMON | {"n_embd_wte": 4, "lora_rank": 2, "run_name": "pca-lora-k4"},
}


def python(code: str, *words: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


def loaded_at_import(tree: ast.Module) -> set[str]:
    """Name the packages that a module imports when it is imported itself."""
    names = set()
    for statement in tree.body:  # not those in functions, nor for type checkers alone
        if isinstance(statement, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and not statement.level:
            names.add(statement.module.partition(".")[0])
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("**/*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_imports_them_with_itself(path):
    assert loaded_at_import(ast.parse(path.read_text(encoding="utf-8"))).isdisjoint(OPTIONAL)


def test_the_package_alone_loads_none_of_them(tmp_path):
    code = f"import sys, factorized_gpt2; print([name for name in {OPTIONAL} if name in sys.modules])"
    assert python(code, folder=tmp_path).stdout.splitlines()[-1] == "[]"


def test_token_files_are_trained_on_without_them(corpus, tokenizer, tmp_path):
    (tmp_path / "tokenizer").symlink_to(corpus / "tokenizer")
    (tmp_path / "text.txt").write_text("words " * 99)
    for name, config in CONFIGS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    for name in ("train", "validation"):
        source = TextSource(files=(str(corpus / f"{name}.jsonl"),))
        write_token_file(tmp_path / f"{name}.bin", token_stream(source, tokenizer), vocabulary_size(tokenizer))
    code = WITHOUT.format(packages=["datasets", "wandb", "pandas", "pyarrow", "matplotlib"]) + WHOLE_PATH
    words = json.dumps([f"--{name}_file={name}.bin" for name in ("train", "validation")])
    finished = python(code, words, folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "No plots were made, because the package matplotlib is not installed." in finished.stderr
    assert "error: Text is read with the package datasets" in finished.stderr.splitlines()[-1]
    assert not (tmp_path / "other").exists()
    root = tmp_path / "models"
    for name in ("gpt_baseline", "gpt_pca_lora_k4"):
        results = json.loads((root / name / "results.json").read_text())
        assert results["training_curve"][-1][1] < results["training_curve"][0][1]
    assert (root / "gpt_pca_lora_k4/adapter/adapter_model.safetensors").exists()
    assert (root / "gpt_pca_nofinetune_k5/config.json").exists()
    assert (root / "report/report.md").exists()


def test_text_without_datasets_is_one_line(corpus, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match=r"read with the package datasets, which files of token ids \(\.bin\) do not need"
    ):
        load_blocks(TextSource(files=(str(corpus / "train.jsonl"),)), tokenizer, 16, keep_tail=True)


def test_versions_are_of_what_is_installed(monkeypatch):
    def without_datasets(name: str) -> str:
        if name == "datasets":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(provenance, "version", without_datasets)
    found = provenance.versions()
    assert "datasets" not in found
    assert found["torch"] == version("torch")


COMPRESS = """
from factorized_gpt2.cli.compress import compress
from factorized_gpt2.cli.shell import run_command

sys.exit(run_command(compress, ['--baseline', 'models', '--ranks', '4'] + more))
"""


def test_a_command_that_needs_what_is_not_there_says_which_extra_brings_it(tmp_path):
    code = WITHOUT.format(packages=["sklearn"]) + "more = []" + COMPRESS
    model = FactorizedGPT2(FactorizedGPT2Config(vocab_size=19, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path / "models")
    done = python(code, folder=tmp_path)
    assert done.returncode == 2, done.stderr
    expected = "This needs the package sklearn.*pip install 'factorized-gpt2\\[compress\\]'"
    assert re.search(expected, done.stderr.splitlines()[-1]), done.stderr


def test_compressing_and_refining_do_without_what_training_needs(corpus, tokenizer, tmp_path):
    more = [
        "--refine",
        "1",
        "--calibration_file",
        str(corpus / "train.jsonl"),
        "--tokenizer",
        str(corpus / "tokenizer"),
    ]
    shape = {"n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = FactorizedGPT2(FactorizedGPT2Config(vocab_size=vocabulary_size(tokenizer), **shape))
    model.save_pretrained(tmp_path / "models")
    done = python(f"{WITHOUT.format(packages=['peft', 'accelerate'])}more = {more}{COMPRESS}", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model_weights/gpt_pca_refined_k4/model.safetensors").is_file()
