"""The loss without logits against plain formulas: `cross_entropy` of all the logits, in float64."""

import copy
import pickle
import sys
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import VARIANTS, random_ids, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_utils import ForCausalLMLoss

from factorized_gpt2 import to_gpt2
from factorized_gpt2.network import blockwise_loss
from factorized_gpt2.network.blockwise_loss import causal_lm_loss, cross_entropy_rows, sum_cross_entropy, sum_row_loss

pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings", "ignore:.*gradient_checkpointing")
IDS, LABELS, OTHER_LABELS = random_ids(), random_ids(), random_ids(seed=3)
LABELS[0, 3:5] = LABELS[1, 8] = -100
OTHER_LABELS[:, ::3] = 5
assert_same = partial(torch.testing.assert_close, rtol=1e-4, atol=2e-5, check_dtype=False)
wanted = pytest.mark.parametrize("wanted", [(False, False), (False, True), (True, False), (True, True)], ids=str)


def set_blocks(monkeypatch, logits, rows_of_a_module=16):
    monkeypatch.setitem(blockwise_loss.BLOCK_LOGITS, "cpu", logits)
    monkeypatch.setattr(blockwise_loss, "ROWS_OF_A_MODULE", rows_of_a_module)


@pytest.fixture(params=[50, 1000, 2**23], ids=["one row", "some rows", "all rows"])
def blocks(request, monkeypatch):
    set_blocks(monkeypatch, request.param)


def problem(rows=123, vocabulary=99, width=5, dtype=torch.float32):
    hidden = torch.randn(rows, width).to(dtype)
    weight = (3 * torch.randn(vocabulary, width) / width**0.5).to(dtype)
    labels = torch.randint(vocabulary, (rows,))
    labels[1:][torch.rand(rows - 1) < 0.2] = -100
    return hidden, weight, labels


def differentiate(function, hidden, weight, labels):
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = function(*leaves, labels)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def materialised(hidden, weight, labels):
    logits = linear(hidden, weight)
    return cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels, reduction="sum")


def exact(hidden, weight, labels):
    return differentiate(materialised, hidden.double(), weight.double(), labels)


