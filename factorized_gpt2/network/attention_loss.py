"""The loss of a frozen head as one call of an attention kernel.

The loss of a row h with label y under a head W (V, k) is logsumexp(W h) - w_y . h. Its gradient by h is
sum_v softmax(W h)_v w_v - w_y. Attention with the rows as queries and W as both keys and values, at scale 1, returns
that sum, and its kernels know the logsumexp. So one forward pass of a flash kernel gives loss and gradient. Logits
never leave the chip, and nothing is computed twice. The gradient of a trained head is not among what attention gives.

Shapes in comments: N rows (tokens), V vocabulary, k width of the head, S parts of the vocabulary.
"""

from collections.abc import Callable

import torch
from torch import nn

Attention = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Takes queries (1, S, N, k) and keys, which are the values too, (1, S, V / S, k). Returns the mean of the keys under
the softmax, (1, S, N, k) in their dtype, and the logsumexp, S N numbers in float32.
"""

LARGEST_WIDTH = 256  # of the flash kernels on CUDA
_TILE_ROWS = 64  # of a thread block of the flash kernel at that width
_TILES_AT_ONCE = 2  # of a multiprocessor
_MOST_PARTS = 64


def _on_cpu(queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, keys, keys, 0.0, False, scale=1.0)


def _flash(queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention(queries, keys, keys, 0.0, False, scale=1.0)[:2]


def _cudnn(queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = torch.ops.aten._scaled_dot_product_cudnn_attention(
        queries, keys, keys, None, True, 0.0, False, scale=1.0
    )
    return outputs[:2]


CUDA_KERNELS: dict[str, Attention] = {"flash": _flash, "cudnn": _cudnn}


def attention_runs(device: str, dtype: torch.dtype, width: int) -> bool:
    """Tell whether a head of this width has an attention kernel: on a CPU any, on CUDA half precision up to 256."""
    half = dtype in (torch.float16, torch.bfloat16)
    return device == "cpu" or (device == "cuda" and half and width <= LARGEST_WIDTH)


@torch.no_grad()
def sum_by_attention(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int = -100,
    kernel: Attention | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the cross-entropy of a head over rows, and take its gradient by the rows.

    Plainly: `cross_entropy((hidden @ weight.T).float(), labels, ignore_index=ignore_index, reduction="sum")`. Sums
    are in float32; probabilities are rounded to the inputs' dtype before they meet the weights, as in every flash
    kernel.

    Args:
        hidden: (N, k) floats.
        weight: (V, k), of the same dtype.
        labels: (N,) int64.
        ignore_index: The label of rows that do not count.
        kernel: By default the device's own; on CUDA the flash kernel.

    Returns:
        The sum, scalar float32 in nats, and its gradient by `hidden`, (N, k) float32.
    """
    means, log_sums = _attend(hidden, weight, kernel or (_flash if hidden.is_cuda else _on_cpu))
    counts = (labels != ignore_index)[:, None]
    rows_of_labels = weight[labels.where(counts[:, 0], 0)].float()  # [N, k]
    logits_of_labels = (hidden.float() * rows_of_labels).sum(1, keepdim=True)
    losses = (log_sums - logits_of_labels).where(counts, 0.0)
    return losses.sum(), means.sub_(rows_of_labels).mul_(counts)


def _attend(hidden: torch.Tensor, weight: torch.Tensor, kernel: Attention) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean row of the head under each row's softmax, (N, k), and the logsumexp, (N, 1), both float32."""
    rows, width = hidden.shape
    padding = -width % 8 if hidden.is_cuda else 0  # the kernels' alignment
    if padding:
        hidden, weight = (nn.functional.pad(tensor, (0, padding)) for tensor in (hidden, weight))
    parts = _number_of_parts(rows, hidden.device)
    size = len(weight) // parts
    keys = weight[: parts * size].view(1, parts, size, -1)
    means, log_sums = kernel(hidden.expand(1, parts, -1, -1), keys)
    means, log_sums = means[0, ..., :width].float(), log_sums.reshape(parts, rows, 1)  # [S, N, k], [S, N, 1]
    rest = weight[parts * size :]  # fewer rows than there are parts
    if len(rest):
        logits = hidden.float() @ rest.float().T
        means = torch.cat([means, (logits.softmax(1) @ rest.float())[None, :, :width]])
        log_sums = torch.cat([log_sums, logits.logsumexp(1)[None, :, None]])
    if len(means) == 1:
        return means[0], log_sums[0]
    total = log_sums.logsumexp(0)
    return (means * (log_sums - total).exp()).sum(0), total


def _number_of_parts(rows: int, device: torch.device) -> int:
    """Choose S: on CUDA so that N / 64 tiles for each of S parts leave the fewest multiprocessors idle at the end."""
    if device.type != "cuda":
        return 1
    slots = _TILES_AT_ONCE * torch.cuda.get_device_properties(device).multi_processor_count
    return parts_for(-(-rows // _TILE_ROWS), slots)


def parts_for(tiles: int, slots: int) -> int:
    """Choose the number of parts that keeps slots busiest when `tiles` tiles a part are dealt to them; ties go low."""
    most = min(_MOST_PARTS, max(8, slots // tiles))
    return max(range(1, most + 1), key=lambda parts: (tiles * parts / slots) / -(-tiles * parts // slots))
