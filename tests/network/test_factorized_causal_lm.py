"""Any decoder of transformers with a factorized vocabulary: the same numbers, at home in the same tools."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import checkpoint_activations
from decoders import ARCHITECTURES, VOCAB_SIZE, tiny_decoder
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Trainer,
    TrainingArguments,
    pipeline,
)

from factorized_gpt2 import FactorizedCausalLM, FactorizedCausalLMConfig, from_causal_lm, from_gpt2, to_causal_lm
from factorized_gpt2.compress.quantizer import encode_table
from factorized_gpt2.models.decoder_conversion import vocabulary_matrices_of
from factorized_gpt2.models.factors import Factors
from factorized_gpt2.network.coded_table import CodedTable

RANK = 10

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),  # PEFT calls it so
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),  # PEFT mends it for GPT-2's Conv1D
]

every = pytest.mark.parametrize("kind", ARCHITECTURES)
some = pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_neox", "phi", "cohere", "gpt2"])
tied = pytest.mark.parametrize("kind", ["llama", "gemma3_text", "opt", "cohere"])


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(2, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(0))


def random_factors(model, rank: int = RANK) -> Factors:
    wte, head = vocabulary_matrices_of(model)
    draw = np.random.default_rng(0).standard_normal
    (size, width) = wte.shape
    matrices = [0.3 * draw(shape) for shape in ((size, rank), (rank, width), (width, rank), (width,), (rank, size))]
    *shared, own = (matrix.astype(np.float32) for matrix in matrices)
    return Factors(*shared, 1.0, None if head is None else own)


def whole(model) -> Factors:
    """Return factors of full rank that multiply by ones and zeros alone."""
    wte, head = vocabulary_matrices_of(model)
    one = np.eye(wte.shape[1], dtype=np.float32)
    return Factors(wte, one, one, np.zeros(len(one), np.float32), 1.0, None if head is None else head.T)


def coded_table(model) -> CodedTable:
    wte, _ = vocabulary_matrices_of(model)
    row_weights = 1 / (np.arange(len(wte)) + 3.0)
    return encode_table(wte, np.eye(wte.shape[1]), row_weights, 6.0)


def factorized(kind: str) -> FactorizedCausalLM:
    model = tiny_decoder(kind)
    return from_causal_lm(model, random_factors(model))


def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@every
def test_at_full_rank_it_is_the_model(kind, ids):
    """To the bit: products with ones and zeros round nothing."""
    model = tiny_decoder(kind)
    assert torch.equal(logits_of(from_causal_lm(model, whole(model)), ids), logits_of(model, ids))


@every
def test_it_is_the_expanded_stock_model(kind, ids):
    model = factorized(kind)
    stock = to_causal_lm(model)
    assert type(stock) is type(tiny_decoder(kind))
    torch.testing.assert_close(logits_of(model, ids), logits_of(stock, ids), atol=5e-6, rtol=1e-5)
    assert stock.get_input_embeddings().weight is not stock.get_output_embeddings().weight


@every
def test_generation_with_every_cache_and_without(kind, ids):
    model = factorized(kind)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    words = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    expected = to_causal_lm(model).generate(ids, **words)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(model.generate(ids, **words, **options), expected)
    beams = [each.generate(ids, **words, num_beams=3) for each in (model, to_causal_lm(model))]
    assert torch.equal(*beams)


def test_what_is_set_in_a_config_is_set_in_the_decoders_where_it_is_from_there():
    config = factorized("llama").config
    assert config.use_cache
    config.use_cache = config.tie_word_embeddings = False
    again = FactorizedCausalLMConfig(**config.to_dict())
    for each in (config, again):
        assert (each.use_cache, each.base_config.use_cache, each.tie_word_embeddings) == (False, False, False)
    assert "use_cache" not in config.to_diff_dict()


def test_no_local_path_is_saved(tmp_path):
    model = factorized("llama")
    model.config.base_config._name_or_path = "/home/me/llama"
    model.save_pretrained(tmp_path)
    assert "/home/me" not in (tmp_path / "config.json").read_text()
    assert "/home/me" not in model.config.to_json_string()


def test_no_plan_ties_or_shards_what_the_decoder_has_no_longer():
    model = factorized("llama")
    assert {"model.lm_head", "model.model.embed_tokens"}.isdisjoint(model.tp_plan)
    assert model.tp_plan["model.model.layers.*.self_attn.q_proj"] == "colwise"
    assert model.all_tied_weights_keys == {"lm_head.weight": "wte.weight"}
    assert not model.model._tied_weights_keys


def test_gpt2_is_factorized_gpt2(ids):
    model = tiny_decoder("gpt2")
    factors = random_factors(model)
    ours, any_decoder = from_gpt2(model, factors), from_causal_lm(model, factors)
    torch.testing.assert_close(logits_of(any_decoder, ids), logits_of(ours, ids), atol=1e-6, rtol=1e-6)
    table = coded_table(model)
    ours, any_decoder = from_gpt2(model, table), from_causal_lm(model, table)
    torch.testing.assert_close(logits_of(any_decoder, ids), logits_of(ours, ids), atol=1e-6, rtol=1e-6)


@every
def test_the_loss_and_its_gradients_without_logits(kind, ids):
    model = factorized(kind)
    labels = ids.clone()
    labels[0, :5] = -100
    gradients = []
    for skip_logits in (True, False):
        model.zero_grad()
        outputs = model(input_ids=ids, labels=labels, skip_logits=skip_logits)
        assert (outputs.logits is None) == skip_logits
        outputs.loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()} | {"loss": outputs.loss})
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, atol=1e-5, rtol=1e-4, msg=name)
    summed = [model(input_ids=ids, labels=ids, skip_logits=skip, num_items_in_batch=5).loss for skip in (True, False)]
    torch.testing.assert_close(*summed)


@pytest.mark.parametrize("kind", ["gemma2", "llama"])
def test_a_row_loss_sees_the_models_logits(kind, ids):
    model, seen = factorized(kind), []

    def row_loss(logits, rows):
        seen.append(logits.clone())
        return logits.new_zeros(len(logits), 1), logits.new_ones(len(logits), 1)

    model(input_ids=ids, row_loss=row_loss)
    torch.testing.assert_close(torch.cat(seen), logits_of(model, ids).flatten(0, 1), atol=1e-5, rtol=1e-5)


@every
def test_embeddings_are_what_wte_yields(kind, ids):
    model = factorized(kind)
    with torch.no_grad():
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert torch.equal(embedded, logits_of(model, ids))


@some
def test_checkpointed_activations_and_copies(kind, ids):
    model = factorized(kind).train()
    twin = copy.deepcopy(model)
    checkpoint_activations(twin)
    gradients = []
    for each in (model, twin):
        each(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(each.wte.weight.grad)
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        twin.wte.weight.zero_()  # of which the other's decoder knows nothing
    assert not torch.equal(logits_of(twin.eval(), ids), logits_of(model.eval(), ids))


def test_a_bfloat16_model(ids):
    model = tiny_decoder("gemma3_text")
    for parameter in model.parameters():  # not the buffers, which stay in float32 when a model is loaded
        parameter.data = parameter.data.bfloat16()
    small = from_causal_lm(model, whole(model))
    assert small.dtype == torch.bfloat16
    assert torch.equal(logits_of(small, ids), logits_of(model, ids))


def test_resizing_the_vocabulary(ids):
    for kind in ("llama", "phi"):
        model = factorized(kind)
        before = logits_of(model, ids)
        model.resize_token_embeddings(VOCAB_SIZE + 3)
        after = logits_of(model, ids)
        assert after.shape[-1] == model.config.vocab_size == VOCAB_SIZE + 3
        torch.testing.assert_close(after[..., :VOCAB_SIZE], before)
        assert model(input_ids=ids, labels=ids).loss.isfinite()


def test_adapters_on_wte_are_followed_by_a_tied_head(ids):
    adapted = get_peft_model(factorized("llama"), LoraConfig(target_modules=["wte"], r=2, task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    expected = logits_of(adapted.eval(), ids)
    torch.testing.assert_close(logits_of(adapted.merge_and_unload(), ids), expected, atol=1e-5, rtol=1e-5)


@every
def test_lora_on_all_linear_trains_saves_and_merges(kind, ids, tmp_path):
    model = factorized(kind)
    start = logits_of(model, ids)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM"))
    names = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if "lora_" in name}
    assert {"scale_up", "scale_down"} < names
    assert "lm_head" not in names
    optimizer = torch.optim.Adam((each for each in adapted.parameters() if each.requires_grad), lr=0.02)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = adapted.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    expected = logits_of(adapted.eval(), ids)
    assert not torch.equal(expected, start)
    adapted.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(PeftModel.from_pretrained(model, tmp_path / "adapter"), ids), expected)
    torch.testing.assert_close(logits_of(adapted.merge_and_unload(), ids), expected, atol=2e-5, rtol=1e-4)


def test_the_stock_trainer_trains_saves_and_goes_on(ids, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in ids.repeat(4, 1)]
    words = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "save_steps": 2, "disable_tqdm": True}
    ends = []
    for steps in (2, 4):
        model = factorized("llama")
        trainer = Trainer(model, TrainingArguments(**words, max_steps=steps), train_dataset=rows)
        trainer.train(resume_from_checkpoint=steps > 2)
        ends.append(logits_of(model.eval(), ids))
    assert not torch.equal(*ends)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert torch.equal(logits_of(loaded, ids), ends[1])


@tied
def test_a_vocabulary_of_integers(kind, ids, tmp_path):
    model = tiny_decoder(kind)
    table = coded_table(model)
    coded = from_causal_lm(model, table)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.from_numpy(table.dense()))
    small, large = (each.log_softmax(-1) for each in (logits_of(coded, ids), logits_of(model, ids)))
    if kind not in ("cohere",):  # which scales logits, and with them what shifts all alike
        torch.testing.assert_close(small, large, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(logits_of(coded.dequantize(), ids), logits_of(coded, ids), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits_of(to_causal_lm(coded), ids), logits_of(coded, ids), atol=1e-5, rtol=1e-5)
    coded.train()(input_ids=ids, labels=ids).loss.backward()
    assert coded.scale_up.weight.grad.abs().max() > 0
    coded.save_pretrained(tmp_path / "first")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert isinstance(again, FactorizedCausalLM)
    assert torch.equal(logits_of(again, ids), logits_of(coded.eval(), ids))
    again.save_pretrained(tmp_path / "second")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second


STRANGER = """
import json, sys, torch
sys.modules["factorized_gpt2"] = None
from transformers import AutoModelForCausalLM
for folder in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, device_map="cpu")
    ids = torch.load(sys.argv[2])
    model.save_pretrained(folder + "-again")
    outputs = [model(input_ids=ids).logits.detach(), model.generate(ids, max_new_tokens=5, do_sample=False)]
    torch.save(outputs, folder + ".pt")
