"""Conversion from and to GPT-2: the same logits, the same bytes, and errors that name what is wrong."""

import numpy as np
import pytest
import torch
from conftest import NO_DROPOUT, RANK, SHAPE, TOKENS, VOCAB_SIZE, WIDTH, left_padded, perturb, random_ids, tiny_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from factorized_gpt2 import FactorizedGPT2, factorize, from_gpt2, to_gpt2
from factorized_gpt2.models.conversion import fingerprint, vocabulary_matrices

CONFIG_VARIATIONS = {
    "default": {},
    "untied": {"tie_word_embeddings": False},
    "narrow feed-forward": {"n_inner": 17},
    "relu": {"activation_function": "relu"},
    "exact gelu": {"activation_function": "gelu"},
    "unscaled attention": {"scale_attn_weights": False},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "upcast attention": {"reorder_and_upcast_attn": True},
    "upcast and scaled by layer": {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    "loose layer norm": {"layer_norm_epsilon": 0.1},
    "one layer, one head": {"n_layer": 1, "n_head": 1},
    "few positions": {"n_positions": 16},
    "no cache": {"use_cache": False},
    "double-heads fields": {"summary_type": "mean", "summary_first_dropout": 0.7},
    "other tokens": {"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": None},
}
every_config = pytest.mark.parametrize("overrides", CONFIG_VARIATIONS.values(), ids=CONFIG_VARIATIONS)
tied_and_untied = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
every_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def tiny_gpt2(seed: int = 5, **overrides) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return perturb(GPT2LMHeadModel(GPT2Config(**(SHAPE | TOKENS | NO_DROPOUT | overrides))), seed).eval()


def factors_of(model: GPT2LMHeadModel, rank: int = RANK):
    wte, lm_head = vocabulary_matrices(model)
    return factorize(wte, rank, lm_head)


def copied_state(model) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def assert_same_state(model, expected: dict[str, torch.Tensor]):
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, weight in expected.items():
        assert state[name].dtype == weight.dtype, name
        assert torch.equal(state[name], weight), name


def assert_close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-5)


@every_config
@every_attention
def test_unfactorized_logits_are_those_of_gpt2(overrides, attention, ids):
    gpt2 = tiny_gpt2(**overrides, attn_implementation=attention)
    converted = from_gpt2(gpt2)
    assert converted.config._attn_implementation == attention
    assert not converted.training
    assert_close(converted(ids).logits, gpt2(ids).logits)
    assert_close(converted(ids, labels=ids).loss, gpt2(ids, labels=ids).loss)
    padded = left_padded([random_ids(1, 4)[0], random_ids(1, 9)[0]])
    seen = padded["attention_mask"].bool()
    assert_close(converted(**padded).logits[seen], gpt2(**padded).logits[seen])


@every_attention
@tied_and_untied
def test_unfactorized_logits_are_those_of_gpt2_step_by_step(attention, tied, ids):
    gpt2 = tiny_gpt2(attn_implementation=attention, tie_word_embeddings=tied)
    converted = from_gpt2(gpt2)
    caches = {gpt2: None, converted: None}
    for piece in ids.split([4, 1, 1, 4], dim=1):
        outputs = {model: model(piece, past_key_values=cache, use_cache=True) for model, cache in caches.items()}
        assert_close(outputs[converted].logits, outputs[gpt2].logits)
        caches = {model: output.past_key_values for model, output in outputs.items()}
    for ours, theirs in zip(caches[converted].layers, caches[gpt2].layers, strict=True):
        assert_close(ours.keys, theirs.keys)
        assert_close(ours.values, theirs.values)


@every_attention
def test_every_output_is_that_of_gpt2(attention, ids):
    gpt2 = tiny_gpt2(attn_implementation=attention)
    options = {"output_hidden_states": True, "output_attentions": attention == "eager", "token_type_ids": ids.flip(1)}
    ours, theirs = from_gpt2(gpt2)(ids, **options), gpt2(ids, **options)
    assert_close(ours.hidden_states, theirs.hidden_states)
    assert_close(ours.attentions or (), theirs.attentions or ())
    assert_close(ours.logits, theirs.logits)


