"""Generation: every strategy of transformers, with and without caches, padding and embeddings."""

import pytest
import torch
from conftest import TOKENS, VOCAB_SIZE, WIDTH, left_padded, random_ids, tiny_model
from transformers import GenerationConfig, StaticCache
from transformers.cache_utils import DynamicCache

from factorized_gpt2 import to_gpt2

NEW_TOKENS = 12

STRATEGIES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "nucleus": {"do_sample": True, "top_p": 0.8, "top_k": 0, "temperature": 0.7},
    "beam search": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "several beams returned": {"num_beams": 4, "num_return_sequences": 4},
    "repetition penalty": {"repetition_penalty": 1.5},
}
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)


def generate(model, ids=None, **options) -> torch.Tensor:
    """Generate exactly NEW_TOKENS tokens, the same ones for the same arguments."""
    torch.manual_seed(0)
    defaults = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    if ids is not None:
        # Otherwise a padding token that the model generated itself would count as padding.
        defaults["attention_mask"] = torch.ones_like(ids)
    return model.generate(ids, **(defaults | options))


def argmax_loop(model, ids: torch.Tensor, steps: int = NEW_TOKENS) -> torch.Tensor:
    """Greedy decoding without a cache and without `generate`."""
    with torch.no_grad():
        for _ in range(steps):
            following = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], dim=-1)
    return ids


def test_greedy_is_the_argmax_of_every_step(model, ids):
    generated = generate(model, ids)
    assert torch.equal(generated, argmax_loop(model, ids))
    assert len(generated[0, 10:].unique()) > 3  # a model that repeats one token would agree with anything


@every_strategy
def test_strategy_continues_the_prompt_reproducibly(model, ids, strategy):
    generated = generate(model, ids, **strategy)
    returned = strategy.get("num_return_sequences", 1)
    assert generated.shape == (2 * returned, 10 + NEW_TOKENS)
    assert torch.equal(generated[:, :10], ids.repeat_interleave(returned, dim=0))
    assert generated.max() < VOCAB_SIZE
    assert torch.equal(generated, generate(model, ids, **strategy))


@every_strategy
def test_cache_changes_nothing(model, ids, strategy):
    assert torch.equal(generate(model, ids, **strategy), generate(model, ids, **strategy, use_cache=False))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_static_cache_changes_nothing(variant, attention, ids):
    model = tiny_model(**variant, attn_implementation=attention)
    options = {"return_dict_in_generate": True, "output_logits": True}
    # Compilation is switched off here; it would take longer than all these tests.
    static = generate(model, ids, cache_implementation="static", disable_compile=True, **options)
    dynamic = generate(model, ids, **options)
    assert isinstance(static.past_key_values, StaticCache)
    assert torch.equal(static.sequences, dynamic.sequences)
    torch.testing.assert_close(torch.stack(static.logits), torch.stack(dynamic.logits), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_step_on_a_static_cache_is_one_graph(variant, attention, ids):
    """`generate` compiles this step with `fullgraph=True`; what can fail is capturing the graph, so only that runs."""
    model = tiny_model(**variant, attn_implementation=attention)
    torch.compiler.reset()  # graphs of other models count towards a limit on recompilations
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    cache = StaticCache(config=model.config, max_cache_len=16)
    following = random_ids(2, 1, seed=7)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        logits = step(following, past_key_values=cache, position_ids=torch.tensor([[10]])).logits
        expected = model(torch.cat([ids, following], dim=1)).logits[:, -1:]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_sampling_differs_from_draw_to_draw(model, ids):
    drawn = generate(model, ids[:1], do_sample=True, num_return_sequences=5)
    assert len(drawn.unique(dim=0)) == 5


def test_wide_beam_search_finds_the_likeliest_continuation(model, ids):
    def log_probability(sequences):
        with torch.no_grad():
            log_probabilities = model(sequences).logits[:, 9:-1].log_softmax(-1)
        return log_probabilities.gather(-1, sequences[:, 10:, None]).sum((1, 2))

    # With as many beams as tokens nothing is pruned in two steps: the search is exhaustive.
    beams = generate(model, ids[:1], num_beams=VOCAB_SIZE, max_new_tokens=2)
    pairs = torch.cartesian_prod(torch.arange(VOCAB_SIZE), torch.arange(VOCAB_SIZE))
    everything = torch.cat([ids[:1].expand(len(pairs), -1), pairs], dim=-1)
    assert torch.equal(everything[log_probability(everything).argmax()], beams[0])


@pytest.mark.parametrize(
    "assistance",
    [
        {"assistant_model": {"n_embd_wte": 5}},
        {"assistant_model": {"n_embd_wte": None, "n_layer": 1}},
        {"assistant_model": None},
        {"prompt_lookup_num_tokens": 3, "eos_token_id": 1},  # without one, older versions cannot look up
    ],
    ids=["narrower", "shallower", "itself", "prompt lookup"],
)
def test_assisted_greedy_is_greedy(model, assistance):
    ids = random_ids(1, 4).repeat(1, 3)
    options = dict(assistance)
    if "assistant_model" in options:
        overrides = options["assistant_model"]
        options["assistant_model"] = model if overrides is None else tiny_model(seed=1, **overrides)
    plain = {"eos_token_id": options["eos_token_id"]} if "eos_token_id" in options else {}
    assert torch.equal(generate(model, ids, **options), generate(model, ids, **plain))


def test_assisted_sampling_generates(model):
    generated = generate(model, random_ids(1), assistant_model=tiny_model(seed=1), do_sample=True)
    assert generated.shape == (1, 10 + NEW_TOKENS)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["greedy", "beam search", "several beams returned", "repetition penalty"])
