"""Runs of factorized decoders other than GPT-2: LoRA and full, from every start; resumed, measured, refused."""

import json
import logging
from pathlib import Path

import pytest
import torch
from conftest import cut_off_at, random_ids
from decoders import ARCHITECTURES, tiny_decoder
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, GPTJConfig, GPTJForCausalLM

from factorized_gpt2 import FactorizedCausalLM, factorize, from_causal_lm
from factorized_gpt2.cli.compress import compress
from factorized_gpt2.cli.evaluate import evaluate
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.models.decoder_conversion import vocabulary_matrices_of
from factorized_gpt2.runs.fields import ALL_LINEAR, LORA_TARGETS
from factorized_gpt2.runs.results import Results
from factorized_gpt2.runs.run import run_experiment
from factorized_gpt2.runs.settings import parse_run
from factorized_gpt2.trainer import adapters

LINEAR = {  # of the decoders' own layers
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "gemma3_text": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
}
VOCABULARY = {"wte", "scale_up", "scale_down"}
ONLY_MEASURED = ("--do_train", False, "--max_eval_samples", 9999, "--eval_strategy", "no", "--save_strategy", "no")
ONLY_MEASURED += ("--load_best_model_at_end", False)

# transformers calls its own by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


class Workshop:
    """A folder of decoders, and of runs from them."""

    def __init__(self, root: Path, corpus: Path):
        self.root, self.corpus = root, corpus
        self.texts = ["--train_file", corpus / "train.jsonl", "--validation_file", corpus / "validation.jsonl"]

    def words(self, name: str, *rest) -> list[str]:
        """The words of a run of `heal.json` in small; what comes later counts."""
        few = ["--block_size", 16, "--max_steps", 4, "--warmup_steps", 0, "--eval_steps", 2, "--save_steps", 2]
        few += ["--per_device_train_batch_size", 2, "--effective_batch_size", 2, "--lora_rank", 4]
        few += ["--learning_rate", "1e-2", "--max_eval_samples", 8, "--report_to", "none", "--disable_tqdm", "True"]
        few += ["--fp16", "False", "--torch_compile", "False"]
        words = ["--config", "heal.json", *self.texts, *few, "--output_dir", self.root / name, *rest]
        return [str(word) for word in words]

    def run(self, name: str, *rest) -> Results:
        return run_experiment(parse_run(self.words(name, *rest)))

    def compress(self, kind: str, *rest) -> None:
        words = ("--baseline", self.root / kind, "--output_dir", self.root, "--device", "cpu", *rest)
        compress([str(word) for word in words])


@pytest.fixture(scope="module")
def workshop(tokenizer, corpus, tmp_path_factory) -> Workshop:
    root = tmp_path_factory.mktemp("decoder_runs")
    for kind in (*LINEAR, "gemma2"):
        tiny_decoder(kind, vocab_size=len(tokenizer)).save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
    shop = Workshop(root, corpus)
    shop.compress(
        *("llama", "--bits_per_weight", 6, "--calibration_file", corpus / "train.jsonl", "--calibration_tokens", 256)
    )
    return shop


@pytest.fixture(scope="module")
def coded(workshop) -> Path:
    return workshop.root / "gpt_coded_nofinetune_b6"


@torch.no_grad()
def logits(model):
    return model.eval()(random_ids()).logits


def adapted(folder: Path) -> set[str]:
    return set(json.loads((folder / "adapter/adapter_config.json").read_text())["target_modules"])


