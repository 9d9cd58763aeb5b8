"""What commands answer before they work: `--help` and refusals, without the seconds that torch takes to import."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from factorized_gpt2.settings import command_names

ASK = """
import json, sys, time
sys.argv = ["/usr/bin/factorized-gpt2-train"]
from factorized_gpt2.cli import compress, demo, evaluate, experiments, import_checkpoint, report, train
answers = []
for module, words in json.loads(sys.stdin.read()):
    sys.argv[1:] = words
    try:
        globals()[module].main()
    except SystemExit as ended:
        answers.append(ended.code)
print(json.dumps([answers, [name for name in ("torch", "datasets", "matplotlib") if name in sys.modules],
    time.process_time()]))
"""
HELP = [
    [name, ["--help"]]
    for name in ("compress", "demo", "evaluate", "experiments", "import_checkpoint", "report", "train")
]
REFUSED = [
    ["compress", ["--baseline", "b", "--rankz", "4"]],
    ["compress", ["--baseline", "b", "--ranks", "0"]],
    ["evaluate", ["--models", "m", "--eval_fil", "x"]],
    ["import_checkpoint", ["--checkpoint", "c", "--output_dir", "o", "--tokeniser", "x"]],
    ["report", ["--result", "x"]],
    ["experiments", ["--onlly", "x"]],
    ["experiments", ["--", "--max_stepz", "3"]],
    ["train", ["--config", "baseline", "--max_stepz", "3"]],
    ["train", ["--config", "baseline", "--lora_rank", "4", "--print_config"]],
    ["train", ["--config", "no_such_config"]],
]


def test_commands_answer_without_importing_torch():
    asked = subprocess.run(
        [sys.executable, "-c", ASK], input=json.dumps(HELP + REFUSED), capture_output=True, text=True, check=True
    )
    codes, imported, seconds = json.loads(asked.stdout.splitlines()[-1])
    assert codes == [0] * len(HELP) + [2] * len(REFUSED)
    assert len(asked.stderr.splitlines()) == len(REFUSED)
    assert imported == []
    assert seconds < 3  # all of them together


def test_the_package_imported_by_others_registers_its_classes(tmp_path):
    (tmp_path / "compress.py").write_text(
        "import factorized_gpt2\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "config = AutoConfig.for_model('factorized_gpt2', n_layer=1, n_head=1, n_embd=4, vocab_size=8, n_embd_wte=2)\n"
        "print(type(AutoModelForCausalLM.from_config(config)) is factorized_gpt2.FactorizedGPT2)\n"
    )
    words = [sys.executable, str(tmp_path / "compress.py")]  # called as one of the commands, and none of them
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "True\n"


CHECKOUT = Path(command_names.__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/opt/bin/factorized-gpt2-compress"], True),
        ([str(CHECKOUT / "train_hf.py"), "--help"], True),
        (["-m", "factorized_gpt2.cli.train"], True),
        (["-m", "factorized_gpt2"], True),
        (["-m", "factorized_gpt2_extras"], False),
        (["-m", "pytest", "factorized_gpt2.cli.train"], False),
        (["/elsewhere/train_hf.py"], False),
        ([str(CHECKOUT / "benchmark.py")], False),
        (["-c"], False),
        ([""], False),
        ([], False),
    ],
)
def test_a_process_knows_whether_it_is_a_command(monkeypatch, words, expected):
    monkeypatch.setattr(sys, "argv", words[:1])
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, *words])
    assert command_names.runs_a_command() is expected
