"""A pretrained model's tied vocabulary, made small in every way: loss increase on text against bits a weight.

`python benchmarks/pretrained.py --model FOLDER --calibration_file BOOKS.parquet --text_file A.tokens B.parquet`. All
ways see the same tokens, and what each adds to the loss is a mean of differences by token. With --refine_steps each is
measured once more, trained for so many steps on the calibration text. With --output, what was measured before is read
and not measured again.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from foreign_models import Calibration, TiedModel, divergence, token_losses
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter
from peers import Small
from side_by_side import machine
from tabulate import tabulate
from transformers import AutoModelForCausalLM
from ways import Way, Ways

from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.common.errors import UserError, blaming
from factorized_gpt2.common.files import replacing_file
from factorized_gpt2.common.progress import Progress
from factorized_gpt2.compress.calibration import count_tokens, spread_blocks
from factorized_gpt2.compress.refinement import HELD_OUT
from factorized_gpt2.compress.vocabulary_refinement import Teacher, refine_vocabulary
from factorized_gpt2.settings.parsing import ManualParser
from factorized_gpt2.text.blocks import load_blocks
from factorized_gpt2.text.source import TextSource
from factorized_gpt2.text.tokenizers import load_tokenizer

_TICKS = (0.5, 1, 2, 4, 8, 16)  # bits a weight
_LEAST_DIVERGENCE = 1e-6  # nats; less is rounding


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
    refine_steps: int = field(
        default=0, metadata={"help": "Of 1,024 tokens each, after which every way but gguf's is measured once more."}
    )
    only: list[str] | None = field(
        default=None, metadata={"help": "Measure the ways alone whose names begin with one of these.", "nargs": "+"}
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Of the network when the loss is measured.", "choices": ["float32", "bfloat16"]},
    )
    output: str | None = field(default=None, metadata={"help": "Folder for the table, JSON and picture."})
    work_dir: str | None = field(
        default=None, metadata={"help": "Folder where the calibration is kept, for the next run on the same texts."}
    )


@dataclass
class Measurement:
    """One way's figures."""

    family: str
    name: str
    bits_per_weight: float
    seconds: float
    increase: list[float]
    standard_error: list[float]
    divergence: list[float]