@every_config
def test_round_trip_keeps_every_bit_and_field(overrides):
    gpt2 = tiny_gpt2(**overrides)
    back = to_gpt2(from_gpt2(gpt2))
    assert type(back) is GPT2LMHeadModel
    assert_same_state(back, copied_state(gpt2))
    # What converters of older GPT-2s look up is new.
    assert back.config.to_diff_dict() == gpt2.config.to_diff_dict() | {"n_ctx": gpt2.config.n_positions}
    assert back.generation_config.to_dict() == gpt2.generation_config.to_dict()
    tied = gpt2.config.tie_word_embeddings
    assert (back.lm_head.weight is back.transformer.wte.weight) is tied


def test_n_ctx_follows_the_positions():
    model = from_gpt2(tiny_gpt2(n_ctx=7))
    assert not hasattr(model.config, "n_ctx")
    assert to_gpt2(model).config.n_ctx == SHAPE["n_positions"]


@tied_and_untied
def test_converted_models_survive_disk(tied, ids, tmp_path):
    for name, model in (("ours", from_gpt2(tiny_gpt2(tie_word_embeddings=tied))), ("gpt2", tiny_gpt2())):
        model.save_pretrained(tmp_path / name)
        loaded = type(model).from_pretrained(tmp_path / name)
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("convert", [from_gpt2, lambda model: from_gpt2(model, factors_of(model))])
@tied_and_untied
def test_the_source_is_neither_changed_nor_shared(convert, tied, ids):
    gpt2 = tiny_gpt2(tie_word_embeddings=tied)
    before, config = copied_state(gpt2), gpt2.config.to_dict()
    converted = convert(gpt2)
    for parameter in converted.parameters():
        assert parameter.requires_grad
        parameter += 1.0
    assert_same_state(gpt2, before)
    assert gpt2.config.to_dict() == config
    back = to_gpt2(converted)
    before = copied_state(converted)
    for parameter in back.parameters():
        parameter += 1.0
    assert_same_state(converted, before)


def factorized_in_numpy(gpt2, ids, rank):
    """Logits of GPT-2 with its embedding and its head projected onto their leading right singular vectors."""

    def projected(weight, keep_mean):
        weight = weight.double().numpy()
        mean = weight.mean(axis=0)
        left, singular, right = np.linalg.svd(weight - mean, full_matrices=False)
        return (left[:, :rank] * singular[:rank]) @ right[:rank] + (mean if keep_mean else 0)

    head = torch.from_numpy(projected(gpt2.lm_head.weight, keep_mean=False))
    embedding = torch.from_numpy(projected(gpt2.transformer.wte.weight, keep_mean=True))
    hidden_states = gpt2.double().transformer(inputs_embeds=embedding[ids]).last_hidden_state
    return hidden_states @ head.T


@pytest.mark.parametrize("rank", [1, RANK, WIDTH - 1])
@tied_and_untied
def test_factorized_logits_are_those_of_the_projected_matrices(rank, tied, ids):
    gpt2 = tiny_gpt2(tie_word_embeddings=tied)
    factorized = from_gpt2(gpt2, factors_of(gpt2, rank))
    assert factorized.config.n_embd_wte == rank
    assert factorized.config.tie_word_embeddings is tied
    assert factorized.config.scale_up_bias
    assert (factorized.lm_head.weight is factorized.transformer.wte.weight) is tied
    assert_close(factorized(ids).logits.double(), factorized_in_numpy(gpt2, ids, rank), atol=1e-4)


