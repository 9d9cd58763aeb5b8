"""Whole runs on tiny models: scratch, PCA, PCA + LoRA; resumed, repeated, refused."""

import json
import warnings
from pathlib import Path
from shutil import copytree

import pytest
import torch
from conftest import cut_off_at, random_ids
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from factorized_gpt2 import FactorizedGPT2, FactorizedGPT2Config
from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.hub.model_card import History, model_card
from factorized_gpt2.runs.fields import LORA_TARGETS
from factorized_gpt2.runs.run import FactorizedTrainer, Results, _training_blocks, run_experiment
from factorized_gpt2.runs.settings import parse_run
from factorized_gpt2.settings.flags import as_flags
from factorized_gpt2.text.tokenizers import load_tokenizer
from factorized_gpt2.trainer.adapters import add_lora, lora_targets
from factorized_gpt2.trainer.checkpoints import damage

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 24, "activation_function": "gelu"}
COMMON = {
    "block_size": 16,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "effective_batch_size": 4,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "do_train": True,
    "disable_tqdm": True,
    "report_to": ["none"],
}
LORA = {"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0, "n_embd_wte": 6}


class Workshop:
    """A folder of runs over one corpus."""

    def __init__(self, root: Path, corpus: Path):
        self.root = root
        self.texts = {
            "train_file": [str(corpus / "train.jsonl")],
            "validation_file": [str(corpus / "validation.jsonl")],
            "tokenizer": str(corpus / "tokenizer"),
        }

    def run(self, name: str, **settings) -> Results:
        config = COMMON | self.texts | {"output_dir": str(self.root / name), "run_name": name} | settings
        path = self.root / f"{name}.json"
        path.write_text(json.dumps(config))
        return run_experiment(parse_run(["--config", str(path)]))

    @property
    def baseline(self) -> str:
        return str(self.root / "gpt_baseline")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, corpus) -> Workshop:
    """Train a baseline once, for all tests of this module."""
    shop = Workshop(tmp_path_factory.mktemp("runs"), corpus)
    shop.run("gpt_baseline", **TINY)
    return shop


@pytest.fixture
def fresh(tmp_path, corpus) -> Workshop:
    return Workshop(tmp_path, corpus)


@torch.no_grad()
def logits(model, ids):
    return model.eval()(ids).logits


