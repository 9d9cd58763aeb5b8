"""GPT-2 with a factorized vocabulary, at home in transformers, PEFT and accelerate."""

from .common.lazy import exporting
from .settings.command_names import runs_a_command

__version__ = "0.1.0"

if not runs_a_command():  # a command checks its flags first, because these imports take seconds
    from . import network as network  # registers with the Auto classes of transformers
    from .models.peft_defaults import register_with_peft

    register_with_peft()

__all__ = [
    "FactorizedCausalLM",
    "FactorizedCausalLMConfig",
    "FactorizedGPT2",
    "FactorizedGPT2Config",
    "FactorizedGPT2ForSequenceClassification",
    "FactorizedGPT2Model",
    "FactorizedGPT2PreTrainedModel",
    "Factors",
    "explained_shares",
    "export_onnx",
    "factorize",
    "factorize_ranks",
    "from_causal_lm",
    "from_gpt2",
    "load_baseline",
    "load_compressed",
    "publish",
    "to_causal_lm",
    "to_gpt2",
    "vocabulary_matrices",
    "write_python_corpus",
]
__getattr__ = exporting(
    __name__,
    {
        "network": [
            "FactorizedCausalLM",
            "FactorizedCausalLMConfig",
            "FactorizedGPT2",
            "FactorizedGPT2Config",
            "FactorizedGPT2ForSequenceClassification",
            "FactorizedGPT2Model",
            "FactorizedGPT2PreTrainedModel",
        ],
        "models.conversion": ["from_gpt2", "to_gpt2", "vocabulary_matrices"],
        "models.decoder_conversion": ["from_causal_lm", "to_causal_lm"],
        "models.factors": ["Factors"],
        "models.loading": ["load_baseline", "load_compressed"],
        "models.onnx_export": ["export_onnx"],
        "compress.pca": ["explained_shares", "factorize", "factorize_ranks"],
        "hub.repository": ["publish"],
        "text.demo_corpus": ["write_python_corpus"],
    },
)
