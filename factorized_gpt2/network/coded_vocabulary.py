"""A vocabulary of integers: embedding and head on one table of codes, and the bytes that it is stored as.

Nothing here knows the network around it. Shapes in comments: V vocabulary, k columns of codes, d width of the network,
N rows of hidden states.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import nn

from .code_products import TimesCodes, rows_of_a_block
from .coded_table import CodedTable
from .prediction import OCTAVE, RowRelations, measure_spreads

_LARGEST_STEP_INDEX = 60
_SPREAD_AT_START = 32  # of the codes of a network that starts at random
_WAY_OUT = "int8 codes can be neither adapted nor trained; `dequantize()` of the model makes floats of them."


class _Codes(nn.Parameter):
    """Integers that say why they cannot be trained."""

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> "_Codes":
        return torch.Tensor._make_subclass(cls, data.detach(), requires_grad)

    def requires_grad_(self, requires_grad: bool = True) -> "_Codes":
        if requires_grad:
            raise ValueError(_WAY_OUT)
        super().requires_grad_(False)
        return self


class _Coded(nn.Module):
    """Integers with a step a row: row v of the table is `steps[v] * codes[v]`.

    Args:
        vocab_size: V.
        width: k.

    Attributes:
        codes: (V, k) int8, never trained.
        steps: (V,) floats.
    """

    def __init__(self, vocab_size: int, width: int):
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(vocab_size, width, dtype=torch.int8), requires_grad=False)
        self.steps = nn.Parameter(torch.ones(vocab_size))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "codes" and type(param) is nn.Parameter:
            param.__class__ = _Codes  # whoever puts it here, be it a loader or an adapter's copy
        super().register_parameter(name, param)

    def __getattr__(self, name: str):
        if name == "weight":
            raise AttributeError(f"There is no weight here: {_WAY_OUT}")
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return "{} x {} int8: {}".format(*self.codes.shape, _WAY_OUT)

    @torch.no_grad()
    def start_at_random(self, std: float) -> None:
        """Draw what has not been loaded, so that the table's standard deviation is about `std`."""
        if not getattr(self.codes, "_is_hf_initialized", False):
            drawn = torch.randn(self.codes.shape, device=self.codes.device) * _SPREAD_AT_START
            self.codes.copy_(drawn.round().clamp(-127, 127))
        if not getattr(self.steps, "_is_hf_initialized", False):
            self.steps.fill_(std / _SPREAD_AT_START)

    @torch.no_grad()
    def dense(self) -> torch.Tensor:
        """Return the table, (V, k) in the dtype of the steps."""
        return self.codes.to(self.steps.dtype) * self.steps[:, None]


class CodedEmbedding(_Coded):
    """Looks rows of the table up; in the dtype of the steps, through which gradients flow.

    Attributes:
        stored: What `without_codes` kept of the file that the codes were read from.
    """

    stored: CodedTable | None = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.codes[ids].to(self.steps.dtype) * self.steps[ids].unsqueeze(-1)  # [..., k]


class CodedHead(_Coded):
    """Maps (..., k) to logits (..., V), by blocks of the table: as a whole it is never there in floats.

    Args:
        vocab_size: V.
        width: k.
        bias: Whether there is one, (V,).
    """

    def __init__(self, vocab_size: int, width: int, bias: bool = False):
        super().__init__(vocab_size, width)
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        rows, steps = hidden.reshape(-1, self.codes.shape[1]), self.steps.to(hidden.dtype)
        with torch.autocast(device, enabled=False):
            logits = TimesCodes.apply(rows, self.codes, False)
            takes_gradient = torch.is_grad_enabled() and (rows.requires_grad or self.steps.requires_grad)
            logits = logits * steps if takes_gradient else logits.mul_(steps)
            if self.bias is not None:
                logits = logits + self.bias.to(logits.dtype)
        return logits.view(*hidden.shape[:-1], len(steps))

    def sum_row_loss(self, hidden: torch.Tensor, row_loss: Callable, rows_at_once: int) -> torch.Tensor:
        """Sum a loss of rows of logits, of which no more than some rows are there at once; differentiable once.

        Args:
            hidden: (N, k) floats.
            row_loss: As `blockwise_loss.RowLoss` has it.
            rows_at_once: How many.

        Returns:
            Scalar float32.
        """
        weights, wanted = (hidden, self.steps, self.bias), self.wanted_gradients(hidden)
        return _SumRowLoss.apply(*weights, self.codes, row_loss, rows_at_once, wanted)

    def wanted_gradients(self, hidden: torch.Tensor) -> list[bool]:
        """Tell of `hidden`, the steps and the bias whether they take gradients."""
        weights = (hidden, self.steps, self.bias)
        return [weight is not None and torch.is_grad_enabled() and weight.requires_grad for weight in weights]