class Yardstick:
    """Measures what tables cost on texts.

    Args:
        model: Whose table is replaced.
        texts: Blocks of token ids of each text, (n, T) int64.
        dtype: Of the model, the original's too: differences between them feel it little.
    """

    def __init__(self, model: TiedModel, texts: list[torch.Tensor], dtype: torch.dtype = torch.float32):
        self._trunk, self._texts, self._dtype = model.trunk(dtype), texts, dtype
        self._head = model.original.to(dtype)
        self._hidden = [self._states(model.original, blocks) for blocks in texts]
        self.baseline = [
            token_losses(hidden, self._head, blocks) for hidden, blocks in zip(self._hidden, texts, strict=True)
        ]

    def measure(self, small: Small) -> tuple[list[float], list[float], list[float]]:
        """Return what a vocabulary adds to every text's loss, its standard error over tokens, and the divergence."""
        head = torch.from_numpy(small.embedding if small.head is None else small.head).to(self._dtype)
        bias = None if small.bias is None else torch.from_numpy(small.bias).to(self._dtype)
        increases, divergences = [], []
        for blocks, original, before in zip(self._texts, self._hidden, self.baseline, strict=True):
            hidden = self._states(torch.from_numpy(small.embedding), blocks)
            increases.append(token_losses(hidden, head, blocks, bias) - before)
            divergences.append(divergence(hidden, head, original, self._head, bias))
        means = [float(values.mean()) for values in increases]
        errors = [float(values.std() / len(values) ** 0.5) for values in increases]
        return means, errors, divergences

    @torch.no_grad()
    def _states(self, table: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        rows = [self._trunk(torch.nn.functional.embedding(row[None], table)) for row in blocks]
        return torch.cat(rows).to(self._dtype)


@dataclass(frozen=True)
class Refiner:
    """Refines small vocabularies on the calibration text, in bfloat16 but for what is trained.

    Args:
        model: The original.
        calibration: On blocks of text.
        block_size: Of those.
        steps: How many.
    """

    model: TiedModel
    calibration: Calibration
    block_size: int
    steps: int

    def __call__(self, vocabulary: torch.nn.Module) -> None:
        """Refine in place."""
        ids, hidden = (torch.from_numpy(array) for array in (self.calibration.ids, self.calibration.hidden))
        states = hidden.bfloat16().view(-1, self.block_size, hidden.shape[1])
        text = Teacher(self.model.original.bfloat16(), ids.view(-1, self.block_size), states)
        held_out = torch.arange(len(states)) % HELD_OUT == HELD_OUT - 1
        if not held_out.any():
            held_out[-1] = True
        before, after = refine_vocabulary(
            vocabulary, self.model.trunk(torch.bfloat16), text[~held_out], text[held_out], self.steps, progress=True
        )
        print(f"Refined: {before:.4f} to {after:.4f} nats from the original, on text held out.", flush=True)


def main(argv: list[str]) -> None:
    """Measure, then print the table."""
    arguments = ManualParser(PretrainedArguments, prog="pretrained.py", description=__doc__).parse(argv)[0]
    with blaming(f"{arguments.model} cannot be loaded"):
        network = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, trust_remote_code=False)
    model = TiedModel(network)
    texts = [read_blocks(arguments, name, arguments.tokens)[0] for name in arguments.text_file]
    calibration, counts = calibrate(arguments, model)
    use = calibration.use(counts)
    ways = list(Ways(model.table, calibration, use).all(arguments.budgets, arguments.ranks, arguments.bits))
    if arguments.refine_steps:
        refiner = Refiner(model, calibration, arguments.block_size, arguments.refine_steps)
        ways = [each for way in ways for each in (way, *way.refined(refiner))]
    ways = [way for way in ways if arguments.only is None or way.name.startswith(tuple(arguments.only))]
    if not ways:
        raise UserError(f"No way's name begins with {' or '.join(map(repr, arguments.only))}.")
    yardstick = Yardstick(model, texts, getattr(torch, arguments.dtype))
    header = {
        "model": Path(arguments.model).name,
        "machine": machine(),
        "texts": [Path(name).name for name in arguments.text_file],
        "tokens": [len(losses) for losses in yardstick.baseline],
        "baseline": [float(losses.mean()) for losses in yardstick.baseline],
        "calibration_tokens": len(calibration.ids),
        "refine_steps": arguments.refine_steps,
        "dtype": arguments.dtype,
    }
    output = None if arguments.output is None else Path(arguments.output)
    rows = [] if output is None else read_results(output, header)
    for way in Progress(ways, desc="ways"):
        if way.name in {row.name for row in rows}:
            continue
        rows.append(measure(way, yardstick))
        if output is not None:  # after each, so that an interruption loses none
            write_results(output, header, rows)
    print(describe(header, rows))


def calibrate(arguments: PretrainedArguments, model: TiedModel) -> tuple[Calibration, np.ndarray]:
    """Run over the calibration text, or read what was kept of that; and count all of its tokens."""
    name, vocab_size = arguments.calibration_file, len(model.table)
    blocks, counts = read_blocks(arguments, name, arguments.calibration_tokens, vocab_size)
    kept = None if arguments.work_dir is None else Path(arguments.work_dir) / "calibration.npz"
    if kept is not None and kept.exists():
        with np.load(kept, allow_pickle=False) as arrays:
            calibration = Calibration(**arrays)
        if len(calibration.ids) == blocks.numel() and calibration.hidden.shape[1] == model.table.shape[1]:
            return calibration, counts
    calibration = model.calibrate(blocks, desc="calibrating")
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(kept) as path, path.open("wb") as file:
            np.savez(file, **{name: getattr(calibration, name) for name in Calibration.__dataclass_fields__})
    return calibration, counts


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


def measure(way: Way, yardstick: Yardstick) -> Measurement:
    """Make a table and measure it."""
    began = time.perf_counter()
    small = way.make()
    seconds = time.perf_counter() - began
    bits_per_weight = 8 * small.nbytes / small.embedding.size
    return Measurement(way.family, way.name, bits_per_weight, seconds, *yardstick.measure(small))


