"""Result files to a table and a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from tabulate import tabulate

from .errors import UserError
from .files import read_json
from .results import RESULTS_NAME

FAMILIES = {
    "baseline": "baseline",
    "lowrank-scratch": "low rank, from scratch",
    "pca-nofinetune": "PCA, no training",
    "pca-lora": "PCA + LoRA",
    "pca-finetune": "PCA + full fine-tuning",
}

_STYLES = {  # told apart in grey by marker and dash
    "lowrank-scratch": {"marker": "s", "linestyle": "--", "color": "0.45"},
    "pca-nofinetune": {"marker": "^", "linestyle": ":", "color": "tab:orange"},
    "pca-lora": {"marker": "o", "linestyle": "-", "color": "tab:blue"},
    "pca-finetune": {"marker": "D", "linestyle": "-.", "color": "tab:green"},
}


def read_results(root: Path) -> list[dict[str, Any]]:
    """Read every `results.json` in the run folders of `root`, ordered by family and rank.

    Raises:
        UserError: There is none.
    """
    results = [read_json(path) for path in sorted(root.glob(f"*/{RESULTS_NAME}"))]
    if not results:
        raise UserError(f"No results under {root}: no run has finished there.")
    order = list(FAMILIES)
    return sorted(results, key=lambda row: (order.index(row["family"]), row["n_embd_wte"] or 0))


def results_table(results: Sequence[dict[str, Any]], style: str = "simple") -> str:
    """Lay out results as a table, one row a run; the gap is to the baseline's loss.

    Args:
        results: Contents of `results.json` files.
        style: A format of `tabulate`, such as "github" for Markdown.
    """
    baseline = next((row for row in results if row["family"] == "baseline"), None)
    rows = [
        {
            "family": FAMILIES[row["family"]],
            "k": row["n_embd_wte"] or "-",
            "loss": f"{row['eval_loss']:.4f}",
            "perplexity": f"{row['perplexity']:.2f}",
            "gap": f"{row['eval_loss'] - baseline['eval_loss']:+.4f}" if baseline else "",
            "parameters": f"{row['parameters']:,}",
            "MB": f"{row['bytes'] / 1e6:.1f}",
            "trained": f"{row['trained_parameters']:,}",
            "seconds": f"{row['train_seconds']:.0f}" if row["train_seconds"] else "-",
        }
        for row in results
    ]
    return tabulate(
        rows,
        headers="keys",
        tablefmt=style,
        disable_numparse=True,
        colalign=("left",) + ("right",) * (len(rows[0]) - 1),
    )


def plot_loss_against_rank(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot validation loss against k, a line a family, the baseline as a level; the format follows the suffix.

    Args:
        results: Contents of `results.json` files.
        path: Image to write, such as `loss.png`.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    ranks = sorted({row["n_embd_wte"] for row in results if row["n_embd_wte"]})
    for family, style in _STYLES.items():
        points = [(row["n_embd_wte"], row["eval_loss"]) for row in results if row["family"] == family]
        if points:
            axes.plot(*zip(*points, strict=True), label=FAMILIES[family], **style)
    for row in results:
        if row["family"] == "baseline":
            axes.axhline(row["eval_loss"], color="black", linewidth=1, label="baseline (not factorized)")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, labels=map(str, ranks))
    axes.set_xlabel("rank k of the token embedding")
    axes.set_ylabel("validation loss [nats / token]")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