@tied_and_untied
def test_without_loss_of_rank_only_a_constant_per_position_is_lost(tied, ids):
    gpt2 = tiny_gpt2(tie_word_embeddings=tied)
    directions = torch.randn(RANK, WIDTH)
    gpt2.transformer.wte.weight.copy_(0.2 * torch.randn(VOCAB_SIZE, RANK) @ directions + 0.5)
    if not tied:
        gpt2.lm_head.weight.copy_(0.2 * torch.randn(VOCAB_SIZE, RANK) @ torch.randn(RANK, WIDTH) - 0.5)
    difference = gpt2(ids).logits - from_gpt2(gpt2, factors_of(gpt2))(ids).logits
    assert difference.abs().max() > 0.1  # the mean that the head leaves out
    assert (difference - difference.mean(-1, keepdim=True)).abs().max() < 1e-4


@pytest.mark.parametrize("scale_up_bias", [True, False])
@tied_and_untied
@every_attention
def test_factorized_model_expands_to_a_gpt2_of_the_same_logits(scale_up_bias, tied, attention, ids):
    model = tiny_model(scale_up_bias=scale_up_bias, tie_word_embeddings=tied, attn_implementation=attention)
    expanded = to_gpt2(model)
    assert not expanded.config.tie_word_embeddings
    assert expanded.config._attn_implementation == attention
    assert expanded.lm_head.weight.shape == expanded.transformer.wte.weight.shape == (VOCAB_SIZE, WIDTH)
    assert_close(expanded(ids).logits, model(ids).logits, atol=1e-4)


def test_an_unfactorized_model_of_this_package_can_be_the_source(ids):
    gpt2 = tiny_gpt2()
    unfactorized, factors = from_gpt2(gpt2), factors_of(gpt2)
    assert torch.equal(from_gpt2(unfactorized, factors)(ids).logits, from_gpt2(gpt2, factors)(ids).logits)
    assert_same_state(from_gpt2(unfactorized), copied_state(unfactorized))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("factorized", [True, False])
def test_dtype_is_kept(dtype, factorized):
    gpt2 = tiny_gpt2().to(dtype)
    converted = from_gpt2(gpt2, factors_of(gpt2) if factorized else None)
    assert {parameter.dtype for parameter in converted.parameters()} == {dtype}
    assert converted.dtype == dtype
    assert {parameter.dtype for parameter in to_gpt2(converted).parameters()} == {dtype}


def test_generation_settings_are_copied():
    gpt2 = tiny_gpt2()
    gpt2.generation_config.num_beams = 7
    converted = from_gpt2(gpt2)
    assert converted.generation_config.num_beams == 7
    assert to_gpt2(converted).generation_config.num_beams == 7
    converted.generation_config.num_beams = 2
    assert gpt2.generation_config.num_beams == 7
    gpt2.generation_config.suppress_tokens = [3]
    from_gpt2(gpt2).generation_config.suppress_tokens.append(4)
    assert gpt2.generation_config.suppress_tokens == [3]


def test_the_device_is_kept():
    gpt2 = tiny_gpt2()
    factors = factors_of(gpt2)
    for converted in (from_gpt2(gpt2.to("meta")), from_gpt2(gpt2, factors)):
        assert {parameter.device.type for parameter in converted.parameters()} == {"meta"}
        assert {parameter.device.type for parameter in to_gpt2(converted).parameters()} == {"meta"}


def without(name):
    return lambda model: model.get_submodule(name.rpartition(".")[0]).register_parameter(name.rpartition(".")[2], None)


def reshaped(name, shape):
    def spoil(model):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(torch.zeros(shape)))

    return spoil