def test_left_padding_does_not_change_the_continuation(attention, name):
    strategy = STRATEGIES[name]
    model = tiny_model(attn_implementation=attention)
    rows = [random_ids(1, length, seed=length)[0] for length in (3, 8, 6)]
    batch = left_padded(rows)
    together = generate(model, batch["input_ids"], attention_mask=batch["attention_mask"], **strategy)
    returned = strategy.get("num_return_sequences", 1)
    for index, row in enumerate(rows):
        alone = generate(model, row[None], **strategy)
        of_row = together[index * returned : (index + 1) * returned]
        assert torch.equal(of_row[:, -NEW_TOKENS:], alone[:, -NEW_TOKENS:])


@every_strategy
def test_generating_from_embeddings(model, ids, strategy):
    embeds = model.get_input_embeddings()(ids)
    assert embeds.shape[-1] == model.config.embedding_size
    from_ids = generate(model, ids, **strategy)
    assert torch.equal(generate(model, ids, inputs_embeds=embeds, **strategy), from_ids)
    if "repetition_penalty" not in strategy:  # which counts the prompt's tokens too, and embeddings have none
        from_embeds = generate(model, inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **strategy)
        assert torch.equal(from_embeds, from_ids[:, 10:])


def test_continuing_from_a_cache(model, ids):
    whole = generate(model, ids)
    first = generate(model, ids, max_new_tokens=5, return_dict_in_generate=True)
    rest = generate(model, first.sequences, past_key_values=first.past_key_values, max_new_tokens=NEW_TOKENS - 5)
    assert torch.equal(rest, whole)


@pytest.mark.parametrize("pieces", [[10], [1] * 10, [4, 6], [9, 1]])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_reading_in_pieces_gives_the_logits_of_reading_at_once(variant, attention, pieces, ids):
    model = tiny_model(**variant, attn_implementation=attention)
    cache, logits = None, []
    with torch.no_grad():
        for piece in ids.split(pieces, dim=1):
            outputs = model(piece, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            logits.append(outputs.logits)
        expected = model(ids, use_cache=False).logits
    # Vectorized kernels round the tail of an array otherwise than the rest, and pieces have their own tails.
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=3e-5, rtol=1e-5)


def test_cache_holds_keys_and_values_by_layer(model, ids):
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    assert cache.get_seq_length() == 10
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(2, 4, 10, 8)] * 2
    assert [tuple(layer.values.shape) for layer in cache.layers] == [(2, 4, 10, 8)] * 2
    attention = model.transformer.h[0].attn
    captured = {}
    hook = attention.v_proj.register_forward_hook(lambda module, args, output: captured.update(values=output))
    with torch.no_grad():
        model(ids)
    hook.remove()
    torch.testing.assert_close(cache.layers[0].values.transpose(1, 2).reshape(2, 10, WIDTH), captured["values"])


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
@every_strategy
def test_unfactorized_model_generates_what_gpt2_generates(tie_word_embeddings, strategy, ids):
    model = tiny_model(n_embd_wte=None, tie_word_embeddings=tie_word_embeddings)
    assert torch.equal(generate(model, ids, **strategy), generate(to_gpt2(model), ids, **strategy))


def test_factorized_model_generates_what_its_expansion_generates(ids):
    model = tiny_model()
    assert torch.equal(generate(model, ids), generate(to_gpt2(model), ids))


def test_generation_stops_at_the_end_of_sequence(model, ids):
    free = generate(model, ids[:1])
    stop = free[0, 14].item()
    first = (free[0, 10:] == stop).nonzero()[0].item()
    stopped = generate(model, ids[:1], eos_token_id=stop, pad_token_id=1)
    assert torch.equal(stopped, free[:, : 10 + first + 1])


def test_generation_settings_survive_disk(model, ids, tmp_path):
    model.generation_config = GenerationConfig(**TOKENS, max_new_tokens=3, num_beams=2)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.generation_config.num_beams == 2
    assert torch.equal(loaded.generate(ids), model.generate(ids))
    assert loaded.generate(ids).shape == (2, 13)


def test_generate_forwards_only_the_last_position_through_the_head(ids):
    model = tiny_model()
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    generate(model, ids)
    assert shapes == [(2, 1, VOCAB_SIZE)] * NEW_TOKENS
