"""What holds on a CPU holds on CUDA: numbers, training in fp16, decoding, memory. On a CPU all of it runs in small.

Needs neither `datasets` nor a network. `pytest tests/test_cuda.py -k "not cpu"` takes an H200 and its compiler two
minutes.
"""

import copy
import gc
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import NO_DROPOUT, TOKENS
from peft import PeftModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, linear
from transformers import StaticCache

from factorized_gpt2 import FactorizedGPT2, FactorizedGPT2Config, from_gpt2
from factorized_gpt2.compress.calibration import calibrate, compensated_head
from factorized_gpt2.compress.methods import METHODS
from factorized_gpt2.compress.refinement import refine
from factorized_gpt2.models.conversion import vocabulary_matrices
from factorized_gpt2.models.verification import probe_logits
from factorized_gpt2.network.blockwise_loss import BACKENDS, cut_cross_entropy_is_exact, sum_cross_entropy
from factorized_gpt2.network.coded_vocabulary import CodedHead
from factorized_gpt2.runs.fields import LORA_TARGETS
from factorized_gpt2.runs.settings import parse_run
from factorized_gpt2.text.blocks import collate_blocks
from factorized_gpt2.trainer.adapters import add_lora, merge
from factorized_gpt2.trainer.trainer import FactorizedTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*tie_word_embeddings")

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no CUDA here.")
on_both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])

# Norms of errors against float64, relative. An error may be twice that of plain PyTorch in the same dtype, and the
# first beyond; and it may not exceed the second.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}
CEILING = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
HALF_SUMS = {torch.bfloat16: 6e-2, torch.float16: 6e-3}  # of cut-cross-entropy 25.1.1, which settings warn of
DTYPES = pytest.mark.parametrize("dtype", FLOOR, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _alone():
    """Let no test see what another left: TF32, which compiled training turns on for its process, and memory."""
    products = torch.backends.cuda.matmul
    products.fp32_precision = "ieee"
    yield
    products.fp32_precision = "ieee"
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_exact(ours: list, plain: list, truth: list, dtype: torch.dtype) -> None:
    """Compare values with float64, beside what plain PyTorch comes to."""
    for value, other, expected in zip(ours, plain, truth, strict=True):
        own = error(value, expected)
        assert own <= 2 * error(other, expected) + FLOOR[dtype]
        assert own <= CEILING[dtype]


def materialised(hidden, weight, labels):
    logits = linear(hidden, weight)
    return cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels, reduction="sum")


def differentiate(function, hidden, weight, labels, trained: bool) -> list[torch.Tensor]:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_(trained)
    loss = function(hidden, weight, labels)
    return [loss.detach(), *torch.autograd.grad(loss, [hidden, weight] if trained else [hidden])]


@on_both
@DTYPES
@pytest.mark.parametrize("rank", [64, 768])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "logits"])
def test_every_backend_is_exact(device, dtype, rank, trained, backend):
    rows, vocabulary = (1000, 50257) if device == "cuda" else (50, 301)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, rank, generator=generator).to(device, dtype)
    weight = (3 * torch.randn(vocabulary, rank, generator=generator) / rank**0.5).to(device, dtype)
    labels = torch.randint(vocabulary, (rows,), generator=generator).to(device)
    labels[::7] = -100
    problem = (hidden, weight, labels, trained)

    def loss(*inputs):
        return sum_cross_entropy(*inputs, backend=backend)

    if backend not in ("blockwise", "auto"):
        try:
            loss(hidden, weight.detach().requires_grad_(trained), labels)
        except ValueError as refusal:
            pytest.skip(f"not here: {refusal}")
    truth = differentiate(materialised, hidden.double(), weight.double(), labels, trained)
    if backend == "cut_cross_entropy" and not cut_cross_entropy_is_exact():
        for value, expected in zip(differentiate(loss, *problem), truth, strict=True):
            assert error(value, expected) <= HALF_SUMS[dtype]
        return
    assert_exact(differentiate(loss, *problem), differentiate(materialised, *problem), truth, dtype)