@pytest.mark.parametrize("kind", LINEAR)
def test_one_config_heals_any_decoder(kind, workshop, tmp_path, caplog):
    """From PCA, by adapters on all linear layers: kept beside their base, and merged."""
    caplog.set_level(logging.INFO)
    shop = Workshop(tmp_path, workshop.corpus)
    start = ("--baseline", workshop.root / kind, "--n_embd_wte", 8)
    results = shop.run("healed", *start)
    assert (results.run_name, results.family) == ("pca-lora-k8-r4", "pca-lora")
    assert adapted(tmp_path / "healed") == LINEAR[kind] | VOCABULARY
    assert "LoRA adapters on wte, scale_up, scale_down, " in caplog.text
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt_pca_nofinetune_k8")
    assert isinstance(merged, FactorizedCausalLM)
    assert merged.config.tie_word_embeddings == (kind != "gpt_neox")
    assert merged.config.to_dict().keys() == base.config.to_dict().keys()
    assert merged.config.base_config.use_cache  # which Trainer switches off
    assert results.parameters == merged.num_parameters() == base.num_parameters()
    beside = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "healed/adapter")
    assert (logits(merged) - logits(beside)).abs().max() < 1e-4
    assert (logits(merged) - logits(base)).abs().max() > 1e-3

    measure = ["--eval_file", str(workshop.corpus / "validation.jsonl"), "--block_size", "16"]
    evaluate(["--models", str(tmp_path / "healed"), *measure, "--json", str(tmp_path / "row.json")])
    row = json.loads((tmp_path / "row.json").read_text())["rows"][0]
    whole = shop.run("measured", "--compressed", tmp_path / "healed", *ONLY_MEASURED)
    assert row["loss"] == pytest.approx(whole.eval_loss, abs=1e-5)
    with pytest.raises(UserError, match=r"adapter is an adapter, no model by itself.*the folder above it"):
        evaluate(["--models", str(tmp_path / "healed/adapter"), *measure])
    assert shop.run("healed", *start) == results  # known to be finished


def test_the_names_of_gpt2s_modules_stand_for_those_of_the_decoder(workshop):
    start = ("--baseline", workshop.root / "gpt_neox", "--n_embd_wte", 6, "--max_steps", 1)
    workshop.run("renamed", *start, "--lora_target_modules", *LORA_TARGETS)
    assert adapted(workshop.root / "renamed") == LINEAR["gpt_neox"] | VOCABULARY
    workshop.run("chosen", *start, "--lora_target_modules", "query_key_value", "lm_head")
    assert adapted(workshop.root / "chosen") == {"query_key_value", "lm_head"}  # whose head is untied
    with pytest.raises(UserError, match=r"no linear layer or embedding 'q_prj'; it has dense, .*wte"):
        workshop.run("refused", *start, "--lora_target_modules", "q_prj")
    with pytest.raises(UserError, match="lora_rank 97 is larger than the model's widest layer, of 96"):
        workshop.run("refused", *start, "--lora_rank", 97)
    assert not (workshop.root / "refused").exists()


def test_codes_stay_and_all_around_them_is_healed(workshop, coded):
    before = AutoModelForCausalLM.from_pretrained(coded)
    results = workshop.run("coded_lora", "--compressed", coded)
    assert results.family == "coded-lora"
    assert adapted(workshop.root / "coded_lora") == LINEAR["llama"] | VOCABULARY - {"wte"}
    merged = AutoModelForCausalLM.from_pretrained(workshop.root / "coded_lora")
    assert torch.equal(merged.wte.codes, before.wte.codes)
    assert not torch.equal(merged.scale_up.weight, before.scale_up.weight)
    beside = AutoPeftModelForCausalLM.from_pretrained(workshop.root / "coded_lora/adapter")
    assert (logits(merged) - logits(beside)).abs().max() < 1e-4

    workshop.run("coded_full", "--compressed", coded, "--lora_rank", 0)
    trained = AutoModelForCausalLM.from_pretrained(workshop.root / "coded_full")
    assert torch.equal(trained.wte.codes, before.wte.codes)
    assert not torch.equal(trained.wte.steps, before.wte.steps)

    floats = ("--dequantize", True, "--lora_target_modules", ALL_LINEAR)
    workshop.run("floats", "--compressed", coded, *floats)
    assert adapted(workshop.root / "floats") == LINEAR["llama"] | VOCABULARY
    with pytest.raises(UserError, match=r"wte is of integers, which cannot be adapted.*dequantize=true"):
        workshop.run("refused", "--compressed", coded, "--lora_target_modules", "wte")


