"""Text, from files or datasets to blocks of token ids, and a model's loss over them.

Read along the way of a text: `source`, `documents`, `tokenizers`, `blocks`, `loss`.
"""

from ..common.lazy import exporting

__all__ = ["TextSource", "load_blocks", "load_tokenizer", "sum_loss"]
__getattr__ = exporting(
    __name__,
    {"source": ["TextSource"], "blocks": ["load_blocks"], "tokenizers": ["load_tokenizer"], "loss": ["sum_loss"]},
)
