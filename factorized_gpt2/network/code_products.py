"""Products of hidden states with a table of int8 codes, of which only a block is there in floats at once, or none.

Shapes in comments: V vocabulary, k columns of codes, N rows of hidden states.
"""

from functools import cache

import torch

BLOCK_CODES = {"cpu": 2**20}  # that are floats at once: on a CPU they stay in the cache
BLOCK_CODES_ELSEWHERE = 2**24
MOST_INTEGER_ROWS = 16  # above, a block is used by so many rows that making floats of it costs little
INTEGER_COLUMNS = range(2, 2**17)  # of one, torch's product is zero; of more than these, sums may leave int32
_DIGITS = {torch.float32: 3, torch.bfloat16: 2, torch.float16: 2}
_DIGIT = 256  # of int8, from -128 to 127
_LARGEST_FIRST_DIGIT = 127


class TimesCodes(torch.autograd.Function):
    """`inputs @ codes.T`, (N, k) to (N, V), or where `back` is true `inputs @ codes`, (N, V) to (N, k)."""

    @staticmethod
    def forward(ctx, inputs: torch.Tensor, codes: torch.Tensor, back: bool) -> torch.Tensor:
        ctx.back = back
        ctx.save_for_backward(codes)
        if back:
            return _sum_over_vocabulary(inputs, codes)
        if _suits_integers(inputs, codes):
            return integer_product(inputs, codes)
        return _product_by_blocks(inputs, codes)

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        (codes,) = ctx.saved_tensors
        return TimesCodes.apply(upstream, codes, not ctx.back), None, None


def rows_of_a_block(codes: torch.Tensor) -> int:
    """Tell how many rows of a table (V, k) are floats at once."""
    return max(1, BLOCK_CODES.get(codes.device.type, BLOCK_CODES_ELSEWHERE) // codes.shape[1])


def integer_product(inputs: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Multiply few rows with all codes by exact products of integers, for which no code becomes a float.

    A row h is written as m / (127 * 256^(n - 1)) times integers of n digits to the base 256, where m is its largest
    absolute value. Each digit is a row of int8, whose products with the codes add up exactly in int32. n is 3 for
    float32, and 2 for half precision. So an element of h is off by at most m * 6.1e-8, and m * 1.6e-5 respectively:
    less than the inputs' own rounding at that size. The result is the same for any number of threads.

    Args:
        inputs: (N, k) float32, bfloat16 or float16. A row that is not finite gives NaN.
        codes: (V, k) int8, k in `INTEGER_COLUMNS`.

    Returns:
        (N, V) in the dtype of `inputs`.
    """
    digits = _DIGITS[inputs.dtype]
    largest = inputs.abs().amax(1, keepdim=True).double()
    unit = torch.where(largest == 0, 1, largest) / (_LARGEST_FIRST_DIGIT * _DIGIT ** (digits - 1))
    left = (inputs.double() / unit).round().nan_to_num().to(torch.int32)
    rows = []
    for _ in range(digits - 1):
        digit = (left + _DIGIT // 2) % _DIGIT - _DIGIT // 2
        rows.append(digit)
        left = (left - digit) // _DIGIT
    stacked = torch.cat([left, *reversed(rows)]).to(torch.int8)  # the first digits of all rows, then the second ones
    first, *others = torch._int_mm(stacked, codes.T).float().split(len(inputs))
    for digit in others:
        first = first.mul_(_DIGIT).add_(digit)
    return first.mul_(unit).to(inputs.dtype)


def _suits_integers(inputs: torch.Tensor, codes: torch.Tensor) -> bool:
    if inputs.device.type != "cpu" or inputs.dtype not in _DIGITS or torch.compiler.is_compiling():
        return False
    fits = 0 < len(inputs) <= MOST_INTEGER_ROWS and codes.shape[1] in INTEGER_COLUMNS
    return fits and multiplies_integers_exactly()


@cache
def multiplies_integers_exactly() -> bool:
    """Try whether this torch multiplies int8 exactly on this processor: some add up in int16, which overflows."""
    extremes = torch.tensor([-128, 127, -127, 1], dtype=torch.int8)
    left, right = extremes[:3, None].repeat(1, 192), extremes[:, None].repeat(16, 192)
    try:
        product = torch._int_mm(left, right.T)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.equal(product.long(), left.long() @ right.long().T)


def _product_by_blocks(inputs: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    on_cpu = inputs.device.type == "cpu"
    # A CPU casts integers to float32 fastest, which decides where a row is all there is to multiply, and multiplies
    # float16 slowly.
    in_float32 = on_cpu and (inputs.dtype == torch.float16 or len(inputs) == 1)
    factors = inputs.float() if in_float32 else inputs
    size = rows_of_a_block(codes)
    product = inputs.new_empty(len(inputs), len(codes))
    buffer = factors.new_empty(min(size, len(codes)), codes.shape[1])  # one for all: memory that is new is slow
    for part, block in zip(product.split(size, dim=1), codes.split(size), strict=True):
        part.copy_(factors @ buffer[: len(block)].copy_(block).T)
    return product


def _sum_over_vocabulary(inputs: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    factors = inputs.float() if inputs.device.type == "cpu" and inputs.dtype == torch.float16 else inputs
    # Sums over the vocabulary stay in float32: added up in half precision, block after block, they would round.
    total = inputs.new_zeros(len(inputs), codes.shape[1], dtype=torch.promote_types(inputs.dtype, torch.float32))
    size = rows_of_a_block(codes)
    for part, block in zip(factors.split(size, dim=1), codes.split(size), strict=True):
        total += part @ block.to(factors.dtype)
    return total.to(inputs.dtype)
