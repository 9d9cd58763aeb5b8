"""A saved folder in the tools of transformers, with nothing of this package but its import."""

import copy

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from conftest import VARIANTS, random_ids, tiny_model
from hub_client import TOKEN, reach
from hub_server import HubServer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TorchAoConfig,
    pipeline,
)

from factorized_gpt2 import FactorizedGPT2
from factorized_gpt2.cli.compress import compress
from factorized_gpt2.hub.repository import publish
from factorized_gpt2.models.verification import probe_logits
from factorized_gpt2.runs.folder import save_model
from factorized_gpt2.text.tokenizers import load_tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
PROMPTS = ["The wife of the mill", "A dog"]

tied = pytest.mark.parametrize("variant", [VARIANTS["tied"]], ids=["tied"])


@pytest.fixture(scope="module")
def chat_tokenizer(corpus):
    tokenizer = load_tokenizer(str(corpus / "tokenizer"))
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def folder(variant, chat_tokenizer, tmp_path):
    """Save a model and its tokenizer, as `compress.py` leaves them."""
    model = tiny_model(**variant, vocab_size=len(chat_tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(tmp_path / "model")
    chat_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def plain(folder):
    return FactorizedGPT2.from_pretrained(folder).eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


def relative_error(model, ids, truth) -> float:
    return ((logits_of(model, ids).float() - truth).norm() / truth.norm()).item()


# Loading


@pytest.mark.parametrize("missing", [None, "transformer.h.0.mlp.mlp_up.weight"])
def test_loading_draws_only_what_the_folder_lacks(folder, plain, missing):
    if missing:
        plain.save_pretrained(folder, state_dict={n: w for n, w in plain.state_dict().items() if n != missing})
    before = torch.get_rng_state()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before) is (missing is None)
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, plain.get_parameter(name)) is (name != missing)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"device_map": "auto"}, {"cpu"}),
        ({"device_map": "cpu"}, {"cpu"}),
        ({"device_map": "auto", "max_memory": {"cpu": "100KB"}}, {"cpu", "meta"}),
        ({"device_map": "auto", "max_memory": {"cpu": "1KB"}}, {"meta"}),
    ],
)
def test_a_device_map_places_weights_and_changes_nothing(folder, plain, options, where, tmp_path):
    ids = random_ids()
    options = options | ({"offload_folder": tmp_path / "offloaded"} if "max_memory" in options else {})
    placed = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert {weight.device.type for weight in placed.parameters()} == where
    assert torch.equal(logits_of(placed, ids), logits_of(plain, ids))
    with torch.no_grad():
        loss = placed.train()(ids, labels=ids).loss
        torch.testing.assert_close(loss, plain(ids, labels=ids).loss)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(placed.eval().generate(ids, **greedy), plain.generate(ids, **greedy))


def test_an_empty_model_is_filled_by_accelerate(folder, plain):
    with init_empty_weights():
        empty = FactorizedGPT2(plain.config)
    assert {weight.device.type for weight in empty.parameters()} == {"meta"}
    empty.tie_weights()
    filled = load_checkpoint_and_dispatch(empty, folder, device_map="auto").eval()
    assert torch.equal(logits_of(filled, random_ids()), logits_of(plain, random_ids()))


@tied
@pytest.mark.parametrize(
    ("asked", "got"),
    [({}, torch.bfloat16), ({"dtype": "auto"}, torch.bfloat16), ({"dtype": "float32"}, torch.float32)],
)
def test_dtype_is_the_folders_unless_another_is_asked_for(folder, plain, asked, got):
    plain.bfloat16().save_pretrained(folder)
    assert {weight.dtype for weight in AutoModelForCausalLM.from_pretrained(folder, **asked).parameters()} == {got}
    assert pipeline("text-generation", model=str(folder), **asked).model.dtype is got


@tied
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_chosen_on_loading(folder, plain, attention):
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    assert loaded.config._attn_implementation == loaded.transformer.h[0].attn.config._attn_implementation == attention
    torch.testing.assert_close(logits_of(loaded, random_ids()), logits_of(plain, random_ids()), atol=1e-4, rtol=1e-4)


# Text


def test_pipeline_generates_from_a_folder(folder, plain, chat_tokenizer):
    generator = pipeline("text-generation", model=str(folder))
    assert type(generator.model) is FactorizedGPT2
    greedy = {"max_new_tokens": 6, "do_sample": False}
    singly = [generator(prompt, **greedy)[0]["generated_text"] for prompt in PROMPTS]
    for prompt, text in zip(PROMPTS, singly, strict=True):
        tokens = plain.generate(**chat_tokenizer(prompt, return_tensors="pt"), **greedy)[0]
        assert text == chat_tokenizer.decode(tokens, skip_special_tokens=True)
        assert text.startswith(prompt)
    generator.tokenizer.padding_side = "left"
    batched = generator(PROMPTS, batch_size=2, **greedy)
    assert [outputs[0]["generated_text"] for outputs in batched] == singly


