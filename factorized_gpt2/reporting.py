"""Result files to a table and a plot."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
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
    "compressed": "compressed, no training",
    "compressed-lora": "compressed + LoRA",
    "compressed-finetune": "compressed + full fine-tuning",
}

_STYLES = {  # told apart in grey by marker and dash
    "lowrank-scratch": {"marker": "s", "linestyle": "--", "color": "0.45"},
    "pca-nofinetune": {"marker": "^", "linestyle": ":", "color": "tab:orange"},
    "pca-lora": {"marker": "o", "linestyle": "-", "color": "tab:blue"},
    "pca-finetune": {"marker": "D", "linestyle": "-.", "color": "tab:green"},
    "compressed": {"marker": "v", "linestyle": ":", "color": "tab:red"},
    "compressed-lora": {"marker": "P", "linestyle": "-", "color": "tab:purple"},
    "compressed-finetune": {"marker": "X", "linestyle": "-.", "color": "tab:brown"},
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
    with _saved_axes(path) as axes:
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
        axes.legend(frameon=False)


def plot_spectrum(shares: Sequence[float], ranks: Sequence[int], method: str, path: Path) -> None:
    """Plot what each rank leaves out of the quantity that a method minimises; the format follows the suffix.

    Args:
        shares: Kept at rank 1, 2, ..., in [0, 1].
        ranks: Those to mark.
        method: The method's name.
        path: Image to write.
    """
    with _saved_axes(path) as axes:
        left_out = [max(1 - share, 1e-6) for share in shares]
        axes.plot(range(1, len(left_out) + 1), left_out, color="black", linewidth=1.2)
        for rank in ranks:
            axes.plot(rank, left_out[rank - 1], "o", label=f"k = {rank}: {shares[rank - 1]:.3f} kept")
        axes.set_yscale("log")
        axes.set_xlabel("rank k of the token embedding")
        axes.set_ylabel(f"share of the {_MINIMISED.get(method, 'curvature')} left out")
        axes.legend(frameon=False)


_MINIMISED = {"pca": "variance", "weighted": "weighted variance"}


def plot_loss_against_bytes(
    points: Sequence[tuple[int, float, int]], baseline_bytes: int, labelled: Sequence[int], label: str, path: Path
) -> None:
    """Plot how much loss compressed models add, against their size; the format follows the suffix.

    Args:
        points: Bytes, loss beyond the baseline's in nats a token, and rank k of each model.
        baseline_bytes: The baseline's size.
        labelled: Ranks whose points are labelled.
        label: How the models were compressed.
        path: Image to write.
    """
    with _saved_axes(path) as axes:
        # On a logarithmic scale, a model that loses nothing stands at the lower edge.
        drawn = [(size / 1e6, max(increase, 1e-4), rank) for size, increase, rank in sorted(points)]
        axes.plot([size for size, _, _ in drawn], [increase for _, increase, _ in drawn], "o-", label=label)
        for size, increase, rank in drawn:
            if rank in labelled:
                axes.annotate(f"k = {rank}", (size, increase), xytext=(6, 6), textcoords="offset points", fontsize=8)
        axes.axvline(baseline_bytes / 1e6, color="black", linewidth=1, label="size of the baseline")
        axes.set_yscale("log")
        axes.margins(0.1)
        axes.set_xlabel("parameters [MB]")
        axes.set_ylabel("loss beyond the baseline's [nats / token]")
        axes.legend(frameon=False)


@contextmanager
def _saved_axes(path: Path) -> Iterator[Axes]:
    """Yield axes to draw on; save their figure when the block ends well, close it in any case."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    axes.grid(alpha=0.3)
    try:
        yield axes
        figure.savefig(path, dpi=150)
    finally:
        plt.close(figure)
