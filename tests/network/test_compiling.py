"""Compiled, quantized and in half precision: the model stays what it is."""

import json

import pytest
import torch
from conftest import VOCAB_SIZE, perturb, random_ids, tiny_model
from datasets import Dataset
from torch import nn
from transformers import StaticCache

from factorized_gpt2.network.modeling_factorized_gpt2 import FactorizedGPT2Block
from factorized_gpt2.runs.fields import LORA_TARGETS
from factorized_gpt2.runs.run import run_experiment
from factorized_gpt2.runs.settings import RunArguments, parse_run
from factorized_gpt2.text.blocks import collate_blocks
from factorized_gpt2.trainer.adapters import add_lora
from factorized_gpt2.trainer.trainer import FactorizedTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*", "ignore:.*gradient_checkpointing")
NEW_TOKENS = 8


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(random_ids()).logits


def relative_error(model, truth: torch.Tensor) -> float:
    return ((logits_of(model).float() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("adapted", [False, True])
def test_training_compiles_one_block_with_causal_attention(monkeypatch, tmp_path, adapted):
    graphs = []

    def keep_graph(graph, _):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(
        FactorizedGPT2Block, "compile", lambda block, **_: nn.Module.compile(block, backend=keep_graph)
    )
    model = tiny_model(n_layer=4)
    model = add_lora(model, 2, 4, 0.1, LORA_TARGETS) if adapted else model
    args = RunArguments(
        output_dir=str(tmp_path), max_steps=2, use_cpu=True, torch_compile=True, report_to="none", disable_tqdm=True
    )
    data = Dataset.from_dict({"input_ids": random_ids(16, 12).numpy()}).with_format("numpy")
    FactorizedTrainer(model=model, args=args, train_dataset=data, data_collator=collate_blocks).train()
    assert len(graphs) == 1  # all blocks share it
    (attention,) = (node for node in graphs[0].graph.nodes if "scaled_dot_product_attention" in str(node.target))
    assert attention.kwargs["attn_mask"] is None
    assert attention.kwargs["is_causal"]


def test_a_compiled_run_with_adapters_is_the_run(tmp_path, corpus, tokenizer):
    tiny_model(n_embd_wte=None, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "gpt_baseline")
    tokenizer.save_pretrained(tmp_path / "gpt_baseline")
    words = ["--baseline", tmp_path / "gpt_baseline", "--n_embd_wte", 6, "--lora_rank", 2, "--lora_dropout", 0]
    words += ["--train_file", corpus / "train.jsonl", "--validation_file", corpus / "validation.jsonl"]
    words += ["--do_train", True, "--max_steps", 4, "--learning_rate", "1e-2", "--logging_steps", 1, "--dropout", 0]
    words += ["--block_size", 16, "--report_to", "none", "--disable_tqdm", True, "--use_cpu", True]
    words += ["--eval_strategy", "steps", "--eval_steps", 2, "--save_steps", 2, "--load_best_model_at_end", True]
    compiled = ["--torch_compile", True, "--torch_compile_backend", "aot_eager"]
    losses = []
    for name, more in (("plain", []), ("compiled", compiled)):
        run = parse_run([str(word) for word in [*words, "--output_dir", tmp_path / name, *more]])
        results = run_experiment(run)
        losses.append((results.eval_loss, results.train_loss))
        assert json.loads((tmp_path / name / "run.json").read_text())["torch_compile"] == bool(more)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def compiling_trainer(tmp_path, gpus: int) -> FactorizedTrainer:
    args = RunArguments(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, torch_compile=True, torch_compile_backend="aot_eager"
    )
    args._n_gpu = gpus
    rows = [{"input_ids": row} for row in random_ids(16, 12)]
    return FactorizedTrainer(model=tiny_model(), args=args, train_dataset=rows, data_collator=collate_blocks)


def compiled_blocks(model) -> list[bool]:
    return [block._compiled_call_impl is not None for block in model.transformer.h]


def test_a_trained_model_leaves_the_compiler_behind(tmp_path):
    trainer = compiling_trainer(tmp_path, gpus=1)
    assert compiled_blocks(trainer.model) == [True, True]
    model = trainer.trained_model()
    assert compiled_blocks(model) == [False, False]
    assert model(random_ids()).logits.shape[-1] == VOCAB_SIZE


def test_one_process_with_several_gpus_does_not_compile(tmp_path, caplog):
    trainer = compiling_trainer(tmp_path, gpus=2)
    assert compiled_blocks(trainer.model) == [False, False]
    assert "One process with 2 GPUs cannot compile" in caplog.text


def test_a_static_cache_decodes_in_one_graph(model):
    prompt = random_ids(1, 5)
    expected = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    forward = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    cache = StaticCache(config=model.config, max_cache_len=5 + NEW_TOKENS)
    tokens = prompt
    with torch.no_grad():
        outputs = model(prompt, past_key_values=cache, use_cache=True)
        for position in range(5, 5 + NEW_TOKENS):
            token = outputs.logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, token], dim=1)
            outputs = forward(token, past_key_values=cache, use_cache=True, position_ids=torch.tensor([[position]]))
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("part", ["transformer.h", ""])
def test_linear_layers_can_be_int8(model, part):
    truth = logits_of(model)
    target = model.get_submodule(part)
    quantized = torch.ao.quantization.quantize_dynamic(target, {nn.Linear}, torch.qint8)
    if part:
        model.transformer.h = quantized
    else:
        model = quantized
    assert not [module for module in model.transformer.h.modules() if type(module) is nn.Linear]
    assert 0 < relative_error(model, truth) < 0.1
    assert model.generate(random_ids(1, 5), max_new_tokens=NEW_TOKENS).shape == (1, 5 + NEW_TOKENS)


def test_bfloat16_decodes(model):
    truth = logits_of(model)
    assert relative_error(model.bfloat16(), truth) < 0.05
    assert model.generate(random_ids(1, 5), max_new_tokens=NEW_TOKENS).shape == (1, 5 + NEW_TOKENS)


def test_gelu_new_is_the_function_of_gpt2():
    model = tiny_model(activation_function="gelu_new")
    values = torch.linspace(-6, 6, 1001)
    spelled_out = 0.5 * values * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (values + 0.044715 * values**3)))
    torch.testing.assert_close(model.transformer.h[0].mlp.act(values), spelled_out, atol=2e-6, rtol=1e-5)
    assert model.config.activation_function == "gelu_new"


def test_merged_adapters_leave_nothing_behind():
    plain = tiny_model()
    adapted = add_lora(tiny_model(), 2, 4, 0.1, LORA_TARGETS)
    perturb(adapted)
    merged = adapted.merge_and_unload()
    assert {name: type(module) for name, module in merged.named_modules()} == {
        name: type(module) for name, module in plain.named_modules()
    }
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    assert not [name for name, module in merged.named_modules() if any(getattr(module, hook) for hook in hooks)]
    assert all(weight.is_contiguous() for weight in merged.parameters())
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert merged(random_ids()).logits.shape[-1] == VOCAB_SIZE
