"""What transformers' test suite asks of every model, asked of ours. Started by run.py, which provides the suite."""

import unittest

import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.testing_utils import torch_device
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from transformers_tests.test_training_mixin import TrainingTesterMixin

from factorized_gpt2 import (
    FactorizedGPT2,
    FactorizedGPT2Config,
    FactorizedGPT2ForSequenceClassification,
    FactorizedGPT2Model,
)

# Tests that do not run, and why. They apply to every variant.
EXCLUDED: dict[str, str] = {}

# The suite tells trunks, language models and classifiers apart by these names, and skips tests without them.
MODEL_MAPPING_NAMES[FactorizedGPT2Config.model_type] = FactorizedGPT2Model.__name__
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[FactorizedGPT2Config.model_type] = FactorizedGPT2.__name__
MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[FactorizedGPT2Config.model_type] = (
    FactorizedGPT2ForSequenceClassification.__name__
)


class FactorizedGPT2Tester:
    """Tiny configurations and inputs, in the form that the common tests expect."""

    is_training = True
    causal_lm_class = FactorizedGPT2
    batch_size = 3
    seq_length = 7
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    vocab_size = 99

    def __init__(self, parent, **overrides):
        self.parent = parent
        self.overrides = overrides

    def get_config(self) -> FactorizedGPT2Config:
        return FactorizedGPT2Config(
            vocab_size=self.vocab_size,
            n_positions=64,
            n_embd=self.hidden_size,
            n_layer=self.num_hidden_layers,
            n_head=self.num_attention_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=98,
            eos_token_id=98,
            pad_token_id=97,
            **self.overrides,
        )

    def prepare_config_and_inputs_for_common(self):
        inputs = {
            "input_ids": ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 2),
            "attention_mask": random_attention_mask([self.batch_size, self.seq_length]),
        }
        return self.get_config(), {name: tensor.to(torch_device) for name, tensor in inputs.items()}


class CommonTests(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    all_model_classes = (FactorizedGPT2Model, FactorizedGPT2, FactorizedGPT2ForSequenceClassification)
    # Off by default in the suite for models older than its present initialisation scheme.
    test_can_init_all_missing_weights_before_2023 = True
    # With small embeddings the first gradients are small too: the norm falls to a tenth of theirs later than usual.
    training_overfit_steps = 1000
    model_tester = None
    overrides: dict = {}

    def setUp(self):
        torch.manual_seed(0)
        if self._testMethodName in EXCLUDED:
            self.skipTest(EXCLUDED[self._testMethodName])
        self.model_tester = FactorizedGPT2Tester(self, **self.overrides)
        self.config_tester = ConfigTester(self, config_class=FactorizedGPT2Config, n_embd=32, n_head=4, n_embd_wte=12)

    def test_config(self):
        self.config_tester.run_common_tests()


class TiedFactorizedTest(CommonTests, unittest.TestCase):
    overrides = {"n_embd_wte": 12}


class UntiedFactorizedTest(CommonTests, unittest.TestCase):
    overrides = {"n_embd_wte": 12, "tie_word_embeddings": False}


class UnfactorizedTest(CommonTests, unittest.TestCase):
    overrides = {"n_embd_wte": None}
