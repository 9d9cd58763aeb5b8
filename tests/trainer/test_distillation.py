"""The divergence from a teacher: its value, its gradient, its part in the Trainer's loss."""

import json
import math

import pytest
import torch
from conftest import random_ids, tiny_model
from torch.nn import functional
from transformers import TrainingArguments

from factorized_gpt2.common.errors import UserError
from factorized_gpt2.network import blockwise_loss
from factorized_gpt2.runs.run import run_experiment
from factorized_gpt2.runs.settings import parse_run
from factorized_gpt2.text.blocks import IGNORED_LABEL
from factorized_gpt2.trainer.distillation import Distillation, divergence_rows
from factorized_gpt2.trainer.trainer import FactorizedTrainer


def plain(student, teacher, temperature):
    """The divergence of every row in PyTorch's own words, float64."""
    p, q = ((x.double() / temperature).log_softmax(-1) for x in (teacher, student))
    return functional.kl_div(q, p, reduction="none", log_target=True).sum(-1) * temperature**2


def fitting(model, ids, labels=None, weight=1.0, temperature=1.0):
    """The loss of a model with a tiny teacher, and the teacher's logits."""
    distillation = Distillation(tiny_model(n_embd_wte=None, seed=3).train(), weight, temperature)
    assert not distillation.teacher.training
    labels = ids if labels is None else labels
    value = model(ids, row_loss=distillation.row_loss(ids, labels)).loss
    return value, distillation.teacher


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("rows", [1, 7, 513])
def test_rows_of_the_divergence(rows, temperature):
    student, teacher = 3 * torch.randn(2, rows, 31)
    student.requires_grad_()
    values, gradients = divergence_rows(student.detach(), teacher, temperature)
    expected = plain(student, teacher, temperature)
    expected.sum().backward()
    assert values.shape == (rows, 1)
    torch.testing.assert_close(values[:, 0].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, student.grad, rtol=1e-4, atol=1e-5)


def test_two_tokens_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4): KL = log(2) / 2 + log(2/3) / 2; the gradient is q - p.
    values, gradients = divergence_rows(torch.tensor([[0.0, math.log(3)]]), torch.zeros(1, 2))
    assert values.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-6)
    assert gradients.tolist() == [[pytest.approx(-0.25), pytest.approx(0.25)]]


def test_a_model_is_not_apart_from_itself():
    value, _ = fitting(tiny_model(n_embd_wte=None, seed=3), random_ids())
    assert value.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("block_logits", [1, 500, 2**23])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mixed_loss_of_a_model(monkeypatch, block_logits, weight, temperature):
    monkeypatch.setitem(blockwise_loss.BLOCK_LOGITS, "cpu", block_logits)
    student, ids = tiny_model(), random_ids()
    labels = ids.clone()
    labels[1, 6:] = IGNORED_LABEL
    value, teacher = fitting(student, ids, labels, weight, temperature)
    value.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()

    logits = student(ids).logits
    apart = plain(logits, teacher(ids).logits, temperature)
    expected = weight * (apart[0, :9].sum() + apart[1, :5].sum())
    expected = expected + (1 - weight) * student.loss_function(logits, labels, 99, num_items_in_batch=1)
    expected.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)
    assert all(weight.grad is None for weight in teacher.parameters())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_the_teacher_computes_in_the_precision_of_autocast(dtype):
    """In that alone: its weights stay as they are, so that what float32 holds does not overflow on the way."""
    teacher, ids = tiny_model(n_embd_wte=None, seed=3), random_ids()
    distillation = Distillation(teacher, weight=1.0)
    logits = torch.randn(ids.numel(), 99)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        row_loss = distillation.row_loss(ids, ids)
        with torch.no_grad():
            expected, _ = divergence_rows(logits.clone(), teacher(ids).logits.flatten(0, 1))
    found, counts = row_loss(logits.clone(), slice(0, ids.numel()))
    assert torch.equal(found, expected * counts)
    assert {weight.dtype for weight in teacher.parameters()} == {torch.float32}


