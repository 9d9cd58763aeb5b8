"""Checkpoints of nanoGPT and its factorized descendant: the same logits, nothing executed, every key accounted for."""

import argparse
import itertools
import pickle

import numpy as np
import pytest
import torch
from conftest import RANK, VOCAB_SIZE, WIDTH
from old_networks import DESCENDANT, NANO, Hostile, OldNet, assert_same_logits, checkpoint, one_line

from factorized_gpt2.common.errors import UserError
from factorized_gpt2.models.loading import load_compressed
from factorized_gpt2.nanogpt.checkpoints import from_old_weights, load_old_checkpoint


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain"])
def test_nanogpt(bias, mask, compiled, ids, tmp_path):
    options = NANO | {"bias": bias}
    net = OldNet(options, mask)
    path = checkpoint(torch.compile(net) if compiled else net, options, tmp_path / "ckpt.pt")
    model = load_old_checkpoint(path)
    assert_same_logits(model, net, ids)
    assert not model.config.is_factorized
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"model.{name}",
        lambda name: name.replace(".h.0.", ".h.0._orig_mod."),
    ],
)
def test_names_of_a_wrapped_network(wrapped, ids):
    net = OldNet(DESCENDANT)
    weights = {wrapped(name): weight for name, weight in net.state_dict().items()}
    assert_same_logits(from_old_weights(weights, DESCENDANT), net, ids)


def test_what_runs_of_2024_save_beside_the_weights(ids, tmp_path):
    options = DESCENDANT | {"shared_mlp_grouping": 1, "softmax_variant": "softmax", "num_of_points": 8}
    net = OldNet(options)
    more = {"nan": None, "nan_iter_num": None, "config": argparse.Namespace(max_iters=3), "a_thing_that_is_off": None}
    assert_same_logits(load_old_checkpoint(checkpoint(net, options, tmp_path / "ckpt.pt", **more)), net, ids)