def with_surplus(model):
    model.transformer.h[1].register_parameter("surplus", nn.Parameter(torch.zeros(3)))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (without("transformer.wpe.weight"), "transformer.wpe.weight"),
        (without("transformer.h.1.attn.c_attn.bias"), "transformer.h.1.attn.c_attn.bias"),
        (without("transformer.h.0.ln_2.bias"), "transformer.h.0.ln_2.bias"),
        (without("lm_head.weight"), "lm_head.weight"),
        (with_surplus, "transformer.h.1.surplus"),
        (reshaped("transformer.wte.weight", (7, WIDTH)), "transformer.wte.weight"),
        (reshaped("lm_head.weight", (VOCAB_SIZE, 7)), "lm_head.weight"),
        (reshaped("transformer.h.1.attn.c_attn.weight", (WIDTH, 7)), "transformer.h.1.attn.c_attn.weight"),
        (reshaped("transformer.h.1.mlp.c_fc.weight", (7, WIDTH)), "transformer.h.1.mlp.mlp_up.weight"),
        (reshaped("transformer.ln_f.bias", (7,)), "transformer.ln_f.bias"),
    ],
)
def test_a_wrong_weight_is_named(spoil, named):
    gpt2 = tiny_gpt2(tie_word_embeddings=False)
    spoil(gpt2)
    with pytest.raises(ValueError, match=named):
        from_gpt2(gpt2)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (without("transformer.scale_up.weight"), "transformer.scale_up.weight"),
        (without("scale_down.weight"), "scale_down.weight"),
        (without("transformer.wte.weight"), "transformer.wte.weight"),
        (without("transformer.h.1.attn.k_proj.bias"), "transformer.h.1.attn.k_proj.bias"),
        (with_surplus, "transformer.h.1.surplus"),
        (reshaped("transformer.h.0.mlp.mlp_down.weight", (7, WIDTH)), "transformer.h.0.mlp.c_proj.weight"),
    ],
)
def test_a_wrong_weight_is_named_on_the_way_back(spoil, named):
    model = tiny_model()
    spoil(model)
    with pytest.raises(ValueError, match=named):
        to_gpt2(model)


def test_all_surplus_is_named():
    gpt2 = tiny_gpt2()
    for layer in (1, 0):
        gpt2.transformer.h[layer].register_parameter("surplus", nn.Parameter(torch.zeros(3)))
    with pytest.raises(ValueError, match=r"have: transformer\.h\.0\.surplus, transformer\.h\.1\.surplus\.$"):
        from_gpt2(gpt2)


@pytest.mark.parametrize("function", [vocabulary_matrices, fingerprint])
@pytest.mark.parametrize("name", ["transformer.wte.weight", "lm_head.weight"])
def test_wrong_vocabulary_matrices_are_named(function, name):
    gpt2 = tiny_gpt2(tie_word_embeddings=False)
    reshaped(name, (7, WIDTH))(gpt2)
    with pytest.raises(ValueError, match=f"{name}.* has shape"):
        function(gpt2)


def random_factors(rank=RANK, rows=VOCAB_SIZE, columns=WIDTH, head_rows=None):
    rng = np.random.default_rng(0)
    head = None if head_rows is None else rng.normal(size=(head_rows, columns))
    return factorize(rng.normal(size=(rows, columns)), rank, head)


def test_factors_with_a_head_of_their_own_untie_a_tied_model():
    baseline, factors = tiny_model(n_embd_wte=None), random_factors(head_rows=VOCAB_SIZE)
    model = from_gpt2(baseline, factors)
    assert not model.config.tie_word_embeddings
    torch.testing.assert_close(model.lm_head.weight, torch.from_numpy(factors.lm_head.T))
    torch.testing.assert_close(model.transformer.wte.weight, torch.from_numpy(factors.wte))


@pytest.mark.parametrize(
    ("factors", "tied", "message"),
    [
        (random_factors(rank=WIDTH), True, f"rank {WIDTH}"),
        (random_factors(), False, "the model's is not"),
        (random_factors(rows=VOCAB_SIZE + 1), True, "transformer.wte.weight"),
        (random_factors(columns=WIDTH + 1), True, "transformer.scale_up.weight"),
        (random_factors(head_rows=VOCAB_SIZE - 1), False, "lm_head.weight"),
    ],
)
def test_factors_that_do_not_fit_are_refused(factors, tied, message):
    with pytest.raises(ValueError, match=message):
        from_gpt2(tiny_gpt2(tie_word_embeddings=tied), factors)