def test_one_process_with_several_devices_is_refused(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    args._n_gpu = 2
    distillation = Distillation(tiny_model(n_embd_wte=None), 0.5)
    with pytest.raises(UserError, match="accelerate launch"):
        FactorizedTrainer(model=tiny_model(), args=args, distillation=distillation)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory, corpus, tokenizer):
    folder = tmp_path_factory.mktemp("distillation") / "gpt_baseline"
    tiny_model(n_embd_wte=None, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def words(corpus, output_dir, *rest) -> list[str]:
    text = ["--train_file", corpus / "train.jsonl", "--validation_file", corpus / "validation.jsonl"]
    steps = ["--do_train", "True", "--max_steps", 3, "--logging_steps", 1, "--learning_rate", "1e-3"]
    quiet = [
        "--report_to",
        "none",
        "--save_strategy",
        "no",
        "--block_size",
        16,
        "--dropout",
        0,
        "--disable_tqdm",
        True,
    ]
    return [str(word) for word in [*text, *steps, *quiet, "--output_dir", output_dir, *rest]]


def first_loss(folder, tmp_path, corpus, *rest) -> float:
    run_experiment(parse_run(words(corpus, folder, *rest)))
    return json.loads((folder / "results.json").read_text())["train_loss"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_weight_mixes_the_two_losses(baseline, tmp_path, corpus, accumulation):
    start = ["--baseline", baseline, "--n_embd_wte", 6, "--lora_rank", 2, "--max_steps", 1]
    start += ["--per_device_train_batch_size", 4 // accumulation, "--gradient_accumulation_steps", accumulation]
    losses = {
        weight: first_loss(tmp_path / f"run{weight}", tmp_path, corpus, *start, "--distillation_weight", weight)
        for weight in (0, 0.25, 1)
    }
    assert losses[0.25] == pytest.approx(0.75 * losses[0] + 0.25 * losses[1], rel=1e-4)
    assert abs(losses[0] - losses[1]) > 0.1


def test_a_scratch_run_learns_from_a_named_teacher(baseline, tmp_path, corpus):
    shape = ["--n_layer", 1, "--n_head", 2, "--n_embd", 24, "--n_embd_wte", 8, "--tokenizer", corpus / "tokenizer"]
    teacher = ["--teacher", baseline, "--distillation_weight", 1, "--distillation_temperature", 2]
    results = run_experiment(parse_run(words(corpus, tmp_path / "run", *shape, *teacher)))
    assert math.isfinite(results.train_loss)
    assert results.settings["teacher"] == str(baseline)


@pytest.mark.parametrize(
    ("rest", "complaint"),
    [
        (["--distillation_weight", "0.5", "--label_smoothing_factor", "0.1"], "has no effect together with"),
        (["--distillation_weight", "1.5"], r"must lie in \[0, 1\], got 1.5"),
        (["--distillation_weight", "nan"], "must be finite, got nan"),
        (["--distillation_weight", "0.5", "--distillation_temperature", "0"], "must be positive, got 0.0"),
        (["--teacher", "somewhere"], "teacher has no effect"),
    ],
)
def test_bad_settings(baseline, tmp_path, corpus, rest, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_run(words(corpus, tmp_path / "run", "--baseline", baseline, *rest))


def test_a_scratch_run_must_name_its_teacher(tmp_path, corpus):
    with pytest.raises(UserError, match="needs a teacher"):
        parse_run(words(corpus, tmp_path, "--tokenizer", "t", "--distillation_weight", "0.5"))


@pytest.mark.parametrize(
    ("shape", "complaint"),
    [({"vocab_size": 99}, "has 99 tokens, the model 300"), ({"n_positions": 15}, "exceeds the 15 positions")],
)
def test_a_teacher_that_does_not_fit(baseline, tmp_path, corpus, tokenizer, shape, complaint):
    tiny_model(**({"vocab_size": len(tokenizer), "n_embd_wte": None} | shape)).save_pretrained(tmp_path / "teacher")
    distil = ["--teacher", tmp_path / "teacher", "--distillation_weight", 0.5]
    with pytest.raises(UserError, match=complaint):
        run_experiment(parse_run(words(corpus, tmp_path / "run", "--baseline", baseline, *distil)))
    assert not (tmp_path / "run/run.json").exists()
