"""What transformers' test suite asks of every model, asked of ours. Started by run.py, which provides the suite."""

import json
import unittest

import torch
from transformers import LlamaConfig
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
    FactorizedCausalLM,
    FactorizedCausalLMConfig,
    FactorizedGPT2,
    FactorizedGPT2Config,
    FactorizedGPT2ForSequenceClassification,
    FactorizedGPT2Model,
)

# The suite tells trunks, language models and classifiers apart by these names, and skips tests without them.
MODEL_MAPPING_NAMES[FactorizedGPT2Config.model_type] = FactorizedGPT2Model.__name__
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[FactorizedGPT2Config.model_type] = FactorizedGPT2.__name__
MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[FactorizedGPT2Config.model_type] = (
    FactorizedGPT2ForSequenceClassification.__name__
)


class Tester:
    """Tiny configurations and inputs, in the form that the common tests expect."""

    is_training = True
    batch_size = 3
    seq_length = 7
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    vocab_size = 99

    def __init__(self, parent, **overrides):
        self.parent = parent
        self.overrides = overrides

    def prepare_config_and_inputs_for_common(self):
        inputs = {
            "input_ids": ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 2),
            "attention_mask": random_attention_mask([self.batch_size, self.seq_length]),
        }
        return self.get_config(), {name: tensor.to(torch_device) for name, tensor in inputs.items()}


class FactorizedGPT2Tester(Tester):
    """Of this package's GPT-2."""

    causal_lm_class = FactorizedGPT2

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


class FactorizedLlamaTester(Tester):
    """Of a Llama with a factorized vocabulary."""

    causal_lm_class = FactorizedCausalLM

    def get_config(self) -> FactorizedCausalLMConfig:
        base = LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=98,
            eos_token_id=98,
            pad_token_id=97,
        )
        return FactorizedCausalLMConfig(base_config=base, n_embd_wte=12, **self.overrides)


class CommonTests(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    all_model_classes = (FactorizedGPT2Model, FactorizedGPT2, FactorizedGPT2ForSequenceClassification)
    # Off by default in the suite for models older than its present initialisation scheme.
    test_can_init_all_missing_weights_before_2023 = True
    # With small embeddings the first gradients are small too: the norm falls to a tenth of theirs later than usual.
    training_overfit_steps = 1000
    model_tester = None
    kind_of_tester: type[Tester] = FactorizedGPT2Tester
    overrides: dict = {}
    excluded: dict[str, str] = {}  # tests that do not run, and why

    def setUp(self):
        torch.manual_seed(0)
        if self._testMethodName in self.excluded:
            self.skipTest(self.excluded[self._testMethodName])
        self.model_tester = self.kind_of_tester(self, **self.overrides)
        self.config_tester = ConfigTester(self, config_class=FactorizedGPT2Config, n_embd=32, n_head=4, n_embd_wte=12)

    def test_config(self):
        self.config_tester.run_common_tests()


class TiedFactorizedTest(CommonTests, unittest.TestCase):
    overrides = {"n_embd_wte": 12}


class UntiedFactorizedTest(CommonTests, unittest.TestCase):
    overrides = {"n_embd_wte": 12, "tie_word_embeddings": False}


class UnfactorizedTest(CommonTests, unittest.TestCase):
    overrides = {"n_embd_wte": None}


class FactorizedLlamaTest(CommonTests, unittest.TestCase):
    all_model_classes = (FactorizedCausalLM,)
    kind_of_tester = FactorizedLlamaTester
    excluded = {
        "test_correct_missing_keys": "the decoder alone is a Llama, whose config does not say how to factorize it",
        "test_tied_head_has_a_tp_plan_entry": "the vocabulary is small: it is not sharded, head and embedding alike",
    }

    def setUp(self):
        super().setUp()
        base = json.loads(self.model_tester.get_config().to_json_string())["base_config"]  # with all its defaults
        fields = {"base_config": base, "n_embd_wte": 12}
        self.config_tester = ConfigTester(self, FactorizedCausalLMConfig, common_properties=[], **fields)

    def test_config(self):
        self.config_tester.run_common_tests(can_init_without_params=False)  # a decoder has to be named


class UntiedFactorizedLlamaTest(FactorizedLlamaTest):
    overrides = {"tie_word_embeddings": False}
