"""GPT-2 with a factorized vocabulary, at home in transformers, PEFT and accelerate."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .common.lazy import exporting
from .compress.pca import factorize, factorize_ranks
from .models.conversion import from_gpt2, to_gpt2, vocabulary_matrices
from .models.factors import Factors
from .models.peft_defaults import register_with_peft
from .network.classification_factorized_gpt2 import FactorizedGPT2ForSequenceClassification
from .network.configuration_factorized_gpt2 import FactorizedGPT2Config
from .network.modeling_factorized_gpt2 import FactorizedGPT2, FactorizedGPT2Model, FactorizedGPT2PreTrainedModel

__version__ = "0.1.0"

AutoConfig.register(FactorizedGPT2Config.model_type, FactorizedGPT2Config, exist_ok=True)
AutoModel.register(FactorizedGPT2Config, FactorizedGPT2Model, exist_ok=True)
AutoModelForCausalLM.register(FactorizedGPT2Config, FactorizedGPT2, exist_ok=True)
AutoModelForSequenceClassification.register(
    FactorizedGPT2Config, FactorizedGPT2ForSequenceClassification, exist_ok=True
)

register_with_peft()

# What is saved takes the code of the network along, so that its folder loads where this package is not.
FactorizedGPT2Config.register_for_auto_class("AutoConfig")
FactorizedGPT2Model.register_for_auto_class("AutoModel")
FactorizedGPT2.register_for_auto_class("AutoModelForCausalLM")
FactorizedGPT2ForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
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
    "from_gpt2",
    "load_baseline",
    "load_compressed",
    "publish",
    "to_gpt2",
    "vocabulary_matrices",
    "write_python_corpus",
]
__getattr__ = exporting(
    __name__,
    {
        "models.loading": ["load_baseline", "load_compressed"],
        "models.onnx_export": ["export_onnx"],
        "compress.pca": ["explained_shares"],
        "hub.repository": ["publish"],
        "text.demo_corpus": ["write_python_corpus"],
    },
)
