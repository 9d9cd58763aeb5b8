"""Models as people have them: loaded with every weight accounted for, converted, measured, checked after saving.

Read `loading`, then `conversion`, which is the way between GPT-2's layout and ours, then `record`.
"""

from ..common.lazy import exporting

__all__ = ["Factors", "from_gpt2", "load_baseline", "load_compressed", "to_gpt2"]
__getattr__ = exporting(
    __name__,
    {"loading": ["load_baseline", "load_compressed"], "conversion": ["from_gpt2", "to_gpt2"], "factors": ["Factors"]},
)