def new_model(device: str, seed: int = 0, **overrides) -> FactorizedGPT2:
    """Make a model of two blocks with weights larger than fresh ones, so that their every part matters."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 997, "n_positions": 128, "n_embd": 128, "n_layer": 2, "n_head": 2, "n_embd_wte": 64}
    model = FactorizedGPT2(FactorizedGPT2Config(**shape | TOKENS | NO_DROPOUT | overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return model.eval().to(device)


def random_ids(device: str, batch: int = 2, length: int = 100) -> torch.Tensor:
    return torch.randint(2, 997, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)


@on_both
@DTYPES
@pytest.mark.parametrize("head", ["tied", "untied", "frozen"])
def test_loss_and_gradients_of_a_model_under_autocast(device, dtype, head):
    model, ids = new_model(device, tie_word_embeddings=head == "tied"), random_ids(device)
    model.lm_head.weight.requires_grad_(head != "frozen")

    def step(network, half: bool, **options) -> list[torch.Tensor]:
        network.zero_grad()
        with torch.autocast(device, dtype) if half else nullcontext():
            loss = network(ids, labels=ids, **options).loss
        loss.backward()
        # A key's bias shifts all scores of a query alike: its gradient is rounding alone.
        named = [(name, weight.grad) for name, weight in network.named_parameters() if "k_proj.bias" not in name]
        return [loss.detach(), *(gradient.clone() for _, gradient in named if gradient is not None)]

    half = dtype != torch.float32
    ours, plain = step(model, half, skip_logits=True), step(model, half, skip_logits=False)
    truth = step(copy.deepcopy(model).double(), False, skip_logits=False)
    for value, other, expected in zip(ours, plain, truth, strict=True):  # whose error is that of the whole network
        assert error(value, expected) <= 1.5 * error(other, expected) + 5 * FLOOR[dtype]


ROWS = 80


class Blocks(list):
    """Rows in memory."""


def training_blocks(length: int, vocabulary: int) -> Blocks:
    """Make blocks of eight tokens alone, which is quickly learned."""
    tokens = np.random.default_rng(0).integers(vocabulary, size=8)
    return Blocks({"input_ids": row} for row in np.random.default_rng(1).choice(tokens, (ROWS, length)))


SIZES = {
    "cpu": {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 301, "n_positions": 16},
    "cuda": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "n_positions": 2048},
}


def trainer(device: str, folder, adapted: bool, **overrides) -> FactorizedTrainer:
    """Make the trainer of experiment 10 if `adapted`, else of experiment 1, on a CPU in small and in float32."""
    torch.manual_seed(0)
    rank = SIZES[device]["n_embd"] // 12 if adapted else None
    model = FactorizedGPT2(FactorizedGPT2Config(**SIZES[device], **TOKENS, n_embd_wte=rank))
    words = {
        "output_dir": folder,
        "tokenizer": "none",
        "max_steps": 20,
        "save_steps": 10,
        "warmup_steps": 2,
        "learning_rate": 3e-3 if adapted or device == "cpu" else 1e-3,
        "effective_batch_size": 4,
        "logging_steps": 1,
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "report_to": "none",
        "disable_tqdm": True,
        **({"use_cpu": True, "fp16": False, "torch_compile": False} if device == "cpu" else {}),
        **overrides,
    }
    name = "pca_lora_k64" if adapted else "baseline"
    run = parse_run(["--config", f"{name}.json", *(f"--{name}={value}" for name, value in words.items())])
    if adapted:
        lora = run.adapter
        model = add_lora(model, lora.lora_rank, lora.lora_alpha, lora.lora_dropout, lora.lora_target_modules)
    blocks = training_blocks(SIZES[device]["n_positions"], SIZES[device]["vocab_size"])
    return FactorizedTrainer(model=model, args=run.training, train_dataset=blocks, data_collator=collate_blocks)


@on_both
@pytest.mark.parametrize("adapted", [False, True], ids=["from scratch", "LoRA"])
def test_training_falls_resumes_and_fits(device, adapted, tmp_path):
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    whole = trainer(device, tmp_path / "whole", adapted)
    start = trained_weights(whole)
    whole.train()
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.5
    if device == "cuda":
        assert whole.args.fp16
        assert whole.accelerator.scaler.get_scale() >= 1
        assert torch.cuda.max_memory_allocated() < 24e9
    expected = trained_weights(whole)
    whole.model.cpu()
    resumed = trainer(device, tmp_path / "resumed", adapted)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-10"))
    again = [row["loss"] for row in resumed.state.log_history if "loss" in row]
    if device == "cpu":
        assert again == losses
        assert all(torch.equal(weight, expected[name]) for name, weight in trained_weights(resumed).items())
        return
    # Sums of atomic additions differ from run to run; other dropout or another loss scale would differ by far more.
    assert again == pytest.approx(losses, rel=2e-2)
    apart, moved = 0.0, 0.0
    for name, weight in trained_weights(resumed).items():
        apart += (weight - expected[name]).double().square().sum().item()
        moved += (expected[name] - start[name]).double().square().sum().item()
    assert apart**0.5 < 0.1 * moved**0.5


def trained_weights(of: FactorizedTrainer) -> dict[str, torch.Tensor]:
    """Copy them to the CPU, by name."""
    named = of.model.named_parameters()
    return {name: weight.detach().cpu().clone() for name, weight in named if weight.requires_grad}


@on_both
def test_a_compiled_step_is_the_step(device, tmp_path):
    """On CUDA in bfloat16 by inductor, on a CPU in float32 by what only traces."""
    sizes = {"n_layer": 2, "n_embd": 128, "n_head": 2, "vocab_size": 997, "n_positions": 128}
    settings = {"max_steps": 3, "save_strategy": "no", "bf16": device == "cuda", "fp16": False, "tf32": False}
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(SIZES, device, sizes | NO_DROPOUT)
            backend = {"torch_compile_backend": "inductor" if device == "cuda" else "aot_eager"} if compiled else {}
            run = trainer(device, tmp_path / str(compiled), False, **settings, **backend, torch_compile=compiled)
        run.train()
        losses.append([row["loss"] for row in run.state.log_history if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=2e-3 if device == "cuda" else 1e-5)


@on_both
def test_a_merged_model_is_the_adapted_one_after_reloading(device, tmp_path):
    base = new_model("cpu")
    base.save_pretrained(tmp_path / "base")
    adapted = add_lora(FactorizedGPT2.from_pretrained(tmp_path / "base"), 8, 16, 0.1, LORA_TARGETS).to(device)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))).to(
                    device
                )
    ids = random_ids(device)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        assert error(base.to(device)(ids).logits, expected) > 0.05
        reloaded = FactorizedGPT2.from_pretrained(tmp_path / "base").to(device)
        reloaded = PeftModel.from_pretrained(reloaded, tmp_path / "adapter").to(device).eval()
        assert error(reloaded(input_ids=ids).logits, expected) < 1e-6
        merge(adapted).save_pretrained(tmp_path / "merged")
        merged = FactorizedGPT2.from_pretrained(tmp_path / "merged").to(device)
        assert error(merged(ids).logits, expected) < 1e-5
        products = torch.backends.cuda.matmul
        before, products.fp32_precision = products.fp32_precision, "tf32"
        try:
            assert error(probe_logits(merged, ids), probe_logits(reloaded, ids)) < 1e-5
            assert products.fp32_precision == "tf32"
        finally:
            products.fp32_precision = before


def draw_on_cpu(probabilities: torch.Tensor, count: int, replacement: bool, generator: torch.Generator):
    """Draw as `torch.multinomial` does, alike on every device."""
    assert replacement
    assert generator.device.type == probabilities.device.type
    uniform = torch.rand(len(probabilities), count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cumulative = probabilities.double().cpu().cumsum(-1)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:]).to(probabilities.device)


@on_both
def test_calibration_and_tokenwise_factors(device, monkeypatch):
    baseline = new_model("cpu", n_embd_wte=None)
    blocks = Blocks({"input_ids": row} for row in random_ids("cpu", 12, 64).numpy())
    counts = np.bincount(np.concatenate([row["input_ids"] for row in blocks]), minlength=997)
    drawn = calibrate(baseline, blocks, counts, device=device)  # with CUDA's own numbers
    monkeypatch.setattr(torch, "multinomial", draw_on_cpu)
    expected, use = (calibrate(baseline, blocks, counts, device=where) for where in ("cpu", device))
    assert drawn.output_side.weights.mean() == pytest.approx(expected.output_side.weights.mean(), rel=0.02)
    for side in ("input_side", "output_side"):
        ours, theirs = getattr(use, side), getattr(expected, side)
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_allclose(ours.vectors, theirs.vectors, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(ours.weights, theirs.weights, rtol=1e-4)
    embedding, _ = vocabulary_matrices(baseline)
    one, other = (METHODS["tokenwise"].fit(embedding, None, each).factors([32])[32] for each in (use, expected))
    ours, theirs = (torch.from_numpy(factors.wte @ factors.scale_up) for factors in (one, other))
    assert error(ours, theirs) < 1e-3
    compressed = from_gpt2(baseline, other)
    vectors = expected.output_side.vectors
    ours, theirs = (
        torch.from_numpy(compensated_head(compressed, other.scale_down, blocks, vectors, where))
        for where in (device, "cpu")
    )
    assert error(ours, theirs) < 1e-3


@torch.no_grad()
def divergence(model, baseline, ids) -> float:
    """Mean KL(baseline || model), in float64 on the CPU."""
    p, q = (copy.deepcopy(each).cpu().double()(ids).logits.log_softmax(-1) for each in (baseline, model))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@on_both
def test_refinement(device):
    baseline = new_model("cpu", n_embd_wte=None)
    ids = random_ids("cpu", 20, 128)
    blocks = Blocks({"input_ids": row} for row in ids.numpy())
    counts = np.bincount(ids.flatten().numpy(), minlength=997)
    embedding, _ = vocabulary_matrices(baseline)
    factors = METHODS["joint"].fit(embedding, None, calibrate(baseline, blocks, counts)).factors([16])[16]
    start = from_gpt2(baseline, factors)
    expected, refined = (refine(start, baseline, blocks, steps=6, device=where) for where in ("cpu", device))
    assert refined.device == start.device
    before, after, there = (divergence(model, baseline, ids) for model in (start, refined, expected))
    assert after < before
    assert before - after == pytest.approx(before - there, rel=0.02)


@on_both
def test_fast_attention_is_attention(device):
    dtype = torch.float16 if device == "cuda" else torch.float32
    ids, found = random_ids(device), []
    for kind in ("sdpa", "eager"):
        model = new_model(device, attn_implementation=kind).to(dtype)
        flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if (device, kind) == ("cuda", "sdpa") else nullcontext()
        with flash:  # without which there is an error
            loss = model(ids, labels=ids).loss
            loss.backward()
        weights = [model.transformer.h[0].attn.get_submodule(name).weight.grad for name in ("q_proj", "v_proj")]
        found.append([loss.detach(), *weights])
    for fast, plain in zip(*found, strict=True):
        assert error(fast, plain) < (2e-2 if device == "cuda" else 1e-5)


@on_both
@torch.no_grad()
def test_a_static_cache_and_compiled_decoding_give_the_same_tokens(device):
    model, prompt, new = new_model(device), random_ids(device, 2, 5), 8
    expected = model.generate(prompt, max_new_tokens=new, do_sample=False)
    options = {"mode": "reduce-overhead"} if device == "cuda" else {"backend": "aot_eager"}
    forward = torch.compile(model.forward, fullgraph=True, dynamic=False, **options)
    cache = StaticCache(config=model.config, max_cache_len=5 + new)
    tokens = prompt
    outputs = model(prompt, past_key_values=cache, use_cache=True)
    for position in range(5, 5 + new):
        token = outputs.logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, token], dim=1)
        positions = torch.tensor([[position]], device=device)
        outputs = forward(token, past_key_values=cache, use_cache=True, position_ids=positions)
    assert torch.equal(tokens, expected)


@on_both
@DTYPES
def test_a_coded_head(device, dtype):
    head = CodedHead(5000, 96)
    head.start_at_random(0.05)
    head.to(device, dtype)
    hidden = torch.randn(300, 96, device=device).to(dtype).requires_grad_()
    labels = torch.randint(5000, (300,), device=device)
    steps = head.steps.detach().double().requires_grad_()
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = linear(exact_hidden, head.codes.double() * steps[:, None])
    assert error(head(hidden).detach(), exact.detach()) < CEILING[dtype]
    found, expected = sum_cross_entropy(hidden, head, labels), cross_entropy(exact, labels, reduction="sum")
    assert error(found.detach(), expected.detach()) < CEILING[dtype]
    found.backward()
    expected.backward()
    assert error(hidden.grad, exact_hidden.grad) < CEILING[dtype]
    assert error(head.steps.grad, steps.grad) < CEILING[dtype]
