"""Publishing to the Hub and loading from it, with huggingface_hub's own client against a stand-in."""

import json
import sys
from pathlib import Path
from shutil import copytree

import pytest
import torch
from hub_client import READER_TOKEN, TOKEN, fresh_process, reach
from hub_server import HubServer, card_errors
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.dynamic_module_utils import get_imports

from factorized_gpt2 import FactorizedGPT2
from factorized_gpt2.cli.compress import compress
from factorized_gpt2.hub.model_card import Figures, Measurement
from factorized_gpt2.hub.repository import code_files, publish, publish_adapter
from factorized_gpt2.models.sizes import model_size
from factorized_gpt2.runs.results import Results
from factorized_gpt2.text.loss import perplexity
from factorized_gpt2.text.source import TextSource
from factorized_gpt2.trainer.adapters import add_lora, merge

REPOSITORY = Path(__file__).resolve().parents[2]
STOCK = "openai-community/gpt2"
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def hub():
    with HubServer({TOKEN: "me", READER_TOKEN: "reader"}) as server:
        server.add(STOCK, {"README.md": b"---\nlicense: mit\npipeline_tag: text-generation\n---\n"})
        yield server


@pytest.fixture(autouse=True)
def _reach(hub, monkeypatch):
    reach(hub, monkeypatch)


@pytest.fixture(scope="module")
def root(tmp_path_factory, corpus, tokenizer):
    """Compress a tiny stock GPT-2 with the command, with its plots."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(3)
    shape = {"vocab_size": len(tokenizer), "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 2}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GPT2LMHeadModel(GPT2Config(**shape, **special)).save_pretrained(root / "stock")
    tokenizer.save_pretrained(root / "stock")
    words = ["--baseline", root / "stock", "--ranks", 8, "--output_dir", root]
    words += ["--eval_file", corpus / "validation.jsonl"]
    compress([str(word) for word in words])
    return root


@pytest.fixture(scope="module")
def folder(root):
    return root / "gpt_pca_nofinetune_k8"


@pytest.fixture(scope="module")
def measured(corpus):
    text = TextSource(files=(str(corpus / "validation.jsonl"),))
    return Measurement(5.25, text, Figures("baseline", None, 30_000, 120_000, 5.125))


@pytest.fixture(scope="module")
def run(root, folder, tokenizer):
    """Make what a LoRA run leaves: adapter, merged model, record."""
    output_dir = root / "gpt_pca_lora_k8"
    model = FactorizedGPT2.from_pretrained(folder)
    adapted = add_lora(model, 2, 4, 0.0, ["wte", "q_proj", "mlp_up"])
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora" in name:
                weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
    adapted.save_pretrained(output_dir / "adapter")
    merged = merge(adapted)
    merged.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    size = model_size(merged)
    settings = {"baseline": STOCK, "compressed": None, "lora_rank": 2, "dataset_name": "Salesforce/wikitext"}
    settings |= {"dataset_config_name": "wikitext-103-raw-v1", "output_dir": str(output_dir), "block_size": 48}
    settings |= {"train_file": None, "validation_file": None}
    Results(
        run_name="pca-lora-k8-r2",
        family="pca-lora",
        n_embd_wte=8,
        eval_loss=4.5,
        perplexity=perplexity(4.5),
        **size.__dict__,
        settings=settings,
        versions={},
        words=["--output_dir", str(output_dir), "--hub_token", TOKEN],
        best_step=120,
        best_tokens=5760,
        trained_parameters=1000,
    ).write(output_dir)
    return output_dir


@pytest.fixture(scope="module")
def published(hub, folder, run, measured, tmp_path_factory):
    """Publish everything once, and load it in a process that does not have the package."""
    with pytest.MonkeyPatch.context() as patch:
        reach(hub, patch)
        urls = {
            "compressed": publish(folder, "me/compressed", token=TOKEN, measured=measured),
            "secret": publish(folder, "me/secret", token=TOKEN, private=True),
            "healed": publish(run, "me/healed", token=TOKEN),
            "adapter": publish_adapter(run / "adapter", "me/adapter", "me/compressed", token=TOKEN),
        }
    return urls


WITHOUT_PACKAGE = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "factorized_gpt2":
            raise ModuleNotFoundError(f"No module named {{name!r}}")

sys.meta_path.insert(0, Absent())
try:
    import factorized_gpt2
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package is there")

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

def error_of(load):
    try:
        load()
    except Exception as error:
        return type(error).__name__ + ": " + str(error)

ids, trust = torch.tensor({IDS.tolist()}), {{"trust_remote_code": True}}
out = {{}}
out["refusal"] = error_of(lambda: AutoModelForCausalLM.from_pretrained("me/compressed"))
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained("me/compressed", **trust)
    out["module"], out["logits"] = type(model).__module__, model(ids).logits
    out["loss"] = model(ids, labels=ids, skip_logits=True).loss
    out["generated"] = model.generate(ids, max_new_tokens=8, do_sample=False)
    out["hidden"] = AutoModel.from_pretrained("me/compressed", **trust)(ids).last_hidden_state
    classifier = AutoModelForSequenceClassification.from_pretrained("me/compressed", num_labels=3, **trust)
    out["classifier's hidden"], out["scores"] = classifier.transformer(ids).last_hidden_state, classifier(ids).logits
    out["tokens"] = AutoTokenizer.from_pretrained("me/compressed")("The wife of the mill")["input_ids"]
    out["adapted"] = PeftModel.from_pretrained(model, "me/adapter").eval()(ids).logits
    out["auto_adapted"] = AutoPeftModelForCausalLM.from_pretrained("me/adapter", **trust).eval()(ids).logits
    out["private refusal"] = error_of(lambda: AutoModelForCausalLM.from_pretrained("me/secret", **trust))
    out["private"] = AutoModelForCausalLM.from_pretrained("me/secret", token="{TOKEN}", **trust)(ids).logits
torch.save(out, sys.argv[1])
"""