@pytest.mark.parametrize(("kind", "lora_rank"), [("llama", 0), ("gpt_neox", 0), ("gemma2", 0), ("llama", 4)])
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(kind, lora_rank, workshop, tmp_path):
    shop = Workshop(tmp_path, workshop.corpus)
    start = ("--baseline", workshop.root / kind, "--n_embd_wte", 8, "--lora_rank", lora_rank, "--eval_steps", 1)
    start += ("--save_steps", 1, "--dropout", 0.1)
    whole = shop.run("whole", *start)
    with cut_off_at(3):
        shop.run("cut", *start)
    assert not (tmp_path / "cut/config.json").exists()
    resumed = shop.run("cut", *start)
    assert (resumed.eval_loss, resumed.fingerprint) == (whole.eval_loss, whole.fingerprint)
    assert resumed.family == ("pca-lora" if lora_rank else "pca-finetune")


def test_an_untied_head_stays_its_own(workshop):
    start = ("--baseline", workshop.root / "llama", "--n_embd_wte", 8, "--tie_word_embeddings", False)
    workshop.run("untied", *start)
    merged = AutoModelForCausalLM.from_pretrained(workshop.root / "untied")
    base = AutoModelForCausalLM.from_pretrained(workshop.root / "gpt_pca_nofinetune_k8")
    assert not merged.config.tie_word_embeddings
    assert torch.equal(merged.lm_head.weight, base.wte.weight)
    assert not torch.equal(merged.wte.weight, base.wte.weight)
    beside = AutoPeftModelForCausalLM.from_pretrained(workshop.root / "untied/adapter")
    assert (logits(merged) - logits(beside)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "gptj"])
def test_every_dropout_is_set_where_the_decoder_has_it(kind):
    """As in a decoder that is built with it: the same losses of the same random numbers."""
    model = factorized(tiny_decoder(kind) if kind in ARCHITECTURES else tiny_gptj())
    calm = model.train()(random_ids(), labels=random_ids()).loss
    names = adapters.set_dropout(model, 0.4)
    assert names
    assert all(model.config.base_config.to_dict()[name] == 0.4 for name in names)
    built = FactorizedCausalLM(model.config)
    built.load_state_dict(model.state_dict())
    built.eval()(random_ids(), labels=random_ids(), skip_logits=True)  # only then it knows what follows its head
    losses = []
    for each in (model, built):
        torch.manual_seed(1)
        losses.append(each.train()(random_ids(), labels=random_ids()).loss)
    assert torch.equal(*losses)
    assert not torch.equal(losses[0], calm)
    adapters.set_dropout(model, 0.0)
    assert torch.equal(model.train()(random_ids(), labels=random_ids()).loss, calm)


def tiny_gptj():
    """A decoder whose embedding has the name that ours has."""
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPTJConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64, **drops)
    return GPTJForCausalLM(config).eval()


def factorized(model) -> FactorizedCausalLM:
    embedding, head = vocabulary_matrices_of(model)
    return from_causal_lm(model, factorize(embedding, 8, head))


def test_a_decoder_with_modules_of_the_same_names_is_adapted():
    model = factorized(tiny_gptj())
    before = logits(model)
    targets = adapters.lora_targets(model, 2, [ALL_LINEAR])
    assert set(targets) == {*VOCABULARY, "q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"}
    tuned = adapters.add_lora(model, 2, 4, 0.0, [*targets, "lm_head"])
    assert torch.equal(logits(tuned), before)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_" in name:
                weight.add_(0.1 * torch.randn(weight.shape))
    expected = logits(tuned)
    assert (expected - before).abs().max() > 1e-2
    assert (logits(adapters.merge(tuned)) - expected).abs().max() < 1e-4


