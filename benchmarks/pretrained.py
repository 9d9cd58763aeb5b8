"""A pretrained model's tied vocabulary, made small in every way: loss increase on text against bits a weight.

`python benchmarks/pretrained.py FOLDER --calibration_file BOOKS.parquet --text_file A.tokens B.parquet`. Nothing is
trained; all ways see the same tokens, and what each adds to the loss is a mean of differences by token.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from foreign_models import Calibration, TiedModel, token_losses
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter
from peers import Small, peers
from side_by_side import machine
from tabulate import tabulate
from transformers import AutoModelForCausalLM

from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.common.errors import UserError, blaming
from factorized_gpt2.common.files import replacing_file
from factorized_gpt2.common.progress import Progress
from factorized_gpt2.compress.calibration import count_tokens, spread_blocks
from factorized_gpt2.compress.data_aware import VocabularyUse
from factorized_gpt2.compress.quantizer import coding_weights, encode_table
from factorized_gpt2.settings.parsing import ManualParser
from factorized_gpt2.text.blocks import load_blocks
from factorized_gpt2.text.source import TextSource
from factorized_gpt2.text.tokenizers import load_tokenizer

_TICKS = (0.5, 1, 2, 4, 8, 16)  # bits a weight
INPUT_SIDE = 3  # times the head's in the metric of the coded table; docs/coding.md measures others


@dataclass
class PretrainedArguments:
    """The model, the texts and the ways."""

    model: str = field(metadata={"help": "Folder or Hub id of a causal model with a tied vocabulary."})
    calibration_file: str = field(metadata={"help": "Text from which ways may learn."})
    text_file: list[str] = field(metadata={"help": "Texts on which the loss is measured.", "nargs": "+"})
    tokens: int = field(default=8192, metadata={"help": "Of each text."})
    calibration_tokens: int = field(default=32768, metadata={"help": "Run forward and backward."})
    block_size: int = field(default=512, metadata={"help": "Tokens of context."})
    ranks: list[int] = field(default_factory=lambda: [48, 96, 192, 384], metadata={"help": "k of low rank."})
    bits: list[int] = field(default_factory=lambda: [8, 6, 5, 4, 3, 2], metadata={"help": "Of integers."})
    budgets: list[float] = field(
        default_factory=lambda: [0.5, 0.75, 1.0, 1.75, 2.75, 4.0, 6.0, 8.0],
        metadata={"help": "Bits a weight, of ours."},
    )
    only: str | None = field(default=None, metadata={"help": "Measure the ways alone whose names hold this word."})
    output: str | None = field(default=None, metadata={"help": "Folder for the table, JSON and picture."})


@dataclass
class Measurement:
    """One way's figures."""

    family: str
    name: str
    bits_per_weight: float
    seconds: float
    increase: list[float]
    standard_error: list[float]


class Yardstick:
    """Measures what tables cost on texts.

    Args:
        model: Whose table is replaced.
        texts: Blocks of token ids of each text, (n, T) int64.
    """

    def __init__(self, model: TiedModel, texts: list[torch.Tensor]):
        self._model, self._texts = model, texts
        self.baseline = self._losses(model.table)

    def increase(self, table: np.ndarray) -> tuple[list[float], list[float]]:
        """Return how much a table adds to every text's loss, and its standard error over tokens, in nats."""
        losses = self._losses(table)
        differences = [after - before for after, before in zip(losses, self.baseline, strict=True)]
        return (
            [float(values.mean()) for values in differences],
            [float(values.std() / len(values) ** 0.5) for values in differences],
        )

    def _losses(self, table: np.ndarray) -> list[np.ndarray]:
        self._model.use_table(table)
        head = torch.from_numpy(np.ascontiguousarray(table, dtype=np.float32))
        losses = [token_losses(self._model.hidden_states(blocks), head, blocks) for blocks in self._texts]
        self._model.use_table(self._model.table)
        return losses


def main(argv: list[str]) -> None:
    """Measure, then print the table."""
    arguments = ManualParser(PretrainedArguments, prog="pretrained.py", description=__doc__).parse(argv)[0]
    with blaming(f"{arguments.model} cannot be loaded"):
        network = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, trust_remote_code=False)
    model = TiedModel(network)
    texts = [read_blocks(arguments, name, arguments.tokens)[0] for name in arguments.text_file]
    blocks, counts = read_blocks(arguments, arguments.calibration_file, arguments.calibration_tokens, len(model.table))
    calibration = model.calibrate(blocks, desc="calibrating")
    use = calibration.use(counts)
    ways = [*ours(model.table, calibration, use, arguments.budgets)]
    ways += peers(model.table, calibration, use, arguments.ranks, arguments.bits)
    ways = [way for way in ways if arguments.only is None or arguments.only in way[1]]
    if not ways:
        raise UserError(f"No way's name holds {arguments.only!r}.")
    yardstick = Yardstick(model, texts)
    header = {
        "model": arguments.model,
        "machine": machine(),
        "texts": [Path(name).name for name in arguments.text_file],
        "tokens": [len(losses) for losses in yardstick.baseline],
        "baseline": [float(losses.mean()) for losses in yardstick.baseline],
        "calibration_tokens": blocks.numel(),
    }
    rows = []
    for family, name, make in Progress(ways, desc="ways"):
        rows.append(measure(family, name, make, yardstick))
        if arguments.output is not None:  # after each, so that an interruption loses none
            write_results(Path(arguments.output), header, rows)
    print(describe(header, rows))


