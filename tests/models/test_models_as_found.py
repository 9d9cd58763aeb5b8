"""Models as people have them: other names, other heads, other precision than their config says; files not fetched."""

import json
import logging
import re

import pytest
import torch
from conftest import VOCAB_SIZE, perturb, random_ids, tiny_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2DoubleHeadsModel, GPT2ForSequenceClassification, GPT2LMHeadModel

from factorized_gpt2 import FactorizedGPT2, from_gpt2, to_gpt2
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.common.fingerprints import weights_fingerprint
from factorized_gpt2.models import loading as baseline
from factorized_gpt2.models.conversion import fingerprint, vocabulary_matrices
from factorized_gpt2.models.loading import load_baseline, load_causal_lm, load_complete
from factorized_gpt2.models.weight_names import plain_name, wrapped_name

SIZES = {"vocab_size": VOCAB_SIZE, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 548118077\n"


def stock(folder, model_class=GPT2LMHeadModel, **options):
    """Save a small GPT-2, and return it."""
    config = GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0, pad_token_id=1, **options)
    model = perturb(model_class(config)).eval()
    model.save_pretrained(folder)
    return model


def rewrite(folder, change) -> None:
    weights = {name: weight.clone() for name, weight in change(load_file(folder / "model.safetensors")).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value is not ...})
    )


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(random_ids()).logits


def with_own_head(weights):
    return weights | {"lm_head.weight": weights["transformer.wte.weight"].flip(0)}


@pytest.mark.parametrize("load", [load_complete, load_causal_lm, lambda name: load_baseline(name).model])
def test_a_head_of_its_own_is_kept_whatever_the_config_says(load, tmp_path, caplog):
    stock(tmp_path)
    rewrite(tmp_path, with_own_head)
    head = load_file(tmp_path / "model.safetensors")["lm_head.weight"]
    model = load(str(tmp_path))
    assert torch.equal(model.lm_head.weight, head)
    assert not model.config.tie_word_embeddings
    assert [record.levelno for record in caplog.records if "has a separate head" in record.message] == [
        logging.WARNING
    ]


@pytest.mark.parametrize("options", [{}, {"n_embd_wte": None}])
def test_so_is_that_of_a_model_of_this_package(options, tmp_path):
    tiny_model(**options).save_pretrained(tmp_path)
    rewrite(tmp_path, with_own_head)
    model = load_complete(str(tmp_path))
    model.save_pretrained(tmp_path / "again")
    again = FactorizedGPT2.from_pretrained(tmp_path / "again")
    assert torch.equal(again.lm_head.weight, load_file(tmp_path / "model.safetensors")["lm_head.weight"])
    assert torch.equal(logits(again), logits(model))


def test_no_conversion_drops_it():
    gpt2 = perturb(GPT2LMHeadModel(GPT2Config(**SIZES))).eval()
    gpt2.lm_head.weight = torch.nn.Parameter(gpt2.transformer.wte.weight.detach().flip(0))
    model = from_gpt2(gpt2)
    torch.testing.assert_close(logits(model), logits(gpt2), atol=1e-4, rtol=1e-4)
    assert vocabulary_matrices(gpt2)[1] is not None
    assert fingerprint(gpt2) == fingerprint(model)
    model.config.tie_word_embeddings = True
    assert torch.equal(to_gpt2(model).lm_head.weight, gpt2.lm_head.weight)


def test_a_copy_of_the_embedding_is_no_head_of_its_own(tmp_path, caplog):
    stock(tmp_path)
    rewrite(tmp_path, lambda weights: weights | {"lm_head.weight": weights["transformer.wte.weight"]})
    assert load_baseline(str(tmp_path)).model.config.tie_word_embeddings
    assert not caplog.records


def test_the_masks_that_older_versions_saved(tmp_path, caplog):
    model = stock(tmp_path)
    masks = {f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
    masks |= {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 48, 48).tril() for layer in range(2)}
    rewrite(tmp_path, lambda weights: weights | masks)
    assert torch.equal(logits(load_complete(str(tmp_path))), logits(model))
    assert not caplog.records


