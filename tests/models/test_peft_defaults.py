"""What PEFT is told of these models, whichever is imported first: without `target_modules`, those of a GPT-2."""

import subprocess
import sys

import pytest
import torch
from conftest import random_ids, tiny_model
from peft import (
    AdaLoraConfig,
    FourierFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    VeraConfig,
    get_peft_model,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

from factorized_gpt2.models.peft_defaults import register_with_peft

ORDERS = {
    "peft later": "import factorized_gpt2; assert 'peft' not in sys.modules; import peft",
    "peft first": "import peft, factorized_gpt2",
    "one of its modules alone": "import factorized_gpt2; import peft.tuners.lora",
}
SHOW = (
    "from peft.utils import constants; print(constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
    "['factorized_gpt2']); from peft import LoraConfig; print(LoraConfig.from_json_file.__module__)"
)


@pytest.mark.parametrize(
    ("config", "adapted"),
    [
        (LoraConfig(task_type="CAUSAL_LM"), {"q_proj", "k_proj", "v_proj"}),
        (IA3Config(task_type="CAUSAL_LM"), {"q_proj", "k_proj", "v_proj", "mlp_down"}),
        (LoHaConfig(task_type="CAUSAL_LM"), {"q_proj", "k_proj", "v_proj"}),
        (VeraConfig(task_type="CAUSAL_LM"), {"q_proj", "k_proj", "v_proj"}),
        (AdaLoraConfig(task_type="CAUSAL_LM", total_step=9), {"q_proj", "k_proj", "v_proj"}),
        (FourierFTConfig(task_type="CAUSAL_LM", n_frequency=9), {"mlp_down"}),
        (LNTuningConfig(task_type="CAUSAL_LM"), {"ln_1", "ln_2", "ln_f"}),
    ],
    ids=lambda value: type(value).__name__.removesuffix("Config") if not isinstance(value, set) else "",
)
def test_every_method_that_knows_gpt2_knows_this_model(config, adapted, variant):
    model = get_peft_model(tiny_model(**variant), config)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(any(f".{module}." in name for module in adapted) for name in trained)
    assert all(any(f".{module}." in name for name in trained) for module in adapted)
    model(input_ids=random_ids(), labels=random_ids()).loss.backward()
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters() if weight.grad is not None)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_either_may_be_imported_first(order):
    words = [sys.executable, "-c", f"import sys; {order}; {SHOW}"]
    finished = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert finished.stdout == "['q_proj', 'k_proj', 'v_proj']\nfactorized_gpt2.models.adapter_base\n", finished.stderr


def test_a_users_own_choice_stays(monkeypatch):
    table = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    monkeypatch.setitem(table, "factorized_gpt2", ["wte"])
    register_with_peft()
    assert table["factorized_gpt2"] == ["wte"]
