"""Publishing decoders other than GPT-2: what is there, what the card says, and that it loads without the package."""

import json

import pytest
import torch
from decoders import tiny_decoder
from hub_client import TOKEN, fresh_process, reach
from hub_server import HubServer, card_errors
from huggingface_hub import ModelCard

from factorized_gpt2 import FactorizedCausalLM
from factorized_gpt2.cli.compress import compress
from factorized_gpt2.hub.model_card import History, adapter_card

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
WITHOUT_PACKAGE = f"""
import sys
sys.modules["factorized_gpt2"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids, out = torch.tensor({IDS.tolist()}), {{}}
for size in ("k8", "b4"):
    model = AutoModelForCausalLM.from_pretrained(f"me/{{size}}", trust_remote_code=True)
    out[size] = type(model).__module__, model(ids).logits.detach()
out["tokens"] = AutoTokenizer.from_pretrained("me/k8", trust_remote_code=True)("The mill")["input_ids"]
torch.save(out, sys.argv[1])
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory, corpus, tokenizer):
    """Compress a tiny Gemma by rank and by bytes, and publish both, with the command."""
    root = tmp_path_factory.mktemp("models")
    tiny_decoder("gemma3_text", vocab_size=len(tokenizer)).save_pretrained(root / "gemma")
    tokenizer.save_pretrained(root / "gemma")
    words = ["--baseline", root / "gemma", "--output_dir", root, "--device", "cpu", "--block_size", 32]
    words += ["--eval_file", corpus / "validation.jsonl", "--calibration_tokens", 512]
    learning = ["--calibration_file", corpus / "train.jsonl", "--refine", 2]
    with HubServer({TOKEN: "me"}) as server, pytest.MonkeyPatch.context() as patch:
        reach(server, patch)
        patch.setenv("HF_TOKEN", TOKEN)
        for size in (
            ["--ranks", 8, "--push_to_hub", "me/k8"],
            ["--bits_per_weight", 4, "--push_to_hub", "me/b4", *learning],
        ):
            compress([str(word) for word in (*words, *size)])
        server.root = root
        yield server


def test_it_loads_without_the_package(hub, tmp_path, tokenizer):
    fresh_process(hub, tmp_path, WITHOUT_PACKAGE, "-I")
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert loaded["tokens"] == tokenizer("The mill")["input_ids"]
    for size, name in (("k8", "gpt_pca_nofinetune_k8"), ("b4", "gpt_coded_refined_b4")):
        module, logits = loaded[size]
        assert module.startswith(f"transformers_modules.me.{size}.")
        expected = FactorizedCausalLM.from_pretrained(hub.root / name).eval()(IDS).logits.detach()
        torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)


def test_what_is_published(hub):
    for name in ("me/k8", "me/b4"):
        files = hub.repos[name].files()
        code = {each for each in files if each.endswith(".py")}
        assert {"modeling_factorized_causal_lm.py", "configuration_factorized_causal_lm.py", "rans.py"} <= code
        assert not {each for each in code if "gpt2" in each}
        config = json.loads(files["config.json"])
        assert config["auto_map"] == {
            "AutoConfig": "configuration_factorized_causal_lm.FactorizedCausalLMConfig",
            "AutoModelForCausalLM": "modeling_factorized_causal_lm.FactorizedCausalLM",
        }
        for each, content in files.items():
            assert str(hub.root).encode() not in content, each


def test_the_card_is_true(hub):
    texts = {name: hub.repos[f"me/{name}"].files()["README.md"].decode() for name in ("k8", "b4")}
    for text in texts.values():
        assert not card_errors(text)
        card = ModelCard(text)
        assert card.data.tags == ["factorized_causal_lm", "gemma3_text", "custom_code", "text-generation"]
        assert card.data.license is None  # nobody has said under which
        assert "2 layers, width d = 32" in text
        assert "import FactorizedCausalLM" in text
        assert "GPT-2" not in text
        assert {metric.metric_type for metric in card.data.eval_results} == {"loss", "perplexity"}
    assert "A `gemma3_text` model of transformers with a factorized vocabulary" in texts["k8"]
    assert "A `gemma3_text` model of transformers with a vocabulary of integers" in texts["b4"]
    assert "refined for 2 steps" in texts["b4"]


def test_an_adapters_card_says_what_it_adapts():
    lora = {"r": 2, "lora_alpha": 4, "target_modules": ["wte"]}
    written = adapter_card("me/adapter", "me/base", lora, History({}, None), decoder="llama")
    assert "a `llama` model of transformers with a factorized vocabulary" in written.text
    assert written.data.tags[:2] == ["factorized_causal_lm", "llama"]
