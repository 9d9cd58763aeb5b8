"""Checkpoints and factor files of nanoGPT and its factorized descendant, in and out.

Read `checkpoints`, then `options`, which says what a checkpoint's options mean.
"""

from ..common.lazy import exporting

__all__ = ["load_old_checkpoint"]
__getattr__ = exporting(__name__, {"checkpoints": ["load_old_checkpoint"]})