def read_blocks(
    arguments: PretrainedArguments, name: str, tokens: int, vocab_size: int | None = None
) -> tuple[torch.Tensor, np.ndarray | None]:
    """Read blocks evenly spread over a text, (n, T), and count the whole text's tokens where `vocab_size` is given."""
    tokenizer = load_tokenizer(arguments.model)
    blocks = load_blocks(TextSource(files=(name,)), tokenizer, arguments.block_size, keep_tail=False)
    if not len(blocks):
        raise UserError(f"{name} has fewer than {arguments.block_size} tokens.")
    counts = None if vocab_size is None else count_tokens(blocks, vocab_size)
    rows = [row["input_ids"] for row in spread_blocks(blocks, tokens)]
    return torch.tensor(np.array(rows)), counts


def ours(
    weight: np.ndarray, calibration: Calibration, use: VocabularyUse, budgets: list[float]
) -> Iterator[tuple[str, str, Callable[[], Small]]]:
    """Yield the coded table at every budget, as `peers` yields peers."""
    metric = INPUT_SIDE * use.input_side.second_moment() + use.output_side.second_moment()
    row_weights = coding_weights(use.token_counts, calibration.head_use)

    def make(budget: float) -> Small:
        table = encode_table(weight, metric, row_weights, budget)
        return table.dense(), table.nbytes

    for budget in budgets:
        yield "coded", f"coded, {budget:g} bits", lambda b=budget: make(b)


def measure(family: str, name: str, make: Callable[[], Small], yardstick: Yardstick) -> Measurement:
    """Make a table and measure it."""
    began = time.perf_counter()
    table, size = make()
    seconds = time.perf_counter() - began
    return Measurement(family, name, 8 * size / table.size, seconds, *yardstick.increase(table))


def describe(header: dict, rows: list[Measurement]) -> str:
    """Write the figures as a Markdown table, smallest first."""
    table = []
    for row in sorted(rows, key=lambda row: row.bits_per_weight):
        cells = {"way": row.name, "bits a weight": f"{row.bits_per_weight:.2f}"}
        for text, mean, error in zip(header["texts"], row.increase, row.standard_error, strict=True):
            cells[text] = f"{mean:.4f} ± {error:.4f}"
        table.append(cells | {"seconds": f"{row.seconds:.0f}"})
    baseline = ", ".join(
        f"{loss:.4f} on {tokens} tokens of {text}"
        for text, tokens, loss in zip(header["texts"], header["tokens"], header["baseline"], strict=True)
    )
    return (
        f"{header['machine']}; calibrated on {header['calibration_tokens']} tokens. Loss without change: {baseline}. "
        "What each way adds, in nats:\n\n" + tabulate(table, headers="keys", tablefmt="github", disable_numparse=True)
    )


def write_results(folder: Path, header: dict, rows: list[Measurement]) -> None:
    """Write `pretrained.md`, `pretrained.json` and `pretrained.png` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_file(folder / "pretrained.md") as path:
        path.write_text(describe(header, rows) + "\n", encoding="utf-8")
    with replacing_file(folder / "pretrained.json") as path:
        path.write_text(json.dumps(header | {"ways": [vars(row) for row in rows]}, indent=1) + "\n", encoding="utf-8")
    figure, panels = plt.subplots(1, len(header["texts"]), figsize=(5 * len(header["texts"]), 4), squeeze=False)
    families = dict.fromkeys(row.family for row in rows)
    for number, (axes, text) in enumerate(zip(panels[0], header["texts"], strict=True)):
        for family, marker in zip(families, "o^vs*DPX", strict=False):
            points = sorted(
                (row.bits_per_weight, max(row.increase[number], 1e-4)) for row in rows if row.family == family
            )
            line = {"linestyle": "none"} if family in ("round to nearest", "gguf") else {}
            axes.loglog(*zip(*points, strict=True), marker=marker, label=family, markersize=4, **line)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(_TICKS, labels=[f"{bits:g}" for bits in _TICKS])
        axes.set_title(text, fontsize=10)
        axes.set_xlabel("bits a weight, all counted")
        axes.set_ylabel("loss increase [nats / token]")
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "pretrained.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(run_command(main))