def test_what_is_set_and_what_is_ignored_is_said(workshop, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    start = ("--baseline", workshop.root / "llama", "--n_embd_wte", 8, "--max_steps", 1, "--dropout", 0.1)
    workshop.run("dropping", *start)
    assert "dropout=0.1 sets attention_dropout; the model has no other." in caplog.text
    saved = AutoModelForCausalLM.from_pretrained(workshop.root / "dropping")
    assert saved.config.base_config.attention_dropout == 0.1
    monkeypatch.setattr("factorized_gpt2.runs.start.set_dropout", lambda *_: [])
    workshop.run("none", *start)
    assert "dropout=0.1 is ignored: the model's config has none." in caplog.text


def test_blocks_of_a_decoder_with_many_positions_are_short(workshop, tokenizer, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    model = tiny_decoder("llama", vocab_size=len(tokenizer), max_position_embeddings=8192)
    model.save_pretrained(tmp_path / "long")
    tokenizer.save_pretrained(tmp_path / "long")
    shop = Workshop(tmp_path, workshop.corpus)
    start = ("--baseline", tmp_path / "long", "--n_embd_wte", 8)
    words = shop.words("run", *start, *ONLY_MEASURED)
    place = words.index("--block_size")
    results = run_experiment(parse_run(words[:place] + words[place + 2 :]))
    assert results.settings["block_size"] == 1024
    assert caplog.text.count("has 8192 positions: it reads blocks of 1024 tokens") == 1
    with pytest.raises(UserError, match="must lie between 2 and the model's 8192 positions, got 8193"):
        shop.run("refused", *start, "--block_size", 8193)


def test_the_ways_of_training_come_to_the_same(workshop):
    """Logits or none, activations kept or computed anew, layers compiled or not."""
    start = ("--baseline", workshop.root / "llama", "--n_embd_wte", 8, "--use_cpu", True, "--lora_dropout", 0.0)
    ways = {
        "blockwise": (),
        "logits": ("--loss_backend", "logits"),
        "auto": ("--loss_backend", "auto"),
        "anew": ("--gradient_checkpointing", True),
        "compiled": ("--torch_compile", True, "--torch_compile_backend", "aot_eager"),
    }
    losses = {name: workshop.run(f"way_{name}", *start, *words).eval_loss for name, words in ways.items()}
    assert losses == pytest.approx(dict.fromkeys(ways, losses["blockwise"]), abs=1e-4)


def test_a_backend_of_the_loss_that_needs_a_plain_head(workshop, coded, tokenizer, tmp_path):
    for name in ("llama", "granite"):
        tiny_decoder(name, vocab_size=len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    shop = Workshop(tmp_path, workshop.corpus)
    backend = ("--loss_backend", "attention", "--lora_target_modules", "q_proj", "scale_up")
    shop.run("plain", "--baseline", tmp_path / "llama", "--n_embd_wte", 8, *backend)
    for start in (("--compressed", coded), ("--baseline", tmp_path / "granite", "--n_embd_wte", 7)):
        with pytest.raises(UserError, match="needs logits that are a product with one matrix of floats"):
            shop.run("refused", *start, *backend)
    assert not (tmp_path / "refused").exists()


def test_learning_from_a_teacher(workshop, coded):
    distil = ("--distillation_weight", 0.5)
    results = workshop.run("taught", "--compressed", coded, *distil)  # by what it was compressed from
    alone = workshop.run("untaught", "--compressed", coded)
    assert results.eval_loss != alone.eval_loss
    workshop.run("taught_untied", "--baseline", workshop.root / "gpt_neox", "--n_embd_wte", 7, *distil)


def test_a_teacher_that_changes_its_logits_is_refused(workshop, tokenizer, tmp_path):
    tiny_decoder("granite", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "granite")
    distil = ("--distillation_weight", 0.5, "--teacher", tmp_path / "granite")
    with pytest.raises(UserError, match="granite scales or caps its logits, which distillation does not know"):
        workshop.run("refused", "--baseline", workshop.root / "llama", "--n_embd_wte", 8, *distil)


def test_of_models_that_are_not_factorized_it_trains_gpt2s(workshop):
    with pytest.raises(UserError, match="llama is a LlamaForCausalLM: set n_embd_wte, the rank to factorize it at"):
        workshop.run("refused", "--baseline", workshop.root / "llama")
    assert not (workshop.root / "refused").exists()


def test_a_number_alone_names_no_module():
    assert [adapters._short(name) for name in ("layers.0.mlp.up", "layers.1.mlp.0")] == ["up", "mlp.0"]
