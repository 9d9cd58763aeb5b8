"""Cross-entropy of rows of logits and its gradient in one Triton kernel, in place, in the logits' own dtype.

In plain PyTorch the same takes some ten passes over a block of logits and a copy of it in float32. This file stands
apart because `triton.jit` needs the package when a kernel is defined.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_COLUMNS = 4096  # of a row, at a time


def fused_rows_run(logits_are_on_cuda: bool) -> bool:
    """Tell whether the kernel can run: it needs CUDA and Triton."""
    return logits_are_on_cuda and triton is not None


def fused_cross_entropy_rows(
    logits: torch.Tensor, rows: slice, labels: torch.Tensor, ignore_index: int = -100
) -> tuple[torch.Tensor, None]:
    """Do what `blockwise_loss.cross_entropy_rows` does; the logits become the gradient itself, without a factor.

    Args:
        logits: (n, V) floats of any dtype, contiguous; overwritten with softmax(logits) - one_hot(label), which is 0
            in rows that do not count. Sums are in float32.
        rows: Which rows of `labels` these are.
        labels: (N,) int64.
        ignore_index: The label of rows that do not count.

    Returns:
        Every row's loss, (n, 1) float32, in nats; and `None`, as there is no factor.
    """
    losses = logits.new_empty(len(logits), 1, dtype=torch.float32)
    sizes = {"VOCAB_SIZE": logits.shape[1], "COLUMNS": _COLUMNS, "num_warps": 8}
    _rows[(len(logits),)](logits, logits.stride(0), labels[rows].contiguous(), losses, ignore_index, **sizes)
    return losses, None


if triton is not None:

    @triton.jit
    def _rows(logits, stride, labels, losses, ignore_index, VOCAB_SIZE: tl.constexpr, COLUMNS: tl.constexpr):
        row = tl.program_id(0)
        logits += row.to(tl.int64) * stride
        label = tl.load(labels + row)
        counts = label != ignore_index
        columns = tl.arange(0, COLUMNS)
        largest = tl.full((COLUMNS,), float("-inf"), tl.float32)  # of every lane's own columns
        sums = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, VOCAB_SIZE, COLUMNS):
            inside = start + columns < VOCAB_SIZE
            block = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            larger = tl.maximum(largest, block)
            # A lane that has seen no column yet has the largest -inf, and -inf - -inf is no number.
            shift = tl.where(larger == float("-inf"), 0.0, larger)
            sums = sums * tl.exp(largest - shift) + tl.exp(block - shift)
            largest = larger
        maximum = tl.max(largest, 0)
        log_sum = tl.log(tl.sum(sums * tl.exp(largest - maximum), 0)) + maximum
        logit_of_label = tl.load(logits + tl.where(counts, label, 0)).to(tl.float32)
        tl.store(losses + row, tl.where(counts, log_sum - logit_of_label, 0.0))
        tl.debug_barrier()  # every lane has read the label's logit before any overwrites it
        for start in range(0, VOCAB_SIZE, COLUMNS):
            inside = start + columns < VOCAB_SIZE
            block = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(block - log_sum) - tl.where(start + columns == label, 1.0, 0.0)
            gradient = tl.where(counts, gradient, 0.0)
            tl.store(logits + start + columns, gradient.to(logits.dtype.element_ty), mask=inside)
