"""`compress.py` at budgets of bytes: models whose vocabulary is of integers, their folders, tables and refusals."""

import json
import re

import pytest
import torch
from matplotlib import image
from test_compress_command import baseline, train_words, words  # noqa: F401
from transformers import pipeline

from factorized_gpt2 import FactorizedGPT2
from factorized_gpt2.cli.compress import compress
from factorized_gpt2.cli.compressing import repository_name
from factorized_gpt2.cli.evaluate import evaluate
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.compress.coded import Budget
from factorized_gpt2.compress.methods import CODED, METHODS
from factorized_gpt2.hub.model_card import History, model_card
from factorized_gpt2.models.sizes import stored_bytes
from factorized_gpt2.runs.fields import LORA_TARGETS
from factorized_gpt2.runs.results import Results
from factorized_gpt2.runs.run import run_experiment
from factorized_gpt2.runs.settings import parse_run


def record(folder) -> dict:
    return json.loads((folder / "compression.json").read_text())


def test_a_grid_of_budgets(words, tmp_path, capsys, drawn_pictures):  # noqa: F811
    asked = words("--bits_per_weight", 4, 8, texts=("calibration", "evaluation"))
    compress(asked)
    rows = [line for line in capsys.readouterr().out.splitlines() if "gpt_" in line]
    assert len(rows) == 3
    increases = {row.split()[-1].rpartition("/")[2]: float(row.split()[-2]) for row in rows}
    assert set(increases) == {"gpt_baseline", "gpt_coded_nofinetune_b4", "gpt_coded_nofinetune_b8"}
    assert all(-0.02 < increase < 0.02 for increase in increases.values())  # too small to be in order
    for bits in (4, 8):
        folder = tmp_path / f"gpt_coded_nofinetune_b{bits}"
        written = record(folder)
        assert (written["method"], written["bits_per_weight"], written["largest_rank"]) == ("coded", bits, None)
        assert 0.9 * bits < written["stored_bits_per_weight"] <= bits
        assert "spectrum" not in written
        assert written["calibration"]["tokens"] == 480
        assert FactorizedGPT2.from_pretrained(folder).config.vocabulary_dtype == "int8"
        assert f"{stored_bytes(folder) / 1e6:.3f}" in rows[2 if bits == 4 else 1]
    assert image.imread(tmp_path / "loss_against_bytes_coded.png").std() > 0
    assert not list(tmp_path.glob("spectrum*"))
    path = tmp_path / "gpt_coded_nofinetune_b4/model.safetensors"
    at = path.stat().st_mtime_ns
    compress(asked)
    assert path.stat().st_mtime_ns == at
    with pytest.raises(UserError, match="made with another seed"):
        compress([*asked, "--seed", "1"])


def test_megabytes_with_a_largest_rank(words, tmp_path, capsys):  # noqa: F811
    compress(words("--vocabulary_mb", 0.006, "--ranks", 4, 9))
    capsys.readouterr()
    folders = sorted(tmp_path.glob("gpt_coded_nofinetune_b*"))
    assert len(folders) == 2
    for folder, rank in zip(folders, (4, 9), strict=True):
        written, model = record(folder), FactorizedGPT2.from_pretrained(folder)
        assert written["largest_rank"] == rank
        weights = model.config.vocab_size * model.config.n_embd
        assert written["stored_bits_per_weight"] * weights / 8 <= 6000
        codes = model.scale_down.weight
        assert torch.linalg.matrix_rank(codes) <= rank
        assert folder.name.endswith(f"_k{rank}")


def test_a_loss_in_the_place_of_a_budget(words, tmp_path, capsys):  # noqa: F811
    asked = ("--method", "coded", "--target_loss_increase", 0.05)
    compress(words(*asked, texts=("calibration", "evaluation")))
    printed = capsys.readouterr().out
    tried = [line for line in printed.splitlines() if "nats a token" in line and "bits:" in line]
    assert 2 <= len(tried) <= 9
    (folder,) = tmp_path.glob("gpt_coded_nofinetune_b*")
    assert float(printed.splitlines()[-1].split()[-2]) <= 0.05
    bits = record(folder)["bits_per_weight"]
    smaller = [float(line.split(": ")[1].split()[0]) for line in tried if float(line.split()[0]) < bits]
    assert all(increase > 0.05 for increase in smaller)


