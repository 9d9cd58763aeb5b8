"""The loss of a linear head, block by block: the logits (N, V) are never there as a whole.

At a small rank k the head's arithmetic is little and its logits are much: writing, normalising and reading them again
is what the loss of a GPT-2 spends its time and memory on. Here one buffer holds the logits of a few rows. They turn
into the gradient in place, which goes through the head at once; what stays are the gradients of the head's input and,
if it is trained, of its weight. Taken on the way forward, they need no second product in backward.

`blockwise` is the general way. Where the head is frozen, an attention kernel does the same in one pass
(`attention_loss`); on CUDA, one kernel turns a block's logits into the gradient (`fused_rows`).

Shapes in comments: N rows (tokens), V vocabulary, k width of the head, n rows of a block.
"""

import inspect
import re
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .attention_loss import attention_runs, sum_by_attention
from .coded_vocabulary import CodedHead, sum_rows
from .fused_rows import fused_cross_entropy_rows, fused_rows_run
from .head import has_hooks

BACKENDS = ("blockwise", "attention", "cut_cross_entropy", "auto", "logits")

# Logits of a block: on a CPU it stays in the cache, elsewhere it is large enough to keep the device busy.
BLOCK_LOGITS = {"cpu": 2**23}
BLOCK_LOGITS_ELSEWHERE = 3 * 2**23
ROWS_OF_A_MODULE = 256

RowLoss = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor | None]]
"""Takes the logits (n, V) float32 of some rows, and these rows; overwrites the logits with their gradient, up to a
factor a row. Returns every row's loss and that factor, each (n, 1) float32, and 0 where a row does not count. `None`
in the factor's place means 1.
"""


def cross_entropy_rows(
    logits: torch.Tensor, rows: slice, labels: torch.Tensor, ignore_index: int = -100
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy as a `RowLoss`, once `labels` (N,) int64 are bound: -log softmax(logits)[label], in nats."""
    labels = labels[rows, None]
    counts = labels != ignore_index
    labels = labels.where(counts, 0)
    largest = logits.amax(1, keepdim=True)
    logit_of_label = logits.gather(1, labels)
    sums = logits.sub_(largest).exp_().sum(1, keepdim=True)
    losses = sums.log() + largest - logit_of_label
    logits.scatter_add_(1, labels, -sums)  # softmax - one_hot, times sums
    return losses.where(counts, 0.0), sums.reciprocal().where(counts, 0.0)


def causal_lm_loss(
    hidden: torch.Tensor,
    head: torch.Tensor | nn.Module,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    backend: str = "blockwise",
    **_: object,
) -> torch.Tensor:
    """Compute what transformers' `ForCausalLMLoss` does of logits, without the logits.

    Args:
        hidden: (B, T, k) floats.
        head: As `sum_row_loss` takes it.
        labels: (B, T) int64, not shifted.
        num_items_in_batch: Divides the sum; by default the number of labels that count.
        ignore_index: The label that does not count.
        shift_labels: (B, T) int64, shifted already; `labels` are then not looked at.
        backend: As in `sum_cross_entropy`.

    Returns:
        Scalar float32, in nats.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    shift_labels = shift_labels.flatten().to(hidden.device)
    total = sum_cross_entropy(hidden.flatten(0, -2), head, shift_labels, ignore_index, backend)
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != ignore_index).sum()
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def sum_cross_entropy(
    hidden: torch.Tensor,
    head: torch.Tensor | nn.Module,
    labels: torch.Tensor,
    ignore_index: int = -100,
    backend: str = "blockwise",
) -> torch.Tensor:
    """Sum the cross-entropy of a head over tokens.

    Plainly: `cross_entropy((hidden @ head.T).float(), labels, ignore_index=ignore_index, reduction="sum")`.
    Differentiable once. Under autocast the products run in its dtype, all else in float32.

    Args:
        hidden: (N, k) floats.
        head: As `sum_row_loss` takes it.
        labels: (N,) int64.
        ignore_index: The label of rows that do not count.
        backend: `blockwise` runs anywhere. `attention` needs a frozen matrix, on a CPU or, in half precision and at
            most 256 wide, on CUDA. `cut_cross_entropy` takes the kernels of the package of that name (Wijmans et al.,
            2024, "Cut Your Losses in Large-Vocabulary Language Models"), for a matrix on CUDA in half precision;
            gradients are exact from the release on that sums them in float32. `auto` takes `attention` where it can
            run and is faster by its count of operations, else `blockwise`. `logits`, which makes a model return
            logits in training too, is `blockwise` where it skips them all the same.

    Returns:
        Scalar float32, in nats.

    Raises:
        ValueError: Labels that do not fit; an unknown backend, or one that cannot run here.
    """
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"{len(hidden)} rows need as many labels, got {tuple(labels.shape)}.")
    if isinstance(head, torch.Tensor):
        hidden, head = _in_autocast_dtype(hidden, head)
    backend = _choose(backend, hidden, head)
    if isinstance(head, CodedHead) and not has_hooks(head):
        (hidden,) = _in_autocast_dtype(hidden)
        rows, wanted = _rows_at_once(hidden, len(head.codes)), head.wanted_gradients(hidden)
        weights = head.codes, head.steps, head.bias
        return _sum_coded_cross_entropy(hidden, *weights, labels, ignore_index, rows, wanted)[0]
    if isinstance(head, nn.Module):
        return sum_row_loss(hidden, head, partial(cross_entropy_rows, labels=labels, ignore_index=ignore_index))
    if backend == "cut_cross_entropy":
        return _cut_cross_entropy(hidden, head, labels, ignore_index).sum(dtype=torch.float32)
    return _sum_cross_entropy(hidden, head, labels, ignore_index, *_wanted(hidden, head), backend == "attention")[0]


