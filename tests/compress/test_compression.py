"""Baseline folders to factor files and compressed models, as `compress.py` makes them."""

import copy
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import random_ids, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from factorized_gpt2 import FactorizedGPT2, to_gpt2
from factorized_gpt2.cli.compress import compress
from factorized_gpt2.cli.evaluate import evaluate
from factorized_gpt2.common import files
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.compress.factor_files import factors_folder, pca_factors, read_factors
from factorized_gpt2.models.loading import load_baseline
from factorized_gpt2.text.demo_corpus import train_tokenizer

WIDTH = 24


@pytest.fixture(scope="module")
def stock_folder(tmp_path_factory, tokenizer):
    """Save a stock GPT-2 whose weights are far from their initialisation."""
    folder = tmp_path_factory.mktemp("stock")
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def arguments(baseline, output_dir, *rest) -> list[str]:
    return ["--baseline", str(baseline), "--output_dir", str(output_dir), *map(str, rest)]


def best_affine_error(weight: np.ndarray, rank: int) -> float:
    """Relative error of the best rank-k affine fit, from numpy's own SVD."""
    singular = np.linalg.svd(weight - weight.mean(0), compute_uv=False)
    return float(np.sqrt((singular[rank:] ** 2).sum()) / np.linalg.norm(weight))


def test_factor_files_are_the_protocols(stock_folder, tmp_path):
    compress(arguments(stock_folder, tmp_path, "--ranks", 4, 8))
    weight = GPT2LMHeadModel.from_pretrained(stock_folder).transformer.wte.weight.detach().double().numpy()
    for rank in (4, 8):
        wte = np.load(tmp_path / f"pca_factorized/wte_pca_k{rank}.npy", allow_pickle=False)
        scales = np.load(tmp_path / f"pca_factorized/scale_mats_pca_k{rank}.npz", allow_pickle=False)
        assert wte.shape == (len(weight), rank)
        assert scales["scale_up"].shape == (rank, WIDTH)
        assert scales["scale_down"].shape == (WIDTH, rank)
        error = np.linalg.norm(wte @ scales["scale_up"] + scales["mean"] - weight) / np.linalg.norm(weight)
        assert error == pytest.approx(best_affine_error(weight, rank), abs=1e-5)


def test_folders_load_and_agree_through_the_head(stock_folder, tmp_path, tokenizer):
    compress(arguments(stock_folder, tmp_path, "--ranks", WIDTH - 1, 6))
    ids = random_ids()
    expected = GPT2LMHeadModel.from_pretrained(stock_folder).eval()
    for rank in (WIDTH - 1, 6):
        folder = tmp_path / f"gpt_pca_nofinetune_k{rank}"
        model = FactorizedGPT2.from_pretrained(folder).eval()
        assert model.config.n_embd_wte == rank
        assert model.config.tie_word_embeddings
        assert (folder / "tokenizer.json").exists()
        # The same network computed with the approximation expanded by hand, mean included, head tied to it.
        scales = np.load(tmp_path / f"pca_factorized/scale_mats_pca_k{rank}.npz")
        wte = np.load(tmp_path / f"pca_factorized/wte_pca_k{rank}.npy")
        approximation = torch.from_numpy(wte @ scales["scale_up"] + scales["mean"])
        expected.transformer.wte.weight.data.copy_(approximation)
        with torch.no_grad():
            difference = model(ids).logits - expected(ids).logits
        assert (difference - difference.mean(-1, keepdim=True)).abs().max() < 1e-4
        expected = GPT2LMHeadModel.from_pretrained(stock_folder).eval()


def test_the_table(stock_folder, tmp_path, corpus, capsys):
    evaluate = ("--eval_file", corpus / "validation.jsonl", "--eval_batch_size", 2)
    compress(arguments(stock_folder, tmp_path, "--ranks", 2, 12, *evaluate))
    head, titles, _, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("Validation loss in nats a token, over")
    assert titles.split() == (
        [
            "k",
            "variance",
            "parameters",
            "vocabulary",
            "dtype",
            "MB",
            "vocabulary",
            "MB",
            "size",
            "loss",
            "perplexity",
            "increase",
            "folder",
        ]
    )
    assert [row.split()[0] for row in rows] == ["-", "12", "2"]
    losses = [float(row.split()[-4]) for row in rows]
    model = FactorizedGPT2.from_pretrained(tmp_path / "gpt_pca_nofinetune_k2")
    assert f"{model.num_parameters():,}" in rows[-1]
    assert all(loss > 0 for loss in losses)