def test_settings_can_hide_nothing(tmp_path):
    more = {"config": argparse.Namespace(lr=Hostile(tmp_path / "touched"))}
    path = checkpoint(OldNet(NANO), NANO, tmp_path / "ckpt.pt", **more)
    with pytest.raises(UserError, match="more than weights and plain values"):
        load_old_checkpoint(path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(("asked", "taken"), [(None, "gelu"), ("gelu", "gelu"), ("gelu_new", "gelu_new")])
def test_which_gelu(asked, taken, tmp_path, caplog):
    caplog.set_level("INFO", "factorized_gpt2")
    path = checkpoint(OldNet(NANO), NANO, tmp_path / "ckpt.pt")
    model = load_old_checkpoint(path, activation_function=asked)
    assert model.config.activation_function == taken
    assert ("does not say which GELU" in caplog.text) == (asked is None)


def test_a_checkpoint_that_names_its_activation(tmp_path, caplog):
    caplog.set_level("INFO", "factorized_gpt2")
    path = checkpoint(OldNet(DESCENDANT), DESCENDANT, tmp_path / "ckpt.pt")
    assert load_old_checkpoint(path, activation_function="gelu").config.activation_function == "gelu"
    load_old_checkpoint(path)
    assert "GELU" not in caplog.text
    with pytest.raises(UserError, match="gelu_new contradicts the checkpoint's own activation_variant='gelu'"):
        load_old_checkpoint(path, activation_function="gelu_new")


@pytest.mark.parametrize("name", ["ckpt.pt", "wte.npy", "scales.npz"])
def test_a_file_that_git_lfs_did_not_fetch(name, tmp_path):
    files = {"wte_npy": tmp_path / "wte.npy", "scale_npz": tmp_path / "scales.npz"}
    np.save(files["wte_npy"], np.ones((VOCAB_SIZE, RANK), np.float32))
    path = checkpoint(OldNet(NANO), NANO, tmp_path / "ckpt.pt")
    (tmp_path / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n")
    with pytest.raises(UserError, match=f"{name} is only a pointer of Git LFS"):
        load_old_checkpoint(path, **files)


@pytest.mark.parametrize("norms", [("ln_1", "ln_2"), ("pre_ln_attn", "pre_ln_mlp")])
@pytest.mark.parametrize(("tied", "scales_tied", "bias"), list(itertools.product([True, False], repeat=3)))
def test_factorized_descendant(tied, scales_tied, bias, norms, ids, tmp_path):
    options = DESCENDANT | {"wte_weight_tying": tied, "n_embd_wte_scale_tying": scales_tied, "bias": bias}
    net = OldNet(options, norms=norms, offsets=(0.0, 0.0))
    more = {"scheduler": None, "best_iter": 5}
    model = load_old_checkpoint(checkpoint(net, options, tmp_path / "ckpt.pt", **more))
    assert_same_logits(model, net, ids)
    assert (model.config.n_embd_wte, model.config.scale_up_bias) == (RANK, False)
    assert model.config.tie_word_embeddings is tied
    assert (model.lm_head.weight is model.transformer.wte.weight) is tied


@pytest.mark.parametrize(
    "changes",
    [
        {"n_embd_wte": None},
        {"n_embd_wte": None, "wte_weight_tying": False},
        {"mlp_size": 40},
        {"mlp_expansion_factor": 2},
        {"bias": False, "mlp_up_bias": True},
        {"mlp_down_bias": False},
        {"n_kv_group": 4},
        *({"activation_variant": name} for name in ("relu", "squared_relu", "silu", "tanh")),
    ],
    ids=str,
)
def test_options_that_are_carried_over(changes, ids):
    options = DESCENDANT | changes
    net = OldNet(options, offsets=(0.3, -0.2))
    assert_same_logits(from_old_weights(net.state_dict(), options), net, ids)


def test_the_config(tmp_path):
    model = from_old_weights(OldNet(NANO).state_dict(), NANO)
    config = model.config
    assert (config.n_positions, config.vocab_size, config.n_layer, config.n_head) == (48, VOCAB_SIZE, 2, 4)
    assert (config.activation_function, config.layer_norm_epsilon, config.n_inner) == ("gelu", 1e-5, None)
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.1, 0.1, 0.1)
    assert config.bos_token_id is config.eos_token_id is None  # GPT-2's is beyond this vocabulary
    assert not model.training
    large = NANO | {"vocab_size": 50304, "n_layer": 1}
    model = from_old_weights(OldNet(large).state_dict(), large)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 50256
    assert model.transformer.wte.weight.shape == (50304, WIDTH)


def test_the_model_is_like_any_other(ids, tmp_path):
    options = DESCENDANT | {"wte_weight_tying": False}
    net = OldNet(options)
    weights = {name: weight.clone() for name, weight in net.state_dict().items()}
    model = from_old_weights(net.state_dict(), options)
    model.save_pretrained(tmp_path)
    assert_same_logits(load_compressed(str(tmp_path)), net, ids)
    model.train()(ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter += 1.0
    for name, weight in net.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    half = from_old_weights({name: weight.bfloat16() for name, weight in weights.items()}, options)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("how", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
@pytest.mark.parametrize("where", ["model", "config"])
def test_a_hostile_pickle_does_nothing(how, where, tmp_path):
    content = {"model": OldNet(NANO).state_dict(), "model_args": NANO, where: Hostile(tmp_path / "touched")}
    how(content, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="more than weights and plain values") as error:
        load_old_checkpoint(tmp_path / "ckpt.pt")
    assert "save its 'model' and 'model_args' alone" in one_line(error)
    assert not (tmp_path / "touched").exists()
    for name, complaint in (("wte_npy", "cannot be read"), ("scale_npz", "cannot be read as .npz")):
        np.save(tmp_path / "hostile.npy", np.array([[Hostile(tmp_path / "touched")]], dtype=object))
        path = checkpoint(OldNet(DESCENDANT), DESCENDANT, tmp_path / "good.pt")
        with pytest.raises(UserError, match=complaint) as error:
            load_old_checkpoint(path, **{name: tmp_path / "hostile.npy"})
        one_line(error)
        assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"config": range(3)}, "range"),
        ({"nan": True, "nan_iter_num": 7}, "its loss had become NaN"),
        ({"best_val_loss": np.float64(3.0)}, "numpy"),
        ({"ema": {}}, "holds 'ema'"),
        ({"model": None}, "no 'model'"),
        ({"model_args": None}, "no 'model_args'"),
        ([1, 2], "is a list"),
        (b"junk", "cannot be read"),
        (b"", "cannot be read"),
        (None, "cannot be read as a checkpoint: .*No such file"),
    ],
    ids=str,
)
def test_files_that_are_no_checkpoints(content, message, tmp_path):
    path = tmp_path / "ckpt.pt"
    if isinstance(content, dict):
        checkpoint(OldNet(NANO), NANO, path, **content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=message) as error:
        load_old_checkpoint(path)
    assert "ckpt.pt" in one_line(error)


def test_a_cut_off_file(tmp_path):
    path = checkpoint(OldNet(NANO), NANO, tmp_path / "ckpt.pt")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="cannot be read as a checkpoint") as error:
        load_old_checkpoint(path)
    one_line(error)