def test_a_run_leaves_a_model_and_its_results(workshop):
    folder = Path(workshop.baseline)
    results = json.loads((folder / "results.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, FactorizedGPT2)
    assert model.config.use_cache  # which Trainer switches off
    assert results["family"] == "baseline"
    assert results["n_embd_wte"] is None
    assert results["parameters"] == model.num_parameters() == results["trained_parameters"]
    assert results["best_tokens"] == results["best_step"] * 4 * 16
    assert results["eval_loss"] < torch.tensor(float(model.config.vocab_size)).log().item()
    assert results["settings"]["max_steps"] == 6
    assert {"torch", "transformers", "peft"} <= results["versions"].keys()
    assert (folder / "tokenizer.json").exists()
    assert not list(folder.glob(".*"))


def test_scratch_runs_are_factorized_and_repeatable(fresh):
    first = fresh.run("one", **TINY, n_embd_wte=6)
    second = fresh.run("two", **TINY, n_embd_wte=6)
    assert first.family == "lowrank-scratch"
    assert first.eval_loss == second.eval_loss
    assert FactorizedGPT2.from_pretrained(fresh.root / "one").config.n_embd_wte == 6
    other = fresh.run("three", **TINY, n_embd_wte=6, seed=1)
    assert other.eval_loss != first.eval_loss


def test_a_scratch_run_can_be_untied(fresh):
    fresh.run("untied", **TINY, n_embd_wte=6, tie_word_embeddings=False, max_steps=2)
    model = FactorizedGPT2.from_pretrained(fresh.root / "untied")
    assert not model.config.tie_word_embeddings
    assert (model.lm_head.weight - model.transformer.wte.weight).std() > 0.02


def test_pca_without_training_is_evaluated(workshop):
    off = {"do_train": False, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    results = workshop.run("gpt_pca_nofinetune_k6", baseline=workshop.baseline, n_embd_wte=6, **off)
    assert results.family == "pca-nofinetune"
    assert (results.best_step, results.train_seconds, results.trained_parameters) == (None, None, 0)
    assert (workshop.root / "pca_factorized/wte_pca_k6.npy").exists()
    loss_of_all = json.loads((workshop.root / "gpt_baseline/results.json").read_text())["eval_loss"]
    assert results.eval_loss != loss_of_all


@pytest.fixture(scope="module")
def lora(workshop) -> tuple[Results, Path]:
    results = workshop.run("gpt_pca_lora_k6", baseline=workshop.baseline, **LORA)
    return results, workshop.root / "gpt_pca_lora_k6"


def test_lora_leaves_an_adapter_and_a_merged_model_that_agree(lora, workshop):
    results, folder = lora
    ids = random_ids()
    base = FactorizedGPT2.from_pretrained(workshop.root / "gpt_pca_nofinetune_k6")
    start = logits(base, ids)
    merged = FactorizedGPT2.from_pretrained(folder)
    adapted = PeftModel.from_pretrained(base, folder / "adapter")
    assert (logits(merged, ids) - logits(adapted, ids)).abs().max() < 1e-4
    assert (logits(merged, ids) - start).abs().max() > 1e-3
    assert merged.config.tie_word_embeddings
    assert merged.num_parameters() == results.parameters == base.num_parameters() - results.trained_parameters


def test_the_adapter_names_its_base(lora):
    _, folder = lora
    adapted = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
    assert (
        logits(adapted, random_ids()) - logits(FactorizedGPT2.from_pretrained(folder), random_ids())
    ).abs().max() < 1e-4


def test_its_checkpoints_are_handed_on_like_what_it_leaves(lora):
    """Others know the tokenizer's class, find the adapter's base, and read no folder of this machine."""
    _, folder = lora
    checkpoint = folder / "checkpoint-6"
    for place in (folder, checkpoint):
        tokenizer = json.loads((place / "tokenizer_config.json").read_text())
        assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert tokenizer["model_max_length"] == FactorizedGPT2.from_pretrained(folder).config.n_positions
    for place in (folder / "adapter", checkpoint):
        assert json.loads((place / "base_model.json").read_text())["from_here"] == "../../gpt_pca_nofinetune_k6"
        assert "base_model:" not in (place / "README.md").read_text()
    assert damage(checkpoint) is None


def test_a_base_that_transformers_alone_does_not_load_is_saved_beside_the_adapter(workshop, lora, tmp_path):
    """As one whose weights have the names of a wrapper: PEFT would start from other weights, drawn anew."""
    wrapped = copytree(workshop.root / "gpt_pca_nofinetune_k6", tmp_path / "wrapped")
    weights = {f"module.{name}": weight for name, weight in load_file(wrapped / "model.safetensors").items()}
    save_file(weights, wrapped / "model.safetensors", metadata={"format": "pt"})
    settings = LORA | {"n_embd_wte": None, "compressed": str(wrapped), "max_steps": 1}
    workshop.run("on_wrapped", **settings)
    adapted = AutoPeftModelForCausalLM.from_pretrained(workshop.root / "on_wrapped/adapter")
    merged = FactorizedGPT2.from_pretrained(workshop.root / "on_wrapped")
    assert (logits(adapted, random_ids()) - logits(merged, random_ids())).abs().max() < 1e-4
    assert adapted.peft_config["default"].base_model_name_or_path == str(workshop.root / "on_wrapped/base_model")


def test_lora_trains_the_protocols_modules(lora):
    results, folder = lora
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert set(config["target_modules"]) == set(LORA_TARGETS)
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    vocab_size = FactorizedGPT2.from_pretrained(folder).config.vocab_size
    vocabulary = 4 * (vocab_size + 6) + 2 * 4 * (24 + 6)
    blocks = 2 * (4 * 4 * (24 + 24) + 2 * 4 * (24 + 96))
    assert results.trained_parameters == vocabulary + blocks


def test_lora_starts_as_the_compressed_model(workshop):
    """A is Kaiming-uniform and B zero, on wte too, so that no logit moves before the first step."""
    model = FactorizedGPT2.from_pretrained(workshop.root / "gpt_pca_nofinetune_k6")
    before = logits(model, random_ids())
    adapted = add_lora(model, 4, 8, 0.0, LORA_TARGETS)
    assert torch.equal(logits(adapted, random_ids()), before)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            is_a = "lora_A" in name or "lora_embedding_A" in name
            bound = weight.shape[1] ** -0.5
            assert (weight.abs().max() <= bound and weight.std() > 0.4 * bound) if is_a else (weight == 0).all(), name


def test_all_linear_names_the_protocols_modules(workshop):
    for folder, absent in (("gpt_pca_nofinetune_k6", set()), ("gpt_baseline", {"scale_up", "scale_down"})):
        model = FactorizedGPT2.from_pretrained(workshop.root / folder)
        assert set(lora_targets(model, 4, ["all-linear"])) == set(LORA_TARGETS) - absent


def test_mixed_precision_ends_in_a_verified_float32_model(workshop):
    workshop.run("mixed", baseline=workshop.baseline, **LORA, bf16=True, use_cpu=True, max_steps=2)
    model = FactorizedGPT2.from_pretrained(workshop.root / "mixed")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_a_half_precision_baseline_is_healed_in_float32(workshop, fresh):
    FactorizedGPT2.from_pretrained(workshop.baseline).bfloat16().save_pretrained(fresh.root / "half")
    results = fresh.run("healed", baseline=str(fresh.root / "half"), **LORA, max_steps=2)
    assert results.bytes == 4 * results.parameters
    assert FactorizedGPT2.from_pretrained(fresh.root / "gpt_pca_nofinetune_k6").dtype == torch.bfloat16


def test_an_untied_head_stays_its_own(workshop):
    results = workshop.run("untied", baseline=workshop.baseline, **LORA, tie_word_embeddings=False)
    merged = FactorizedGPT2.from_pretrained(workshop.root / "untied")
    base = FactorizedGPT2.from_pretrained(workshop.root / "gpt_pca_nofinetune_k6")
    assert not merged.config.tie_word_embeddings
    assert torch.equal(merged.lm_head.weight, base.transformer.wte.weight)
    assert not torch.equal(merged.transformer.wte.weight, base.transformer.wte.weight)
    assert results.parameters == base.num_parameters() + base.transformer.wte.weight.numel()
    adapted = AutoPeftModelForCausalLM.from_pretrained(workshop.root / "untied/adapter")
    assert (logits(adapted, random_ids()) - logits(merged, random_ids())).abs().max() < 1e-4


def test_an_adapter_finds_its_base_from_any_folder(workshop, tmp_path, monkeypatch):
    monkeypatch.chdir(workshop.root)
    base = {"baseline": Path(workshop.baseline).name}
    kinds = {"pca": LORA | base, "whole": LORA | base | {"n_embd_wte": None}, "untied": {"tie_word_embeddings": False}}
    for name, settings in kinds.items():
        workshop.run(f"here_{name}", **(kinds["pca"] | settings | {"output_dir": f"here_{name}", "max_steps": 1}))
    monkeypatch.chdir(tmp_path)
    for name in kinds:
        adapter = workshop.root / f"here_{name}/adapter"
        adapted = AutoPeftModelForCausalLM.from_pretrained(adapter)
        merged = FactorizedGPT2.from_pretrained(adapter.parent)
        assert (logits(adapted, random_ids()) - logits(merged, random_ids())).abs().max() < 1e-4
        assert Path(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]).is_absolute()
        assert "base_model:" not in (adapter / "README.md").read_text()
        assert str(workshop.root) not in (adapter / "README.md").read_text()


def test_one_config_heals_any_baseline(workshop, tmp_path, monkeypatch, caplog):
    """Blocks as long as the baseline's positions, the baseline's own tokenizer, rows that stay documents."""
    monkeypatch.chdir(tmp_path)
    texts = [f"--{split}={workshop.texts[split][0]}" for split in ("train_file", "validation_file")]
    words = ["--config", "heal.json", "--baseline", workshop.baseline, "--n_embd_wte", "6", *texts]
    words += ["--max_steps", "2", "--warmup_steps", "0", "--report_to", "none", "--use_cpu", "True"]
    words += ["--torch_compile", "False", "--eval_steps", "1", "--save_steps", "1", "--output_dir", "out/healed"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is_gradient_checkpointing.*")
        results = run_experiment(parse_run(words))
    positions = FactorizedGPT2Config.from_pretrained(workshop.baseline).n_positions
    assert (results.run_name, results.settings["block_size"]) == ("pca-lora-k6-r32", positions)
    assert results.settings["tokenizer"] is None
    saved, own = (load_tokenizer(folder) for folder in ("out/healed", workshop.baseline))
    assert saved.get_vocab() == own.get_vocab()
    assert "missing keys" not in caplog.text
    again = run_experiment(parse_run(words))
    assert again == results  # it is known to be finished
    blocks = _training_blocks(parse_run([*words, "--block_size", "16"]), own)
    ends = sum(int(token) == own.eos_token_id for row in blocks for token in row["input_ids"])
    rows = Path(workshop.texts["train_file"][0]).read_text().splitlines()
    assert ends >= len(rows) - 1


def test_a_rank_that_would_not_factorize_is_refused(workshop):
    for rank in (24, 64):
        with pytest.raises(UserError, match=f"Rank {rank} is out of range"):
            workshop.run("refused", baseline=workshop.baseline, n_embd_wte=rank)


def card_of(folder: Path) -> str:
    return str(model_card("me/it", FactorizedGPT2Config.from_pretrained(folder), (1, 4), History.read(folder)))


def test_an_unfactorized_baseline_can_be_adapted(workshop):
    results = workshop.run("adapted", baseline=workshop.baseline, **(LORA | {"n_embd_wte": None}))
    merged = FactorizedGPT2.from_pretrained(workshop.root / "adapted")
    assert results.n_embd_wte is None
    assert results.family == "lora"
    card = card_of(workshop.root / "adapted")
    assert "Made from `gpt_baseline`. Trained with LoRA of rank 4" in card
    assert "ompressed" not in card
    assert not merged.config.is_factorized
    adapted = AutoPeftModelForCausalLM.from_pretrained(workshop.root / "adapted/adapter")
    assert (logits(adapted, random_ids()) - logits(merged, random_ids())).abs().max() < 1e-4


def test_a_name_follows_the_settings_unless_it_is_given(workshop):
    off = {"do_train": False, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    config = ["--config", "pca_lora_k64.json", *as_flags(COMMON | workshop.texts | off | {"report_to": "none"})]
    config += ["--baseline", workshop.baseline, "--n_embd_wte", "4", "--lora_rank", "3"]
    names = [
        run_experiment(parse_run([*config, "--output_dir", str(workshop.root / place), *words])).run_name
        for place, words in {
            "derived": (),
            "trained": ("--do_train", "True", "--max_steps", "1", "--warmup_steps", "0"),
            "given": ("--run_name", "mine"),
        }.items()
    ]
    assert names == ["pca-nofinetune-k4", "pca-lora-k4-r3", "mine"]
    assert Results.read(workshop.root / "trained").settings["run_name"] == "pca-lora-k4-r3"


def test_an_evaluated_baseline_was_not_compressed(workshop):
    results = workshop.run("as_it_is", baseline=workshop.baseline, run_name=None, do_train=False)
    assert (results.family, results.run_name, results.spectrum) == ("evaluation", "evaluation", None)


def test_a_baseline_can_be_fine_tuned_whole(workshop):
    results = workshop.run("whole", baseline=workshop.baseline, n_embd_wte=6)
    assert results.family == "pca-finetune"
    assert results.trained_parameters == results.parameters


def test_a_run_that_was_cut_off_goes_on_to_the_same_end(fresh):
    whole = fresh.run("whole", **TINY, n_embd_wte=6)
    with cut_off_at(5):
        fresh.run("cut", **TINY, n_embd_wte=6)
    assert not (fresh.root / "cut/results.json").exists()
    resumed = fresh.run("cut", **TINY, n_embd_wte=6)
    assert resumed.eval_loss == whole.eval_loss
    ours, theirs = (FactorizedGPT2.from_pretrained(fresh.root / name).state_dict() for name in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_finished_run_is_not_repeated(workshop, monkeypatch):
    monkeypatch.setattr(FactorizedTrainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    results = workshop.run("gpt_baseline", **TINY)
    assert results.best_step


def test_other_settings_need_consent(fresh):
    fresh.run("run", **TINY, max_steps=2)
    with pytest.raises(UserError, match=r"other settings \(seed\).*--overwrite"):
        fresh.run("run", **TINY, max_steps=2, seed=3)
    assert fresh.run("run", **TINY, max_steps=2, seed=3, overwrite=True).settings["seed"] == 3


def test_a_setting_of_a_later_version_counts_as_having_had_its_default(fresh):
    finished = fresh.run("run", **TINY, max_steps=2)
    path = fresh.root / "run/run.json"
    path.write_text(json.dumps({name: value for name, value in finished.settings.items() if name != "teacher"}))
    assert fresh.run("run", **TINY, max_steps=2) == finished
    path.write_text(json.dumps({name: value for name, value in finished.settings.items() if name != "tokenizer"}))
    with pytest.raises(UserError, match=r"other settings \(tokenizer\)"):
        fresh.run("run", **TINY, max_steps=2)


def test_evaluation_does_not_depend_on_its_batch_size(workshop):
    settings = {"baseline": workshop.baseline, "do_train": False, "eval_strategy": "no", "save_strategy": "no"}
    settings["load_best_model_at_end"] = False
    losses = [
        workshop.run(f"eval{size}", **settings, per_device_eval_batch_size=size).eval_loss for size in (1, 3, 64)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_a_stream_trains_on_what_would_be_prepared(fresh):
    """With one block a buffer and no shuffling the order differs from a sampler's; the text and its losses do not."""
    settings = TINY | {"n_embd_wte": 6, "streaming": True, "shuffle_buffer": 40}
    first, second = fresh.run("one", **settings), fresh.run("two", **settings)
    assert first.training_curve == second.training_curve
    assert fresh.run("other", **settings, seed=1).training_curve != first.training_curve
    prepared = fresh.run("prepared", **TINY, n_embd_wte=6)
    assert first.best_tokens == prepared.best_tokens
    assert first.eval_loss == pytest.approx(prepared.eval_loss, abs=0.3)
    many = fresh.run("many", **settings, max_steps=70, learning_rate=1e-3)  # more than the text has once
    assert [step for step, _ in many.training_curve] == list(range(1, 71))


def test_a_stream_goes_on_where_it_was_cut(fresh):
    settings = TINY | {"n_embd_wte": 6, "streaming": True, "shuffle_buffer": 40}
    whole = fresh.run("whole", **settings)
    with cut_off_at(5):
        fresh.run("cut", **settings)
    assert fresh.run("cut", **settings).training_curve == whole.training_curve


@pytest.mark.parametrize("workers", [0, 1])
def test_a_text_that_vanishes_under_a_stream(fresh, monkeypatch, capsys, workers):
    text = fresh.root / "text.jsonl"
    text.write_bytes(Path(fresh.texts["train_file"][0]).read_bytes())
    train = FactorizedTrainer.train

    def vanish(*args, **kwargs):
        text.unlink()
        return train(*args, **kwargs)

    monkeypatch.setattr(FactorizedTrainer, "train", vanish)
    settings = TINY | {"streaming": True, "train_file": [str(text)], "dataloader_num_workers": workers}
    assert run_command(lambda words: fresh.run("run", **settings), []) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line == f"error: The text cannot be read to the end: [Errno 2] No such file or directory: '{text}'"


def test_only_the_first_blocks_are_evaluated_if_asked(workshop):
    off = {"do_train": False, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    losses = {
        limit: workshop.run(f"limit{limit}", baseline=workshop.baseline, **off, max_eval_samples=limit).eval_loss
        for limit in (1, 2, 10**6)
    }
    whole = json.loads((workshop.root / "gpt_baseline/results.json").read_text())["eval_loss"]
    assert losses[10**6] == pytest.approx(whole, rel=1e-6)
    assert len({losses[1], losses[2], whole}) == 3


def test_a_run_from_pca_keeps_its_spectrum_and_others_none(lora, workshop):
    results, folder = lora
    shares = results.spectrum
    assert len(shares) == 24
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1, abs=1e-5)
    record = json.loads((folder.parent / "gpt_pca_nofinetune_k6/compression.json").read_text())
    assert shares[5] == pytest.approx(record["explained_variance_ratio"], abs=1e-5)
    assert workshop.run("gpt_baseline", **TINY).spectrum is None


@pytest.mark.parametrize("mode", ["auto", "offline", "disabled"])
def test_tracking_needs_no_account(fresh, monkeypatch, mode):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(fresh.root))  # where a login would be stored
    fresh.run("tracked", **TINY, max_steps=2, report_to=["wandb"], project="new-small-gpt", wandb_mode=mode)
    recorded = list((fresh.root / "tracked/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(recorded) == (mode != "disabled")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"n_embd_wte": 24 + 1}, "Rank 25 is out of range"),
        ({"block_size": 64}, "block_size must lie between 2 and the model's 16 positions, got 64"),
        ({"lora_target_modules": ["q_prj"]}, "no linear layer or embedding 'q_prj'"),
        ({"lora_target_modules": ["wte", "lm_head"]}, "lm_head is tied to wte"),
        ({"baseline": "nowhere"}, "There is no folder nowhere"),
    ],
)
def test_settings_that_contradict_the_baseline(workshop, settings, complaint):
    with pytest.raises(UserError, match=complaint):
        workshop.run("refused", **({"baseline": workshop.baseline} | LORA | settings))
    assert not (workshop.root / "refused").exists()


@pytest.mark.parametrize("rank", [0, -1, 25])
def test_a_rank_that_no_network_has(fresh, rank):
    with pytest.raises(UserError, match=r"n_embd_wte must (be at least 1|lie between 1 and n_embd)"):
        fresh.run("refused", **TINY, n_embd_wte=rank)