def usable_backends(hidden: torch.Tensor, head: torch.Tensor | nn.Module) -> list[str]:
    """Name the backends that can compute the loss of these inputs, `auto` and `logits` aside."""
    usable = ["blockwise"]
    if isinstance(head, torch.Tensor):
        device, frozen = hidden.device.type, not _wanted(hidden, head)[1]
        if frozen and attention_runs(device, hidden.dtype, head.shape[1]):
            usable.append("attention")
        if cut_cross_entropy_runs(device == "cuda", hidden.dtype in (torch.float16, torch.bfloat16)):
            usable.append("cut_cross_entropy")
    return usable


def sum_row_loss(hidden: torch.Tensor, head: torch.Tensor | nn.Module, row_loss: RowLoss) -> torch.Tensor:
    """Sum any loss of rows of logits over tokens; differentiable once.

    Args:
        hidden: (N, k) floats.
        head: A matrix (V, k) of the same dtype unless autocast is on; or, where the head is more than a matrix (an
            adapter with dropout), a module that maps (n, k) to (n, V): a block's logits are then computed once more
            in backward, unless it is a `CodedHead`.
        row_loss: What to sum.

    Returns:
        Scalar float32.
    """
    if isinstance(head, torch.Tensor):
        hidden, head = _in_autocast_dtype(hidden, head)
        return _LinearRowLoss.apply(hidden, head, row_loss, _wanted(hidden, head))
    if isinstance(head, CodedHead) and not has_hooks(head):
        (hidden,) = _in_autocast_dtype(hidden)
        return head.sum_row_loss(hidden, row_loss, _rows_at_once(hidden, len(head.codes)))
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(hidden), ROWS_OF_A_MODULE):
        rows = slice(start, start + ROWS_OF_A_MODULE)
        total = total + checkpoint(_block_loss, hidden[rows], head, row_loss, rows, use_reentrant=False)
    return total


def _block_loss(hidden: torch.Tensor, head: nn.Module, row_loss: RowLoss, rows: slice) -> torch.Tensor:
    return _RowLossOfLogits.apply(head(hidden), row_loss, rows)


def _wanted(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[bool, bool]:
    takes_gradient = torch.is_grad_enabled()
    return takes_gradient and hidden.requires_grad, takes_gradient and weight.requires_grad


def _in_autocast_dtype(*tensors: torch.Tensor) -> list[torch.Tensor]:
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


def cut_cross_entropy_runs(on_cuda: bool, in_half_precision: bool) -> bool:
    """Tell whether the backend of that name can run: it needs both, and its package."""
    return on_cuda and in_half_precision and find_spec("cut_cross_entropy") is not None


def _choose(backend: str, hidden: torch.Tensor, head: torch.Tensor | nn.Module) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"Unknown loss backend {backend!r}; known are {', '.join(BACKENDS)}.")
    if backend in ("blockwise", "logits"):
        return "blockwise"
    usable = usable_backends(hidden, head)
    if backend == "auto":
        # A CPU's matrix products outrun its attention in half precision; without gradients half of it is for nothing.
        pays = hidden.is_cuda or hidden.dtype == torch.float32
        is_trained = torch.is_grad_enabled() and hidden.requires_grad
        return "attention" if "attention" in usable and pays and is_trained else "blockwise"
    if backend not in usable:
        raise ValueError(f"The loss backend {backend} needs {_NEEDS[backend]}.")
    return backend


