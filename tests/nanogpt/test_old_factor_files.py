"""Factor files of nanoGPT's factorized descendant, in either orientation, in and out."""

import itertools

import numpy as np
import pytest
import torch
from conftest import RANK, VOCAB_SIZE, WIDTH, tiny_config, tiny_model
from old_networks import DESCENDANT, NANO, OldNet, assert_same_logits, checkpoint, one_line
from torch import nn

from factorized_gpt2 import FactorizedGPT2, factorize, from_gpt2
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.compress.factor_files import write_factors
from factorized_gpt2.models.conversion import fingerprint, vocabulary_matrices
from factorized_gpt2.models.loading import Baseline
from factorized_gpt2.nanogpt.checkpoints import from_old_weights, load_old_checkpoint
from factorized_gpt2.nanogpt.factor_files import old_factors, write_old_factors


@pytest.mark.parametrize(("up_as_exported", "down_as_exported"), list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("factorized", [True, False], ids=["factorized", "whole"])
def test_factors_from_files(up_as_exported, down_as_exported, factorized, ids, tmp_path):
    """Files as the descendant writes them, (d, k), and as it reads them, (k, d)."""
    rank, rows = 9, VOCAB_SIZE - 3
    rng = np.random.default_rng(0)
    wte, up, down = (rng.normal(size=size, scale=0.3) for size in ((rows, rank), (rank, WIDTH), (rank, WIDTH)))
    np.save(tmp_path / "wte.npy", wte.astype(np.float32))
    np.savez(tmp_path / "import.npz", scale_up=up.astype(np.float32), scale_down=down.astype(np.float32))
    scales = {"scale_up": up.T if up_as_exported else up, "scale_down": down.T if down_as_exported else down}
    np.savez(tmp_path / "scales.npz", **scales)
    source = DESCENDANT if factorized else NANO
    path = checkpoint(torch.compile(OldNet(source)), source, tmp_path / "ckpt.pt")
    model = load_old_checkpoint(path, wte_npy=tmp_path / "wte.npy", scale_npz=tmp_path / "scales.npz")
    assert model.config.vocab_size == rows

    trunk = OldNet(source).state_dict()
    net = OldNet(source | {"n_embd_wte": rank, "n_embd_wte_scale_tying": False})
    own = ("wte", "scale_", "lm_head")
    net.load_state_dict({name: trunk[name] for name in trunk if not any(map(name.count, own))}, strict=False)
    net.import_factors(tmp_path / "wte.npy", tmp_path / "import.npz")
    assert_same_logits(model, net, ids % rows)


def test_one_file_alone(ids, tmp_path):
    net, options = OldNet(DESCENDANT | {"wte_weight_tying": False}), DESCENDANT | {"wte_weight_tying": False}
    path = checkpoint(net, options, tmp_path / "ckpt.pt")
    np.save(tmp_path / "wte.npy", np.random.default_rng(0).normal(size=(VOCAB_SIZE, RANK)).astype(np.float32))
    scale = net.transformer.scale_up.weight.detach().numpy()
    np.savez(tmp_path / "scales.npz", scale_up=-scale, scale_down=-scale)
    net.import_factors(tmp_path / "wte.npy")
    model = load_old_checkpoint(path, wte_npy=tmp_path / "wte.npy")
    assert_same_logits(model, net, ids)
    assert model.config.tie_word_embeddings
    model = load_old_checkpoint(path, scale_npz=tmp_path / "scales.npz")
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.scale_down.weight, torch.from_numpy(-scale.T))

    whole = OldNet(NANO)
    path = checkpoint(whole, NANO, tmp_path / "whole.pt")
    np.save(tmp_path / "whole.npy", np.random.default_rng(0).normal(size=(VOCAB_SIZE, WIDTH)).astype(np.float32))
    whole.import_factors(tmp_path / "whole.npy")
    model = load_old_checkpoint(path, wte_npy=tmp_path / "whole.npy")
    assert_same_logits(model, whole, ids)
    assert not model.config.is_factorized
    with pytest.raises(UserError, match=r"wte\.npy has width 12, but the checkpoint has 32: give the scale matrices"):
        load_old_checkpoint(tmp_path / "whole.pt", wte_npy=tmp_path / "wte.npy")
    with pytest.raises(UserError, match=r"ckpt\.pt.*scales\.npz has no effect without wte_npy"):
        load_old_checkpoint(checkpoint(OldNet(NANO), NANO, tmp_path / "ckpt.pt"), scale_npz=tmp_path / "scales.npz")


def test_an_imported_embedding_is_tied_whatever_is_said(ids):
    options = DESCENDANT | {"wte_weight_tying": False, "import_wte_npy": "some.npy"}
    assert from_old_weights(OldNet(DESCENDANT).state_dict(), options).config.tie_word_embeddings


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_protocols_own_factor_files(tied, ids, tmp_path):
    options = NANO | {"wte_weight_tying": tied}
    path = checkpoint(OldNet(options), options, tmp_path / "ckpt.pt")
    baseline = load_old_checkpoint(path)
    matrix, head = vocabulary_matrices(baseline)
    factors = factorize(matrix, RANK, head)
    write_factors(tmp_path, factors, Baseline(baseline, "x", fingerprint(baseline)))
    files = {"wte_npy": tmp_path / f"wte_pca_k{RANK}.npy", "scale_npz": tmp_path / f"scale_mats_pca_k{RANK}.npz"}
    loaded, expected = load_old_checkpoint(path, **files), from_gpt2(baseline, factors)
    assert loaded.config.to_diff_dict() == expected.config.to_diff_dict()
    assert torch.equal(loaded(ids).logits, expected(ids).logits)


