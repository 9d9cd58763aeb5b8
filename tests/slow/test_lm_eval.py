"""The Language Model Evaluation Harness, as its users start it, on a saved folder; and what we measure beside it."""

import json
import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import DOCUMENTS, tiny_model

from factorized_gpt2.text.bits_per_byte import measure_bits_per_byte
from factorized_gpt2.text.source import TextSource
from factorized_gpt2.text.tokenizers import load_tokenizer

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")

# Of 48 positions, these fill less than one window, none, several, and several with a rest.
TEXTS = [DOCUMENTS[0], "", "\n\n", " ".join(DOCUMENTS[:9]), "x", "Der Bär  saß im Gras. " * 20, DOCUMENTS[1] + "\n"]

TASK = {
    "task": "held_out",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": name} for name in ("bits_per_byte", "byte_perplexity", "word_perplexity")],
}


def test_its_command_measures_a_saved_folder_as_we_do(tokenizer, tmp_path):
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = tmp_path / "held_out.jsonl"
    text.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    task = TASK | {"dataset_kwargs": {"data_files": {"test": str(text)}}}
    (tmp_path / "tasks/held_out.yaml").write_text(json.dumps(task), encoding="utf-8")  # all JSON is YAML
    # The folder brings the code of the network: the package must not be needed.
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent/factorized_gpt2.py").write_text("raise ImportError('imported after all')\n")
    words = ["--model", "hf", "--model_args", "pretrained=model,trust_remote_code=True", "--tasks", "held_out"]
    words += ["--include_path", "tasks", "--output_path", "out", "--device", "cpu", "--batch_size", "3"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(tmp_path / "absent")}
    finished = subprocess.run(
        [sys.executable, "-m", "lm_eval", *words],
        cwd=tmp_path,
        env=os.environ | offline,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(results.read_text(encoding="utf-8"))["results"]["held_out"]

    model = tiny_model(vocab_size=len(tokenizer))
    source = TextSource(files=(str(text),))
    ours = measure_bits_per_byte(model, source, load_tokenizer(str(tmp_path / "model")), 48, batch_size=4)
    assert theirs["bits_per_byte,none"] == pytest.approx(ours, abs=1e-4)
    assert theirs["byte_perplexity,none"] == pytest.approx(2**ours, rel=1e-4)
    bits = ours * sum(len(text.encode()) for text in TEXTS)
    words = sum(len(re.split(r"\s+", text)) for text in TEXTS)  # as the harness counts them
    assert math.log2(theirs["word_perplexity,none"]) == pytest.approx(bits / words, rel=1e-4)
