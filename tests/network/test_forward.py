"""What the network computes, however it is asked: inputs, outputs, attention."""

import pytest
import torch
from conftest import RANK, VOCAB_SIZE, WIDTH, left_padded, random_ids, tiny_model
from torch.nn.functional import layer_norm, softmax
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from factorized_gpt2.network import modeling_factorized_gpt2


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def written_out_logits(model, ids):
    """The network once more, from its weights alone and in float64."""
    weights = {name: weight.double() for name, weight in model.state_dict().items()}
    config = model.config

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def norm(name, x):
        return layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"], config.layer_norm_epsilon)

    def heads(x):
        return x.view(*ids.shape, config.n_head, -1).transpose(1, 2)

    embedded = weights["transformer.wte.weight"][ids]
    if config.is_factorized:
        embedded = linear("transformer.scale_up", embedded)
    x = embedded + weights["transformer.wpe.weight"][: ids.shape[1]]
    future = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    for layer in range(config.n_layer):
        block = f"transformer.h.{layer}"
        normed = norm(f"{block}.ln_1", x)
        query, key, value = (heads(linear(f"{block}.attn.{name}_proj", normed)) for name in "qkv")
        scores = (query @ key.transpose(-1, -2) / (WIDTH / config.n_head) ** 0.5).masked_fill(future, -torch.inf)
        context = (softmax(scores, dim=-1) @ value).transpose(1, 2).reshape(*ids.shape, WIDTH)
        x = x + linear(f"{block}.attn.c_proj", context)
        inner = linear(f"{block}.mlp.mlp_up", norm(f"{block}.ln_2", x))
        gelu = 0.5 * inner * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
        x = x + linear(f"{block}.mlp.mlp_down", gelu)
    x = norm("transformer.ln_f", x)
    x = linear("scale_down", x) if config.is_factorized else x
    return linear("lm_head", x)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_equal_the_network_written_out(variant, attention, ids):
    model = tiny_model(**variant, attn_implementation=attention)
    torch.testing.assert_close(model(ids).logits.double(), written_out_logits(model, ids), atol=2e-5, rtol=1e-5)


def test_without_scale_up_bias_equals_the_network_written_out(ids):
    model = tiny_model(scale_up_bias=False)
    torch.testing.assert_close(model(ids).logits.double(), written_out_logits(model, ids), atol=2e-5, rtol=1e-5)


def test_same_input_gives_the_same_output(model, ids):
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_rows_of_a_batch_do_not_see_each_other(model):
    ids = random_ids(batch=5)
    for row, together in zip(ids, model(ids).logits, strict=True):
        torch.testing.assert_close(model(row[None]).logits[0], together, atol=1e-5, rtol=1e-5)


def test_later_tokens_do_not_reach_earlier_ones(model, ids):
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % VOCAB_SIZE
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().max() > 1e-2


def test_hidden_states_and_attentions(variant, ids):
    model = tiny_model(**variant, attn_implementation="eager")
    outputs = model(ids, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(2, 10, WIDTH)] * 3
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 4, 10, 10)] * 2
    final = model.transformer(ids).last_hidden_state
    assert torch.equal(outputs.hidden_states[-1], final)
    for weights in outputs.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 10))
        assert weights.triu(1).abs().max() == 0


def test_hidden_states_and_attentions_only_when_asked(ids):
    outputs = tiny_model()(ids)
    assert outputs.hidden_states is None
    assert outputs.attentions is None


def test_tuple_and_dict_outputs_hold_the_same(variant, ids):
    model = tiny_model(**variant, attn_implementation="eager")
    options = {"labels": ids, "output_hidden_states": True, "output_attentions": True, "use_cache": False}
    as_dict, as_tuple = model(ids, **options), model(ids, **options, return_dict=False)
    assert isinstance(as_dict, CausalLMOutputWithPast)
    assert isinstance(as_tuple, tuple)
    assert list(as_dict) == ["loss", "logits", "hidden_states", "attentions"]
    torch.testing.assert_close(as_tuple, as_dict.to_tuple(), rtol=0, atol=0)


@pytest.mark.parametrize("use_cache", [True, False])
def test_cache_is_returned_exactly_when_asked_for(use_cache, ids):
    model = tiny_model()
    cache = model(ids, use_cache=use_cache).past_key_values
    assert isinstance(cache, DynamicCache) is use_cache
    model.config.use_cache = use_cache
    assert (model(ids).past_key_values is not None) is use_cache
    earlier = model(ids, use_cache=True).past_key_values
    assert model(ids[:, :1], past_key_values=earlier).past_key_values is (earlier if use_cache else None)