def test_factors_with_a_head_of_their_own_untie_an_imported_embedding(tmp_path):
    options = NANO | {"import_wte_npy": "some.npy"}
    path = checkpoint(OldNet(NANO), options, tmp_path / "ckpt.pt")
    baseline = load_old_checkpoint(path)
    matrix, _ = vocabulary_matrices(baseline)
    factors = factorize(matrix, RANK, -matrix)
    write_factors(tmp_path, factors, Baseline(baseline, "x", fingerprint(baseline)))
    files = {"wte_npy": tmp_path / f"wte_pca_k{RANK}.npy", "scale_npz": tmp_path / f"scale_mats_pca_k{RANK}.npz"}
    model = load_old_checkpoint(path, **files)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, torch.from_numpy(factors.lm_head.T))


@pytest.mark.parametrize("mean", [False, True], ids=["no mean", "mean"])
def test_factors_go_back(mean, ids, tmp_path):
    options = DESCENDANT | {"n_embd_wte_scale_tying": False}
    net = OldNet(options)
    path = checkpoint(net, options, tmp_path / "ckpt.pt")
    model = load_old_checkpoint(path)
    if mean:
        model = tiny_bias(model)
    files = {"wte_npy": tmp_path / "new" / "wte.npy", "scale_npz": tmp_path / "new" / "scales.npz"}
    flags = write_old_factors(model, **files)
    assert flags["n_embd_wte"] == RANK + mean
    assert flags["n_embd_wte_scale_tying"] is False
    other = OldNet(options | {"n_embd_wte": RANK + mean})
    weights = net.state_dict()
    other.load_state_dict(
        {name: weights[name] for name in weights if "wpe" in name or ".h." in name or "ln" in name}, False
    )
    other.import_factors(flags["import_wte_npy"], flags["import_scale_matrices_npz"])
    assert_same_logits(model, other, ids)
    again = load_old_checkpoint(path, **files)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    if not mean:
        for name, weight in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], weight), name


def tiny_bias(model: FactorizedGPT2) -> FactorizedGPT2:
    """Give a model a bias after `scale_up`."""
    config = type(model.config)(**(model.config.to_dict() | {"scale_up_bias": True}))
    biased = FactorizedGPT2(config).eval()
    missing, unexpected = biased.load_state_dict(model.state_dict(), strict=False)
    assert (missing, unexpected) == (["transformer.scale_up.bias"], [])
    nn.init.normal_(biased.transformer.scale_up.bias)
    return biased


def test_factors_of_a_decomposition_go_back():
    matrix = np.random.default_rng(0).normal(size=(VOCAB_SIZE, WIDTH))
    factors = factorize(matrix, RANK)
    arrays = old_factors(factors)
    expected = factors.wte @ factors.scale_up + factors.mean
    np.testing.assert_allclose(arrays["wte"] @ arrays["scale_up"], expected, atol=1e-5)
    hidden_states = np.random.default_rng(1).normal(size=(5, WIDTH)).astype(np.float32)
    np.testing.assert_allclose(
        hidden_states @ arrays["scale_down"].T @ arrays["wte"].T,
        hidden_states @ factors.scale_down @ factors.wte.T,
        atol=1e-5,
    )
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: tiny_model(n_embd_wte=None), "not factorized"),
        (lambda: FactorizedGPT2(tiny_config(vocabulary_dtype="int8")), "an integer vocabulary"),
        (lambda: tiny_model(tie_word_embeddings=False), "lm_head"),
        (lambda: factorize(np.eye(9), 3, np.eye(9)), "lm_head"),
    ],
)
def test_what_cannot_go_back(source, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write_old_factors(source(), tmp_path / "wte.npy", tmp_path / "scales.npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wte", "scales", "message"),
    [
        (np.ones((VOCAB_SIZE, RANK), dtype=int), None, "not a float type"),
        (np.ones(VOCAB_SIZE), None, r"one matrix \(V, k\)"),
        (np.ones((VOCAB_SIZE, RANK + 1)), None, r"scale_up\.weight' has shape"),
        (np.full((VOCAB_SIZE, RANK), np.nan), None, "wte.weight' contains NaN"),
        (None, {"scale_up": np.ones((RANK, WIDTH))}, "no 'scale_down'"),
        (None, {"scale_up": np.ones((RANK, WIDTH)), "scale_down": np.ones((RANK, 3))}, r"scale_down in .*\(12, 3\)"),
        (None, dict.fromkeys(("scale_up", "scale_down", "scale_left"), np.ones((RANK, WIDTH))), "'scale_left'"),
    ],
)
def test_bad_factor_files_are_named(wte, scales, message, tmp_path):
    path, files = checkpoint(OldNet(DESCENDANT), DESCENDANT, tmp_path / "ckpt.pt"), {}
    if wte is not None:
        np.save(tmp_path / "wte.npy", wte)
        files["wte_npy"] = tmp_path / "wte.npy"
    if scales is not None:
        np.savez(tmp_path / "scales.npz", **scales)
        files["scale_npz"] = tmp_path / "scales.npz"
    with pytest.raises(UserError, match=message) as error:
        load_old_checkpoint(path, **files)
    one_line(error)