@pytest.mark.parametrize("name", ["transformer.h.0.mlp.bias", "transformer.h.0.crossattention.masked_bias"])
def test_what_only_looks_like_them_is_refused(name, tmp_path):
    stock(tmp_path)
    rewrite(tmp_path, lambda weights: weights | {name: torch.tensor(-1e4)})
    with pytest.raises(UserError, match=f"unexpected {name}"):
        load_complete(str(tmp_path))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_value_head_is_left_out_and_named(prefix, tmp_path, caplog):
    model = stock(tmp_path)
    head = {"v_head.summary.weight": torch.zeros(1, 32), "v_head.summary.bias": torch.zeros(1)}
    rewrite(tmp_path, lambda weights: {prefix + name: weight for name, weight in (weights | head).items()})
    assert torch.equal(logits(load_complete(str(tmp_path))), logits(model))
    assert "is ignored: " in caplog.text
    assert "v_head.summary.weight" in caplog.text


def test_a_head_for_multiple_choice_is_left_out(tmp_path, caplog):
    stock(tmp_path, GPT2DoubleHeadsModel)
    load_baseline(str(tmp_path))
    assert "multiple_choice_head" in caplog.text


def test_a_classifier_is_no_language_model(tmp_path):
    stock(tmp_path, GPT2ForSequenceClassification)
    with pytest.raises(UserError, match=r"unexpected score\.weight"):
        load_baseline(str(tmp_path))


@pytest.mark.parametrize(
    ("stored", "named", "loaded"),
    [
        (torch.float32, "float16", torch.float32),
        (torch.float16, "bfloat16", torch.float16),
        (torch.bfloat16, "bfloat16", torch.bfloat16),
        (torch.float16, "float32", torch.float32),  # which rounds nothing
        (torch.float16, None, torch.float16),
    ],
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_no_weight_is_rounded_because_a_config_says_so(stored, named, loaded, key, tmp_path, caplog):
    stock(tmp_path)
    rewrite(tmp_path, lambda weights: {name: weight.to(stored) for name, weight in weights.items()})
    configure(tmp_path, **{"dtype": ..., key: named or ...})
    model = load_complete(str(tmp_path))
    assert {weight.dtype for weight in model.parameters()} == {loaded}
    assert model.config.dtype == loaded
    wte = load_file(tmp_path / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(model.transformer.wte.weight, wte.to(loaded))
    is_told = named is not None and loaded != getattr(torch, named)
    assert is_told == (f"although its config says {named}" in caplog.text)


@pytest.mark.parametrize("half", ["transformer.wte.weight", "transformer.ln_f.bias", "transformer.h.0.ln_1.bias"])
def test_of_several_precisions_the_widest_is_taken(half, tmp_path):
    stock(tmp_path)
    rewrite(tmp_path, lambda weights: weights | {half: weights[half].half()})
    model, weights = load_complete(str(tmp_path)), load_file(tmp_path / "model.safetensors")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, weights[name].float()), name


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("module._orig_mod.transformer.h.0.ln_1.weight", "transformer.h.0.ln_1.weight"),
        ("_orig_mod.module.lm_head.weight", "lm_head.weight"),
        ("model.lm_head.weight", "lm_head.weight"),
        ("model.transformer.wte.weight", "transformer.wte.weight"),
        ("transformer._orig_mod.h.1._orig_mod.mlp.c_fc.bias", "transformer.h.1.mlp.c_fc.bias"),
        ("transformer.model.module.wpe.weight", "transformer.wpe.weight"),
        ("transformer.lm_head.weight", "lm_head.weight"),
        ("h.0._checkpoint_wrapped_module.attn.c_attn.weight", "transformer.h.0.attn.c_attn.weight"),
        ("transformer.strange.weight", "transformer.strange.weight"),
        ("module.v_head.summary.bias", "v_head.summary.bias"),
        ("model", "model"),
    ],
)
def test_names_without_wrappers(name, plain):
    assert plain_name(name) == plain
    assert re.match(wrapped_name(plain), name)
    assert not re.match(wrapped_name(plain), name + "s")
    assert plain_name(plain) == plain


