"""What a run did, in a word: the protocol's names for kinds of runs, and others like them for other starts."""

from ..compress.methods import METHODS

UNKNOWN_METHOD = "compressed"  # how a compressed model was made whose folder does not say so
REFINED = "-refined"  # follows a method whose vocabulary was trained after it, by the compressor

_MADE = {
    **{
        method.name + refined: method.title + refined.replace("-", " ")
        for method in METHODS.values()
        for refined in ("", REFINED)
    },
    UNKNOWN_METHOD: "compressed",
}
TREATMENTS = {"nofinetune": ", no training", "lora": " + LoRA", "finetune": " + full fine-tuning"}

FAMILIES = {  # what pictures call them, in the order of tables
    "baseline": "baseline",
    "lowrank-scratch": "low rank, from scratch",
    "evaluation": "not factorized, no training",
    "lora": "not factorized + LoRA",
    "finetune": "not factorized + full fine-tuning",
    **{
        f"{made}-{treatment}": title + (what if treatment != "nofinetune" or REFINED not in made else "")
        for made, title in _MADE.items()
        for treatment, what in TREATMENTS.items()
    },
}


def family_of(method: str | None, trains: bool, has_adapters: bool, is_refined: bool = False) -> str:
    """Name what was done to a trained model.

    Args:
        method: How it was factorized, `None` where it was not.
        trains: Whether it trains after that.
        has_adapters: Whether by LoRA.
        is_refined: Whether the compressor refined it.

    Returns:
        A key of `FAMILIES`, such as `pca-lora`, `tokenwise-refined-nofinetune` or `evaluation`.
    """
    treatment = "nofinetune" if not trains else "lora" if has_adapters else "finetune"
    if method is None:
        return treatment if trains else "evaluation"
    made = method + (REFINED if is_refined else "") if method in METHODS else UNKNOWN_METHOD
    return f"{made}-{treatment}"


def run_name(family: str, rank: int | None, lora_rank: int, bits: float | None = None) -> str:
    """Name a run as the protocol does, by what it is told.

    Args:
        family: A key of `FAMILIES`.
        rank: k; `None` when not factorized.
        lora_rank: Of the adapters, where there are any.
        bits: Of a weight in a coded vocabulary, which tell its size as k does not.

    Returns:
        Such as `pca-lora-k64-r32` or `coded-lora-b1.5-r32`.
    """
    size_part = f"-b{bits:g}" if bits else f"-k{rank}" if rank else ""
    return family + size_part + (f"-r{lora_rank}" if family.split("-")[-1] == "lora" else "")
