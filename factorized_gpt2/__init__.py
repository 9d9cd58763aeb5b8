"""GPT-2 with a factorized vocabulary, at home in transformers, PEFT and accelerate."""

from .settings.command_names import runs_a_command

__version__ = "0.1.0"

if not runs_a_command():  # which reads its words first, and then imports what it needs: that takes seconds
    from .compress.pca import factorize, factorize_ranks
    from .models.conversion import from_gpt2, to_gpt2
    from .models.factors import Factors
    from .models.peft_defaults import register_with_peft
    from .network import (
        FactorizedGPT2,
        FactorizedGPT2Config,
        FactorizedGPT2ForSequenceClassification,
        FactorizedGPT2Model,
        FactorizedGPT2PreTrainedModel,
    )

    register_with_peft()

__all__ = [
    "FactorizedGPT2",
    "FactorizedGPT2Config",
    "FactorizedGPT2ForSequenceClassification",
    "FactorizedGPT2Model",
    "FactorizedGPT2PreTrainedModel",
    "Factors",
    "factorize",
    "factorize_ranks",
    "from_gpt2",
    "to_gpt2",
]
