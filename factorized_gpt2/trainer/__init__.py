"""The Trainer: its loss, its LoRA adapters, its checkpoints, and how it stops.

Read `trainer`, then `adapters`, `checkpoints` and `distillation`.
"""

from ..common.lazy import exporting

__all__ = ["Distillation", "FactorizedTrainer", "add_lora"]
__getattr__ = exporting(
    __name__, {"trainer": ["FactorizedTrainer"], "adapters": ["add_lora"], "distillation": ["Distillation"]}
)
