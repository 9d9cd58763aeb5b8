"""What a coded vocabulary costs in time and memory, at GPT-2's size: `python benchmarks/coded_table.py`.

A random matrix with a falling spectrum and tokens drawn by Zipf's law stand for GPT-2's.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from side_by_side import machine, measure_in_turns, print_table, ratios, seconds_cell, timed
from speed import random_weight
from torch import nn

from factorized_gpt2 import FactorizedGPT2, FactorizedGPT2Config, from_gpt2
from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.compress.quantizer import coding_weights, encode_table
from factorized_gpt2.network.coded_table import CodedTable
from factorized_gpt2.settings.parsing import ManualParser


@dataclass
class CodedTableArguments:
    """The size of the problem."""

    vocab_size: int = field(default=50257, metadata={"help": "V."})
    width: int = field(default=768, metadata={"help": "d."})
    n_layer: int = field(default=12, metadata={"help": "Blocks of the model that is saved and loaded."})
    bits: list[float] = field(default_factory=lambda: [1.75, 5.0], metadata={"help": "A weight."})
    rounds: int = field(default=11, metadata={"help": "Timed runs of the head."})


def main(argv: list[str]) -> None:
    """Code at every size, and print a table of files and one of the head."""
    arguments = ManualParser(CodedTableArguments, prog="coded_table.py", description=__doc__).parse(argv)[0]
    print(f"{machine()}; V = {arguments.vocab_size}, d = {arguments.width}\n", flush=True)
    baseline, weight, row_weights = _problem(arguments)
    files, heads = [], []
    for bits in arguments.bits:
        seconds, table = _timed(lambda bits=bits: encode_table(weight, np.eye(weight.shape[1]), row_weights, bits))
        model = from_gpt2(baseline, table)
        files.append(_files_row(model, table, seconds))
        heads.append(_heads_row(model, table, arguments.rounds))
    print_table(files)
    print("\nHead, one row of hidden states, ms:\n")
    print_table(heads)


def _problem(arguments: CodedTableArguments) -> tuple[FactorizedGPT2, np.ndarray, np.ndarray]:
    """Make a model that is not factorized, its matrix, and what its rows weigh."""
    torch.manual_seed(0)
    width = arguments.width
    heads = max(1, width // 64)
    shape = {"vocab_size": arguments.vocab_size, "n_embd": width, "n_layer": arguments.n_layer, "n_head": heads}
    baseline = FactorizedGPT2(FactorizedGPT2Config(**shape))
    frequencies = 1e7 / np.arange(1, arguments.vocab_size + 1)
    weight = random_weight(arguments.vocab_size, width, np.random.default_rng(0))
    return baseline, weight, coding_weights(frequencies.astype(np.int64), frequencies)


def _files_row(model: FactorizedGPT2, table: CodedTable, seconds: float) -> dict[str, str]:
    writing, data = _timed(table.to_bytes)
    reading, _ = _timed(lambda: CodedTable.from_bytes(data))
    with tempfile.TemporaryDirectory() as folder:
        saving, _ = _timed(lambda: model.save_pretrained(folder))
        loading, _ = _timed(lambda: FactorizedGPT2.from_pretrained(folder))
    held = sum(tensor.nbytes for tensor in _vocabulary(model).values())
    return {
        "bits a weight": f"{table.bits_per_weight:.2f}",
        "MB": f"{len(data) / 1e6:.1f}",
        "columns": str(table.codes.shape[1]),
        "find the codes, s": f"{seconds:.1f}",
        "to bytes, s": f"{writing:.2f}",
        "from bytes, s": f"{reading:.2f}",
        "save_pretrained, s": f"{saving:.1f}",
        "from_pretrained, s": f"{loading:.1f}",
        "in memory, bytes a weight": f"{held / model.config.vocab_size / model.config.n_embd:.2f}",
    }


def _vocabulary(model: FactorizedGPT2) -> dict[int, torch.Tensor]:
    """List what the vocabulary holds in memory, what is shared once."""
    parts = (model.transformer.wte, model.transformer.scale_up, model.scale_down, model.lm_head)
    tensors = [*(tensor for part in parts for tensor in (*part.parameters(), *part.buffers()))]
    return {tensor.data_ptr(): tensor for tensor in tensors}


@torch.no_grad()
def _heads_row(model: FactorizedGPT2, table: CodedTable, rounds: int) -> dict[str, str]:
    """Time the head on one row against a float table of its rank, in three number types."""
    rank = table.codes.shape[1]
    row = {"columns": str(rank)}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name, state = str(dtype).removeprefix("torch."), torch.randn(1, rank, dtype=dtype)
        coded = model.lm_head.to(dtype)
        plain = nn.Linear(rank, len(table.codes), bias=False, dtype=dtype)
        ways = {"coded": timed(lambda: coded(state), 5), "float": timed(lambda: plain(state), 5)}  # noqa: B023
        seconds = measure_in_turns(ways, rounds)
        row |= {
            f"coded, {name}": seconds_cell(seconds["coded"]),
            f"float table, {name}": seconds_cell(seconds["float"]),
        }
        row[f"float / coded, {name}"] = ratios(seconds["float"], seconds["coded"])
    return row


def _timed(function: Callable):
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


if __name__ == "__main__":
    sys.exit(run_command(main))
