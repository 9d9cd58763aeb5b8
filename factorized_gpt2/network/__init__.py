"""The network, and all that is published with a model: nothing else lives here.

Its files stand in one folder because transformers fetches the code of a published model that way; they import torch,
numpy, transformers and each other. Read `configuration_factorized_gpt2`, `modeling_factorized_gpt2`, then
`blockwise_loss` with its two kernels, `attention_loss` and `fused_rows`.
"""

from .classification_factorized_gpt2 import FactorizedGPT2ForSequenceClassification
from .configuration_factorized_gpt2 import FactorizedGPT2Config
from .modeling_factorized_gpt2 import FactorizedGPT2, FactorizedGPT2Model, FactorizedGPT2PreTrainedModel

__all__ = [
    "FactorizedGPT2",
    "FactorizedGPT2Config",
    "FactorizedGPT2ForSequenceClassification",
    "FactorizedGPT2Model",
    "FactorizedGPT2PreTrainedModel",
]