def test_evaluation_of_saved_models_gives_the_same_numbers(stock_folder, tmp_path, corpus, capsys):
    text = ["--eval_file", str(corpus / "validation.jsonl")]
    compress(arguments(stock_folder, tmp_path, "--ranks", 5, *text, "--eval_batch_size", 1))
    from_compress = [row.split()[-4] for row in capsys.readouterr().out.splitlines()[3:]]
    evaluate(["--models", str(stock_folder), str(tmp_path / "gpt_pca_nofinetune_k5"), *text])
    from_evaluate = [row.split()[0] for row in capsys.readouterr().out.splitlines()[2:]]
    assert from_compress == from_evaluate


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "No text to evaluate on"),
        (["--eval_file", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--eval_file", "nowhere.txt", "--block_size", "33"], "between 2 and the model's 32 positions, got 33"),
    ],
)
def test_bad_evaluations(stock_folder, words, complaint):
    with pytest.raises(UserError, match=complaint):
        evaluate(["--models", str(stock_folder), *words])


def test_an_unfactorized_model_of_ours_is_a_baseline_too(stock_folder, tmp_path):
    ours = load_baseline(str(stock_folder))
    ours.model.save_pretrained(tmp_path / "ours")
    assert load_baseline(str(tmp_path / "ours")).fingerprint == ours.fingerprint


def test_an_untied_baseline_gets_an_untied_model(tmp_path, tokenizer):
    model = to_gpt2(tiny_model(tie_word_embeddings=False, n_embd_wte=None, vocab_size=len(tokenizer)))
    model.save_pretrained(tmp_path / "untied")
    compress(arguments(tmp_path / "untied", tmp_path, "--ranks", 8, "--tokenizer", _saved(tokenizer, tmp_path)))
    compressed = FactorizedGPT2.from_pretrained(tmp_path / "gpt_pca_nofinetune_k8")
    assert not compressed.config.tie_word_embeddings
    assert not torch.equal(compressed.lm_head.weight, compressed.transformer.wte.weight)


def _saved(tokenizer, folder) -> str:
    tokenizer.save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")


def test_factor_files_are_reused_by_their_fingerprint(stock_folder, tmp_path):
    baseline = load_baseline(str(stock_folder))
    made = pca_factors(baseline, [4], tmp_path)[4]
    path = tmp_path / "pca_factorized/wte_pca_k4.npy"
    written = path.stat().st_mtime_ns
    again = pca_factors(baseline, [4, 6], tmp_path)
    assert path.stat().st_mtime_ns == written
    assert np.array_equal(again[4].wte, made.wte)
    assert again[4].explained_share == made.explained_share


@pytest.fixture
def other_folder(stock_folder, tmp_path):
    model = GPT2LMHeadModel.from_pretrained(stock_folder)
    model.transformer.wte.weight.data[3, 3] += 1
    model.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_factors_of_another_baseline_are_refused_unless_overwritten(stock_folder, other_folder, tmp_path):
    tokenizer = ("--tokenizer", stock_folder)
    compress(arguments(stock_folder, tmp_path, "--ranks", 4))
    with pytest.raises(UserError, match=r"was not made from .*; remove or overwrite it"):
        compress(arguments(other_folder, tmp_path, "--ranks", 4, *tokenizer))
    shutil.rmtree(tmp_path / "gpt_pca_nofinetune_k4")
    with pytest.raises(UserError, match="belong to another baseline; remove or overwrite them"):
        compress(arguments(other_folder, tmp_path, "--ranks", 4, *tokenizer))
    compress(arguments(other_folder, tmp_path, "--ranks", 4, "--overwrite", *tokenizer))
    record = json.loads((tmp_path / "gpt_pca_nofinetune_k4/compression.json").read_text())
    assert record["baseline_fingerprint"] == load_baseline(str(other_folder)).fingerprint
    assert not list(tmp_path.glob(".*"))


