"""The network, and all that is published with a model: nothing else lives here.

Its files stand in one folder because transformers fetches the code of a published model that way; they import torch,
numpy, transformers and each other. Read `configuration_factorized_gpt2`, `modeling_factorized_gpt2`, then
`blockwise_loss` with its two kernels, `attention_loss` and `fused_rows`. `modeling_factorized_causal_lm` does for any
decoder of transformers what the first two do for GPT-2. Importing this registers the classes with
transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .classification_factorized_gpt2 import FactorizedGPT2ForSequenceClassification
from .configuration_factorized_causal_lm import FactorizedCausalLMConfig
from .configuration_factorized_gpt2 import FactorizedGPT2Config
from .modeling_factorized_causal_lm import FactorizedCausalLM
from .modeling_factorized_gpt2 import FactorizedGPT2, FactorizedGPT2Model, FactorizedGPT2PreTrainedModel

AutoConfig.register(FactorizedGPT2Config.model_type, FactorizedGPT2Config, exist_ok=True)
AutoModel.register(FactorizedGPT2Config, FactorizedGPT2Model, exist_ok=True)
AutoModelForCausalLM.register(FactorizedGPT2Config, FactorizedGPT2, exist_ok=True)
AutoModelForSequenceClassification.register(
    FactorizedGPT2Config, FactorizedGPT2ForSequenceClassification, exist_ok=True
)
AutoConfig.register(FactorizedCausalLMConfig.model_type, FactorizedCausalLMConfig, exist_ok=True)
AutoModelForCausalLM.register(FactorizedCausalLMConfig, FactorizedCausalLM, exist_ok=True)

# What is saved takes the code of the network along, so that its folder loads where this package is not.
FactorizedGPT2Config.register_for_auto_class("AutoConfig")
FactorizedGPT2Model.register_for_auto_class("AutoModel")
FactorizedGPT2.register_for_auto_class("AutoModelForCausalLM")
FactorizedGPT2ForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
FactorizedCausalLMConfig.register_for_auto_class("AutoConfig")
FactorizedCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "FactorizedCausalLM",
    "FactorizedCausalLMConfig",
    "FactorizedGPT2",
    "FactorizedGPT2Config",
    "FactorizedGPT2ForSequenceClassification",
    "FactorizedGPT2Model",
    "FactorizedGPT2PreTrainedModel",
]
