"""What else PEFT offers: several adapters from disk, learned prompts, IA3, trained tokens, an int8 base."""

import copy
from functools import partial

import pytest
import torch
from conftest import RANK, VARIANTS, random_ids, tiny_model
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from torch import nn
from transformers import TorchAoConfig

from factorized_gpt2 import FactorizedGPT2

TASK = {"task_type": "CAUSAL_LM"}
FACTORIZED = ["wte", "scale_up", "scale_down"]
IN_BLOCKS = ["q_proj", "k_proj", "v_proj", "c_proj", "mlp_up", "mlp_down"]

pytestmark = [
    # Of every tied layer that is adapted; that the head follows is what these tests are about.
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers."),
]

tied = pytest.mark.parametrize("variant", [VARIANTS["tied"]], ids=["tied"])
factorized = pytest.mark.parametrize("variant", [VARIANTS["tied"], VARIANTS["untied"]], ids=["tied", "untied"])


@pytest.fixture
def base(variant, tmp_path):
    """Save a compressed model and load it, as someone would who has its folder and no more."""
    tiny_model(**variant).save_pretrained(tmp_path / "base")
    return FactorizedGPT2.from_pretrained(tmp_path / "base")


def logits_of(model, ids, **arguments):
    with torch.no_grad():
        return model(input_ids=ids, **arguments).logits


def assert_same_logits(actual, expected, atol=1e-4):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-4)


def trained(model: PeftModel, ids: torch.Tensor, steps: int = 4) -> PeftModel:
    """Train what is trainable for a few steps; the loss falls, and the rest stays as it was."""
    comparable = [(name, weight) for name, weight in model.named_parameters() if type(weight) is nn.Parameter]
    frozen = {name: weight.clone() for name, weight in comparable if not weight.requires_grad}
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    assert frozen
    for name, weight in frozen.items():
        assert torch.equal(model.get_parameter(name), weight), name
    return model.eval()