def test_a_file_of_factors_from_elsewhere_is_no_pair_with_the_other(stock_folder, other_folder, tmp_path):
    one, other = (load_baseline(str(folder)) for folder in (stock_folder, other_folder))
    pca_factors(one, [4], tmp_path)
    pca_factors(other, [4], tmp_path / "elsewhere")
    shutil.copy(factors_folder(tmp_path / "elsewhere") / "wte_pca_k4.npy", factors_folder(tmp_path))
    with pytest.raises(UserError, match=r"cannot be read \(wte_pca_k4.npy is of another factorization\)"):
        pca_factors(one, [4], tmp_path)
    path = factors_folder(tmp_path / "elsewhere") / "scale_mats_pca_k4.npz"
    with np.load(path) as arrays:
        of_an_earlier_version = {name: array for name, array in arrays.items() if name != "wte_fingerprint"}
    np.savez(path, **of_an_earlier_version)
    assert read_factors(factors_folder(tmp_path / "elsewhere"), 4, other) is not None


def test_a_compressed_model_whose_weights_were_changed_is_not_taken_for_what_was_made(stock_folder, tmp_path):
    asked = arguments(stock_folder, tmp_path, "--ranks", 4)
    compress(asked)
    folder = tmp_path / "gpt_pca_nofinetune_k4"
    model = FactorizedGPT2.from_pretrained(folder)
    model.scale_down.weight.data += 1
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="k4 has other weights than it was made with; remove or overwrite it"):
        compress(asked)
    compress([*asked, "--overwrite"])
    compress(asked)


def test_factor_files_of_two_baselines_never_count_as_a_pair(stock_folder, other_folder, tmp_path, monkeypatch):
    one, other = (load_baseline(str(folder)) for folder in (stock_folder, other_folder))
    pca_factors(one, [4], tmp_path)
    replace = os.replace

    def replace_and_die(source, to):
        replace(source, to)
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", replace_and_die)
    with pytest.raises(KeyboardInterrupt):
        pca_factors(other, [4], tmp_path, overwrite=True)
    monkeypatch.undo()
    assert read_factors(factors_folder(tmp_path), 4, one) is None
    made = pca_factors(one, [4], tmp_path)[4]
    assert np.array_equal(made.wte, pca_factors(one, [4], tmp_path / "fresh")[4].wte)


def test_damaged_factor_files_are_refused(stock_folder, tmp_path):
    baseline = load_baseline(str(stock_folder))
    pca_factors(baseline, [4], tmp_path)
    path = tmp_path / "pca_factorized/scale_mats_pca_k4.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"rank 4 .* cannot be read"):
        pca_factors(baseline, [4], tmp_path)


def test_a_folder_of_something_else_is_left_alone(stock_folder, tmp_path):
    (tmp_path / "gpt_pca_nofinetune_k4").mkdir()
    (tmp_path / "gpt_pca_nofinetune_k4/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something else than a compressed model; remove it"):
        compress(arguments(stock_folder, tmp_path, "--ranks", 4, "--overwrite"))
    assert (tmp_path / "gpt_pca_nofinetune_k4/thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("ranks", "complaint"),
    [
        (["0"], "ranks must be at least 1, got 0"),
        (["-3"], "ranks must be at least 1, got -3"),
        ([str(WIDTH)], f"Rank {WIDTH} is out of range.*between 1 and {WIDTH - 1}"),
        (["4", "4"], "a rank is given twice"),
        (["four"], "ranks.*invalid int value: 'four'"),
    ],
)
def test_bad_ranks(stock_folder, tmp_path, ranks, complaint):
    with pytest.raises(UserError, match=complaint):
        compress(arguments(stock_folder, tmp_path / "out", "--ranks", *ranks))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path, stock_folder):
    to_gpt2(tiny_model(n_embd_wte=None, vocab_size=200)).save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match=r"The tokenizer has \d+ tokens, the model only 200"):
        compress(arguments(tmp_path / "small", tmp_path / "out", "--ranks", 4, "--tokenizer", stock_folder))
    assert not (tmp_path / "out").exists()


