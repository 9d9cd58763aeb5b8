"""Text to batches: resident memory and speed of tokenizing and packing, and how fast batches load.

`python benchmarks/text.py --text_file TEXT --tokenizer TOKENIZER`; without them, on Python's documentation.
"""

import multiprocessing
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import psutil
from side_by_side import machine, print_table
from torch.utils.data import DataLoader

from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.settings.parsing import ManualParser
from factorized_gpt2.text.blocks import collate_blocks, load_blocks
from factorized_gpt2.text.demo_corpus import write_python_corpus
from factorized_gpt2.text.source import TextSource
from factorized_gpt2.text.tokenizers import load_tokenizer


@dataclass
class TextArguments:
    """The text and how it is cut."""

    text_file: str | None = field(default=None, metadata={"help": "None: Python's documentation."})
    tokenizer: str | None = field(default=None, metadata={"help": "Folder or Hub id; needed with --text_file."})
    document_start: str | None = field(default=None, metadata={"help": "As in train_hf.py."})
    block_size: int = field(default=2048, metadata={"help": "Tokens a block."})
    batch_size: int = field(default=4, metadata={"help": "Blocks a batch."})
    processes: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Numbers of processes to try."})


def main(argv: list[str]) -> None:
    """Tokenize in processes of their own, without a cache, and print a table."""
    arguments = ManualParser(TextArguments, prog="text.py", description=__doc__).parse(argv)[0]
    if arguments.text_file and not arguments.tokenizer:
        raise UserError("--text_file needs a --tokenizer.")
    print(f"{machine('datasets', 'tokenizers')}\n", flush=True)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.text_file is None:
            write_python_corpus(Path(folder) / "text", 4096)
            arguments.text_file = str(Path(folder) / "text" / "train.jsonl")
            arguments.tokenizer = str(Path(folder) / "text" / "tokenizer")
        rows = []
        for processes in arguments.processes:
            results, report = context.Pipe(duplex=False)
            child = context.Process(target=_measure, args=(arguments, processes, report))
            child.start()
            rows.append(results.recv())
            child.join()
    print_table(rows)


def _measure(arguments: TextArguments, processes: int, report: "multiprocessing.connection.Connection") -> None:
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        tokenizer = load_tokenizer(arguments.tokenizer)
        source = TextSource(files=(arguments.text_file,), document_start=arguments.document_start)
        began = time.perf_counter()
        with ProportionalMemory() as memory:
            blocks = load_blocks(source, tokenizer, arguments.block_size, keep_tail=False, num_proc=processes)
        seconds = time.perf_counter() - began
        characters = sum(len(text) for dataset, _ in source.load() for text in dataset.with_format("numpy")["text"])
        batches = DataLoader(blocks, arguments.batch_size, shuffle=True, collate_fn=collate_blocks)
        began = time.perf_counter()
        loaded = sum(batch["input_ids"].numel() for batch in batches)
        loading = time.perf_counter() - began
    report.send(
        {
            "processes": processes,
            "characters, M": f"{characters / 1e6:.1f}",
            "tokens, M": f"{len(blocks) * arguments.block_size / 1e6:.2f}",
            "seconds": f"{seconds:.1f}",
            "memory before, GB": f"{memory.before / 1e9:.2f}",
            "after a third, GB": f"{memory.after_a_third / 1e9:.2f}",
            "peak, GB": f"{memory.peak / 1e9:.2f}",
            "batches load, M tokens a second": f"{loaded / loading / 1e6:.0f}",
        }
    )


class ProportionalMemory:
    """Memory of this process and its children, pages of files that several map counted once (PSS), over time."""

    def __enter__(self):
        """Start to watch."""
        self._samples, self._done = [self._now()], threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            self._samples.append(self._now())

    def __exit__(self, *_):
        """Stop, and keep results in bytes."""
        self._done.set()
        self._thread.join()
        self.before, self.peak = self._samples[0], max(self._samples)
        self.after_a_third = max(self._samples[: max(1, len(self._samples) // 3)])

    @staticmethod
    def _now() -> int:
        total = 0
        this = psutil.Process()
        for process in (this, *this.children(recursive=True)):
            try:
                total += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):  # ended in between
                continue
        return total


if __name__ == "__main__":
    sys.exit(run_command(main))