"""


def test_they_load_where_the_package_is_not(ids, tmp_path):
    models = {kind: factorized(kind) for kind in ARCHITECTURES}
    models |= {
        f"coded-{kind}": from_causal_lm(each := tiny_decoder(kind), coded_table(each)) for kind in ("llama", "opt")
    }
    for kind, model in models.items():
        model.save_pretrained(tmp_path / kind)
    torch.save(ids, tmp_path / "ids.pt")
    words = json.dumps([str(tmp_path / kind) for kind in models]), str(tmp_path / "ids.pt")
    subprocess.run([sys.executable, "-c", STRANGER, *words], check=True, cwd=tmp_path, capture_output=True, text=True)
    for kind, model in models.items():
        logits, generated = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
        torch.testing.assert_close(logits, logits_of(model, ids), atol=1e-6, rtol=1e-6)
        assert torch.equal(generated, model.generate(ids, max_new_tokens=5, do_sample=False))
        stored = [(tmp_path / name / "model.safetensors").read_bytes() for name in (kind, f"{kind}-again")]
        assert stored[0] == stored[1]


def test_a_new_model_starts_small(ids):
    config = FactorizedCausalLMConfig(base_config=tiny_decoder("llama").config.to_dict(), n_embd_wte=8)
    model = AutoModelForCausalLM.from_config(config)
    assert model.lm_head.weight is model.wte.weight
    assert logits_of(model, ids).abs().max() < 1
    assert config.hidden_size == 32
    assert copy.deepcopy(config).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ({"n_embd_wte": 0}, "n_embd_wte, of 1 or more; got 0"),
        ({"base_config": None}, "needs base_config"),
        ({"base_config": {"model_type": "nothing"}}, "model_type 'nothing', which transformers does not know"),
        ({"vocabulary_dtype": "int4"}, 'must be "int8"'),
        ({"vocabulary_dtype": "int8", "tie_word_embeddings": False}, "needs tie_word_embeddings"),
    ],
)
def test_configurations_that_nobody_can_build_are_refused(words, complaint):
    with pytest.raises(Exception, match=complaint):
        FactorizedCausalLMConfig(**({"base_config": {"model_type": "llama"}, "n_embd_wte": 8} | words))


REFUSED = {
    "bert": (AutoModelForCausalLM, {}, "BertLMHeadModel is an encoder"),
    "t5": (
        AutoModelForSeq2SeqLM,
        {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
        "more than",
    ),
    "mamba": (AutoModelForCausalLM, {"state_size": 4}, "MambaForCausalLM is recurrent"),
    "llama": (AutoModel, {}, "LlamaModel has as embedding and head: Embedding and none"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_decoder_with_a_linear_head_is_named(kind):
    auto, words, complaint = REFUSED[kind]
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = auto.from_config(AutoConfig.for_model(kind, **(sizes | words)))
    factors = Factors(*(np.zeros((1, 1), np.float32),) * 4, 1.0)
    with pytest.raises(ValueError, match=complaint + ".*supported are causal decoders with one token embedding"):
        from_causal_lm(model, factors)


def test_a_head_of_several_layers_is_named():
    model = tiny_decoder("mistral")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="MistralForCausalLM has as embedding and head: Embedding and Sequential"):
        from_causal_lm(model, random_factors(tiny_decoder("llama")))


def test_factors_that_do_not_fit_are_refused():
    llama, neox = tiny_decoder("llama"), tiny_decoder("gpt_neox")
    with pytest.raises(ValueError, match="for a head that is tied, but the model's is not"):
        from_causal_lm(neox, random_factors(llama))
    with pytest.raises(ValueError, match="A coded table is for a head that is tied"):
        from_causal_lm(neox, coded_table(neox))
    with pytest.raises(ValueError, match=r"'wte.weight' has shape \(99, 10\), the model needs \(50, 10\)"):
        from_causal_lm(tiny_decoder("llama", vocab_size=50), random_factors(llama))
    with pytest.raises(ValueError, match="is a model of this package already"):
        from_causal_lm(factorized("llama"), random_factors(llama))


def test_a_pipeline_writes_with_it(tokenizer):
    model = from_causal_lm(each := tiny_decoder("llama", vocab_size=len(tokenizer)), random_factors(each))
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    (written,) = writer("def f(", max_new_tokens=5, do_sample=False)
    assert written["generated_text"].startswith("def f(")
