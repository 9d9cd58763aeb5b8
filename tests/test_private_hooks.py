"""What this package uses of its libraries' insides, each by name and signature.

Nobody promises that these stay. Where a new release changes one, it is named here, before something far from it fails.
"""

import argparse
import inspect

import pytest
import tokenizers
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import TorchDynamoPlugin
from conftest import tiny_config, tiny_model
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from peft import LoraConfig
from peft.config import PeftConfigMixin
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    core_model_loading,
    masking_utils,
    modeling_layers,
    modeling_utils,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.gpt2 import modeling_gpt2
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import generic, output_capturing

# owner, name, the parameters that this package passes or overrides, in their order
FUNCTIONS = [
    (Trainer, "_get_output_dir", "self trial"),
    (Trainer, "_save_checkpoint", "self model trial"),
    (
        Trainer,
        "_init_training_state",
        "self max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial",
    ),
    (Trainer, "_run_epoch", "self"),
    (Trainer, "_load_best_model", "self"),
    (Trainer, "_issue_warnings_after_load", "self load_result"),
    (Trainer, "_maybe_log_save_evaluate", "self tr_loss grad_norm"),
    (Trainer, "get_optimizer_cls_and_kwargs", "args model"),
    (Trainer, "floating_point_ops", "self inputs"),
    (Trainer, "evaluation_loop", "self dataloader description prediction_loss_only ignore_keys metric_key_prefix"),
    (Trainer, "compute_loss", "self model inputs return_outputs num_items_in_batch"),
    (Trainer, "get_eval_dataloader", "self eval_dataset"),
    (Trainer, "save_model", "self output_dir _internal_call"),
    (PeftConfigMixin, "from_json_file", "path_json_file"),
    (PreTrainedModel, "_init_weights", "self module"),
    (PreTrainedModel, "tie_weights", "self"),
    (PreTrainedModel, "_load_pretrained_model", "model state_dict checkpoint_files load_config"),
    (masking_utils, "create_causal_mask", "config inputs_embeds attention_mask past_key_values position_ids"),
    (modeling_gpt2, "eager_attention_forward", "module query key value attention_mask"),
    (modeling_layers, "GradientCheckpointingLayer.__call__", "self"),
    (modeling_utils, "ALL_ATTENTION_FUNCTIONS.get_interface", "attn_implementation default"),
    (generic, "maybe_autocast", "device_type dtype enabled"),
    (generic, "merge_with_config_defaults", "func"),
    (output_capturing, "capture_outputs", "func"),
    (output_capturing, "OutputRecorder", "target_class index"),
    (sort_checkpoints, None, "output_dir"),
    (ForCausalLMLoss, None, "logits labels vocab_size num_items_in_batch"),
    (Dataset, "from_generator", "generator"),
    (Dataset, "map", "self function"),
    (IterableDataset, "from_generator", "generator"),
    (Hasher, "hash", "value"),
    (argparse.HelpFormatter, "_format_action_invocation", "self action"),
    (argparse.HelpFormatter, "_format_args", "self action default_metavar"),
    (argparse.HelpFormatter, "_get_default_metavar_for_optional", "self action"),
    (argparse.HelpFormatter, "_get_help_string", "self action"),
]


@pytest.mark.parametrize(
    ("owner", "name", "parameters"), FUNCTIONS, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_function_is_there_with_its_parameters(owner, name, parameters):
    function = owner
    for part in name.split(".") if name else ():
        assert hasattr(function, part), f"{owner.__name__} has no {name} any more"
        function = getattr(function, part)
    found = inspect.signature(function).parameters
    takes_any = any(item.kind in (item.VAR_KEYWORD, item.VAR_POSITIONAL) for item in found.values())
    missing = [word for word in parameters.split() if word not in found]
    assert not missing or takes_any, f"{name} is {inspect.signature(function)} now, without {', '.join(missing)}"
    asked = [word for word in parameters.split() if word in found]
    order = [word for word in found if word in asked]
    assert order == asked, f"{name} is {inspect.signature(function)} now"
    needed = {
        word
        for word, item in found.items()
        if item.default is item.empty and item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL)
    }
    if name not in ("_run_epoch", "_maybe_log_save_evaluate"):  # whose further arguments are passed on as they come
        assert needed <= set(asked), f"{name} is {inspect.signature(function)} now, and needs more"


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (TrainingArguments, "n_gpu"),
        (TrainingArguments, "world_size"),
        (PreTrainedModel, "_tied_weights_keys"),
        (PreTrainedModel, "_no_split_modules"),
        (PreTrainedModel, "_keys_to_ignore_on_load_unexpected"),
        (PreTrainedModel, "loss_function"),
        (PreTrainedTokenizerBase, "init_kwargs"),
        (modeling_utils, "ALL_ATTENTION_FUNCTIONS"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_an_attribute_is_there(owner, name):
    found = hasattr(owner, name) or name in inspect.getsource(owner)
    assert found, f"{owner.__name__} has no {name} any more"


def test_attributes_of_instances():
    """Those that only an instance has, on the instances that this package makes."""
    model = tiny_model()
    assert model.all_tied_weights_keys == {"lm_head.weight": "transformer.wte.weight"}
    assert Dataset.from_dict({"text": ["a"]})._fingerprint
    assert argparse.ArgumentParser()._actions[0].dest == "help"
    assert isinstance(tokenizers.ByteLevelBPETokenizer()._tokenizer, tokenizers.Tokenizer)
    assert tiny_config().model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    adapter = LoraEmbedding(torch.nn.Embedding(4, 3), "default", config=LoraConfig(r=2), r=2)
    assert adapter.lora_embedding_A["default"].shape == (2, 4)
    assert adapter.lora_embedding_B["default"].shape == (3, 2)


def test_compilation_is_set_aside_by_the_state_of_accelerate():
    assert "_n_gpu" in inspect.getsource(TrainingArguments)
    assert "dynamo_plugin" in inspect.getsource(AcceleratorState)
    assert "backend" in inspect.signature(TorchDynamoPlugin).parameters


def test_by_which_names_a_model_would_be_saved_again_is_an_attribute_of_it():
    assert 'getattr(model, "_weight_conversions", None)' in inspect.getsource(core_model_loading)


def test_what_a_checkpoint_lacks_is_told_by_a_named_tuple():
    loaded = torch.nn.Linear(1, 1).load_state_dict({}, strict=False)
    assert loaded._replace(missing_keys=[]).unexpected_keys == []
