"""Adapters of stock PEFT: they train, merge, save and load, and the tied head follows wte."""

import copy
import re

import pytest
import torch
from conftest import VARIANTS, checkpoint_activations, perturb, random_ids, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear

from factorized_gpt2 import FactorizedGPT2, to_gpt2

TARGETS = ["wte", "scale_up", "scale_down", "q_proj", "k_proj", "v_proj", "c_proj", "mlp_up", "mlp_down"]

pytestmark = [
    # PEFT warns of every tied layer it adapts; that our head follows its adapter is what these tests are about.
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
    # PEFT still calls the old name.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
]

factorized = pytest.mark.parametrize("variant", [VARIANTS["tied"], VARIANTS["untied"]], ids=["tied", "untied"])


@torch.no_grad()
def randomise(adapted: PeftModel, seed: int = 1) -> PeftModel:
    """Give every adapter weight a value that matters: a fresh adapter changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


def adapt(model: FactorizedGPT2, targets=TARGETS, seed: int = 1, **options) -> PeftModel:
    targets = [target for target in targets if model.config.is_factorized or not target.startswith("scale")]
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets, **options)
    return randomise(get_peft_model(model, config), seed)


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def assert_same_logits(actual, expected, atol=1e-4):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-4)


def saved_bytes(folder) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_takes_an_adapter_that_acts(target, ids):
    model = tiny_model()
    base = logits_of(model, ids)
    adapted = adapt(model, [target])
    layers = [module for module in adapted.modules() if isinstance(module, LoraEmbedding | LoraLinear)]
    assert len(layers) == (1 if target in ("wte", "scale_up", "scale_down") else 2)
    assert isinstance(layers[0], LoraEmbedding) is (target == "wte")
    assert (logits_of(adapted, ids) - base).abs().max() > 1e-2
    adapted.train()(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)


def test_adapter_on_wte_trains_through_both_ends_of_a_tied_model(ids):
    model = tiny_model()
    tied, untied = adapt(copy.deepcopy(model), ["wte"]), adapt(tiny_model(tie_word_embeddings=False), ["wte"])
    gradients = []
    for adapted in (tied, untied):
        adapted(input_ids=ids, labels=ids).loss.backward()
        gradients.append(adapted.base_model.model.transformer.wte.lora_embedding_A["default"].grad)
    unseen = torch.tensor(sorted(set(range(99)) - set(ids.flatten().tolist())))
    assert gradients[0][:, unseen].abs().min(dim=1).values.max() > 0  # by way of the head, tokens not in the input
    assert gradients[1][:, unseen].abs().max() == 0


def test_saved_adapter_on_a_reloaded_base_gives_the_same_logits(variant, ids, tmp_path):
    model = tiny_model(**variant)
    base = logits_of(model, ids)
    model.save_pretrained(tmp_path / "base")
    adapted = adapt(model)
    assert (logits_of(adapted, ids) - base).abs().max() > 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    reloaded_base = FactorizedGPT2.from_pretrained(tmp_path / "base")
    reloaded = PeftModel.from_pretrained(reloaded_base, tmp_path / "adapter").eval()
    assert_same_logits(logits_of(reloaded, ids), logits_of(adapted, ids), atol=1e-6)


def test_saved_adapter_holds_adapter_weights_only(tmp_path):
    adapted = adapt(tiny_model())
    adapted.save_pretrained(tmp_path)
    trainable, _ = adapted.get_nb_trainable_parameters()
    assert 4 * trainable < saved_bytes(tmp_path) < 4 * trainable + 8192


def test_merging_changes_no_logits_and_no_size(variant, ids, tmp_path):
    model = tiny_model(**variant)
    names, parameters = list(model.state_dict()), model.num_parameters()
    model.save_pretrained(tmp_path / "base")
    adapted = adapt(model)
    expected = logits_of(adapted, ids)
    merged = adapted.merge_and_unload(safe_merge=True)
    assert type(merged) is FactorizedGPT2
    assert_same_logits(logits_of(merged, ids), expected)
    assert list(merged.state_dict()) == names
    assert merged.num_parameters() == parameters
    assert (merged.lm_head.weight is merged.transformer.wte.weight) is merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path / "merged")
    assert saved_bytes(tmp_path / "merged") == saved_bytes(tmp_path / "base")
    reloaded, report = FactorizedGPT2.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_same_logits(logits_of(reloaded, ids), expected)
    assert_same_logits(logits_of(to_gpt2(reloaded), ids), expected)


def test_merging_in_place_and_back(variant, ids):
    adapted = adapt(tiny_model(**variant))
    expected = logits_of(adapted, ids)
    adapted.merge_adapter()
    assert_same_logits(logits_of(adapted, ids), expected)
    adapted.unmerge_adapter()
    assert_same_logits(logits_of(adapted, ids), expected)


def test_unloading_restores_the_base(variant, ids):
    base = logits_of(tiny_model(**variant), ids)
    assert torch.equal(logits_of(adapt(tiny_model(**variant)).unload(), ids), base)


def test_disabled_adapter_leaves_the_base(variant, ids):
    base = logits_of(tiny_model(**variant), ids)
    adapted = adapt(tiny_model(**variant))
    with adapted.disable_adapter():
        assert_same_logits(logits_of(adapted, ids), base, atol=1e-6)
    assert (logits_of(adapted, ids) - base).abs().max() > 0.1


@factorized
def test_head_follows_the_adapter_of_wte_exactly_when_tied(variant):
    model = tiny_model(**variant)
    hidden_states = torch.randn(5, 32)
    before = model.compute_logits(hidden_states)
    wte = model.transformer.wte.weight.detach().clone()
    adapted = adapt(model, ["wte"]).base_model.model
    layer = adapted.transformer.wte
    change = 2.0 * (layer.lora_embedding_B["default"] @ layer.lora_embedding_A["default"]).T  # alpha / r = 2
    expected = model.scale_down(hidden_states) @ (wte + change).T if variant == VARIANTS["tied"] else before
    assert_same_logits(adapted.compute_logits(hidden_states), expected, atol=1e-5)
    assert (expected - before).abs().max() > 0.1 or variant == VARIANTS["untied"]


@pytest.mark.parametrize("targets", [None, ["wte"], TARGETS])
def test_the_base_model_is_the_trunk(variant, targets, ids):
    """As transformers promises of every language model, adapted or not."""
    model = tiny_model(**variant)
    if targets:
        adapt(model, targets)
    assert isinstance(model.base_model, torch.nn.Module)
    assert model.base_model is model.transformer is model.get_decoder()
    assert hash(model.base_model) == hash(model.transformer)
    assert model.get_encoder() is model  # PEFT takes any other for an encoder-decoder
    states = model.eval().base_model(ids).last_hidden_state
    assert states.shape == (*ids.shape, model.config.n_embd)
    assert_same_logits(model.compute_logits(states), logits_of(model, ids), atol=1e-5)
    assert model.get_output_embeddings() is model.lm_head


@pytest.mark.parametrize(
    "options",
    [
        {"targets": ["lm_head"]},
        {"targets": ["lm_head", "wte"]},
        {"targets": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"targets": ["q_proj"], "modules_to_save": ["lm_head", "wte"]},
    ],
)
def test_an_adapter_on_a_tied_head_is_refused(options, ids):
    with pytest.raises(ValueError, match=r"lm_head is tied to wte.*target wte.*tie_word_embeddings=False"):
        logits_of(adapt(tiny_model(), **copy.deepcopy(options)), ids)


def test_an_adapter_on_an_untied_head_merges(ids):
    model = tiny_model(tie_word_embeddings=False)
    base = logits_of(model, ids)
    adapted = adapt(model, ["lm_head", "wte"])
    expected = logits_of(adapted, ids)
    assert (expected - base).abs().max() > 0.1
    assert_same_logits(logits_of(adapted.merge_and_unload(), ids), expected)


@factorized
def test_a_trained_copy_of_wte_is_followed_merged_and_reloaded(variant, ids, tmp_path):
    model = tiny_model(**variant)
    base = logits_of(model, ids)
    adapted = adapt(model, ["q_proj"], modules_to_save=["wte"])
    perturb(adapted.base_model.model.transformer.wte.modules_to_save["default"], seed=2)
    expected = logits_of(adapted, ids)
    assert (expected - base).abs().max() > 0.1
    adapted.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(tiny_model(**variant), tmp_path).eval()
    assert_same_logits(logits_of(reloaded, ids), expected, atol=1e-6)
    merged = adapted.merge_and_unload()
    assert merged.config.tie_word_embeddings is (variant == VARIANTS["tied"])
    assert_same_logits(logits_of(merged, ids), expected)
    merged.save_pretrained(tmp_path / "merged")
    assert_same_logits(logits_of(FactorizedGPT2.from_pretrained(tmp_path / "merged"), ids), expected)
    assert saved_bytes(tmp_path / "merged") < 4 * tiny_model(**variant).num_parameters() + 8192


@factorized
def test_unloading_a_trained_copy_of_wte_unloads_it_at_both_ends(variant, ids):
    """PEFT leaves the trained copy in the model; a tied head has it too, before anyone asks for the head."""
    adapted = adapt(tiny_model(**variant), ["q_proj"], modules_to_save=["wte"])
    copied = adapted.base_model.model.transformer.wte.modules_to_save["default"]
    perturb(copied, seed=2)
    expected = tiny_model(**variant)
    with torch.no_grad():
        expected.transformer.wte.weight.copy_(copied.weight)
    unloaded = adapted.unload()
    assert unloaded.transformer.wte is copied
    assert_same_logits(logits_of(unloaded, ids), logits_of(expected, ids))


def test_two_adapters_switch(variant, ids):
    alone = {name: logits_of(adapt(tiny_model(**variant), seed=seed), ids) for name, seed in (("a", 1), ("b", 2))}
    assert (alone["a"] - alone["b"]).abs().max() > 0.1
    adapted = adapt(tiny_model(**variant), seed=1)
    adapted.add_adapter("other", adapted.peft_config["default"])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if re.search(r"lora_.*\.other", name):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    for name, adapter in (("a", "default"), ("b", "other"), ("a", "default")):
        adapted.set_adapter(adapter)
        assert_same_logits(logits_of(adapted, ids), alone[name], atol=1e-6)
    merged = adapted.merge_and_unload(adapter_names=["other"])
    assert_same_logits(logits_of(merged, ids), alone["b"])


@factorized
@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}])
@pytest.mark.parametrize("targets", [["wte"], ["wte", "scale_up", "scale_down", "q_proj", "mlp_down"], ["scale_up"]])
def test_kinds_of_lora_merge(variant, options, targets, ids):
    model = tiny_model(**variant)
    base = logits_of(model, ids)
    adapted = adapt(model, targets, **options)
    expected = logits_of(adapted, ids)
    assert (expected - base).abs().max() > 1e-2
    assert_same_logits(logits_of(adapted.merge_and_unload(safe_merge=True), ids), expected)


@factorized
def test_trainable_tokens_merge(variant, ids):
    model = tiny_model(**variant)
    base = logits_of(model, ids)
    tokens = sorted(set(ids[0].tolist()))[:3]
    adapted = adapt(model, ["q_proj"], trainable_token_indices={"wte": tokens})
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += 0.3
    expected = logits_of(adapted, ids)
    assert (expected - base).abs().max() > 0.1
    assert_same_logits(logits_of(adapted.merge_and_unload(), ids), expected)


@factorized
def test_adapted_model_generates_what_the_merged_one_generates(variant, ids):
    adapted = adapt(tiny_model(**variant))
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    generated = adapted.generate(input_ids=ids, **options)
    assert torch.equal(generated, adapted.merge_and_unload().generate(input_ids=ids, **options))


@factorized
def test_gradient_checkpointing_with_adapters_gives_the_same_gradients(variant):
    ids = random_ids()
    collected = []
    for checkpointing in (False, True):
        adapted = adapt(tiny_model(**variant)).train()
        if checkpointing:
            checkpoint_activations(adapted.base_model.model, use_reentrant=True)
            adapted.enable_input_require_grads()
        adapted(input_ids=ids, labels=ids).loss.backward()
        collected.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    torch.testing.assert_close(collected[1], collected[0], atol=1e-6, rtol=1e-4)


@factorized
def test_bfloat16_base_merges_close_to_float32(variant, ids):
    expected = logits_of(adapt(tiny_model(**variant)), ids)
    merged = adapt(tiny_model(**variant).bfloat16()).merge_and_unload()
    assert merged.dtype is torch.bfloat16
    assert (logits_of(merged, ids).float() - expected).norm() / expected.norm() < 0.05
