"""The network as transformers sees it: its parts, its initialisation, its files, its embeddings."""

import copy
import json
import pickle

import pytest
import torch
from conftest import RANK, VARIANTS, VOCAB_SIZE, WIDTH, random_ids, tiny_config, tiny_model
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from factorized_gpt2 import FactorizedGPT2, FactorizedGPT2Config, FactorizedGPT2Model

LORA_TARGETS = {"wte", "scale_up", "scale_down", "q_proj", "k_proj", "v_proj", "c_proj", "mlp_up", "mlp_down"}


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


def stored_names(folder) -> list[str]:
    names = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    return names


@pytest.mark.parametrize(
    ("name", "kind", "shape"),
    [
        ("transformer.wte", nn.Embedding, (VOCAB_SIZE, RANK)),
        ("transformer.wpe", nn.Embedding, (48, WIDTH)),
        ("transformer.scale_up", nn.Linear, (WIDTH, RANK)),
        ("scale_down", nn.Linear, (RANK, WIDTH)),
        ("lm_head", nn.Linear, (VOCAB_SIZE, RANK)),
        ("transformer.h.1.attn.q_proj", nn.Linear, (WIDTH, WIDTH)),
        ("transformer.h.1.attn.k_proj", nn.Linear, (WIDTH, WIDTH)),
        ("transformer.h.1.attn.v_proj", nn.Linear, (WIDTH, WIDTH)),
        ("transformer.h.1.attn.c_proj", nn.Linear, (WIDTH, WIDTH)),
        ("transformer.h.1.mlp.mlp_up", nn.Linear, (4 * WIDTH, WIDTH)),
        ("transformer.h.1.mlp.mlp_down", nn.Linear, (WIDTH, 4 * WIDTH)),
    ],
)
def test_module_is_where_and_what_adapters_expect(name, kind, shape):
    module = tiny_model().get_submodule(name)
    assert type(module) is kind
    assert tuple(module.weight.shape) == shape


