"""A vocabulary of integers in the network: what it computes, what is stored of it, what works on it."""

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from accelerate import init_empty_weights
from conftest import RANK, VOCAB_SIZE, WIDTH, left_padded, random_ids, tiny_config, tiny_model
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from factorized_gpt2 import FactorizedGPT2, FactorizedGPT2Config, from_gpt2, to_gpt2
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.compress.quantizer import encode_table
from factorized_gpt2.models.loading import load_baseline, load_complete, load_compressed
from factorized_gpt2.models.onnx_export import export_onnx
from factorized_gpt2.models.sizes import model_size
from factorized_gpt2.network.coded_table import CodedTable

STREAM = "transformer.wte.stream"


@pytest.fixture(scope="module")
def baseline() -> FactorizedGPT2:
    return tiny_model(n_embd_wte=None)


def coded_table(baseline, bits: float) -> CodedTable:
    row_weights = 1 / (np.arange(VOCAB_SIZE) + 3.0)
    return encode_table(baseline.transformer.wte.weight.detach().numpy(), np.eye(WIDTH), row_weights, bits)


@pytest.fixture(scope="module", params=[7.5, 14], ids=["k of d and less", "k above d"])
def table(baseline, request) -> CodedTable:
    return coded_table(baseline, request.param)


@pytest.fixture
def coded(baseline, table) -> FactorizedGPT2:
    return from_gpt2(baseline, table)


@pytest.fixture
def saved(coded, tmp_path):
    coded.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def weight_files(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def assert_same(first, second):
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert tensor.dtype == states[1][name].dtype
        assert torch.equal(tensor, states[1][name]), name


def test_it_is_the_network_with_the_tables_matrix(baseline, table, coded, ids):
    """The head meets the matrix without its mean, which shifts all logits of a row alike."""
    plain = tiny_model(n_embd_wte=None)
    plain.transformer.wte.weight.data = torch.from_numpy(table.dense())
    plain.tie_weights()
    with torch.no_grad():
        expected, logits = plain(ids).logits.log_softmax(-1), coded(ids).logits.log_softmax(-1)
    assert coded.config.n_embd_wte == table.codes.shape[1]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)
    assert coded(ids, labels=ids).loss.item() == pytest.approx(baseline(ids, labels=ids).loss.item(), abs=0.1)


@pytest.mark.parametrize("backend", ["blockwise", "auto"])
def test_the_loss_without_logits_trains_all_but_codes(coded, ids, backend):
    coded.loss_backend = backend
    gradients = []
    for skip_logits in (True, False):
        coded.zero_grad()
        loss = coded(ids, labels=ids, skip_logits=skip_logits).loss
        loss.backward()
        gradients.append({name: weight.grad for name, weight in coded.named_parameters() if weight.grad is not None})
        gradients[-1]["loss"] = loss.detach()
    assert gradients[0].keys() == gradients[1].keys()
    names = {"transformer.wte.steps", "transformer.scale_up.weight", "transformer.scale_up.bias", "scale_down.weight"}
    assert names < gradients[0].keys()
    assert "transformer.wte.codes" not in gradients[0]
    for name, gradient in gradients[0].items():  # those of keys' biases are 0 but for rounding
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_a_frozen_head_and_the_attention_backend(coded, ids):
    coded.loss_backend = "attention"
    with pytest.raises(ValueError, match="attention needs a frozen plain head"):
        coded(ids, labels=ids, skip_logits=True)


def test_autocast(coded, ids):
    with torch.autocast("cpu", torch.bfloat16):
        logits = coded(ids).logits
        loss = coded.train()(ids, labels=ids).loss
    loss.backward()
    assert logits.dtype == torch.bfloat16
    assert coded.scale_down.weight.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(coded.eval()(ids, labels=ids).loss.item(), abs=0.05)