WITH_PACKAGE = f"""
import sys
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer
import factorized_gpt2

ids, out = torch.tensor({IDS.tolist()}), {{"from": factorized_gpt2.__file__}}
with torch.no_grad():
    out["logits"] = factorized_gpt2.FactorizedGPT2.from_pretrained("me/compressed")(ids).logits
    model = AutoModelForCausalLM.from_pretrained("me/healed")
    out["auto"], out["module"] = model(ids).logits, type(model).__module__
    trusting = AutoModelForCausalLM.from_pretrained("me/healed", trust_remote_code=True)
    out["module, trusting"] = type(trusting).__module__
out["tokens"] = AutoTokenizer.from_pretrained("me/compressed")("The wife of the mill")["input_ids"]
card = ModelCard.load("me/healed")
card.validate()
out["card"] = card.data.to_dict()
torch.save(out, sys.argv[1])
"""


@pytest.fixture(scope="module")
def loaded(hub, published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("without")
    fresh_process(hub, folder, WITHOUT_PACKAGE, "-I")
    return torch.load(folder / "out.pt")


@pytest.fixture(scope="module")
def loaded_with_package(hub, published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("with")
    fresh_process(hub, folder, WITH_PACKAGE, PYTHONPATH=str(REPOSITORY))
    return torch.load(folder / "out.pt")


@pytest.fixture(scope="module")
def original(folder):
    return FactorizedGPT2.from_pretrained(folder).eval()


@torch.no_grad()
def test_loads_without_the_package(loaded, original):
    assert loaded["module"].startswith("transformers_modules.me.compressed.")
    torch.testing.assert_close(loaded["logits"], original(IDS).logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(loaded["hidden"], original.transformer(IDS).last_hidden_state, atol=1e-6, rtol=0)
    assert torch.equal(loaded["classifier's hidden"], loaded["hidden"])
    assert loaded["scores"].shape == (1, 3)
    assert torch.equal(loaded["generated"], original.generate(IDS, max_new_tokens=8, do_sample=False))
    torch.testing.assert_close(loaded["loss"], original(IDS, labels=IDS).loss, atol=1e-5, rtol=0)


def test_tokenizer_loads(loaded, loaded_with_package, tokenizer):
    assert loaded["tokens"] == loaded_with_package["tokens"] == tokenizer("The wife of the mill")["input_ids"]


def test_code_of_a_repository_needs_consent(loaded):
    assert "trust_remote_code=True" in loaded["refusal"]


def test_a_private_repository_needs_the_token(loaded, original, hub):
    assert hub.repos["me/secret"].private
    assert not hub.repos["me/compressed"].private
    assert "not a valid model identifier" in loaded["private refusal"]
    torch.testing.assert_close(loaded["private"], original(IDS).logits, atol=1e-6, rtol=0)


@torch.no_grad()
def test_adapters_load_on_the_published_base(loaded, run):
    merged = FactorizedGPT2.from_pretrained(run).eval()(IDS).logits
    assert not torch.allclose(merged, loaded["logits"], atol=1e-2)
    for name in ("adapted", "auto_adapted"):
        torch.testing.assert_close(loaded[name], merged, atol=1e-5, rtol=0)


@torch.no_grad()
def test_with_the_package_its_own_code_runs(loaded_with_package, original, run):
    assert loaded_with_package["from"].startswith(str(REPOSITORY))
    torch.testing.assert_close(loaded_with_package["logits"], original(IDS).logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        loaded_with_package["auto"], FactorizedGPT2.from_pretrained(run).eval()(IDS).logits, atol=1e-6, rtol=0
    )
    for name in ("module", "module, trusting"):
        assert loaded_with_package[name] == "factorized_gpt2.network.modeling_factorized_gpt2"


def test_the_code_demands_no_other_package():
    """What transformers looks for in a repository's code, and refuses to load it without."""
    imported = {name for path in code_files("factorized_gpt2") for name in get_imports(path)} - sys.stdlib_module_names
    assert imported == {
        "huggingface_hub",
        "numpy",
        "safetensors",
        "torch",
        "transformers",
    }


def test_what_is_published(published, hub, run):
    assert published["compressed"] == f"{hub.url}/me/compressed"
    code = {"attention_loss.py", "blockwise_loss.py", "classification_factorized_gpt2.py", "fused_rows.py", "head.py"}
    code |= {"configuration_factorized_gpt2.py", "modeling_factorized_gpt2.py"}
    code |= {
        "coded_table.py",
        "code_products.py",
        "coded_vocabulary.py",
        "frequencies.py",
        "prediction.py",
        "rans.py",
        "stored_vocabulary.py",
        "trellis.py",
    }
    assert {path.name for path in code_files("factorized_gpt2")} == code
    always = {".gitattributes", "README.md", "config.json", "generation_config.json", "model.safetensors"}
    always |= code | {"tokenizer.json", "tokenizer_config.json"}
    plots = {"spectrum_pca.png", "loss_against_bytes_pca.png"}
    compressed, healed, adapter = (hub.repos[f"me/{name}"] for name in ("compressed", "healed", "adapter"))
    assert set(compressed.files()) == always | plots | {"compression.json"}
    assert set(healed.files()) == always | {"results.json"}
    assert set(adapter.files()) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert len(compressed.log) == len(healed.log) == len(adapter.log) == 2  # the Hub's own, and one
    assert json.loads(compressed.files()["config.json"])["auto_map"] == {
        "AutoConfig": "configuration_factorized_gpt2.FactorizedGPT2Config",
        "AutoModel": "modeling_factorized_gpt2.FactorizedGPT2Model",
        "AutoModelForCausalLM": "modeling_factorized_gpt2.FactorizedGPT2",
        "AutoModelForSequenceClassification": (
            "classification_factorized_gpt2.FactorizedGPT2ForSequenceClassification"
        ),
    }
    assert json.loads(adapter.files()["adapter_config.json"])["base_model_name_or_path"] == "me/compressed"
    assert Results(**json.loads(healed.files()["results.json"])).eval_loss == Results.read(run).eval_loss


def test_nothing_of_this_machine_is_published(published, hub, root, corpus):
    for repo_id, repo in hub.repos.items():
        for name, content in repo.files().items():
            for secret in (str(root), str(corpus), root.name, TOKEN, str(Path.home())):
                assert secret.encode() not in content, f"{secret} in {repo_id}/{name}"
    record = json.loads(hub.repos["me/compressed"].files()["compression.json"])
    assert record["baseline"] == "stock"
    tokenizer_config = json.loads(hub.repos["me/compressed"].files()["tokenizer_config.json"])
    assert not tokenizer_config.keys() & {"is_local", "local_files_only"}


def card_of(hub, repo_id: str) -> ModelCard:
    content = hub.repos[repo_id].files()["README.md"].decode()
    assert not card_errors(content)
    return ModelCard(content)


def test_cards(published, hub, original, loaded_with_package):
    compressed, healed, adapter = (card_of(hub, f"me/{name}") for name in ("compressed", "healed", "adapter"))
    size = model_size(original)
    figures = [
        "compressed",
        "8",
        f"{size.parameters:,}",
        f"{size.bytes / 1e6:.3f}",
        "5.2500",
        f"{perplexity(5.25):.2f}",
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in compressed.text.splitlines()]
    assert figures in rows
    assert ["baseline", "-", "30,000", "0.120", "5.1250", f"{perplexity(5.125):.2f}"] in rows
    assert compressed.data.base_model is None  # a folder
    for plot in ("spectrum_pca.png", "loss_against_bytes_pca.png"):
        assert f"]({plot})" in compressed.text
    assert loaded_with_package["card"] == healed.data.to_dict()
    assert (healed.data.base_model, healed.data.license) == (STOCK, "mit")
    assert "4.5000" in healed.text
    assert (adapter.data.library_name, adapter.data.base_model) == ("peft", "me/compressed")


def test_the_base_is_linked_when_the_hub_has_it(hub, folder, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    copytree(folder, copy)
    record = json.loads((copy / "compression.json").read_text())
    calibration = {"text": "/data/my texts/train.txt, more/of.txt", "tokens": 480}
    (copy / "compression.json").write_text(json.dumps(record | {"baseline": STOCK, "calibration": calibration}))
    publish(copy, "me/linked", token=TOKEN)
    data = card_of(hub, "me/linked").data
    assert (data.base_model, data.license) == (STOCK, "mit")
    stored = json.loads(hub.repos["me/linked"].files()["compression.json"])
    assert (stored["baseline"], stored["calibration"]["text"]) == (STOCK, "train.txt, more/of.txt")
    publish(copy, "me/linked", token=TOKEN, base_model="me/compressed", license="apache-2.0")
    data = card_of(hub, "me/linked").data
    assert (data.base_model, data.license) == ("me/compressed", "apache-2.0")
    (tmp_path / STOCK).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)  # where the same name is a folder's
    publish(copy, "me/linked", token=TOKEN)
    assert card_of(hub, "me/linked").data.base_model is None


@pytest.mark.parametrize("kind", ["wrapped", "pickled", "own head"])
def test_what_is_published_loads_whatever_the_folder_was_saved_by(hub, folder, kind, tmp_path):
    """Names of wrappers, a pickle, a head under a config that says it is tied: the model is what is published."""
    copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy/model.safetensors"
    expected = load_file(path)
    if kind == "own head":
        expected["lm_head.weight"] = expected["transformer.wte.weight"].flip(0)
    prefix = "module." if kind == "wrapped" else ""
    save_file({prefix + name: weight for name, weight in expected.items()}, path, metadata={"format": "pt"})
    if kind == "pickled":
        torch.save(expected, path.with_name("pytorch_model.bin"))
        path.unlink()
    name = f"me/{kind.replace(' ', '-')}"
    publish(tmp_path / "copy", name, token=TOKEN)
    files = hub.repos[name].files()
    weights = load(files["model.safetensors"])
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    config = json.loads(files["config.json"])
    assert config.get("tie_word_embeddings", True) is (kind != "own head")
    assert "AutoModelForCausalLM" in config["auto_map"]


def test_publishing_again_changes_nothing(published, hub, folder, run, measured):
    for again in (
        lambda: publish(folder, "me/compressed", token=TOKEN, measured=measured),
        lambda: publish(run, "me/healed", token=TOKEN),
        lambda: publish_adapter(run / "adapter", "me/adapter", "me/compressed", token=TOKEN),
    ):
        hub.requests.clear()
        again()
        assert not any("PUT" in request or "/commit/" in request for request in hub.requests)
    assert all(len(hub.repos[f"me/{name}"].log) == 2 for name in ("compressed", "healed", "adapter"))


def test_the_token_may_come_from_the_environment(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert publish(folder, "by-name-alone") == f"{hub.url}/me/by-name-alone"
    assert 'from_pretrained("me/by-name-alone"' in card_of(hub, "me/by-name-alone").text


def test_a_branch(hub, folder):
    assert publish(folder, "me/branched", token=TOKEN, revision="k8") == f"{hub.url}/me/branched/tree/k8"
    repo = hub.repos["me/branched"]
    assert set(repo.files()) == {".gitattributes"}
    assert [branch for branch, _ in repo.log] == ["main", "k8"]
    assert 'FactorizedGPT2.from_pretrained("me/branched", revision="k8")' in repo.files("k8")["README.md"].decode()