def step_by_step(model: PeftModel, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Continue greedily, without a cache and without `generate`."""
    for _ in range(new_tokens):
        ids = torch.cat([ids, logits_of(model, ids)[:, -1:].argmax(-1)], dim=1)
    return ids


def assert_lives(model: PeftModel, ids: torch.Tensor, folder) -> None:
    """Check that an adapted model generates what its logits say, and is the same when its folder alone is loaded."""
    expected = logits_of(model, ids)
    generated = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert torch.equal(generated, step_by_step(model, ids, 5))
    model.save_pretrained(folder)
    reloaded = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    assert type(reloaded.get_base_model()) is FactorizedGPT2
    assert_same_logits(logits_of(reloaded, ids), expected, atol=1e-5)


# Several adapters


@pytest.fixture
def adapters(variant, base, ids, tmp_path):
    """Save two trained LoRA adapters; return their folders."""
    targets = IN_BLOCKS + (FACTORIZED if variant["n_embd_wte"] else ["wte"])
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        plain = FactorizedGPT2.from_pretrained(tmp_path / "base")
        adapted = get_peft_model(plain, LoraConfig(r=4, target_modules=targets, **TASK))
        trained(adapted, random_ids(seed=seed)).save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in ("a", "b")}


@pytest.fixture
def both_loaded(adapters, tmp_path):
    base = FactorizedGPT2.from_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(base, adapters["a"], adapter_name="a")
    model.load_adapter(adapters["b"], adapter_name="b")
    return model.eval()


def test_an_adapter_folder_alone_loads_its_compressed_base(adapters, ids, tmp_path):
    model = AutoPeftModelForCausalLM.from_pretrained(adapters["a"]).eval()
    plain = FactorizedGPT2.from_pretrained(tmp_path / "base").eval()
    with model.disable_adapter():
        assert_same_logits(logits_of(model, ids), logits_of(plain, ids), atol=1e-6)
    assert (logits_of(model, ids) - logits_of(plain, ids)).abs().max() > 0.1
    by_hand = PeftModel.from_pretrained(plain, adapters["a"]).eval()
    assert torch.equal(logits_of(model, ids), logits_of(by_hand, ids))


def test_adapters_from_disk_switch_combine_and_go(both_loaded, adapters, ids, tmp_path):
    model, weights = both_loaded, {"a": 0.7, "b": 0.4}
    base = FactorizedGPT2.from_pretrained(tmp_path / "base").eval()
    merged = {name: AutoPeftModelForCausalLM.from_pretrained(adapters[name]).merge_and_unload() for name in adapters}
    for name in ("b", "a"):
        model.set_adapter(name)
        assert_same_logits(logits_of(model, ids), logits_of(merged[name].eval(), ids))

    changed = {name: dict(merged[name].named_parameters()) for name in weights}
    expected = copy.deepcopy(base)
    for name, weight in expected.named_parameters():
        before = weight.data.clone()
        weight.data += sum(share * (changed[adapter][name].data - before) for adapter, share in weights.items())
    for combination, options in (("cat", {}), ("svd", {"svd_rank": 8})):
        given = ["a", "b"], list(weights.values()), combination
        model.add_weighted_adapter(*given, combination_type=combination, **options)
        model.set_adapter(combination)
        assert_same_logits(logits_of(model, ids), logits_of(expected, ids))

    model.delete_adapter("a")
    assert set(model.peft_config) == {"b", "cat", "svd"}
    assert not [name for name, _ in model.named_parameters() if "a" in name.split(".")]
    assert_same_logits(logits_of(model, ids), logits_of(expected, ids))
    model.save_pretrained(tmp_path, selected_adapters=["cat"])
    reloaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "cat").eval()
    assert_same_logits(logits_of(reloaded, ids), logits_of(expected, ids))


def test_rows_of_a_batch_can_each_have_an_adapter(ids):
    model = get_peft_model(
        tiny_model(tie_word_embeddings=False), LoraConfig(target_modules=FACTORIZED + IN_BLOCKS, **TASK)
    )
    trained(model, ids)
    mixed = logits_of(model, ids, adapter_names=["default", "__base__"])
    assert_same_logits(mixed[0], logits_of(model, ids)[0])
    with model.disable_adapter():
        assert_same_logits(mixed[1], logits_of(model, ids)[1])
    assert (mixed[1] - logits_of(model, ids)[1]).abs().max() > 0.1


def test_rows_cannot_each_have_a_vocabulary(ids):
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["wte"], **TASK)).eval()
    with pytest.raises(ValueError, match="adapter_names"):
        logits_of(model, ids, adapter_names=["default", "__base__"])


def test_all_linear_is_everything_but_embeddings_and_head(base, variant, ids):
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", **TASK))
    layers = {name.rsplit(".", 1)[-1] for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert layers == {*IN_BLOCKS, *(("scale_up", "scale_down") if variant["n_embd_wte"] else ())}
    expected = logits_of(trained(adapted, ids), ids)
    assert_same_logits(logits_of(adapted.merge_and_unload().eval(), ids), expected)


# Learned prompts

PROMPTS = {
    "prompt": (PromptTuningConfig, {"token_dim": RANK}),
    "p-tuning": (PromptEncoderConfig, {"token_dim": RANK, "encoder_hidden_size": 16}),
    "p-tuning, LSTM": (PromptEncoderConfig, {"token_dim": RANK, "encoder_reparameterization_type": "LSTM"}),
    "prefix": (PrefixTuningConfig, {}),
    "prefix, projected": (PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 16}),
}


@tied
@pytest.mark.parametrize("kind", PROMPTS)
def test_a_learned_prompt_trains_generates_and_reloads(base, kind, ids, tmp_path):
    before = logits_of(base.eval(), ids)
    make_config, options = PROMPTS[kind]
    adapted = trained(get_peft_model(base, make_config(num_virtual_tokens=4, **options, **TASK)), ids)
    after = logits_of(adapted, ids)
    assert (after[:, -before.shape[1] :] - before).abs().max() > 0.1
    assert_lives(adapted, ids, tmp_path / "prompt")


def test_a_learned_prompt_is_as_wide_as_wte():
    config = PromptTuningConfig(num_virtual_tokens=4, token_dim=tiny_model().config.embedding_size, **TASK)
    prompts = get_peft_model(tiny_model(), config).get_prompt(batch_size=2)
    assert prompts.shape == (2, 4, RANK)


# Scales, and trained tokens


def test_ia3_trains_merges_and_reloads(base, ids, tmp_path):
    targets = {"target_modules": ["k_proj", "v_proj", "mlp_down"], "feedforward_modules": ["mlp_down"]}
    adapted = trained(get_peft_model(base, IA3Config(**targets, **TASK)), ids)
    assert_lives(adapted, ids, tmp_path / "ia3")
    expected = logits_of(adapted, ids)
    merged = adapted.merge_and_unload().eval()
    assert type(merged) is FactorizedGPT2
    assert_same_logits(logits_of(merged, ids), expected)


TOKENS = [7, 11, 13]
TRAINED_TOKENS = {
    "list": LoraConfig(target_modules=["q_proj"], trainable_token_indices=TOKENS, **TASK),
    "both": LoraConfig(target_modules=["q_proj"], trainable_token_indices={"wte": TOKENS, "lm_head": TOKENS}, **TASK),
    "alone": TrainableTokensConfig(token_indices=TOKENS, **TASK),
}
ON_A_TIED_HEAD = {
    "head": LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": TOKENS}, **TASK),
    "other": LoraConfig(target_modules=["q_proj"], trainable_token_indices={"wte": [7], "lm_head": TOKENS}, **TASK),
    "alone": TrainableTokensConfig(target_modules=["lm_head"], token_indices=TOKENS, **TASK),
}


@factorized
@pytest.mark.parametrize("kind", TRAINED_TOKENS)
def test_trained_tokens_act_at_both_ends_of_a_tied_model(base, kind, ids, tmp_path):
    ids = torch.tensor([TOKENS + TOKENS, TOKENS[::-1] + TOKENS])
    tied = base.config.tie_word_embeddings
    before = base.transformer.wte.weight.detach().clone()
    adapted = trained(get_peft_model(base, copy.deepcopy(TRAINED_TOKENS[kind])), ids)
    assert_lives(adapted, ids, tmp_path / "tokens")
    assert sum(path.stat().st_size for path in (tmp_path / "tokens").glob("*.safetensors")) < 12_000
    expected = logits_of(adapted, ids)
    merged = adapted.merge_and_unload().eval()
    assert_same_logits(logits_of(merged, ids), expected)
    assert (merged.lm_head.weight is merged.transformer.wte.weight) is tied
    changed = (merged.transformer.wte.weight != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == TOKENS


@pytest.mark.parametrize("kind", ON_A_TIED_HEAD)
def test_trained_tokens_of_a_tied_head_alone_are_refused(kind, ids):
    adapted = get_peft_model(tiny_model(), copy.deepcopy(ON_A_TIED_HEAD[kind]))
    with pytest.raises(ValueError, match=r"lm_head is tied to wte.*target wte.*tie_word_embeddings=False"):
        logits_of(adapted, ids)


@pytest.mark.parametrize("kind", ON_A_TIED_HEAD)
def test_trained_tokens_of_an_untied_head_merge(kind, ids):
    adapted = get_peft_model(tiny_model(tie_word_embeddings=False), copy.deepcopy(ON_A_TIED_HEAD[kind]))
    expected = logits_of(trained(adapted, ids), ids)
    assert_same_logits(logits_of(adapted.merge_and_unload().eval(), ids), expected)


NEW_TOKENS = {
    "tokens": {"trainable_token_indices": [300, 301]},
    "saved": {"modules_to_save": ["wte"]},
    "adapted": {"target_modules": ["q_proj", "wte"]},
}


@factorized
@pytest.mark.parametrize("kind", NEW_TOKENS)
def test_new_tokens_travel_with_the_adapter(variant, tokenizer, kind, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    assert len(tokenizer) == 300
    tiny_model(**variant, vocab_size=300).save_pretrained(tmp_path / "base")
    model = FactorizedGPT2.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<question>", "<answer>"])
    model.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(**({"target_modules": ["q_proj"]} | copy.deepcopy(NEW_TOKENS[kind])), **TASK)
    ids = tokenizer("<question> Whose clock? <answer> The dog's", return_tensors="pt")["input_ids"]
    assert {300, 301} < set(ids[0].tolist())
    adapted = trained(get_peft_model(model, config), ids)
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert_lives(adapted, ids, tmp_path / "adapter")
    expected = logits_of(adapted, ids)
    merged = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").merge_and_unload().eval()
    assert merged.config.vocab_size == 302
    assert_same_logits(logits_of(merged, ids), expected)


@tied
def test_adapters_train_on_an_int8_base(base, ids, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    settings = TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))
    load = partial(FactorizedGPT2.from_pretrained, tmp_path / "base", quantization_config=settings)
    config = LoraConfig(r=4, target_modules=FACTORIZED + IN_BLOCKS, **TASK)
    adapted = trained(get_peft_model(load(), config), ids)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits_of(adapted, ids)
    assert_same_logits(logits_of(PeftModel.from_pretrained(load(), tmp_path / "adapter").eval(), ids), expected)
    in_float = logits_of(PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), ids)
    assert 0 < (in_float - expected).norm() / expected.norm() < 0.05
