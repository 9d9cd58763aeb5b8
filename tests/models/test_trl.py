"""trl's trainers, as their users call them, on a folder of a compressed model whose head is tied."""

import math

import pytest
import torch
from conftest import DOCUMENTS, random_ids, tiny_model
from datasets import Dataset
from peft import LoraConfig, PeftModel
from test_peft import TARGETS, assert_same_logits, logits_of

from factorized_gpt2 import FactorizedGPT2
from factorized_gpt2.models.trl_head import fit_trl_head

trl = pytest.importorskip("trl")

pytestmark = [
    # PEFT warns of every tied layer it adapts, and of trl's settings transformers has newer names.
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

TEXTS = Dataset.from_dict({"text": DOCUMENTS[8:40]})
COMPLETIONS = Dataset.from_dict(
    {"prompt": [text[:10] for text in DOCUMENTS[8:40]], "completion": [text[10:40] for text in DOCUMENTS[8:40]]}
)
PREFERENCES = COMPLETIONS.rename_column("completion", "chosen").add_column(
    "rejected", [text[40:9:-1] for text in DOCUMENTS[8:40]]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("trl")
    tiny_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def trainer_of(kind: str, folder, dataset: Dataset, **settings):
    """Make an SFT or DPO trainer of the model in a folder, with LoRA on the protocol's targets."""
    settings = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 5e-3} | settings
    settings |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(folder / "out"), use_cpu=True, bf16=False, max_length=48, **settings
    )
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    trainer = getattr(trl, f"{kind}Trainer")(
        model=str(folder / "model"), args=arguments, train_dataset=dataset, peft_config=lora
    )
    fit_trl_head(trainer.model)
    return trainer


def losses_of(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_sft_trains_an_adapter_that_reloads_and_merges(folder):
    ids = random_ids()
    base = FactorizedGPT2.from_pretrained(folder / "model")
    before = logits_of(base, ids)
    trainer = trainer_of("SFT", folder, TEXTS)
    assert type(trainer.model.get_base_model()) is FactorizedGPT2
    losses = losses_of(trainer)
    assert losses[-1] < losses[0] - 1
    trainer.save_model(str(folder / "adapter"))
    expected = logits_of(trainer.model.eval(), ids)
    assert (expected - before).abs().max() > 0.1
    reloaded = PeftModel.from_pretrained(base, folder / "adapter").eval()
    assert_same_logits(logits_of(reloaded, ids), expected, atol=1e-6)
    merged = reloaded.merge_and_unload(safe_merge=True)
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert_same_logits(logits_of(merged, ids), expected)


@pytest.mark.parametrize(
    ("dataset", "settings"),
    [(TEXTS, {}), (COMPLETIONS, {}), (TEXTS, {"packing": True})],
    ids=["padded", "completions", "packed"],
)
def test_sft_computes_the_loss_of_the_model_it_saves(folder, dataset, settings):
    """Over every document by itself, and over completions alone; the adapter on wte acts on the tied head too."""
    trainer = trainer_of("SFT", folder, dataset, max_steps=2, **settings)
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    ids, labels = batch["input_ids"].flatten(), batch["labels"].flatten()
    positions = batch.get("position_ids", torch.arange(batch["input_ids"].shape[1]).repeat(len(batch["input_ids"])))
    starts = (positions.flatten() == 0).nonzero().flatten().tolist()
    assert len(starts) > 2
    nats = tokens = 0
    for rows in map(slice, starts, [*starts[1:], len(ids)]):
        log_probabilities = logits_of(trainer.model.eval(), ids[None, rows])[0, :-1].log_softmax(-1)
        counts = labels[rows][1:] != -100
        nats -= log_probabilities[counts, ids[rows][1:][counts]].sum().item()
        tokens += counts.sum().item()
    assert tokens < len(ids) - len(starts) or "packing" in settings
    for mode in (True, False):
        loss = trainer.compute_loss(trainer.model.train(mode), dict(batch))
        assert loss.item() == pytest.approx(nats / tokens, rel=1e-5)


def test_dpo_learns_to_prefer(folder):
    losses = losses_of(trainer_of("DPO", folder, PREFERENCES, max_steps=3))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert losses[-1] < losses[0] / 2


def test_what_trl_did_not_prepare_is_refused():
    with pytest.raises(ValueError, match="create the trainer first"):
        fit_trl_head(tiny_model())
    with pytest.raises(ValueError, match="Linear contains no FactorizedGPT2"):
        fit_trl_head(torch.nn.Linear(2, 2))