def test_refinement_keeps_to_the_budget_and_brings_the_model_nearer(words, tmp_path, capsys, caplog):  # noqa: F811
    caplog.set_level("INFO", "factorized_gpt2")
    compress(words("--bits_per_weight", 2, "--refine", 30))
    folder = tmp_path / "gpt_coded_refined_b2"
    written, model = record(folder), FactorizedGPT2.from_pretrained(folder)
    assert written["refine_steps"] == 30
    assert written["stored_bits_per_weight"] <= 2
    before, after = map(float, re.search(r"falls from (\S+) to (\S+) nats", caplog.text).groups())
    assert after < before
    assert model.config.lm_head_bias
    assert model.lm_head.bias.abs().max() > 0
    again = tmp_path / "again"
    model.save_pretrained(again)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    ids = torch.arange(2, 12)[None]
    floats = model.dequantize()
    assert torch.allclose(floats(ids).logits, model(ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("rest", "complaint"),
    [
        (("--bits_per_weight", 2, "--vocabulary_mb", 1), "needs one of bits_per_weight, vocabulary_mb"),
        (("--method", "coded"), "needs one of bits_per_weight"),
        (("--bits_per_weight", 2, "--method", "joint"), "are for method coded, not for joint"),
        (("--bits_per_weight", 2, "--tie_word_embeddings", "false"), "needs a tied head"),
        (("--bits_per_weight", 2, 2), "a size is given twice in 2.0 2.0"),
        (("--bits_per_weight", 99), "99 bits a weight are out of range"),
        (("--bits_per_weight", 2, "--ranks", 99), "Rank 99 is out of range"),
        (("--bits_per_weight", 0.01), "A vocabulary of 0.01 bits cannot be made"),
    ],
)
def test_what_cannot_be_asked_is_one_line(words, tmp_path, rest, complaint):  # noqa: F811
    with pytest.raises(UserError, match=complaint):
        compress(words(*rest))
    assert not list(tmp_path.glob("gpt_*"))


def test_a_run_adapts_the_trunk_and_floats_on_demand(words, tmp_path, corpus):  # noqa: F811
    compress(words("--bits_per_weight", 6))
    folder = tmp_path / "gpt_coded_nofinetune_b6"
    start = ["--compressed", folder, "--do_train", True, "--max_steps", 4, "--learning_rate", "1e-2"]
    lora = ["--lora_rank", 2, "--lora_target_modules", "q_proj", "scale_up"]

    def run(name, *rest):
        run_experiment(parse_run(train_words(corpus, tmp_path / name, *start, *rest)))
        return FactorizedGPT2.from_pretrained(tmp_path / name), Results.read(tmp_path / name)

    before = FactorizedGPT2.from_pretrained(folder)
    adapted, results = run("adapted", *lora)
    assert (results.family, results.run_name, results.bits_per_weight) == ("coded-lora", "coded-lora-b6-r2", 6)
    assert torch.equal(adapted.transformer.wte.codes, before.transformer.wte.codes)
    assert not torch.equal(adapted.transformer.scale_up.weight, before.transformer.scale_up.weight)
    trained, _ = run("trained")
    assert not torch.equal(trained.transformer.wte.steps, before.transformer.wte.steps)
    run("healed", "--lora_rank", 2, "--lora_target_modules", "all-linear")
    targets = json.loads((tmp_path / "healed/adapter/adapter_config.json").read_text())["target_modules"]
    assert set(targets) == set(LORA_TARGETS) - {"wte"}
    floats, _ = run("floats", *lora, "wte", "--dequantize", True)
    assert not floats.config.is_coded
    for rest, complaint in (
        ((*lora, "wte"), "wte is of integers, which cannot be adapted.*dequantize=true"),
        (("--tie_word_embeddings", False), "vocabulary of integers is tied.*dequantize"),
    ):
        with pytest.raises(UserError, match=complaint):
            run("refused", *rest)
    with pytest.raises(UserError, match="dequantize needs a compressed model"):
        parse_run(train_words(corpus, tmp_path / "x", "--n_embd", 32, "--tokenizer", "x", "--dequantize", True))


def test_other_commands_and_tools_take_it(words, tmp_path, corpus, capsys):  # noqa: F811
    compress(words("--bits_per_weight", 6, "--dtype", "bfloat16"))
    folder = tmp_path / "gpt_coded_nofinetune_b6"
    model = FactorizedGPT2.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.transformer.wte.codes.dtype == torch.int8
    capsys.readouterr()
    evaluate(["--models", str(folder), "--eval_file", str(corpus / "validation.jsonl"), "--block_size", "48"])
    assert folder.name in capsys.readouterr().out
    generate = pipeline("text-generation", model=str(folder))
    assert generate("The ", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("The ")


def test_the_card_says_what_it_is(words, tmp_path):  # noqa: F811
    compress(words("--bits_per_weight", 6))
    folder = tmp_path / "gpt_coded_nofinetune_b6"
    config = FactorizedGPT2.from_pretrained(folder).config
    card = str(model_card("me/small", config, (1, 2), History.read(folder)))
    assert "A GPT-2 with a vocabulary of integers" in card
    assert f"by {METHODS[CODED].summary}" in card


def test_refinement_keeps_to_the_budget_and_helps(words, tmp_path, capsys):  # noqa: F811
    losses = []
    for steps in (0, 30):
        compress(words("--bits_per_weight", 4, "--refine", steps, texts=("calibration", "evaluation")))
        losses.append(float(capsys.readouterr().out.splitlines()[-1].split()[-4]))
    folder = tmp_path / "gpt_coded_refined_b4"
    written = record(folder)
    assert written["refine_steps"] == 30
    assert written["stored_bits_per_weight"] <= 4
    assert losses[1] < losses[0] + 0.02
    assert FactorizedGPT2.from_pretrained(folder).config.lm_head_bias


def test_budgets_need_text(words):  # noqa: F811
    with pytest.raises(UserError, match="method coded learns from text"):
        compress(words("--bits_per_weight", 2, texts=()))


def test_names_of_repositories(tmp_path):
    for name, size in (
        ("gpt_pca_nofinetune_k64", "-k64"),
        ("gpt_joint_refined_k8", "-k8"),
        ("gpt_coded_nofinetune_b1.75", "-b1.75"),
        ("gpt_coded_nofinetune_b1.75_k64", "-b1.75-k64"),
    ):
        assert repository_name("a/b", tmp_path / name, True) == f"a/b{size}"
        assert repository_name("a/b", tmp_path / name, False) == "a/b"


def test_budgets_of_megabytes():
    assert Budget.of_megabytes(6.6, 50257 * 768) == Budget(1.367)
    assert str(Budget(1.75, 64)) == "1.75 bits, k <= 64"