def test_every_matrix_is_a_lora_target_or_one_of_the_two_that_are_not():
    model = tiny_model()
    matrices = {name.rsplit(".")[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    assert matrices == LORA_TARGETS | {"wpe", "lm_head"}


def test_only_the_intended_linears_carry_a_bias():
    without = {name for name, m in tiny_model().named_modules() if isinstance(m, nn.Linear) and m.bias is None}
    assert without == {"scale_down", "lm_head"}
    assert tiny_model(scale_up_bias=False).transformer.scale_up.bias is None


def test_unfactorized_model_has_no_scales():
    model = tiny_model(n_embd_wte=WIDTH)
    assert model.transformer.scale_up is None
    assert model.scale_down is None
    assert model.transformer.wte.weight.shape == (VOCAB_SIZE, WIDTH)


@pytest.mark.parametrize("n_inner", [None, 17])
def test_parameter_count_is_what_the_shapes_say(variant, n_inner):
    model = tiny_model(**variant, n_inner=n_inner)
    inner, width, rank = n_inner or 4 * WIDTH, WIDTH, variant["n_embd_wte"]
    block = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    expected = 48 * width + 2 * block + 2 * width + VOCAB_SIZE * (rank or width)
    expected += 2 * rank * width + width if rank else 0
    expected += 0 if model.config.tie_word_embeddings else VOCAB_SIZE * (rank or width)
    assert model.num_parameters() == sum(p.numel() for p in model.parameters()) == expected


def test_head_shares_storage_with_wte_exactly_when_tied(model):
    shared = model.lm_head.weight is model.transformer.wte.weight
    assert shared is model.config.tie_word_embeddings


def test_initialisation_scheme(variant):
    config = tiny_config(**variant, initializer_range=0.05, n_layer=8)
    model = FactorizedGPT2(config)
    residual = 0.05 / 4  # 1 / sqrt(2 * 8 layers)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            expected = residual if name.endswith(("c_proj.weight", "mlp_down.weight")) else 0.05
            if name.endswith(("scale_up.weight", "scale_down.weight")):
                expected = RANK**-0.5  # so that products with wte and the head keep a spread of 0.05
            # The standard deviation of n draws is known to within 1 / sqrt(2 n) of itself; five times that is never.
            tolerance = 5 * expected / (2 * parameter.numel()) ** 0.5
            assert parameter.std().item() == pytest.approx(expected, abs=tolerance), name
            assert abs(parameter.mean().item()) < 5 * expected / parameter.numel() ** 0.5, name
        elif "ln_" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        else:
            assert (parameter == 0).all(), name


def test_save_and_load_keeps_every_bit(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, report = FactorizedGPT2.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    test_head_shares_storage_with_wte_exactly_when_tied(loaded)


def test_sharded_save_and_load(model, ids, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(stored_names(tmp_path))
    assert torch.equal(logits_of(FactorizedGPT2.from_pretrained(tmp_path), ids), logits_of(model, ids))


def test_a_tied_head_is_stored_once(model, tmp_path):
    model.save_pretrained(tmp_path)
    names = stored_names(tmp_path)
    assert ("lm_head.weight" in names) is not model.config.tie_word_embeddings
    assert len(names) == len(list(model.parameters()))
    stored_bytes = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert stored_bytes == pytest.approx(4 * model.num_parameters(), abs=8192)


def test_missing_and_unexpected_weights_are_reported(tmp_path):
    model = tiny_model()
    state = model.state_dict()
    del state["scale_down.weight"]
    state["surplus"] = torch.ones(1)
    model.save_pretrained(tmp_path, state_dict=state)
    report = FactorizedGPT2.from_pretrained(tmp_path, output_loading_info=True)[1]
    assert set(report["missing_keys"]) == {"scale_down.weight"}
    assert set(report["unexpected_keys"]) == {"surplus"}


def test_trunk_and_language_model_load_each_other(model, ids, tmp_path):
    model.save_pretrained(tmp_path / "language_model")
    trunk = FactorizedGPT2Model.from_pretrained(tmp_path / "language_model").eval()
    with torch.no_grad():
        assert torch.equal(trunk(ids).last_hidden_state, model.transformer(ids).last_hidden_state)
    trunk.save_pretrained(tmp_path / "trunk")
    loaded, report = FactorizedGPT2.from_pretrained(tmp_path / "trunk", output_loading_info=True)
    assert torch.equal(loaded.transformer.h[1].mlp.mlp_up.weight, model.transformer.h[1].mlp.mlp_up.weight)
    own_head = set() if model.config.tie_word_embeddings else {"lm_head.weight"}
    assert set(report["missing_keys"]) == own_head | ({"scale_down.weight"} if model.config.is_factorized else set())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_survives_disk(dtype, tmp_path):
    tiny_model().to(dtype).save_pretrained(tmp_path)
    loaded = FactorizedGPT2.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert FactorizedGPT2.from_pretrained(tmp_path, dtype=torch.float32).dtype is torch.float32


@pytest.mark.parametrize(
    ("auto_class", "expected"),
    [(AutoConfig, FactorizedGPT2Config), (AutoModel, FactorizedGPT2Model), (AutoModelForCausalLM, FactorizedGPT2)],
)
def test_auto_classes_round_trip(auto_class, expected, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert type(auto_class.from_pretrained(tmp_path)) is expected


def test_auto_model_from_config():
    assert type(AutoModelForCausalLM.from_config(tiny_config())) is FactorizedGPT2
    assert type(AutoModel.from_config(tiny_config())) is FactorizedGPT2Model


@pytest.mark.parametrize("new_size", [VOCAB_SIZE + 13, VOCAB_SIZE - 40])
def test_resize_token_embeddings(model, new_size, tmp_path):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids = random_ids() % min(new_size, VOCAB_SIZE)
    logits = logits_of(model, ids)
    embedding = model.resize_token_embeddings(new_size)
    assert embedding is model.get_input_embeddings() is model.transformer.wte
    assert (
        model.config.vocab_size == embedding.num_embeddings == model.get_output_embeddings().out_features == new_size
    )
    kept = min(new_size, VOCAB_SIZE)
    for name, weight in model.state_dict().items():
        rows = kept if name in ("transformer.wte.weight", "lm_head.weight") else len(weight)
        assert torch.equal(weight[:rows], before[name][:rows]), name
    resized = logits_of(model, ids)
    assert resized.shape == (*ids.shape, new_size)
    torch.testing.assert_close(resized[..., :kept], logits[..., :kept])
    test_head_shares_storage_with_wte_exactly_when_tied(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(FactorizedGPT2.from_pretrained(tmp_path), ids), resized)
    assert torch.isfinite(model(ids, labels=ids).loss)


def test_embeddings_can_be_exchanged(model, ids):
    replacement = nn.Embedding.from_pretrained(torch.randn_like(model.transformer.wte.weight), freeze=False)
    before = logits_of(model, ids)
    model.set_input_embeddings(replacement)
    assert model.get_input_embeddings() is model.transformer.wte is replacement
    test_head_shares_storage_with_wte_exactly_when_tied(model)
    model.tie_weights()
    test_head_shares_storage_with_wte_exactly_when_tied(model)
    assert not torch.allclose(logits_of(model, ids), before, atol=1e-2)
    assert model.get_output_embeddings() is model.lm_head


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_the_head_of_a_copy_follows_the_copy(model, copies):
    copied, shared = copies(model), model.lm_head.weight
    copied.transformer.wte = nn.Embedding.from_pretrained(torch.randn_like(model.transformer.wte.weight))
    test_head_shares_storage_with_wte_exactly_when_tied(copied)
    assert model.lm_head.weight is shared
    test_head_shares_storage_with_wte_exactly_when_tied(model)


def test_a_replica_for_another_device_leaves_the_head_as_it_is(model):
    """`nn.DataParallel` puts copies of a model together anew at every step, module by module."""
    shared = model.lm_head.weight
    replica = model.transformer._replicate_for_data_parallel()
    replica.wte = model.transformer.wte._replicate_for_data_parallel()
    assert model.lm_head.weight is shared


def test_getters_change_nothing(model):
    with torch.no_grad():
        model.lm_head.weight = nn.Parameter(model.lm_head.weight * 2)
    own = model.lm_head.weight
    assert model.get_output_embeddings() is model.lm_head
    assert model.get_input_embeddings() is model.transformer.wte
    assert model.base_model is model.transformer
    assert model.lm_head.weight is own


def test_the_variants_are_three_different_networks(ids):
    sizes = {tiny_model(**variant).num_parameters() for variant in VARIANTS.values()}
    assert len(sizes) == 3


def test_saving_takes_what_transformers_takes_in_its_order(model, tmp_path):
    model.save_pretrained(tmp_path, True, None, False, "10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