_NEEDS = {
    "attention": "a frozen plain head, on a CPU, or on CUDA in half precision and at most 256 wide",
    "cut_cross_entropy": "its package, CUDA, half precision, a plain head",
}


def _cut_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    """Compute every row's loss, (N,), with the package's kernels."""
    try:  # What is imported outside of a try, transformers demands of all who load this file from the Hub.
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise ValueError(f"The loss backend cut_cross_entropy cannot run here: {error}.") from error

    exact = dict.fromkeys(_exact_sums(linear_cross_entropy), True)
    # By keyword: between releases the fourth argument became a bias.
    return linear_cross_entropy(
        hidden, weight, labels, ignore_index=ignore_index, reduction="none", filter_eps=None, **exact
    )


def cut_cross_entropy_is_exact() -> bool:
    """Tell whether the installed package can sum gradients in float32; release 25.1.1 cannot.

    Its gradients are off by 2 to 5 % in bfloat16 and by 0.3 to 0.5 % in float16, where exact sums have 0.3 and 0.04 %.
    """
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        return False
    return bool(_exact_sums(linear_cross_entropy))


def _exact_sums(function: Callable) -> list[str]:
    """List the switches of `linear_cross_entropy` for sums in float32, which newer releases have."""
    known = inspect.signature(function).parameters
    return [name for name in ("accum_e_fp32", "accum_c_fp32") if name in known]


@torch.no_grad()
def _sum_blocks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    row_loss: RowLoss,
    hidden_grad: bool,
    weight_grad: bool,
    in_float32: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum a loss over rows; `in_float32` says whether `row_loss` wants logits in float32 whatever the dtype.

    Returns:
        The sum, float32; its gradients by `hidden`, (N, k) in its dtype, and by `weight`, (V, k) float32 whatever the
        dtype (a sum over tokens can exceed what float16 holds). Those not wanted are empty.
    """
    dtype = hidden.dtype
    if dtype == torch.float16 and hidden.device.type == "cpu":  # which multiplies float32 many times faster
        hidden, weight = hidden.float(), weight.float()
    half = hidden.dtype != torch.float32
    copies = half and in_float32
    size = _rows_at_once(hidden, len(weight))
    buffer = hidden.new_empty(size, len(weight))
    buffer32 = torch.empty_like(buffer, dtype=torch.float32) if copies else buffer
    total = hidden.new_zeros((), dtype=torch.float32)
    by_hidden = torch.empty_like(hidden) if hidden_grad else hidden.new_empty(0)
    by_weight = torch.zeros_like(weight, dtype=torch.float32) if weight_grad else hidden.new_empty(0)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            block = hidden[rows]
            logits, logits32 = buffer[: len(block)], buffer32[: len(block)]
            torch.mm(block, weight.T, out=logits)
            if copies:
                logits32.copy_(logits)
            losses, scales = row_loss(logits32, rows)  # from here on the buffer holds gradients
            total += losses.sum()
            if copies and (hidden_grad or weight_grad):
                torch.mul(logits32, 1.0 if scales is None else scales, out=logits)
                scales = None
            if hidden_grad:
                torch.mm(logits, weight, out=by_hidden[rows])
                if scales is not None:
                    by_hidden[rows] *= scales
            if weight_grad:
                if half:
                    by_weight.add_(logits.T @ (block * _HALF_SCALE), alpha=1 / _HALF_SCALE)
                else:
                    by_weight.addmm_(logits.T, block if scales is None else block * scales)
    return total, by_hidden.to(dtype), by_weight


def _rows_at_once(hidden: torch.Tensor, vocab_size: int) -> int:
    block_logits = BLOCK_LOGITS.get(hidden.device.type, BLOCK_LOGITS_ELSEWHERE)
    return max(1, min(block_logits // vocab_size, len(hidden)))


_HALF_SCALE = 2.0**-8  # keeps the sum over a block's rows within float16


def _scaled(gradient: torch.Tensor, upstream: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Multiply in float32: a loss scale times a gradient may fit a dtype that the scale alone does not."""
    return (gradient.float() * upstream).to(dtype) if gradient.numel() else None


