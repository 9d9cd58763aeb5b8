"""The stock `Trainer`, with its own collator and nothing of this package but its import."""

import copy

import pytest
import torch
from conftest import VARIANTS, tiny_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from factorized_gpt2 import FactorizedGPT2
from factorized_gpt2.text.tokenizers import load_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated"),
    # Of every tied layer that PEFT adapts.
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
]

tied = pytest.mark.parametrize("variant", [VARIANTS["tied"]], ids=["tied"])


@pytest.fixture(scope="module")
def tokenizer(corpus):
    tokenizer = load_tokenizer(str(corpus / "tokenizer"))
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture
def folder(variant, tokenizer, tmp_path):
    tiny_model(**variant, vocab_size=len(tokenizer), pad_token_id=0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def plain(folder):
    return FactorizedGPT2.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def texts(tokenizer, corpus):
    rows = [
        f"The {noun} of the {place} was old." for noun in ("dog", "clock", "wife") for place in ("mill", "harbour")
    ]
    return Dataset.from_dict(dict(tokenizer([row + " It went." * (i % 3) for i, row in enumerate(rows)])))


def stock_trainer(model, texts, tokenizer, output_dir, **options) -> Trainer:
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "save_strategy": "no"}
    settings = {
        "max_steps": 6,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 3,
        "lr_scheduler_type": "constant",
    }
    names = ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func")
    given = {name: options.pop(name) for name in names if name in options}
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(output_dir), **(quiet | settings | options)),
        train_dataset=texts,
        eval_dataset=texts.select(range(4)),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        **given,
    )


def losses_of(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_stock_trainer_trains_evaluates_predicts_and_goes_on(folder, texts, tokenizer, tmp_path):
    def accuracy(prediction) -> dict:
        assert prediction.predictions.shape == prediction.label_ids.shape
        counted = prediction.label_ids[:, 1:] != -100
        hits = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
        return {"accuracy": float(hits[counted].mean())}

    options = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    options |= {"load_best_model_at_end": True, "compute_metrics": accuracy, "per_device_eval_batch_size": 2}
    options |= {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = stock_trainer(model, texts, tokenizer, tmp_path / "run", **options)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert losses_of(trainer)[-1] < losses_of(trainer)[0] - 0.5
    assert after["eval_loss"] == pytest.approx(trainer.state.best_metric)
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_accuracy"] > before["eval_accuracy"]

    trainer.save_model(tmp_path / "trained")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "trained").eval()
    batches = [trainer.data_collator([trainer.eval_dataset[i] for i in pair]) for pair in ((0, 1), (2, 3))]
    with torch.no_grad():
        expected = [saved(**batch).loss.item() for batch in batches]
    assert after["eval_loss"] == pytest.approx(sum(expected) / 2, rel=1e-4)

    model = AutoModelForCausalLM.from_pretrained(folder)
    resumed = stock_trainer(model, texts, tokenizer, tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    assert losses_of(resumed)[-2:] == pytest.approx(losses_of(trainer)[-2:], rel=1e-4)


@tied
def test_stock_trainer_predicts_logits(folder, plain, texts, tokenizer, tmp_path):
    one = texts.select([0])
    output = stock_trainer(plain, texts, tokenizer, tmp_path).predict(one)
    logits = plain(torch.tensor(one["input_ids"])).logits
    torch.testing.assert_close(torch.from_numpy(output.predictions), logits, atol=1e-4, rtol=1e-4)


@tied
def test_gradient_checkpointing_of_a_stock_trainer_computes_twice_and_trains_the_same(
    folder, texts, tokenizer, tmp_path
):
    trained, calls = [], []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        passes = []
        model.transformer.h[0].ln_1.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        options = {"gradient_checkpointing": checkpointing, "max_steps": 2}
        stock_trainer(model, texts, tokenizer, tmp_path, **options).train()
        trained.append(dict(model.named_parameters()))
        calls.append(len(passes))
    assert calls == [2, 4]
    torch.testing.assert_close(trained[1], trained[0], atol=1e-5, rtol=1e-4)


@tied
@pytest.mark.parametrize("adapted", [False, True])
def test_smoothed_labels_are_shifted(folder, plain, texts, tokenizer, tmp_path, adapted):
    trained = get_peft_model(plain, LoraConfig(target_modules=["wte"], task_type="CAUSAL_LM")) if adapted else plain
    trainer = stock_trainer(trained, texts, tokenizer, tmp_path, label_smoothing_factor=0.1)
    batch = trainer.data_collator([texts[0], texts[1]])
    counted = batch["labels"][:, 1:] != -100
    log_probabilities = plain(**batch).logits[:, :-1].log_softmax(-1)[counted]
    likelihoods = log_probabilities.gather(-1, batch["labels"][:, 1:][counted][:, None])
    expected = -(0.9 * likelihoods.mean() + 0.1 * log_probabilities.mean())
    torch.testing.assert_close(trainer.compute_loss(trained.train(), dict(batch)), expected)


@tied
def test_a_loss_of_ones_own_finds_logits(plain, texts, tokenizer, tmp_path):
    def own(outputs, labels, num_items_in_batch):
        return plain.loss_function(outputs.logits, labels, plain.config.vocab_size, num_items_in_batch)

    losses = []
    for compute_loss in (None, own):
        trainer = stock_trainer(copy.deepcopy(plain), texts, tokenizer, tmp_path, compute_loss_func=compute_loss)
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@tied
@pytest.mark.parametrize("adapted", [False, True])
def test_noise_on_the_embeddings_acts_in_training_alone(plain, texts, tokenizer, tmp_path, adapted):
    before = copy.deepcopy(plain)
    noise = {"neftune_noise_alpha": 20, "learning_rate": 0.0}
    config = LoraConfig(target_modules=["wte"], init_lora_weights=False, task_type="CAUSAL_LM")
    trained, same = (get_peft_model(m, copy.deepcopy(config)) if adapted else m for m in (plain, before))
    same.load_state_dict(trained.state_dict())
    losses = []
    for model, options in ((same, {"learning_rate": 0.0}), (trained, noise)):
        trainer = stock_trainer(model, texts, tokenizer, tmp_path, **options)
        trainer.train()
        losses.append([*losses_of(trainer), trainer.evaluate()["eval_loss"]])
    noisy = [abs(a - b) > 1e-3 for a, b in zip(*losses, strict=True)]
    assert noisy == [True] * 6 + [False]