@tied
def test_pipeline_answers_a_chat(folder):
    generator = pipeline("text-generation", model=str(folder))
    messages = [{"role": "user", "content": "Whose is the clock?"}]
    greedy = {"max_new_tokens": 6, "do_sample": False}
    answered = generator(messages, **greedy)[0]["generated_text"]
    assert answered[0] == messages[0]
    written = generator("user: Whose is the clock?\nassistant:", return_full_text=False, **greedy)
    assert answered[1:] == [{"role": "assistant", "content": written[0]["generated_text"]}]


def test_chat_templates_pass_through_compression_runs_and_the_hub(chat_tokenizer, tmp_path, monkeypatch):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "{{ tools }}" + TEMPLATE}
    baseline, run = tmp_path / "gpt_baseline", tmp_path / "gpt_run"
    tiny_model(n_embd_wte=None, vocab_size=len(tokenizer)).save_pretrained(baseline)
    tokenizer.save_pretrained(baseline)
    compress(["--baseline", str(baseline), "--ranks", "6", "--output_dir", str(tmp_path)])
    compressed = tmp_path / "gpt_pca_nofinetune_k6"

    model, probe = FactorizedGPT2.from_pretrained(compressed), random_ids()
    run.mkdir()
    for _ in range(2):  # the second run replaces what the first left
        save_model(run, model, AutoTokenizer.from_pretrained(compressed), probe, probe_logits(model, probe))
    for folder in (compressed, run):
        assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template, folder

    with HubServer({TOKEN: "me"}) as hub:
        reach(hub, monkeypatch)
        publish(run, "me/chat", token=TOKEN)
        published = hub.repos["me/chat"].files()
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        assert published[name] == (baseline / name).read_bytes()


# Compiled, quantized, with another vocabulary


def test_a_compiled_model_is_the_model():
    model, mask = tiny_model(n_layer=1), torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(random_ids(), attention_mask=mask).logits
        torch.testing.assert_close(compiled(random_ids(), attention_mask=mask).logits, expected)


@pytest.mark.parametrize("new_tokens", [5, -20])
def test_a_resized_vocabulary_trains_and_generates(folder, plain, new_tokens):
    size = plain.config.vocab_size + new_tokens
    plain.resize_token_embeddings(size)
    assert plain.transformer.wte.weight.shape == plain.lm_head.weight.shape == (size, plain.config.embedding_size)
    ids = torch.tensor([[size - 1, 5, size - 1, 6, size - 1, 7, size - 1]])
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2)
    for _ in range(30):
        plain.train()(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    plain.eval().save_pretrained(folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(reloaded.generate(ids[:, :2], max_new_tokens=5, do_sample=False), ids)


IN_TRUNK = {"q_proj", "k_proj", "v_proj", "c_proj", "mlp_up", "mlp_down"}


def int8_modules(model) -> set[str]:
    return {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module.weight.data).__name__ == "Int8Tensor"
    }


def test_torchao_makes_the_trunk_int8_in_place(plain):
    quantization = pytest.importorskip("torchao.quantization")
    ids, truth = random_ids(), logits_of(plain, random_ids())
    quantization.quantize_(
        plain,
        quantization.Int8WeightOnlyConfig(version=2),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and name.startswith("transformer.h."),
    )
    assert int8_modules(plain) == IN_TRUNK
    assert 0 < relative_error(plain, ids, truth) < 0.05
    assert plain.generate(ids, max_new_tokens=5, min_new_tokens=5).shape == (2, 15)


def test_torchao_loads_a_folder_as_int8_saves_and_loads_it(folder, plain, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    ids, truth = random_ids(), logits_of(plain, random_ids())
    kept = ["lm_head", "scale_down", "transformer.scale_up"]
    settings = TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2), modules_to_not_convert=kept)
    quantized = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings)
    assert int8_modules(quantized) == IN_TRUNK
    for name in ("transformer.wte.weight", "lm_head.weight"):
        assert torch.equal(quantized.get_parameter(name), plain.get_parameter(name))
    assert 0 < relative_error(quantized, ids, truth) < 0.05
    quantized.save_pretrained(tmp_path / "int8")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert int8_modules(reloaded) == IN_TRUNK
    assert torch.equal(logits_of(reloaded, ids), logits_of(quantized, ids))
    assert reloaded.generate(ids, max_new_tokens=5, min_new_tokens=5).shape == (2, 15)
    sizes = [(place / "model.safetensors").stat().st_size for place in (tmp_path / "int8", folder)]
    assert sizes[0] < 0.6 * sizes[1]
