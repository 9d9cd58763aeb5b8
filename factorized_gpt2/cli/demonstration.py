"""What the demo does once its words are read."""

import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from ..network.configuration_factorized_gpt2 import FactorizedGPT2Config
from ..network.modeling_factorized_gpt2 import FactorizedGPT2
from ..report.plots import plot_loss_against_rank
from ..report.reporting import read_results
from ..report.studies import studies_of
from ..report.tables import results_table
from ..runs.grid import Experiment, load_grid, select
from ..runs.results import Results
from ..runs.run import run_experiment
from ..runs.settings import parse_run
from ..text.demo_corpus import write_python_corpus
from ..text.tokenizers import load_tokenizer
from .compress import compress

PROMPT = "Return a list of"
VOCAB_SIZE = 4096
REFINE_STEPS = 20
BITS = ("1", "2", "4")
HELD_OUT = 24  # each so-many-th document, which is 28,000 tokens


def demonstrate(root: Path, max_steps: int | None) -> None:
    """Corpus, baseline, compression, scratch models, LoRA; then the table, the plot and two sentences.

    Args:
        root: Folder for all of it.
        max_steps: Of every run; `None`: as the configs say.
    """
    import datasets

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    models, corpus = root / "model_weights", root / "corpus"
    experiments = load_grid("demo/experiments.json", root=models)
    ranks = [str(experiment.compressed_rank) for experiment in select(experiments, ["pca_lora_*"])[1:]]
    words = [f"--baseline={models / 'gpt_baseline'}", f"--output_dir={models}"]
    words += [f"--eval_file={corpus / 'validation.jsonl'}", "--eval_batch_size=16"]
    at_ranks = ["--ranks", *ranks]
    learning = ["--method=tokenwise", f"--calibration_file={corpus / 'train.jsonl'}"]
    refine_steps = REFINE_STEPS if max_steps is None else min(REFINE_STEPS, max_steps)

    def run(names: str) -> None:
        _run(names, experiments, corpus, max_steps)

    stages = Stages(_STAGES, _seconds_of_steps() / _STEPS_TOOK)
    stages.begin("Collecting Python's own documentation and training a tokenizer on it")
    _prepare_corpus(corpus)
    stages.begin("Training the baseline")
    run("baseline")
    stages.begin("Compressing it by PCA, without training")
    compress([*words, *at_ranks])
    stages.begin("Compressing it token by token, to the same size")
    compress([*words, *at_ranks, *learning])
    stages.begin(f"Refining that for {refine_steps} steps")
    compress([*words, *at_ranks, *learning, f"--refine={refine_steps}"])
    stages.begin("Coding it as integers, in few bits a weight")
    compress([*words, learning[1], "--bits_per_weight", *BITS])
    stages.begin("Recording the compressed models")
    run("pca_nofinetune_*")
    stages.begin("Healing them with LoRA")
    run("pca_lora_*")
    stages.begin("Training low-rank models from scratch, for comparison")
    run("lowrank_scratch_*")

    stages.end("Results")
    results = read_results(models)
    plot = root / "loss_against_rank.png"
    plot_loss_against_rank(studies_of(results), plot)
    print(results_table(results))
    print(f"\n{_verdict(results)}\n\nPlot: {plot}\n\nA sentence of the baseline, and one of a model healed at")
    healed = max((row for row in results if row.family == "pca-lora"), key=lambda row: row.n_embd_wte)
    print(f"k = {healed.n_embd_wte}, {healed.bytes / results[0].bytes:.0%} of its size:")
    for folder in (models / "gpt_baseline", Path(healed.settings["output_dir"])):
        print(f"  {folder.name}: {_continue(folder, PROMPT)!r}")
    print(f"\nThe demo took {stages.seconds:.0f} seconds.")


# Seconds of each stage, and of the steps that `_seconds_of_steps` times, on two quiet cores of an AMD EPYC.
_STAGES = (9, 20, 7, 9, 17, 7, 4, 20, 48)
_STEPS_TOOK = 0.42


class Stages:
    """A bar over all stages of a long work, with how long the rest will take.

    Args:
        seconds: Of each stage, on some machine.
        pace: How many times as long this machine takes, as far as that is known before.
    """

    def __init__(self, seconds: Sequence[float], pace: float):
        self.expected, self.pace, self.done = seconds, pace, 0
        self.began = time.perf_counter()
        print(f"The demo will take about {_duration(sum(seconds) * pace)} on this machine.")

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self.began

    def begin(self, title: str) -> None:
        """Announce the next stage; what those before it took tells the pace."""
        before, after = sum(self.expected[: self.done]), sum(self.expected[self.done :])
        pace = self.seconds / before if before else self.pace
        share = before / (before + after)
        bar = "#" * round(share * _BAR) + "." * (_BAR - round(share * _BAR))
        self.done += 1
        print(f"\n[{bar}] {self.done} of {len(self.expected)}, {_duration(after * pace)} left: {title}", flush=True)

    def end(self, title: str) -> None:
        """Announce what follows the last stage."""
        print(f"\n[{'#' * _BAR}] {title}", flush=True)


_BAR = 24  # characters


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _seconds_of_steps() -> float:
    """Time some steps of training like the baseline's, without what the first of them sets up."""
    model = FactorizedGPT2(
        FactorizedGPT2Config(vocab_size=VOCAB_SIZE, n_positions=128, n_embd=128, n_layer=3, n_head=4)
    )
    ids = torch.randint(VOCAB_SIZE, (8, 128))
    for step in range(6):
        if step == 1:
            began = time.perf_counter()
        model(ids, labels=ids).loss.backward()
    return time.perf_counter() - began


def _prepare_corpus(folder: Path) -> None:
    if folder.exists():
        return
    training, validation = write_python_corpus(folder, VOCAB_SIZE, HELD_OUT)
    print(f"{training:,} documents to train on, {validation:,} held out.")


def _run(names: str, experiments: list[Experiment], corpus: Path, max_steps: int | None) -> None:
    flags = [f"--{split}_file={corpus / split}.jsonl" for split in ("train", "validation")]
    flags += [f"--tokenizer={corpus / 'tokenizer'}"] + ([f"--max_steps={max_steps}"] if max_steps else [])
    for experiment in experiments:
        if fnmatchcase(experiment.name, names):
            results = run_experiment(parse_run(experiment.words + flags))
            print(f"{results.run_name}: validation loss {results.eval_loss:.4f}")


def _verdict(results: list[Results]) -> str:
    """Say whether the rows stand in the order that theory predicts: baseline < PCA + LoRA < PCA at equal k."""
    loss = {(row.family, row.n_embd_wte): row.eval_loss for row in results}
    baseline = loss["baseline", None]
    misplaced = [
        rank
        for family, rank in loss
        if family == "pca-lora" and not baseline < loss["pca-lora", rank] < loss["pca-nofinetune", rank]
    ]
    if not misplaced:
        return "At every k: baseline < PCA + LoRA < PCA, as theory says."
    return (
        f"Not in the order baseline < PCA + LoRA < PCA at k = {', '.join(map(str, misplaced))}: a short baseline goes "
        "on learning while it is healed, and so may be overtaken."
    )


def _continue(folder: Path, prompt: str) -> str:
    set_seed(0)
    tokenizer = load_tokenizer(str(folder))
    model = FactorizedGPT2.from_pretrained(folder).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=24,
            do_sample=True,
            top_k=20,
            temperature=0.7,
            pad_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.batch_decode(output, skip_special_tokens=True)[0]