def error(actual, expected) -> float:
    """In norm, relative; absolute where nothing is expected but rounding, as of the bias of `k_proj`."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=0.1)).item()


def worst_error(actual, expected) -> float:
    return max(error(*pair) for pair in zip(actual, expected, strict=True))


def squares(logits, rows, weights):
    losses = logits.square().sum(1, keepdim=True)
    logits.mul_(2)
    return losses * weights[rows], weights[rows]


def with_gradients(loss, model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(model, **options):
    """The loss of a batch and every gradient, by name."""
    return with_gradients(model(**{"input_ids": IDS, "labels": LABELS} | options).loss, model)


def exact_step(model, labels=LABELS, shift_labels=None, num_items_in_batch=None, ignore_index=-100):
    """The same by formula, in float64, of the logits of the model in evaluation mode."""
    model = copy.deepcopy(model).double().eval()
    logits = model(input_ids=IDS).logits
    if shift_labels is None:
        logits, shift_labels = logits[:, :-1], labels[:, 1:]
    logits, labels = logits.flatten(0, 1), shift_labels.flatten()
    total = cross_entropy(logits, labels, reduction="sum", ignore_index=ignore_index)
    return with_gradients(total / (num_items_in_batch or (labels != ignore_index).sum()), model)


def adapt(model, targets, **options):
    """Attach LoRA with weights that matter, here and in copies to save: fresh ones change nothing."""
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, **options))
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, adapted.parameters()):
            parameter += 0.2 * torch.randn(parameter.shape)
    return adapted.train()


class LargestOutput(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = filter(torch.is_tensor, torch.utils._pytree.tree_leaves(result))
        self.numel = max([self.numel, *(tensor.numel() for tensor in tensors)])
        return result


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", [99, 507])
@pytest.mark.parametrize("rows", [1, 7, 123, 255])
@pytest.mark.parametrize("width", [1, 5, 64])
def test_value_and_gradients(rows, vocabulary, width, dtype):
    hidden, weight, labels = inputs = problem(rows, vocabulary, width, dtype)
    actual = differentiate(sum_cross_entropy, *inputs)
    # In float32 the order of summation alone moves a few units in the last place.
    floor = torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 0.01)
    for value, whole, truth in zip(actual, differentiate(materialised, *inputs), exact(*inputs), strict=True):
        assert error(value, truth) <= 1.5 * error(whole, truth) + floor
    if dtype != torch.float16:  # of which a CPU computes float32 logits
        of_rounded_logits = cross_entropy(linear(hidden, weight).double(), labels, reduction="sum")
        assert actual[0].item() == pytest.approx(of_rounded_logits.item(), rel=1e-4)
    assert [value.dtype for value in actual] == [torch.float32, dtype, dtype]
    assert (actual[1][labels == -100] == 0).all()
    assert all(map(torch.equal, actual, differentiate(sum_cross_entropy, *inputs)))
    transposed = hidden.T.contiguous().T, weight.T.contiguous().T, labels.repeat_interleave(2)[::2]
    assert worst_error(differentiate(sum_cross_entropy, *transposed), actual) < max(2e-6, torch.finfo(dtype).eps)


@wanted
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_gradients_nobody_wants_are_not_computed(monkeypatch, wanted, mode):
    seen, sum_blocks = [], blockwise_loss._sum_blocks
    monkeypatch.setattr(blockwise_loss, "_sum_blocks", lambda *given: seen.append(given[3:5]) or sum_blocks(*given))
    hidden, weight, labels = problem()
    expected = exact(hidden, weight, labels)
    tensors = hidden.requires_grad_(wanted[0]), weight.requires_grad_(wanted[1])
    with mode():
        loss = sum_cross_entropy(*tensors, labels)
    wanted = wanted if mode is torch.enable_grad else (False, False)
    assert seen == [wanted]
    assert loss.requires_grad is any(wanted)
    assert error(loss, expected[0]) < 1e-5
    if any(wanted):
        loss.backward()
    assert tuple(tensor.grad is not None for tensor in tensors) == wanted
    for tensor, truth in zip(tensors, expected[1:], strict=True):
        assert tensor.grad is None or error(tensor.grad, truth) < 1e-5


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e4), (torch.bfloat16, 1e4), (torch.float16, 3e4)])
def test_extreme_logits(dtype, scale):
    weight = torch.tensor([1.0, -1.0, 0.5, 0.0]).to(dtype)[:, None]
    hidden = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 1.0]).mul(scale).to(dtype)[:, None]
    labels = torch.tensor([0, 1, 0, 1, 3, -100])  # of the second and third the probability underflows
    expected = exact(hidden, weight, labels)
    assert expected[0] > 3 * scale
    assert worst_error(differentiate(sum_cross_entropy, hidden, weight, labels), expected) < 1e-6


@pytest.mark.parametrize("as_module", [False, True])
def test_every_label_ignored(as_module):
    module, (hidden, _, labels) = nn.Linear(5, 99, bias=False), problem()
    head = module if as_module else module.weight
    loss = sum_cross_entropy(hidden.requires_grad_(), head, labels.fill_(-100))
    loss.backward()
    assert loss.item() == hidden.grad.count_nonzero() == module.weight.grad.count_nonzero() == 0
    batch = hidden[None], head, labels[None]
    assert causal_lm_loss(*batch).isnan()
    assert ForCausalLMLoss(module(hidden)[None], labels[None], 99).isnan()
    assert causal_lm_loss(*batch, num_items_in_batch=5).item() == 0.0


def test_a_loss_scale_that_float16_does_not_hold():
    hidden, weight, labels = problem(dtype=torch.float16)
    inputs = hidden[None] / 50, weight / 50, labels[None]  # small, as the scaled gradients have to fit
    value, by_hidden, by_weight = differentiate(lambda *given: 65536 * causal_lm_loss(*given, 1), *inputs)
    expected = [65536 * truth for truth in exact(inputs[0][0, :-1], inputs[1], labels[1:])]
    assert worst_error((value, by_hidden[0, :-1], by_weight), expected) < 1e-3


def test_a_loss_used_twice():
    inputs = problem()
    actual = differentiate(lambda *given: 2 * (loss := sum_cross_entropy(*given)) + loss, *inputs)
    assert worst_error(actual, [3 * truth for truth in exact(*inputs)]) < 1e-5


def test_a_sum_over_a_block_that_float16_does_not_hold():
    hidden, weight, labels = problem(4096, dtype=torch.float16)
    inputs = hidden.abs() + 20, weight, labels.fill_(7)
    gradient = differentiate(lambda *given: sum_cross_entropy(*given) / 4096, *inputs)[2]
    assert error(gradient, exact(*inputs)[2] / 4096) < 2e-3


def test_a_second_derivative_is_refused():
    hidden, weight, labels = problem()
    loss = sum_cross_entropy(hidden.requires_grad_(), weight, labels)
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(loss**2, hidden, create_graph=True)


@pytest.mark.parametrize("labelled", [1, 246])
def test_labels_that_do_not_fit(labelled):
    with pytest.raises(ValueError, match=f"123 rows need as many labels.*{labelled}"):
        sum_cross_entropy(*problem()[:2], torch.zeros(labelled, dtype=torch.int64))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-6), (True, 2e-2)])
@pytest.mark.parametrize("of_a_module", [False, True])
def test_any_loss_of_rows(autocast, tolerance, of_a_module):
    head = nn.Sequential(nn.Linear(5, 99), nn.Tanh()) if of_a_module else nn.Linear(5, 99, bias=False)
    hidden, weights = torch.randn(123, 5, requires_grad=True), torch.rand(123, 1)
    exact_head, exact_hidden = copy.deepcopy(head).double(), hidden.detach().double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = sum_row_loss(hidden, head if of_a_module else head.weight, partial(squares, weights=weights))
    expected = (exact_head(exact_hidden).square() * weights).sum()
    actual = loss, *torch.autograd.grad(5 * loss, [hidden, *head.parameters()])
    truth = expected, *torch.autograd.grad(5 * expected, [exact_hidden, *exact_head.parameters()])
    assert all(value.dtype == torch.float32 for value in actual)
    assert worst_error(actual, truth) < tolerance


@pytest.mark.parametrize("of_a_module", [False, True])
def test_a_loss_of_rows_is_computed_in_float32_whatever_is_the_default(of_a_module):
    hidden, weight, labels = problem(dtype=torch.bfloat16)
    head = nn.Linear(5, 99, bias=False, dtype=torch.bfloat16)
    head.weight.data = weight
    seen = set()

    def row_loss(logits, rows):
        seen.add((logits.dtype, torch.is_autocast_enabled("cpu")))
        return cross_entropy_rows(logits, rows, labels=labels)

    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu"):
            loss = sum_row_loss(hidden, head if of_a_module else weight, row_loss)
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen == {(torch.float32, False)}
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(materialised(hidden, weight, labels).item(), rel=1e-4)


@pytest.mark.parametrize("on_cuda", [False, True])
@pytest.mark.parametrize("in_half_precision", [False, True])
@pytest.mark.parametrize("is_installed", [False, True])
def test_where_cut_cross_entropy_runs(monkeypatch, on_cuda, in_half_precision, is_installed):
    installed = {"cut_cross_entropy"} if is_installed else set()
    monkeypatch.setattr(blockwise_loss, "find_spec", lambda name: name if name in installed else None)
    expected = on_cuda and in_half_precision and is_installed
    assert blockwise_loss.cut_cross_entropy_runs(on_cuda, in_half_precision) == expected


@wanted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_as_large_as_the_logits(monkeypatch, dtype, wanted):
    set_blocks(monkeypatch, 2000)
    hidden, weight, labels = problem(dtype=dtype)
    row_loss = partial(cross_entropy_rows, labels=labels)
    torch.library.opcheck(blockwise_loss._sum_cross_entropy, (hidden, weight, labels, -100, *wanted, False))
    with LargestOutput() as blockwise:
        blockwise_loss._sum_blocks(hidden, weight, row_loss, *wanted)
        loss = sum_row_loss(hidden.requires_grad_(wanted[0]), weight.requires_grad_(wanted[1]), row_loss)
        loss.requires_grad_().backward()
    with LargestOutput() as whole:
        materialised(hidden, weight, labels)
    assert 1000 < blockwise.numel <= 2000 < whole.numel == 123 * 99


@pytest.mark.parametrize("case", ["trained", "frozen", "tied wte", "untied lm_head"])
def test_a_model_has_no_tensor_as_large_as_the_logits(monkeypatch, case):
    set_blocks(monkeypatch, 2000)
    # Narrow inside, so that of all tensors the logits would be the largest.
    model = tiny_model(n_inner=32, vocab_size=507, tie_word_embeddings=case != "untied lm_head").train()
    model.lm_head.requires_grad_(case != "frozen")
    model = adapt(model, [case.split()[1]]) if " " in case else model
    ids = random_ids(2, 40)
    for skip_logits in (None, False):
        with LargestOutput() as largest:
            model(input_ids=ids, labels=ids, skip_logits=skip_logits).loss.backward()
        assert (largest.numel == 80 * 507) if skip_logits is False else (largest.numel <= 16 * 507)


OPTIONS = [{}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}]
OPTIONS += [{name: OTHER_LABELS, "ignore_index": 5} for name in ("labels", "shift_labels")]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_a_model_in_training(model, options):
    assert model.train()(**{"input_ids": IDS, "labels": LABELS} | options).logits is None
    actual = step(model, **options)
    assert_same(actual, step(model, skip_logits=False, **options), rtol=2e-5, atol=5e-6)
    assert_same(actual, exact_step(model, **options))
    model.gradient_checkpointing_enable()
    assert_same(step(model, **options), actual, rtol=2e-5, atol=5e-6)


def test_when_there_are_logits(model):
    outputs, skipped = model(IDS, labels=LABELS), model(IDS, labels=LABELS, skip_logits=True)
    assert outputs.logits.shape == model(IDS).logits.shape == (2, 10, 99)
    assert skipped.logits is None
    assert torch.equal(outputs.loss, ForCausalLMLoss(outputs.logits, LABELS, 99))
    with torch.inference_mode():
        inferred = model.train()(IDS, labels=LABELS)
    for loss in (outputs.loss, skipped.loss, inferred.loss, to_gpt2(model).eval()(IDS, labels=LABELS).loss):
        assert error(loss, exact_step(model)["loss"]) < 1e-5
    with pytest.raises(ValueError, match="skip_logits leaves nothing"):
        model(IDS, skip_logits=True)
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.square().sum() + vocab_size
    outputs = model(IDS, labels=LABELS)
    assert error(outputs.loss, outputs.logits.square().sum() + 99) < 1e-6


def test_a_head_with_a_bias():
    model = tiny_model(tie_word_embeddings=False).train()
    model.set_output_embeddings(nn.Linear(12, 99))
    assert_same(step(model), exact_step(model))


@pytest.mark.parametrize("adapter", [None, "wte", "lm_head"])
def test_autocast(variant, adapter):
    model = tiny_model(**variant | ({"tie_word_embeddings": False} if adapter == "lm_head" else {})).train()
    model = adapt(model, [adapter]) if adapter else model
    expected = exact_step(model)
    with torch.autocast("cpu", torch.bfloat16):
        actual, whole = step(model), step(model, skip_logits=False)
    for name, truth in expected.items():
        assert actual[name].dtype == torch.float32
        assert error(actual[name], truth) < min(0.1, 1.5 * error(whole[name], truth) + 2**-9)
        assert error(actual[name], whole[name]) < 2**-5


ADAPTERS = [
    *((name, ["wte"], {}) for name in VARIANTS),
    *(("tied", [target], {}) for target in ("scale_down", "scale_up", "q_proj")),
    *(("untied", targets, {}) for targets in (["lm_head"], ["wte", "lm_head", "scale_down", "q_proj"])),
    *((name, ["q_proj"], {"modules_to_save": [of]}) for name, of in (("untied", "lm_head"), ("tied", "wte"))),
    *((name, [target], {"use_dora": True}) for name, target in (("tied", "wte"), ("untied", "lm_head"))),
]


@pytest.mark.parametrize(("name", "targets", "options"), ADAPTERS, ids=str)
def test_adapters(monkeypatch, name, targets, options):
    set_blocks(monkeypatch, 500, rows_of_a_module=3)
    adapted = adapt(tiny_model(**VARIANTS[name]), targets, **options)
    actual = step(adapted)
    assert all(value.count_nonzero() for value in actual.values())
    assert_same(actual, step(adapted, skip_logits=False), rtol=2e-5, atol=5e-6)
    assert_same(actual, exact_step(adapted))
    assert error(actual["loss"], exact_step(copy.deepcopy(adapted).merge_and_unload().requires_grad_())["loss"]) < 1e-5
    with torch.inference_mode():
        assert error(adapted(input_ids=IDS, labels=LABELS).loss, actual["loss"]) < 1e-6


def test_dropout_of_an_adapter_on_the_head(monkeypatch):
    adapted = adapt(tiny_model(tie_word_embeddings=False), ["lm_head"], lora_dropout=0.5)
    collected = []
    for skip_logits in (None, False):
        torch.manual_seed(1)  # one block: the random numbers are drawn in one order
        collected.append(step(adapted, skip_logits=skip_logits))
    assert_same(*collected)
    assert abs(collected[0]["loss"] - step(adapted)["loss"]) > 1e-3
    set_blocks(monkeypatch, 500, rows_of_a_module=3)
    assert all(value.isfinite().all() for value in step(adapted).values())


def test_compiled_as_one_graph(model):
    compiled = torch.compile(lambda ids: model(ids, labels=LABELS).loss, fullgraph=True, backend="aot_eager")
    try:
        assert_same(with_gradients(compiled(IDS), model.train()), step(model))
    finally:
        torch._dynamo.reset()


def test_distributed(tmp_path, model):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        actual = step(nn.parallel.DistributedDataParallel(model.train()))
    finally:
        torch.distributed.destroy_process_group()
    assert_same({name.removeprefix("module."): value for name, value in actual.items()}, exact_step(model))


def test_backends(monkeypatch):
    model = tiny_model().train()
    model.loss_backend = "blockwise"
    assert_same(step(model), exact_step(model))
    for model.loss_backend, complaint in (
        ("cut_cross_entropy", "needs.*CUDA"),
        ("magic", "blockwise, attention, cut_cross_entropy, auto"),
    ):
        with pytest.raises(ValueError, match=rf"{model.loss_backend}.*{complaint}"):
            step(model)


@pytest.mark.parametrize("sums_in_float32", [False, True], ids=["25.1", "newer"])
def test_cut_cross_entropy_is_called_by_keyword(monkeypatch, sums_in_float32):
    """The fourth argument is `ignore_index` in one release and a bias in the next, which sums in float32 if asked."""
    given, package = [], ModuleType("cut_cross_entropy")
    losses = torch.full((20,), 1.0078125, dtype=torch.bfloat16)  # the sum needs more digits than bfloat16 has

    def of_25_1(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high"):
        given.append((e, c, targets, ignore_index, reduction, filter_eps))
        return losses

    def newer(e, c, targets, bias=None, *, accum_e_fp32=False, accum_c_fp32=False, **options):
        assert (bias, accum_e_fp32, accum_c_fp32) == (None, True, True)
        return of_25_1(e, c, targets, **options)

    package.linear_cross_entropy = newer if sums_in_float32 else of_25_1
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", package)
    assert_same(step(tiny_model().train()), exact_step(tiny_model()))  # installed, but not for a CPU
    assert not given
    monkeypatch.setattr(blockwise_loss, "_choose", lambda *_: "cut_cross_entropy")
    inputs = problem(rows=20, dtype=torch.bfloat16)
    total = sum_cross_entropy(*inputs, ignore_index=3)
    assert (total.dtype, total.item()) == (torch.float32, 20 * 1.0078125)
    assert given == [(*inputs, 3, "none", None)]
    assert blockwise_loss.cut_cross_entropy_is_exact() == sums_in_float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("of_a_module", [False, True])
@pytest.mark.parametrize("runs", [False, True])
def test_the_choice_of_a_backend(monkeypatch, dtype, of_a_module, runs):
    """As it is made on CUDA, where the package is installed or is not."""
    monkeypatch.setattr(blockwise_loss, "cut_cross_entropy_runs", lambda on_cuda, half: on_cuda and half and runs)
    hidden = SimpleNamespace(dtype=dtype, is_cuda=True, device=torch.device("cuda"), requires_grad=True)
    head = nn.Linear(2, 3, bias=False)
    for frozen in (False, True):
        head.requires_grad_(not frozen)
        matrix = head if of_a_module else head.weight
        half = dtype != torch.float32 and not of_a_module
        choose = partial(blockwise_loss._choose, hidden=hidden, head=matrix)
        assert choose("blockwise") == choose("logits") == "blockwise"
        assert choose("auto") == ("attention" if half and frozen else "blockwise")
        for backend, usable in (("attention", half and frozen), ("cut_cross_entropy", half and runs)):
            if usable:
                assert choose(backend) == backend
            else:
                with pytest.raises(ValueError, match=rf"^The loss backend {backend} needs"):
                    choose(backend)


@pytest.mark.parametrize("of_a_module", [False, True])
def test_a_label_of_ones_own_is_ignored(of_a_module):
    hidden, weight, labels = problem()
    labels = labels.where(labels >= 0, 7)
    head = nn.Linear(5, 99, bias=False)
    head.weight.data = weight
    expected = cross_entropy(linear(hidden, weight), labels, ignore_index=7, reduction="sum")
    assert_same(sum_cross_entropy(hidden, head if of_a_module else weight, labels, ignore_index=7), expected)


def test_a_trained_model_copies_and_pickles(model):
    before = copy.deepcopy(model.train().state_dict())
    step(model)
    assert_same(model.state_dict(), before, rtol=0, atol=0)
    torch.optim.AdamW(model.parameters()).step()
    expected = step(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(step(other), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["модель.a", "теория.a", "café-1.a", "my model.a"])
def test_it_loads_by_any_module_name(name, monkeypatch):
    package = ModuleType(name.partition(".")[0])  # a folder of any name, as transformers imports it
    package.__path__ = [str(Path(blockwise_loss.__file__).parent)]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    for other in ("attention_loss", "fused_rows"):
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{other}", raising=False)
    spec = spec_from_file_location(name, blockwise_loss.__file__)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    inputs = problem()
    assert torch.equal(module.sum_cross_entropy(*inputs), sum_cross_entropy(*inputs))
