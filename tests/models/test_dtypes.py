"""`--dtype`: what is saved and measured in half precision, beside what it is rounded from."""

import json

import pytest
import torch
from conftest import tiny_model
from old_networks import NANO, OldNet, checkpoint

from factorized_gpt2 import FactorizedGPT2
from factorized_gpt2.cli.compress import compress
from factorized_gpt2.cli.evaluate import evaluate
from factorized_gpt2.cli.import_checkpoint import import_checkpoint
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.models.dtypes import in_dtype
from factorized_gpt2.models.loading import load_compressed

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Relative rounding of a weight is at most 2^-9 or 2^-12; a loss, in which many roundings meet, is far less wrong.
TOLERANCE = {"bfloat16": 2**-8, "float16": 2**-11}


@pytest.fixture(scope="module")
def baseline(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("dtypes") / "baseline"
    tiny_model(n_embd_wte=None, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_of(command, tmp_path, *words) -> list[dict]:
    command([*map(str, words), "--json", str(tmp_path / "result.json")])
    return json.loads((tmp_path / "result.json").read_text())["rows"]


@pytest.mark.parametrize("dtype", HALVES)
def test_a_compressed_model_is_saved_and_measured_in_the_type(baseline, corpus, tmp_path, dtype):
    words = ["--baseline", baseline, "--ranks", 5, "--eval_file", corpus / "validation.jsonl", "--output_dir"]
    plain = rows_of(compress, tmp_path, *words, tmp_path / "plain")
    half = rows_of(compress, tmp_path, *words, tmp_path / "half", "--dtype", dtype)
    assert [row["dtype"] for row in plain + half] == ["float32", "float32", "float32", dtype]
    assert half[0] == plain[0]  # the baseline is as it is
    assert half[1]["bytes"] * 2 == plain[1]["bytes"]
    assert half[1]["parameters"] == plain[1]["parameters"]
    assert 0 < abs(half[1]["loss"] - plain[1]["loss"]) < TOLERANCE[dtype] * plain[1]["loss"]
    first, second = (load_compressed(str(tmp_path / name / "gpt_pca_nofinetune_k5")) for name in ("plain", "half"))
    for name, weight in second.state_dict().items():
        assert weight.dtype == HALVES[dtype]
        assert torch.equal(weight, first.state_dict()[name].to(HALVES[dtype]))  # rounded once, at the end
    again = rows_of(evaluate, tmp_path, "--models", tmp_path / "half/gpt_pca_nofinetune_k5", *words[4:6])
    assert again[0]["loss"] == half[1]["loss"]


def test_a_folder_in_another_type_is_another_model(baseline, tmp_path):
    words = [str(word) for word in ("--baseline", baseline, "--ranks", 5, "--output_dir", tmp_path)]
    compress(words)
    compress([*words, "--dtype", "float32"])  # which the baseline is
    with pytest.raises(UserError, match="made with another dtype"):
        compress([*words, "--dtype", "bfloat16"])
    compress([*words, "--dtype", "bfloat16", "--overwrite"])
    assert load_compressed(str(tmp_path / "gpt_pca_nofinetune_k5")).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", HALVES)
def test_models_are_measured_in_the_type(baseline, corpus, tmp_path, dtype):
    words = ["--models", baseline, "--eval_file", corpus / "validation.jsonl", "--bits_per_byte"]
    (plain,) = rows_of(evaluate, tmp_path, *words)
    (half,) = rows_of(evaluate, tmp_path, *words, "--dtype", dtype)
    assert (plain["dtype"], half["dtype"]) == ("float32", dtype)
    assert half["bytes"] * 2 == plain["bytes"]
    for figure in ("loss", "bits_per_byte"):
        assert 0 < abs(half[figure] - plain[figure]) < TOLERANCE[dtype] * plain[figure]


def test_a_checkpoint_is_imported_in_the_type(tmp_path):
    net = OldNet(NANO)
    path = checkpoint(net, NANO, tmp_path / "ckpt.pt")
    words = ["--checkpoint", str(path), "--output_dir"]
    import_checkpoint([*words, str(tmp_path / "plain")])
    import_checkpoint([*words, str(tmp_path / "half"), "--dtype", "bfloat16"])
    plain, half = (FactorizedGPT2.from_pretrained(tmp_path / name).state_dict() for name in ("plain", "half"))
    assert all(torch.equal(half[name], weight.bfloat16()) for name, weight in plain.items())


def test_what_a_type_cannot_hold_is_refused():
    model = tiny_model()
    with torch.no_grad():
        model.transformer.wte.weight[0, 0] = 1e5
    with pytest.raises(UserError, match=r"'transformer.wte.weight' is too large for dtype float16; use bfloat16"):
        in_dtype(model, "float16")
    assert model.dtype == torch.float32
    assert in_dtype(model, None) is model
    assert in_dtype(model, "bfloat16").dtype == torch.bfloat16


def test_an_unknown_type_is_one_line(baseline):
    with pytest.raises(UserError, match="--dtype: invalid choice: 'int8'"):
        compress(["--baseline", str(baseline), "--ranks", "4", "--dtype", "int8"])