BLOCK = "transformer.h.1"
NEW_WEIGHTS = {
    "missing": ({f"{BLOCK}.attn.c_attn_k.weight": None}, f"'{BLOCK}.attn.c_attn_k.weight' is missing"),
    "missing bias": ({f"{BLOCK}.mlp.c_proj.bias": None}, f"'{BLOCK}.mlp.c_proj.bias' is missing"),
    "missing scale": ({"transformer.scale_up.weight": None}, "'transformer.scale_up.weight' is missing"),
    "missing head": ({"lm_head.weight": None}, "'lm_head.weight' is missing"),
    "unknown": ({f"{BLOCK}.attn.rotary": torch.zeros(2)}, f"Unknown weights: '{BLOCK}.attn.rotary'"),
    "one layer more": (
        {"transformer.h.2.ln_1.weight": torch.ones(WIDTH)},
        r"Unknown weights.*transformer\.h\.2\.ln_1",
    ),
    "misshapen": ({f"{BLOCK}.ln_2.weight": torch.ones(3)}, r"ln_2\.weight' has shape \(3,\), its options say \(32,\)"),
    "transposed": ({f"{BLOCK}.mlp.c_fc.weight": torch.ones(WIDTH, 4 * WIDTH)}, r"c_fc\.weight' has shape"),
    "scale the wrong way round": (
        {"transformer.scale_down.weight": torch.ones(RANK, WIDTH)},
        "scale_down.* has shape",
    ),
    "NaN": ({"transformer.wpe.weight": torch.full((48, WIDTH), torch.nan)}, "'transformer.wpe.weight' contains NaN"),
    "infinity": ({"transformer.ln_f.bias": torch.full((WIDTH,), torch.inf)}, "'transformer.ln_f.bias' contains NaN"),
    "too large": (
        {"transformer.ln_f.bias": torch.full((WIDTH,), 1e300, dtype=torch.float64)},
        "contains NaN or infinity",
    ),
    "whole numbers": ({"transformer.ln_f.bias": torch.ones(WIDTH, dtype=torch.long)}, "not a dense tensor of floats"),
    "sparse": ({"transformer.ln_f.bias": torch.ones(WIDTH).to_sparse()}, "not a dense tensor of floats"),
    "no tensor": ({"transformer.ln_f.bias": [1.0] * WIDTH}, "not a dense tensor of floats"),
    "twice": ({"_orig_mod.lm_head.weight": torch.ones(VOCAB_SIZE, RANK)}, "'lm_head.weight' is there twice"),
    "no tie": ({"lm_head.weight": torch.ones(VOCAB_SIZE, RANK)}, r"lm_head.* options say that they are tied"),
    "no tie of scales": (
        {"transformer.scale_up.weight": torch.ones(WIDTH, RANK)},
        r"scale_down.* options say that they are tied",
    ),
    "no mask": ({f"{BLOCK}.attn.bias": torch.ones(1, 1, 48, 48)}, rf"Unknown weights.*{BLOCK}\.attn\.bias"),
    "offset": ({f"{BLOCK}.mlp.activation_x_offset": torch.zeros(3)}, "activation_x_offset' has shape"),
}


@pytest.mark.parametrize(("new", "message"), NEW_WEIGHTS.values(), ids=NEW_WEIGHTS)
def test_bad_weights_are_named(new, message, tmp_path):
    weights = dict(OldNet(DESCENDANT).state_dict()) | new
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    torch.save({"model": weights, "model_args": DESCENDANT}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=message) as error:
        load_old_checkpoint(tmp_path / "ckpt.pt")
    assert "ckpt.pt" in one_line(error)


def test_biases_without_bias_are_refused():
    with pytest.raises(UserError, match=r"Unknown weights.*'transformer\.h\.0\.attn\.c_attn\.bias'.* and \d+ more"):
        from_old_weights(OldNet(NANO).state_dict(), NANO | {"bias": False})


NEW_OPTIONS = [
    *({name: True} for name in ("use_rotary_embeddings", "use_moe", "use_post_ln", "use_peri_ln", "use_parallel_mlp")),
    *({name: True} for name in ("use_qk_norm", "use_qk_norm_scale", "gate", "use_embedding_scale", "multicontext")),
    *({name: True} for name in ("use_fire_embeddings", "use_lsv", "use_flash_lobo", "quantize_wte", "a_new_thing")),
    *({name: False} for name in ("use_abs_pos_embeddings", "use_pre_ln")),
    *({name: "rmsnorm"} for name in ("norm_variant_attn", "norm_variant_output")),
    *({name: "softermax"} for name in ("softmax_variant_attn", "softmax_variant_output")),
    *({"activation_variant": name} for name in ("gelu_shifted", ["gelu"])),
    *({name: 30.0} for name in ("attn_logit_softcapping", "final_logit_softcapping")),
    *({"attention_variant": "mla"}, {"mlp_variant": "swiglu"}, {"linear_variant_q": "bitlinear"}, {"window_size": 8}),
    *({"mlp_down_projs": 2}, {"n_lpe": 1}, {"n_kv_group": 2}, {"mlp_size_layerlist": [8, 9]}, {"n_embd_wte": WIDTH}),
    *({"apply_vector_at_layer_idx": 1}, {"n_layer": 0}, {"n_head": True}, {"n_head": 5}, {"vocab_size": None}),
    *({"block_size": 4.0}, {"dropout": 1.5}, {"dropout": "0"}, {"bias": "yes"}, {"n_embd": torch.ones(2)}),
    *({"a\nb": "c\nd" * 99}, {3: 4}),
]


@pytest.mark.parametrize("new", NEW_OPTIONS, ids=str)
def test_options_that_cannot_be_honoured_are_named(new):
    with pytest.raises(UserError) as error:
        from_old_weights(OldNet(DESCENDANT).state_dict(), DESCENDANT | new)
    ((name, _),) = new.items()
    assert repr(name)[1:-1] in one_line(error)


def test_a_missing_option_is_named():
    with pytest.raises(UserError, match="'block_size' is missing"):
        from_old_weights(OldNet(NANO).state_dict(), {name: NANO[name] for name in NANO if name != "block_size"})