def test_a_factorized_model_is_no_source():
    for function in (from_gpt2, vocabulary_matrices, fingerprint):
        with pytest.raises(ValueError, match="factorized already"):
            function(tiny_model())


@pytest.mark.parametrize("other", [nn.Linear(2, 2), GPT2Model(GPT2Config(**SHAPE, **TOKENS))])
def test_other_models_are_no_source(other):
    with pytest.raises(TypeError, match=type(other).__name__):
        from_gpt2(other)


@tied_and_untied
def test_fingerprint_is_the_same_in_both_layouts(tied):
    gpt2 = tiny_gpt2(tie_word_embeddings=tied)
    assert fingerprint(gpt2) == fingerprint(from_gpt2(gpt2)) == fingerprint(tiny_gpt2(tie_word_embeddings=tied))
    assert len(fingerprint(gpt2)) == 64
    assert fingerprint(gpt2) != fingerprint(tiny_gpt2(seed=1, tie_word_embeddings=tied))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_notices_one_changed_number_in_any_weight(dtype):
    gpt2 = tiny_gpt2(tie_word_embeddings=False).to(dtype)
    seen = {fingerprint(gpt2)}
    for parameter in gpt2.parameters():
        parameter.view(-1)[-1] += 1.0
        seen.add(fingerprint(gpt2))
    assert len(seen) == 1 + len(list(gpt2.parameters()))


@tied_and_untied
def test_fingerprints_that_were_written_down_stay_valid(tied):
    """Records and factor files hold them: another one for the same weights would make all of them strangers'."""
    gpt2 = tiny_gpt2(n_layer=1, tie_word_embeddings=tied)
    for number, (_, parameter) in enumerate(sorted(gpt2.named_parameters())):
        parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) % 251 + number)
    assert fingerprint(gpt2) == WRITTEN_DOWN[tied]


WRITTEN_DOWN = {
    True: "bd76e30cdbd732d249f20285ea28885e1c5b92590c1d4c2d4d84bb960f8fc00e",
    False: "26d0e7a9d603d0e91be1d1fe4330e93b970e6be321df5e8f12dfe304d4192146",
}


def test_fingerprint_tells_ties_apart():
    untied = tiny_gpt2(tie_word_embeddings=False)
    untied.lm_head.weight.copy_(untied.transformer.wte.weight)
    tied = tiny_gpt2()
    tied.load_state_dict(untied.state_dict())
    assert fingerprint(tied) != fingerprint(untied)


def test_fingerprint_tells_dtypes_of_the_same_bytes_apart():
    bfloat16, float16 = tiny_gpt2().bfloat16(), tiny_gpt2().half()
    for parameter, source in zip(float16.parameters(), bfloat16.parameters(), strict=True):
        parameter.copy_(source.view(torch.float16))
    assert fingerprint(bfloat16) != fingerprint(float16)


@tied_and_untied
def test_vocabulary_matrices(tied):
    gpt2 = tiny_gpt2(tie_word_embeddings=tied)
    for model in (gpt2, from_gpt2(gpt2), tiny_gpt2(tie_word_embeddings=tied).double()):
        wte, lm_head = vocabulary_matrices(model)
        assert wte.dtype == np.float32
        np.testing.assert_array_equal(wte, gpt2.transformer.wte.weight.numpy())
        if tied:
            assert lm_head is None
        else:
            np.testing.assert_array_equal(lm_head, gpt2.lm_head.weight.numpy())


def test_a_converted_model_is_ours_in_every_respect(ids):
    converted = from_gpt2(tiny_gpt2())
    assert type(converted) is FactorizedGPT2
    assert converted.config.model_type == "factorized_gpt2"
    converted.resize_token_embeddings(VOCAB_SIZE + 5)
    assert to_gpt2(converted)(ids).logits.shape[-1] == VOCAB_SIZE + 5