def _break(folder, stock_folder, kind: str) -> None:
    model = GPT2LMHeadModel.from_pretrained(stock_folder)
    if kind == "NaN":
        model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = float("nan")
    model.save_pretrained(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    content = json.loads(config.read_text())
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "layers":
        content["n_layer"] = 3
    elif kind == "architecture":
        content = {"model_type": "bert"}
    elif kind == "factorized":
        tiny_model().save_pretrained(folder)
        return
    elif kind == "no config":
        config.unlink()
        return
    config.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("NaN", "'transformer.h.1.mlp.mlp_up.weight'.*NaN|'transformer.h.1.mlp.c_fc.weight'.*NaN"),
        ("truncated", "cannot be read"),
        ("layers", "missing.*transformer.h.2"),
        (
            "architecture",
            "is a 'bert' model; a baseline is a GPT-2 or another causal decoder",
        ),
        ("factorized", "is factorized already"),
        ("no config", "No model can be loaded"),
    ],
)
def test_bad_baselines(stock_folder, tmp_path, kind, complaint):
    _break(tmp_path / "broken", stock_folder, kind)
    with pytest.raises(UserError, match=complaint) as caught:
        load_baseline(str(tmp_path / "broken"))
    assert "\n" not in str(caught.value)


def test_a_compressed_model_is_reloaded_before_it_is_kept(stock_folder, tmp_path, monkeypatch):
    save = FactorizedGPT2.save_pretrained

    def save_something_else(model, folder, **options):
        changed = copy.deepcopy(model)
        changed.scale_down.weight.data[1, 2] += 0.01
        save(changed, folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(FactorizedGPT2, "save_pretrained", save_something_else)
        with pytest.raises(
            RuntimeError, match=r"saved for .*gpt_pca_nofinetune_k4 does not equal the model in memory"
        ):
            compress(arguments(stock_folder, tmp_path, "--ranks", 4))
    assert not list(tmp_path.glob("gpt_*"))
    compress(arguments(stock_folder, tmp_path, "--ranks", 4))


def test_a_compressed_model_that_overflows_is_not_kept(stock_folder, tmp_path):
    model = GPT2LMHeadModel.from_pretrained(stock_folder)
    model.transformer.ln_f.weight.data.fill_(3e38)
    model.save_pretrained(tmp_path / "large")
    with pytest.raises(UserError, match=r"gpt_pca_nofinetune_k4 computes NaN or infinity and was not saved"):
        compress(arguments(tmp_path / "large", tmp_path, "--ranks", 4, "--tokenizer", stock_folder))
    assert not list(tmp_path.glob("gpt_*"))


def test_a_model_of_a_baseline_whose_config_or_tokenizer_changed_is_not_reused(stock_folder, tmp_path, tokenizer):
    baseline, words = tmp_path / "baseline", ("--ranks", 6)
    shutil.copytree(stock_folder, baseline)
    tokenizer.save_pretrained(baseline)
    folder = tmp_path / "out/gpt_pca_nofinetune_k6"
    compress(arguments(baseline, tmp_path / "out", *words))
    before = (folder / "config.json").read_bytes()
    config = json.loads((baseline / "config.json").read_text())
    (baseline / "config.json").write_text(json.dumps(config | {"activation_function": "relu"}))
    with pytest.raises(UserError, match="was made with another config; remove or overwrite it"):
        compress(arguments(baseline, tmp_path / "out", *words))
    assert (folder / "config.json").read_bytes() == before
    (baseline / "config.json").write_text(json.dumps(config))
    train_tokenizer(["other words"], 280).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="was made with another tokenizer"):
        compress(arguments(baseline, tmp_path / "out", *words, "--tokenizer", tmp_path / "other"))


def test_a_record_of_an_earlier_version_is_reused_with_a_word(stock_folder, tmp_path, caplog):
    compress(arguments(stock_folder, tmp_path, "--ranks", 6))
    path = tmp_path / "gpt_pca_nofinetune_k6/compression.json"
    record = json.loads(path.read_text())
    del record["config_fingerprint"], record["tokenizer_fingerprint"]
    path.write_text(json.dumps(record))
    compress(arguments(stock_folder, tmp_path, "--ranks", 6))
    assert "does not say of which config and tokenizer it was made" in caplog.text


def test_a_damaged_record_of_another_rank_ends_nothing(stock_folder, tmp_path):
    compress(arguments(stock_folder, tmp_path, "--ranks", 4))
    (tmp_path / "gpt_pca_nofinetune_k4/compression.json").write_text("{")
    compress(arguments(stock_folder, tmp_path, "--ranks", 8))
    assert (tmp_path / "gpt_pca_nofinetune_k8/model.safetensors").is_file()