class _SumRowLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, steps, bias, codes, row_loss, rows_at_once, wanted):
        total, *gradients = sum_rows(hidden, steps, bias, codes, row_loss, rows_at_once, wanted)
        ctx.wanted, ctx.dtypes = wanted, [None if weight is None else weight.dtype for weight in (hidden, steps, bias)]
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        kept = zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
        # In float32: a loss scale times a gradient may fit a dtype that the scale alone does not.
        gradients = [(gradient * upstream).to(dtype) if wanted else None for gradient, dtype, wanted in kept]
        return *gradients, None, None, None, None


@torch.no_grad()
def sum_rows(
    hidden: torch.Tensor,
    steps: torch.Tensor,
    bias: torch.Tensor | None,
    codes: torch.Tensor,
    row_loss: Callable,
    rows_at_once: int,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum a loss of rows of a coded head's logits; see `CodedHead.sum_row_loss`.

    Returns:
        The sum, and its gradients by `hidden`, `steps` and `bias`, all in float32; those not wanted are empty.
    """
    hidden_wanted, steps_wanted, bias_wanted = wanted
    if hidden.dtype == torch.float16 and hidden.device.type == "cpu":
        hidden = hidden.float()
    steps, largest = steps.float(), steps.float().abs().max()
    parts = codes.split(rows_of_a_block(codes))
    logits = hidden.new_empty(rows_at_once, len(codes), dtype=torch.float32)
    unscaled = torch.empty_like(logits) if steps_wanted else logits
    total = hidden.new_zeros((), dtype=torch.float32)
    by_hidden, by_steps, by_bias = (
        torch.zeros_like(of, dtype=torch.float32) if is_wanted else steps.new_empty(0)
        for of, is_wanted in zip((hidden, steps, bias), wanted, strict=True)
    )
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), rows_at_once):
            rows = slice(start, start + rows_at_once)
            block = hidden[rows]
            of_block, products = logits[: len(block)], unscaled[: len(block)]
            for part, columns in zip(parts, of_block.split([len(part) for part in parts], dim=1), strict=True):
                columns.copy_(block @ part.to(block.dtype).T)
            if steps_wanted:
                products.copy_(of_block)
            of_block *= steps
            if bias is not None:
                of_block += bias
            losses, scales = row_loss(of_block, rows)  # from here on the buffer holds gradients
            total += losses.sum()
            if scales is not None and any(wanted):
                of_block *= scales
            if bias_wanted:
                by_bias += of_block.sum(0)
            if steps_wanted:
                by_steps += products.mul_(of_block).sum(0)
            if hidden_wanted:
                of_block *= steps / largest  # so that half precision holds them
                for part, columns in zip(parts, of_block.split([len(part) for part in parts], dim=1), strict=True):
                    by_hidden[rows] += columns.to(block.dtype) @ part.to(block.dtype)
    return total, by_hidden.mul_(largest), by_steps, by_bias


@dataclass(frozen=True)
class VocabularyNames:
    """What a network's state calls the tensors of its coded vocabulary.

    Attributes:
        codes: (V, k) int8.
        steps: (V,).
        scale_up: (d, k), of a linear layer.
        mean: (d,), its bias.
        scale_down: (k, d), of a linear layer.
        bias: (V,), of the head; a network may have none.
        tied: Names under which codes and steps occur once more, in this order.
        stream: The file's name for the bytes, uint8.
    """

    codes: str
    steps: str
    scale_up: str
    mean: str
    scale_down: str
    bias: str
    tied: tuple[str, str]
    stream: str


def table_tensors(table: CodedTable, names: VocabularyNames) -> dict[str, torch.Tensor]:
    """Return what a table says of a network's state, tied names included: int8 codes, the others float32."""
    return _tie(
        {names.codes: torch.from_numpy(np.ascontiguousarray(table.codes)), **_side_tensors(table, names)}, names
    )


def _tie(state: dict[str, torch.Tensor], names: VocabularyNames) -> dict[str, torch.Tensor]:
    return state | dict(zip(names.tied, (state[names.codes], state[names.steps]), strict=True))


def _side_tensors(table: CodedTable, names: VocabularyNames) -> dict[str, torch.Tensor]:
    arrays = {
        names.steps: table.steps,
        names.scale_up: table.scale_up.T,
        names.mean: table.mean,
        names.scale_down: table.scale_down.T,
        names.bias: table.bias,
    }
    return {name: torch.from_numpy(np.array(array, np.float32, order="C")) for name, array in arrays.items()}


def without_codes(table: CodedTable) -> CodedTable:
    """Keep of a table what the network's own tensors do not tell, 7 V + k d bytes, for the next time it is stored."""
    return replace(table, codes=table.codes[:0], relations=_as_types(table.relations, np.int32, np.int8))


def encode_state(
    state: Mapping[str, torch.Tensor], names: VocabularyNames, stored: CodedTable | None = None
) -> dict[str, torch.Tensor]:
    """Put the bytes of its table in the place of a state's vocabulary.

    Tensors that are not what the table says, such as steps that were trained, stay as they are beside it.

    Args:
        state: Of the network.
        names: Of its vocabulary.
        stored: What `without_codes` kept when the codes were read. Where there is nothing, codes are stored without
            relations between rows, which takes more bytes.

    Returns:
        The state for a file.
    """
    codes = state[names.codes].cpu().numpy()
    table = _table_of(codes, state, names) if stored is None or not _fits(stored, state, names) else stored
    table = replace(table, codes=codes, relations=_as_types(table.relations, np.int64, np.int64))
    kept = {name: tensor for name, tensor in state.items() if name not in (names.codes, *names.tied)}
    for name, told in _side_tensors(table, names).items():
        if name in kept and torch.equal(kept[name].cpu(), told.to(kept[name].dtype)):
            del kept[name]
    return kept | {names.stream: torch.frombuffer(bytearray(table.to_bytes()), dtype=torch.uint8)}


def decode_state(
    state: Mapping[str, torch.Tensor], names: VocabularyNames, shape: tuple[int, int, int]
) -> tuple[dict[str, torch.Tensor], CodedTable]:
    """Undo `encode_state`.

    Args:
        state: As a file has it.
        names: Of the vocabulary.
        shape: V, k and d of the network.

    Returns:
        The state of the network, tied names included, and the table.

    Raises:
        ValueError: The bytes are damaged, or of another shape.
    """
    table = CodedTable.from_bytes(state[names.stream].numpy().tobytes(), shape)
    others = {name: tensor for name, tensor in state.items() if name != names.stream}
    return _tie(table_tensors(table, names) | others, names), table


def _fits(stored: CodedTable, state: Mapping[str, torch.Tensor], names: VocabularyNames) -> bool:
    (size, rank), width = state[names.codes].shape, state[names.scale_up].shape[0]
    return len(stored.relations.step_index) == size and stored.scale_codes.shape == (rank, width)


def _table_of(codes: np.ndarray, state: Mapping[str, torch.Tensor], names: VocabularyNames) -> CodedTable:
    """Describe codes that no table is known for: no row is predicted, nothing is said of the other tensors."""
    steps = state[names.steps].double().abs().cpu().numpy()
    first = float(max(steps.min(), np.finfo(np.float32).tiny))
    index = np.rint(OCTAVE * np.log2(np.maximum(steps, first) / first)).clip(0, _LARGEST_STEP_INDEX).astype(np.int64)
    parent, width = np.zeros_like(index), state[names.scale_up].shape[0]
    relations = RowRelations(index, parent, parent, *measure_spreads(codes, index, parent, parent))
    scale_codes = np.zeros((codes.shape[1], width), np.int8)
    scale_steps, mean = (np.zeros(size, np.float16) for size in (codes.shape[1], width))
    return CodedTable.quantized(codes, relations, first, scale_codes, scale_steps, mean)


def _as_types(relations: RowRelations, of_parents: type, of_others: type) -> RowRelations:
    types = {field.name: of_parents if field.name == "parent" else of_others for field in fields(relations)}
    return RowRelations(**{name: getattr(relations, name).astype(kind) for name, kind in types.items()})
