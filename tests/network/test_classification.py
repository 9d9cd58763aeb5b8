"""Classification of texts: the loading, the loss and the tools that transformers has for every classifier."""

import pytest
import torch
from conftest import left_padded, random_ids, tiny_config, tiny_model
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from factorized_gpt2 import FactorizedGPT2ForSequenceClassification, from_gpt2
from factorized_gpt2.compress.pca import factorize
from factorized_gpt2.models.conversion import vocabulary_matrices


@pytest.fixture
def folder(tmp_path, variant):
    tiny_model(**variant).save_pretrained(tmp_path / "language_model")
    return tmp_path / "language_model"


def load(folder, **options):
    set_seed(7)
    return AutoModelForSequenceClassification.from_pretrained(folder, **options)


def examples(count: int = 64):
    """Texts whose label is whether they hold token 5."""
    ids = random_ids(count, 12)
    ids[ids == 5] = 6
    ids[::2, 3] = 5
    return [{"input_ids": row, "labels": int(5 in row.tolist())} for row in ids]


def test_starts_from_a_language_model(folder, variant):
    model, report = load(folder, num_labels=3, output_loading_info=True)
    assert type(model) is FactorizedGPT2ForSequenceClassification
    assert report["missing_keys"] == {"score.weight"}
    assert not report["unexpected_keys"]
    language_model = tiny_model(**variant)
    for name, weight in model.transformer.state_dict().items():
        assert torch.equal(weight, language_model.transformer.state_dict()[name])


def test_score_starts_as_the_seed_says(folder):
    score = load(folder, num_labels=3).score.weight.detach()
    assert score.std().item() == pytest.approx(0.02, rel=0.3)
    assert torch.equal(score, load(folder, num_labels=3).score.weight)
    assert not torch.equal(
        score, AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).score.weight
    )


def test_is_gpt2s_classifier_where_nothing_is_factorized():
    """The stock classifier, converted weight by weight, gives the same logits and the same loss."""
    shape = {"vocab_size": 99, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 1}
    torch.manual_seed(0)
    stock = GPT2ForSequenceClassification(GPT2Config(**shape, num_labels=3)).eval()
    ours = FactorizedGPT2ForSequenceClassification(tiny_config(n_embd_wte=None, num_labels=3)).eval()
    language_model = GPT2LMHeadModel(GPT2Config(**shape))
    language_model.transformer.load_state_dict(stock.transformer.state_dict())
    ours.transformer.load_state_dict(from_gpt2(language_model).transformer.state_dict())
    ours.score.load_state_dict(stock.score.state_dict())
    batch = left_padded([random_ids(1, 9)[0], random_ids(1, 5, seed=2)[0]])
    labels = torch.tensor([2, 0])
    with torch.no_grad():
        ours, stock = ours(**batch, labels=labels), stock(**batch, labels=labels)
    torch.testing.assert_close(ours.logits, stock.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.loss, stock.loss, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(folder):
    model = load(folder, num_labels=3)
    rows = [random_ids(1, 9)[0], random_ids(1, 5, seed=2)[0]]
    alone = torch.cat([model(row[None]).logits for row in rows])
    left = left_padded(rows)
    positions = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    torch.testing.assert_close(model(**left, position_ids=positions).logits, alone, atol=1e-5, rtol=1e-4)
    right = {name: padded.flip(1) for name, padded in left_padded([row.flip(0) for row in rows]).items()}
    torch.testing.assert_close(model(**right).logits, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "labels", "expected"),
    [
        ({"num_labels": 3}, torch.tensor([2, 0]), torch.nn.functional.cross_entropy),
        ({"num_labels": 1}, torch.tensor([0.5, -1.0]), lambda x, y: torch.nn.functional.mse_loss(x[:, 0], y)),
        (
            {"num_labels": 2, "problem_type": "multi_label_classification"},
            torch.tensor([[1.0, 0.0], [1.0, 1.0]]),
            torch.nn.functional.binary_cross_entropy_with_logits,
        ),
    ],
    ids=["classes", "regression", "several labels"],
)
def test_loss_is_of_the_kind_that_the_labels_ask_for(tmp_path, options, labels, expected):
    tiny_model().save_pretrained(tmp_path)
    model = load(tmp_path, **options)
    outputs = model(random_ids(), labels=labels)
    torch.testing.assert_close(outputs.loss, expected(outputs.logits, labels))
    outputs.loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_batch_needs_a_padding_token(tmp_path):
    tiny_model(pad_token_id=None).save_pretrained(tmp_path)
    model = load(tmp_path, num_labels=2)
    assert model(random_ids(1)).logits.shape == (1, 2)
    with pytest.raises(ValueError, match="padding token"):
        model(random_ids(2))


def test_trains_saves_and_reloads_with_trainer(folder, tmp_path):
    model = load(folder, num_labels=2)
    arguments = TrainingArguments(
        output_dir=tmp_path / "run",
        max_steps=30,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=examples(), eval_dataset=examples())
    trainer.train()
    predicted = trainer.predict(examples())
    assert (predicted.predictions.argmax(-1) == predicted.label_ids).mean() > 0.95
    trainer.save_model(tmp_path / "classifier")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    ids = random_ids()
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, model.eval()(ids).logits)


def test_lora_trains_the_trunk_and_keeps_the_score(tmp_path):
    tiny_model().save_pretrained(tmp_path / "language_model")
    model = load(tmp_path / "language_model", num_labels=2)
    targets = ["wte", "scale_up", "q_proj", "mlp_up"]
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=targets))
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-2)
    rows = examples()
    ids, labels = torch.stack([row["input_ids"] for row in rows]), torch.tensor([row["labels"] for row in rows])
    losses = []
    for _ in range(25):
        loss = adapted(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    adapted.eval().save_pretrained(tmp_path / "adapter")
    reloaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=2).eval()
    merged = reloaded.merge_and_unload()
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_pipeline_names_the_labels(tmp_path, tokenizer):
    labels = {0: "dull", 1: "fine"}
    config = tiny_config(vocab_size=len(tokenizer), num_labels=2, id2label=labels)
    FactorizedGPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (answer,) = pipeline("text-classification", model=str(tmp_path))("The wife of the mill")
    assert answer["label"] in labels.values()
    assert 0.5 <= answer["score"] <= 1


def test_a_compressed_models_classifier_meets_the_same_hidden_states(tmp_path):
    """Compression leaves the trunk as it was: a classifier may start from either."""
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=48, n_embd=32, n_layer=1, n_head=4)).eval()
    embedding, _ = vocabulary_matrices(stock)
    compressed = from_gpt2(stock, factorize(embedding, 31))
    compressed.save_pretrained(tmp_path)
    classifier, ids = load(tmp_path, num_labels=2), random_ids()
    with torch.no_grad():
        assert torch.equal(
            classifier.transformer(ids).last_hidden_state, compressed.transformer(ids).last_hidden_state
        )
