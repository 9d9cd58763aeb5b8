"""What the demo does once its words are read."""

import time
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from ..network.modeling_factorized_gpt2 import FactorizedGPT2
from ..report.plots import plot_loss_against_rank
from ..report.reporting import read_results, results_table
from ..runs.grid import Experiment, load_grid, select
from ..runs.results import Results
from ..runs.run import run_experiment
from ..runs.settings import parse_run
from ..text.demo_corpus import write_python_corpus
from ..text.tokenizers import load_tokenizer
from .compress import compress

PROMPT = "Return a list of"
VOCAB_SIZE = 4096
REFINE_STEPS = 60


def demonstrate(root: Path, max_steps: int | None) -> None:
    """Corpus, baseline, compression, scratch models, LoRA; then the table, the plot and a sentence.

    Args:
        root: Folder for all of it.
        max_steps: Of every run; `None`: as the configs say.
    """
    import datasets

    began = time.perf_counter()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    _prepare_corpus(root / "corpus")
    models, corpus = root / "model_weights", root / "corpus"
    experiments = load_grid("demo/experiments.json", root=models)

    _announce("Training the baseline")
    _run("baseline", experiments, corpus, max_steps)
    _announce("Compressing it by PCA, without training")
    ranks = [str(experiment.compressed_rank) for experiment in select(experiments, ["pca_lora_*"])[1:]]
    words = [f"--baseline={models / 'gpt_baseline'}", f"--output_dir={models}", "--ranks", *ranks]
    words += [f"--eval_file={corpus / 'validation.jsonl'}", "--eval_batch_size=16"]
    compress(words)
    _announce("Compressing it token by token, to the same size, and refining that")
    learning = ["--method=tokenwise", f"--calibration_file={corpus / 'train.jsonl'}"]
    refine_steps = REFINE_STEPS if max_steps is None else min(REFINE_STEPS, max_steps)
    compress([*words, *learning])
    compress([*words, *learning, f"--refine={refine_steps}"])
    for family, title in (
        ("pca_nofinetune", "Recording the compressed models"),
        ("pca_lora", "Healing them with LoRA"),
        ("lowrank_scratch", "Training low-rank models from scratch, for comparison"),
    ):
        _announce(title)
        _run(f"{family}_*", experiments, corpus, max_steps)

    results = read_results(models)
    plot = root / "loss_against_rank.png"
    plot_loss_against_rank(results, plot)
    _announce("Results")
    print(results_table(results))
    print(f"\n{_verdict(results)}")
    healed = max((row for row in results if row.family == "pca-lora"), key=lambda row: row.n_embd_wte)
    folder = Path(healed.settings["output_dir"])
    print(f"\nPlot: {plot}\nA sentence from {folder}:\n  {_continue(folder, PROMPT)!r}")
    print(f"\nThe demo took {time.perf_counter() - began:.0f} seconds.")


def _prepare_corpus(folder: Path) -> None:
    if folder.exists():
        return
    _announce("Collecting Python's own documentation and training a tokenizer on it")
    training, validation = write_python_corpus(folder, VOCAB_SIZE)
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
    return tokenizer.decode(output[0], skip_special_tokens=True)


def _announce(title: str) -> None:
    print(f"\n== {title}", flush=True)