wrappers = pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"model.{name}",
        lambda name: name.removeprefix("transformer."),
        lambda name: f"module.{name.removeprefix('transformer.')}",
        lambda name: name.replace(".h.0.", ".h.0._orig_mod."),
    ],
)


@wrappers
def test_a_wrapped_model_is_the_model(wrapped, tmp_path):
    model = stock(tmp_path, tie_word_embeddings=False)
    rewrite(tmp_path, lambda weights: {wrapped(name): weight for name, weight in weights.items()})
    assert torch.equal(logits(load_complete(str(tmp_path))), logits(model))
    assert torch.equal(logits(load_causal_lm(str(tmp_path))), logits(model))


@wrappers
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False}, {"n_embd_wte": None}])
@pytest.mark.parametrize("load", [load_complete, load_causal_lm])
def test_so_is_a_wrapped_model_of_this_package_and_what_is_saved_of_it(wrapped, options, load, tmp_path):
    model = tiny_model(**options)
    model.save_pretrained(tmp_path / "wrapped")
    rewrite(tmp_path / "wrapped", lambda weights: {wrapped(name): weight for name, weight in weights.items()})
    loaded = load(str(tmp_path / "wrapped"))
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "plain")
    again, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "plain"))
    assert again.keys() == plain.keys()


@pytest.mark.parametrize("make", [stock, lambda folder: tiny_model().save_pretrained(folder)])
def test_a_wrapped_model_whose_tied_head_was_saved_too(make, tmp_path):
    """As of `DistributedDataParallel`'s own state dict."""
    make(tmp_path)
    expected = load_complete(str(tmp_path))
    copies = {f"module.{name}": weight for name, weight in expected.state_dict().items()}
    torch.save(copies, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    loaded = load_complete(str(tmp_path))
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(logits(loaded), logits(expected))


def test_one_weight_under_two_names_is_refused(tmp_path):
    stock(tmp_path)
    rewrite(tmp_path, lambda weights: weights | {"module.transformer.wpe.weight": torch.zeros(48, 32)})
    with pytest.raises(UserError, match=r"module\.transformer\.wpe\.weight"):
        load_complete(str(tmp_path))


def test_a_pickle_of_weights_is_identified_by_what_it_holds(tmp_path):
    model = stock(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    before = weights_fingerprint(str(tmp_path))
    assert before is not None
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] += 1
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert weights_fingerprint(str(tmp_path)) != before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_a_file_that_git_lfs_did_not_fetch(name, tmp_path):
    stock(tmp_path)
    if name == "pytorch_model.bin":
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(UserError, match=f"{name} is only a pointer of Git LFS.* `git lfs pull`"):
        load_baseline(str(tmp_path))


def test_a_file_that_is_not_read_need_not_be_fetched(tmp_path):
    stock(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text(POINTER)
    load_baseline(str(tmp_path))


@pytest.mark.parametrize(("cause", "told"), [(None, True), (ConnectionError(), False)])
def test_the_hub_is_asked_for_an_adapter_if_it_answers(cause, told, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("me/lora does not appear to have a file named config.json.") from cause

    monkeypatch.setattr(baseline.AutoConfig, "from_pretrained", fail)
    monkeypatch.setattr(baseline, "find_adapter_config_file", lambda name: "adapter_config.json")
    monkeypatch.setattr(baseline, "refuse_missing", lambda name: None)
    with pytest.raises(UserError, match="is an adapter" if told else "does not appear to have"):
        load_causal_lm("me/lora")


def test_an_adapter_is_told_from_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an adapter, not a model"):
        load_causal_lm(str(tmp_path))
