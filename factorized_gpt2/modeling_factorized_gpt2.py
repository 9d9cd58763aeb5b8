"""Where the network was before; adapters that were saved then name this module. It goes with the next release."""

from .network.modeling_factorized_gpt2 import *  # noqa: F403
from .network.modeling_factorized_gpt2 import FactorizedGPT2 as FactorizedGPT2