def describe(header: dict, rows: list[Measurement]) -> str:
    """Write the figures as a Markdown table, smallest first."""
    table = []
    for row in sorted(rows, key=lambda row: row.bits_per_weight):
        cells = {"way": row.name, "bits a weight": f"{row.bits_per_weight:.2f}"}
        for text, mean, error in zip(header["texts"], row.increase, row.standard_error, strict=True):
            cells[text] = f"{mean:.4f} ± {error:.4f}"
        for text, nats in zip(header["texts"], row.divergence, strict=True):
            cells[f"KL, {text}"] = f"{nats:.5f}"
        table.append(cells | {"seconds": f"{row.seconds:.0f}"})
    baseline = ", ".join(
        f"{loss:.4f} on {tokens} tokens of {text}"
        for text, tokens, loss in zip(header["texts"], header["tokens"], header["baseline"], strict=True)
    )
    return (
        f"{header['machine']}; calibrated on {header['calibration_tokens']} tokens. Loss without change: {baseline}. "
        "What each way adds, in nats:\n\n" + tabulate(table, headers="keys", tablefmt="github", disable_numparse=True)
    )


def read_results(folder: Path, header: dict) -> list[Measurement]:
    """Read what `write_results` wrote of the same model on the same tokens; nothing where there is none of that."""
    path = folder / "pretrained.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    about = ("model", "texts", "tokens", "calibration_tokens", "refine_steps", "dtype")
    if any(found.get(name) != header[name] for name in about) or not np.allclose(
        found["baseline"], header["baseline"], rtol=1e-4
    ):
        raise UserError(f"{path} holds measurements of something else: choose another --output.")
    return [Measurement(**row) for row in found["ways"]]


def write_results(folder: Path, header: dict, rows: list[Measurement]) -> None:
    """Write `pretrained.md`, `pretrained.json` and `pretrained.png` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_file(folder / "pretrained.md") as path:
        path.write_text(describe(header, rows) + "\n", encoding="utf-8")
    with replacing_file(folder / "pretrained.json") as path:
        path.write_text(
            json.dumps(header | {"ways": [asdict(row) for row in rows]}, indent=1) + "\n", encoding="utf-8"
        )
    draw(folder / "pretrained.png", header["texts"], rows)


def draw(path: Path, texts: list[str], rows: list[Measurement]) -> None:
    """Draw loss increases, where they are above their standard errors, and below them the divergences."""
    figure, panels = plt.subplots(2, len(texts), figsize=(5 * len(texts), 8), squeeze=False, sharex=True)
    families = dict.fromkeys(row.family for row in rows)
    for number, text in enumerate(texts):
        for family, marker in zip(families, cycle("o^vs*DPX<>")):
            own = sorted((row for row in rows if row.family == family), key=lambda row: row.bits_per_weight)
            losses = [
                (row.bits_per_weight, row.increase[number])
                for row in own
                if row.increase[number] > row.standard_error[number]
            ]
            divergences = [(row.bits_per_weight, max(row.divergence[number], _LEAST_DIVERGENCE)) for row in own]
            line = {"linestyle": "none"} if family in ("round to nearest", "gguf") else {}
            for axes, points in zip(panels[:, number], (losses, divergences), strict=True):
                axes.plot(*np.reshape(points, (-1, 2)).T, marker=marker, label=family, markersize=4, **line)
        for axes, what in zip(panels[:, number], ("loss increase", "divergence from the original"), strict=True):
            axes.set_xscale("log")
            if any(len(line.get_ydata()) for line in axes.get_lines()):  # on which a logarithmic scale insists
                axes.set_yscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xticks(_TICKS, labels=[f"{bits:g}" for bits in _TICKS])
            axes.set_ylabel(f"{what} [nats / token]")
        panels[0][number].set_title(text, fontsize=10)
        panels[1][number].set_xlabel("bits a weight, all counted")
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    with replacing_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(run_command(main))
