"""What a run did, in a word: the protocol's names for kinds of runs, and others like them for other starts."""

from ..compress.methods import METHODS

UNKNOWN_METHOD = "compressed"  # how a compressed model was made whose folder does not say so

_TITLES = {**{method.name: method.title for method in METHODS.values()}, UNKNOWN_METHOD: "compressed"}
_TREATMENTS = {"nofinetune": ", no training", "lora": " + LoRA", "finetune": " + full fine-tuning"}

FAMILIES = {  # what pictures call them, in the order of tables
    "baseline": "baseline",
    "lowrank-scratch": "low rank, from scratch",
    "evaluation": "not factorized, no training",
    "lora": "not factorized + LoRA",
    "finetune": "not factorized + full fine-tuning",
    **{
        f"{method}-{treatment}": f"{title}{what}"
        for method, title in _TITLES.items()
        for treatment, what in _TREATMENTS.items()
    },
}


def family_of(method: str | None, trains: bool, has_adapters: bool) -> str:
    """Name what was done to a trained model.

    Args:
        method: How it was factorized, `None` where it was not.
        trains: Whether it trains after that.
        has_adapters: Whether by LoRA.

    Returns:
        A key of `FAMILIES`, such as `pca-lora` or `evaluation`.
    """
    treatment = "nofinetune" if not trains else "lora" if has_adapters else "finetune"
    if method is None:
        return treatment if trains else "evaluation"
    return f"{method if method in _TITLES else UNKNOWN_METHOD}-{treatment}"


def run_name(family: str, rank: int | None, lora_rank: int) -> str:
    """Name a run as the protocol does, by what it is told.

    Args:
        family: A key of `FAMILIES`.
        rank: k; `None` when not factorized.
        lora_rank: Of the adapters, where there are any.

    Returns:
        Such as `pca-lora-k64-r32`.
    """
    rank_part = f"-k{rank}" if rank else ""
    return family + rank_part + (f"-r{lora_rank}" if family.split("-")[-1] == "lora" else "")