def test_embeddings_of_the_ids_give_what_the_ids_give(model, ids):
    embeds = model.get_input_embeddings()(ids)
    assert embeds.shape[-1] == model.config.embedding_size
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either input_ids or inputs_embeds"),
        (
            {"input_ids": random_ids(), "inputs_embeds": torch.zeros(2, 10, RANK)},
            "either input_ids or inputs_embeds",
        ),
        ({"input_ids": random_ids(), "encoder_hidden_states": torch.zeros(2, 10, WIDTH)}, "encoder_hidden_states"),
    ],
)
def test_inputs_that_make_no_sense_are_refused(arguments, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        model(**arguments)
    with pytest.raises(ValueError, match=message):
        model.transformer(**arguments)


def test_default_positions_count_from_zero(model, ids):
    counted = torch.arange(10).expand(2, -1)
    assert torch.equal(model(ids, position_ids=counted).logits, model(ids).logits)
    assert (model(ids, position_ids=counted + 3).logits - model(ids).logits).abs().max() > 1e-2


def test_positions_select_rows_of_wpe(model, ids):
    positions = torch.randint(48, (2, 10))
    moved = model(ids, position_ids=positions).logits
    rearranged = model.transformer.wpe.weight[positions[0]]
    model.transformer.wpe.weight[:10] = rearranged
    torch.testing.assert_close(model(ids[:1]).logits, moved[:1], atol=1e-5, rtol=1e-5)


def test_token_types_are_looked_up_in_wte_and_added(model, ids):
    types = torch.randint(VOCAB_SIZE, ids.shape)
    trunk = model.transformer
    widened = trunk.wte(types) if trunk.scale_up is None else trunk.scale_up(trunk.wte(types))
    handle = trunk.wpe.register_forward_hook(lambda module, args, output: output + widened)
    expected = model(ids).logits
    handle.remove()
    actual = model(ids, token_type_ids=types).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert (actual - model(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("mask_kind", ["none", "left", "right", "hole", "four_dimensional"])
def test_eager_and_sdpa_agree(variant, mask_kind, ids):
    mask = torch.ones(2, 10, dtype=torch.long)
    if mask_kind == "left":
        mask[0, :4] = 0
    elif mask_kind == "right":
        mask[1, 7:] = 0
    elif mask_kind == "hole":
        mask[1, 3:5] = 0
    seen = mask.bool()
    if mask_kind == "four_dimensional":
        allowed = torch.ones(10, 10, dtype=torch.bool).tril()
        mask = torch.zeros(2, 1, 10, 10).masked_fill(~allowed, torch.finfo(torch.float32).min)
    elif mask_kind == "none":
        mask = None
    eager = tiny_model(**variant, attn_implementation="eager")(ids, attention_mask=mask).logits
    sdpa = tiny_model(**variant, attn_implementation="sdpa")(ids, attention_mask=mask).logits
    torch.testing.assert_close(eager[seen], sdpa[seen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padding_changes_nothing(variant, attention):
    model = tiny_model(**variant, attn_implementation=attention)
    rows = [random_ids(1, length, seed=length)[0] for length in (4, 9, 7)]
    batch = left_padded(rows)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits = model(**batch, position_ids=positions).logits
    for row, padded in zip(rows, logits, strict=True):
        torch.testing.assert_close(model(row[None]).logits[0], padded[-len(row) :], atol=1e-5, rtol=1e-5)


def test_attention_implementation_can_be_switched(ids):
    model = tiny_model()
    assert model.config._attn_implementation == "sdpa"
    sdpa = model(ids).logits
    model.set_attn_implementation("eager")
    assert model.transformer.h[0].attn.config._attn_implementation == "eager"
    assert model(ids, output_attentions=True).attentions[0] is not None
    torch.testing.assert_close(model(ids).logits, sdpa, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reorder_and_upcast_attn", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bfloat16_is_close_to_float32(variant, attention, reorder_and_upcast_attn, ids):
    settings = variant | {"reorder_and_upcast_attn": reorder_and_upcast_attn, "attn_implementation": attention}
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    logits = tiny_model(**settings)(ids, attention_mask=mask).logits[mask.bool()]
    low = tiny_model(**settings).bfloat16()(ids, attention_mask=mask).logits[mask.bool()]
    assert low.dtype is torch.bfloat16
    assert (low.float() - logits).norm() / logits.norm() < 0.03


@pytest.mark.parametrize(("upcast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
@pytest.mark.parametrize("autocast", [True, False])
def test_upcast_attention_scores_in_float32(upcast, dtype, autocast, ids):
    model = tiny_model(reorder_and_upcast_attn=upcast, attn_implementation="eager")
    model = model if autocast else model.bfloat16()
    seen = []
    attend = modeling_factorized_gpt2.eager_attention_forward

    def spy(module, query, key, value, *args, **kwargs):
        seen.append((query @ key.transpose(-1, -2)).dtype)
        return attend(module, query, key, value, *args, **kwargs)

    with (
        pytest.MonkeyPatch.context() as patch,
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        patch.setattr(modeling_factorized_gpt2, "eager_attention_forward", spy)
        model(ids)
    assert seen == [dtype] * 2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bfloat16_autocast_is_close_to_float32(attention, ids):
    model = tiny_model(attn_implementation=attention, reorder_and_upcast_attn=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(ids).logits
    logits = model(ids).logits
    assert (low.float() - logits).norm() / logits.norm() < 0.03


@pytest.mark.parametrize("which", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_dropout_acts_in_training_only(variant, which, attention, ids):
    model = tiny_model(**variant, **{which: 0.5}, attn_implementation=attention)
    assert torch.equal(model(ids).logits, tiny_model(**variant, attn_implementation=attention)(ids).logits)
    model.train()
    assert not torch.allclose(model(ids).logits, model(ids).logits, atol=1e-3)


def test_residual_dropout_acts_on_both_terms_of_a_block(variant, ids):
    model = tiny_model(**variant, resid_pdrop=1.0).train()
    states = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(states[1], states[0])
    assert not torch.equal(model.eval()(ids, output_hidden_states=True).hidden_states[1], states[0])


@pytest.mark.parametrize("kept", [1, 3, 10, torch.tensor([0, 4, 9]), torch.tensor([-1])])
def test_logits_to_keep(model, kept, ids):
    everything = model(ids).logits
    expected = everything[:, -kept:] if isinstance(kept, int) else everything[:, kept]
    torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(model(ids, logits_to_keep=0).logits, everything)


def test_compute_logits_is_the_head_of_forward(model, ids):
    hidden_states = model.transformer(ids).last_hidden_state
    assert torch.equal(model.compute_logits(hidden_states), model(ids).logits)
    assert model.compute_logits(hidden_states[0, 0]).shape == (VOCAB_SIZE,)


def test_a_prompt_longer_than_the_positions_is_an_error(model):
    with pytest.raises(IndexError):
        model(random_ids(1, 49))