def _scale_saved(ctx, upstream: torch.Tensor) -> list[torch.Tensor | None]:
    saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    return [_scaled(gradient, upstream, dtype) for gradient, dtype in saved]


# An operator of its own is opaque to torch.compile: no break in the graph, and no loop over blocks unrolled into it.
@torch.library.custom_op(re.sub(r"\W", "_", ascii(__name__)[1:-1]) + "::sum_cross_entropy", mutates_args=())
def _sum_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    hidden_grad: bool,
    weight_grad: bool,
    by_attention: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if by_attention:
        total, by_hidden = sum_by_attention(hidden, weight, labels, ignore_index)
        return total, by_hidden.to(hidden.dtype) if hidden_grad else hidden.new_empty(0), hidden.new_empty(0)
    fused = fused_rows_run(hidden.is_cuda)
    row_loss = partial(
        fused_cross_entropy_rows if fused else cross_entropy_rows, labels=labels, ignore_index=ignore_index
    )
    return _sum_blocks(hidden, weight, row_loss, hidden_grad, weight_grad, not fused)


@_sum_cross_entropy.register_fake
def _(hidden, weight, labels, ignore_index, hidden_grad, weight_grad, by_attention):
    return (
        hidden.new_empty((), dtype=torch.float32),
        torch.empty_like(hidden) if hidden_grad else hidden.new_empty(0),
        torch.empty_like(weight, dtype=torch.float32) if weight_grad else hidden.new_empty(0),
    )


def _save_gradients(ctx, inputs, output) -> None:
    ctx.dtypes = [tensor.dtype for tensor in inputs[:2]]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _scale_gradients(ctx, upstream, *_):
    if torch.is_grad_enabled():  # as under create_graph
        raise RuntimeError("The loss without logits can be differentiated once only; pass skip_logits=False.")
    return *_scale_saved(ctx, upstream), *[None] * 5


_sum_cross_entropy.register_autograd(_scale_gradients, setup_context=_save_gradients)


@torch.library.custom_op(re.sub(r"\W", "_", ascii(__name__)[1:-1]) + "::sum_coded_cross_entropy", mutates_args=())
def _sum_coded_cross_entropy(
    hidden: torch.Tensor,
    codes: torch.Tensor,
    steps: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    ignore_index: int,
    rows_at_once: int,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    row_loss = partial(cross_entropy_rows, labels=labels, ignore_index=ignore_index)
    return sum_rows(hidden, steps, bias, codes, row_loss, rows_at_once, wanted)


@_sum_coded_cross_entropy.register_fake
def _(hidden, codes, steps, bias, labels, ignore_index, rows_at_once, wanted):
    weights = zip((hidden, steps, bias), wanted, strict=True)
    return (
        hidden.new_empty((), dtype=torch.float32),
        *(torch.empty_like(of, dtype=torch.float32) if is_wanted else steps.new_empty(0) for of, is_wanted in weights),
    )


def _save_coded_gradients(ctx, inputs, output) -> None:
    hidden, _, steps, bias, *_, wanted = inputs
    ctx.dtypes = [of.dtype if is_wanted else None for of, is_wanted in zip((hidden, steps, bias), wanted, strict=True)]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _scale_coded_gradients(ctx, upstream, *_):
    if torch.is_grad_enabled():  # as under create_graph
        raise RuntimeError("The loss without logits can be differentiated once only; pass skip_logits=False.")
    by_hidden, by_steps, by_bias = _scale_saved(ctx, upstream)
    return by_hidden, None, by_steps, by_bias, *[None] * 4


_sum_coded_cross_entropy.register_autograd(_scale_coded_gradients, setup_context=_save_coded_gradients)


class _LinearRowLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, row_loss, wanted):
        total, *gradients = _sum_blocks(hidden, weight, row_loss, *wanted)
        ctx.dtypes = [hidden.dtype, weight.dtype]
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        return *_scale_saved(ctx, upstream), None, None


class _RowLossOfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, row_loss, rows):
        gradient = logits.to(torch.float32, copy=True)
        with torch.autocast(logits.device.type, enabled=False):
            losses, scales = row_loss(gradient, rows)
        ctx.save_for_backward(gradient.mul_(scales).to(logits.dtype))
        return losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return _scaled(gradient, upstream, gradient.dtype), None, None
