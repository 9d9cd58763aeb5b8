"""A trained model to a smaller one: the factorizations, what they learn from text, and the folders they leave.

Read `pca`, then `data_aware` with `row_fit` and `calibration`, then `recipe` and `compressor`, which put them
together; `quantizer` writes a matrix as integers, `refinement` trains factors, or what is beside
integer codes, for some steps.
"""

from ..common.lazy import exporting

__all__ = ["Compressor", "Recipe", "factorize", "factorize_ranks", "refine"]
__getattr__ = exporting(
    __name__,
    {
        "compressor": ["Compressor"],
        "recipe": ["Recipe"],
        "pca": ["factorize", "factorize_ranks"],
        "refinement": ["refine"],
    },
)