def test_a_file_holds_the_bytes_of_the_table(table, coded, saved):
    stored = load_file(saved / "model.safetensors")
    assert stored[STREAM].numpy().tobytes() == table.to_bytes()
    assert not [name for name in stored if "scale" in name or "head" in name or name.startswith("transformer.wte.c")]
    for model in (FactorizedGPT2.from_pretrained(saved), AutoModelForCausalLM.from_pretrained(saved)):
        assert_same(model, coded)
        assert model.lm_head.codes is model.transformer.wte.codes
        assert not model.training
        model.save_pretrained(saved.parent / "again")
        assert weight_files(saved.parent / "again") == weight_files(saved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_comes_back(coded, saved, dtype, ids):
    half = FactorizedGPT2.from_pretrained(saved, dtype=dtype)
    assert half.dtype == half.transformer.wte.steps.dtype == dtype
    assert torch.equal(half.transformer.wte.codes, coded.transformer.wte.codes)
    half.save_pretrained(saved.parent / "half")
    assert load_file(saved.parent / "half/model.safetensors").keys() == load_file(saved / "model.safetensors").keys()
    again = FactorizedGPT2.from_pretrained(saved.parent / "half")
    assert_same(again, half)
    torch.testing.assert_close(again(ids).logits.float(), coded(ids).logits, rtol=0.05, atol=0.3)


def test_what_was_trained_is_stored_beside_the_bytes(coded, tmp_path):
    with torch.no_grad():
        coded.transformer.wte.steps *= 1.01
        coded.scale_down.weight += 0.1
    coded.save_pretrained(tmp_path / "trained")
    stored = load_file(tmp_path / "trained/model.safetensors")
    assert {"transformer.wte.steps", "scale_down.weight", STREAM} < stored.keys()
    assert "transformer.scale_up.weight" not in stored
    assert_same(FactorizedGPT2.from_pretrained(tmp_path / "trained"), coded)


def test_a_refined_table_comes_back(baseline, ids, tmp_path):
    """One whose head has a bias and steps and scales of its own."""
    table, generator = coded_table(baseline, 7.5), np.random.default_rng(0)
    table = replace(
        table,
        gains=generator.integers(-9, 9, VOCAB_SIZE).astype(np.int8),
        bias_codes=generator.integers(-40, 40, VOCAB_SIZE).astype(np.int8),
        head_scale_steps=(table.scale_steps * generator.uniform(0.9, 1.1, len(table.scale_steps))).astype(np.float16),
    )
    model = from_gpt2(baseline, table)
    plain = baseline.transformer(inputs_embeds=torch.from_numpy(table.dense())[ids]).last_hidden_state
    expected = plain @ torch.from_numpy(table.dense_head()).T + torch.from_numpy(table.bias)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.dequantize()(ids).logits, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored[STREAM].numpy().tobytes() == table.to_bytes()
    assert not [name for name in stored if "lm_head" in name or "scale" in name]
    assert_same(FactorizedGPT2.from_pretrained(tmp_path), model)
    AutoModel.from_pretrained(tmp_path)


def test_a_network_from_nowhere_is_stored_too(tmp_path, ids):
    model = FactorizedGPT2(tiny_config(vocabulary_dtype="int8", lm_head_bias=True))
    model.lm_head.bias.data.normal_()
    assert model.transformer.wte.dense().std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.isfinite(model(ids).logits).all()
    model.save_pretrained(tmp_path)
    assert_same(FactorizedGPT2.from_pretrained(tmp_path), model)


def test_the_trunk_alone_and_a_classifier(coded, saved, ids):
    trunk = AutoModel.from_pretrained(saved)
    expected = coded.transformer(ids).last_hidden_state
    torch.testing.assert_close(trunk(ids).last_hidden_state, expected)
    trunk.save_pretrained(saved.parent / "trunk")
    torch.testing.assert_close(AutoModel.from_pretrained(saved.parent / "trunk")(ids).last_hidden_state, expected)
    classifier = AutoModelForSequenceClassification.from_pretrained(saved, num_labels=3)
    classifier.save_pretrained(saved.parent / "classifier")
    assert_same(AutoModelForSequenceClassification.from_pretrained(saved.parent / "classifier"), classifier)


def test_it_loads_where_the_package_is_not(coded, saved, ids, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    assert config["vocabulary_dtype"] == "int8"
    script = f"""
import sys, torch
sys.modules["factorized_gpt2"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(saved)!r}, trust_remote_code=True, device_map="cpu")
model.save_pretrained({str(tmp_path / "from_there")!r})
torch.save(model(torch.tensor({ids.tolist()})).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, capture_output=True, text=True)
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(logits, coded(ids).logits)
    assert weight_files(tmp_path / "from_there") == weight_files(saved)


def test_copies_are_copies(coded, ids):
    for copied in (copy.deepcopy(coded), pickle.loads(pickle.dumps(coded))):
        assert_same(copied, coded)
        assert copied.lm_head.codes is copied.transformer.wte.codes
    with init_empty_weights():
        empty = FactorizedGPT2(coded.config)
    empty.load_state_dict(coded.state_dict(), assign=True)
    torch.testing.assert_close(empty(ids).logits, coded(ids).logits)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="5.10 compares tied tensors that it has put on disk"
)
def test_a_disk_holds_a_part(coded, saved, ids, tmp_path):
    places = dict.fromkeys(("transformer.wte", "lm_head", "transformer.h", "scale_down"), "disk")
    places |= {f"transformer.{name}": "cpu" for name in ("scale_up", "wpe", "drop", "ln_f")}
    model = FactorizedGPT2.from_pretrained(saved, device_map=places, offload_folder=tmp_path / "offloaded")
    torch.testing.assert_close(model(ids).logits, coded(ids).logits)
    with pytest.raises(ValueError, match="Offloaded weights cannot be encoded"):
        model.save_pretrained(tmp_path / "again")


def test_several_devices_and_shards(coded, saved, ids):
    coded.save_pretrained(saved.parent / "shards", max_shard_size="20KB")
    assert len(list((saved.parent / "shards").glob("*.safetensors"))) > 1
    model = FactorizedGPT2.from_pretrained(saved.parent / "shards", device_map="auto")
    torch.testing.assert_close(model(ids).logits, coded(ids).logits)


def test_an_onnx_graph_holds_integers(coded, ids, tmp_path):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export_onnx(coded, tmp_path / "model.onnx")
    stored = {tuple(tensor.dims): tensor.data_type for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert stored[tuple(coded.lm_head.codes.shape)] == onnx.TensorProto.INT8
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    feed = {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)}
    empty = np.zeros((len(ids), 4, 0, WIDTH // 4), np.float32)
    feed |= {entry.name: empty for entry in session.get_inputs() if entry.name.startswith("past")}
    logits = torch.from_numpy(session.run(["logits"], feed)[0])
    torch.testing.assert_close(logits, coded(ids).logits, rtol=1e-4, atol=1e-4)


def test_generation_with_and_without_a_cache(coded):
    batch = left_padded([random_ids(1, 5)[0], random_ids(1, 9, seed=1)[0]])
    found = [coded.generate(**batch, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*found)


def test_gpt2_and_floats_compute_the_same(coded, ids):
    for other in (to_gpt2(coded), coded.dequantize()):
        torch.testing.assert_close(other(ids).logits, coded(ids).logits, rtol=1e-5, atol=1e-5)
    floats = coded.dequantize(torch.float64)
    assert floats.dtype == torch.float64
    if coded.config.n_embd_wte < WIDTH:
        assert floats.config.n_embd_wte == coded.config.n_embd_wte
        assert floats.lm_head.weight is floats.transformer.wte.weight
    else:
        assert not floats.config.is_factorized
    with pytest.raises(ValueError, match="already consists of floats"):
        floats.dequantize()
    with pytest.raises(ValueError, match="The head has a bias"):
        to_gpt2(FactorizedGPT2(tiny_config(lm_head_bias=True)))


def test_it_compiles_whole(coded, ids):
    compiled = torch.compile(coded, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, coded(ids).logits, rtol=1e-5, atol=1e-5)
    compiled(ids, labels=ids, skip_logits=True).loss.backward()
    assert coded.transformer.wte.steps.grad.abs().sum() > 0


def test_embeddings_in_the_place_of_ids(coded, ids):
    embeds = coded.get_input_embeddings()(ids)
    assert embeds.shape == (*ids.shape, coded.config.n_embd_wte)
    torch.testing.assert_close(coded(inputs_embeds=embeds).logits, coded(ids).logits)


def test_lora_on_trunk_and_scale_matrices(coded, ids, tmp_path):
    before = {name: tensor.clone() for name, tensor in coded.state_dict().items()}
    targets = ["q_proj", "mlp_up", "scale_up", "scale_down"]
    adapted = get_peft_model(coded, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets))
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        loss = adapted.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.eval().save_pretrained(tmp_path)
    expected = adapted(input_ids=ids).logits
    base = FactorizedGPT2(coded.config)
    base.load_state_dict(before)
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path).eval()(input_ids=ids).logits, expected)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert_same(FactorizedGPT2.from_pretrained(tmp_path / "merged"), merged)
    assert torch.equal(merged.transformer.wte.codes, before["transformer.wte.codes"])


def test_stock_trainer_goes_on_from_its_checkpoints(baseline, tmp_path):
    """What a checkpoint holds is the bytes; going on from it gives what training through would have."""
    rows = [{"input_ids": row, "labels": row} for row in random_ids(8, 12)]

    def train(name, steps, resume=False):
        model = from_gpt2(baseline, coded_table(baseline, 7.5))
        arguments = TrainingArguments(
            tmp_path / name, max_steps=steps, save_steps=2, report_to=[], learning_rate=1e-2, disable_tqdm=True,
            lr_scheduler_type="constant", per_device_train_batch_size=2, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    train("cut", 2)
    assert STREAM in load_file(tmp_path / "cut/checkpoint-2/model.safetensors")
    gone_on, through = train("cut", 4, resume=True), train("whole", 4)
    for name, tensor in through.state_dict().items():
        torch.testing.assert_close(gone_on.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "where", [{"target_modules": ["wte"]}, {"modules_to_save": ["wte"]}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_adapters_on_codes_are_refused_with_the_way_out(coded, where):
    lora = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]} | where
    with pytest.raises(ValueError, match=r"can be neither adapted nor trained; `dequantize\(\)`"):
        get_peft_model(coded, LoraConfig(**lora))


def test_resizing_is_refused_with_the_way_out(coded):
    with pytest.raises(AttributeError, match=r"`dequantize\(\)` of the model"):
        coded.resize_token_embeddings(VOCAB_SIZE + 1)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda data: data[:-9], "checksum"),
        (lambda data: data[:3], "checksum"),
        (lambda data: torch.cat([data[:99], data[99:100] ^ 1, data[100:]]), "checksum"),
        (lambda data: data[:0], "checksum"),
    ],
    ids=["truncated", "a few bytes", "a bit", "nothing"],
)
def test_damaged_bytes_are_one_line(saved, damage, complaint):
    stored = load_file(saved / "model.safetensors")
    save_file(stored | {STREAM: damage(stored[STREAM])}, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=complaint) as raised:
        FactorizedGPT2.from_pretrained(saved)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"cannot be read.*checksum"):
        load_complete(str(saved))


def test_a_table_of_another_shape_or_kind_is_one_line(coded, saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"n_embd_wte": 7}))
    with pytest.raises(ValueError, match="The coded matrix has V, k, d = "):
        FactorizedGPT2.from_pretrained(saved)
    (saved / "config.json").write_text(json.dumps(config | {"vocabulary_dtype": None, "n_embd_wte": RANK}))
    with pytest.raises(UserError, match=r"do not make its model: missing .*unexpected .*wte\.stream"):
        load_complete(str(saved))
    with pytest.raises(ValueError, match="has an integer vocabulary, but the configuration says floats"):
        tiny_model().load_state_dict(load_file(saved / "model.safetensors"))
    (saved / "config.json").write_text(json.dumps(config))
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"can only be read from safetensors, not from pytorch_model\.bin"):
        FactorizedGPT2.from_pretrained(saved)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"vocabulary_dtype": "int4"}, "vocabulary_dtype"),
        ({"vocabulary_dtype": "int8", "n_embd_wte": None}, "needs n_embd_wte"),
        ({"vocabulary_dtype": "int8", "tie_word_embeddings": False}, "needs tie_word_embeddings"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(fields, complaint):
    with pytest.raises(Exception, match=complaint):
        FactorizedGPT2Config(**{"n_embd_wte": 8} | fields)


def test_the_packages_own_loading_and_counting(coded, saved, table):
    model = load_compressed(str(saved))
    assert_same(model, coded)
    size = model_size(model)
    side = 4 * (VOCAB_SIZE + 2 * WIDTH * table.codes.shape[1] + WIDTH)
    assert size.vocabulary_bytes == table.codes.size + side
    with pytest.raises(UserError, match="factorized already"):
        load_baseline(str(saved))
