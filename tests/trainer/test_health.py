"""Training that goes wrong: stopped or warned of, with the step, and with nothing broken left as if it were good."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import VOCAB_SIZE, random_ids, tiny_model
from datasets import Dataset
from safetensors.torch import load_file
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from factorized_gpt2 import FactorizedGPT2
from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.cli.train import train
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.runs.run import run_experiment
from factorized_gpt2.runs.settings import parse_run
from factorized_gpt2.text.blocks import collate_blocks
from factorized_gpt2.trainer import health
from factorized_gpt2.trainer.health import DEAD_SCALE, DIVERGED_LOGS, TrainingFailure
from factorized_gpt2.trainer.trainer import FactorizedTrainer

NAN, INFINITY = float("nan"), float("inf")


class Spoil(TrainerCallback):
    """Put a value into a weight, before a step, or into its gradient, in some steps."""

    def __init__(self, value: float, steps, weight: str = "scale_down.weight", gradient: bool = False):
        self.value, self.steps, self.weight, self.gradient = value, steps, weight, gradient
        self.is_on = False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.gradient:
            model.get_parameter(self.weight).register_hook(
                lambda gradient: torch.full_like(gradient, self.value) if self.is_on else gradient
            )

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.is_on = state.global_step + 1 in self.steps
        if self.is_on and not self.gradient:
            model.get_parameter(self.weight).data.view(-1)[0] = self.value


def trainer(folder, *callbacks, scaler: torch.amp.GradScaler | None = None, **settings) -> FactorizedTrainer:
    """Make a trainer of a tiny model, evaluating and saving every second of eight steps."""
    blocks = Dataset.from_dict({"input_ids": random_ids(16, 12).tolist()})
    each_second = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    arguments = {"max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 4}
    arguments |= each_second | {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
    arguments |= {"logging_nan_inf_filter": False} | settings
    made = FactorizedTrainer(
        model=tiny_model(),
        args=TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=blocks,
        eval_dataset=blocks.select(range(3)),
        data_collator=collate_blocks,
        callbacks=list(callbacks),
    )
    made.remove_callback(PrinterCallback)
    made.accelerator.scaler = scaler
    return made


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Where to look at every step would be to wait for the device."""
    monkeypatch.setattr(health, "_is_free_to_look", lambda device: False)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def assert_all_are_finite(folder: Path) -> None:
    for name in checkpoints(folder):
        for weight in load_file(folder / name / "model.safetensors").values():
            assert torch.isfinite(weight).all(), name


@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(tmp_path, value):
    with pytest.raises(TrainingFailure) as caught:
        trainer(tmp_path, Spoil(value, {5})).train()
    assert str(caught.value) == (
        "Training went wrong at step 5: the training loss is NaN or infinite. The last good checkpoint is "
        f"{tmp_path}/checkpoint-4. The same command would come to the same end: lower learning_rate, lengthen "
        "warmup_steps or set a smaller max_grad_norm, and start anew with --overwrite."
    )
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert_all_are_finite(tmp_path)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_a_gradient_that_is_not_finite_stops_the_run_at_its_step(tmp_path, value, max_grad_norm):
    broken = trainer(tmp_path, Spoil(value, {1}, gradient=True), max_grad_norm=max_grad_norm)
    with pytest.raises(TrainingFailure, match=r"at step 1: the gradient norm .* There is no checkpoint\."):
        broken.train()
    assert checkpoints(tmp_path) == []


def test_the_filter_of_logged_losses_hides_nothing(tmp_path):
    with pytest.raises(TrainingFailure, match="at step 3: the gradient norm"):
        trainer(tmp_path, Spoil(NAN, {3}), logging_nan_inf_filter=True).train()


@pytest.mark.parametrize("step", [3, 4])
def test_on_a_gpu_nothing_broken_is_evaluated_or_saved(tmp_path, as_on_a_gpu, step):
    broken = trainer(tmp_path, Spoil(NAN, {step}), logging_steps=100)
    with pytest.raises(TrainingFailure, match=r"between steps 3 and 4: the training loss .*/checkpoint-2\. "):
        broken.train()
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    assert broken.state.best_metric is None or math.isfinite(broken.state.best_metric)


def test_on_a_gpu_a_gradient_shows_in_the_weights(tmp_path, as_on_a_gpu):
    """It came between two logged steps, and no loss came after it."""
    spoil = Spoil(INFINITY, {3}, gradient=True)
    settings = {"logging_steps": 2, "eval_strategy": "no", "save_steps": 3}
    with pytest.raises(TrainingFailure, match="at step 3: the gradient norm"):
        trainer(tmp_path, spoil, **settings).train()
    with pytest.raises(TrainingFailure, match="between steps 3 and 4: the training loss"):
        trainer(tmp_path, spoil, **settings | {"save_steps": 5}).train()
    assert checkpoints(tmp_path) == []


def test_on_a_gpu_steps_are_logged_without_being_looked_at(tmp_path, as_on_a_gpu, monkeypatch):
    looks = []
    monkeypatch.setattr(health.math, "isfinite", lambda value: looks.append(value) or True)
    trainer(tmp_path, eval_strategy="no", save_strategy="no").train()
    assert len(looks) == 2 * 2  # loss and norm of the logged steps 4 and 8


class After(TrainerCallback):
    """Do something to the model after a step."""

    def __init__(self, step: int, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.act(model)


def test_a_weight_that_nothing_uses_yet_is_not_saved(tmp_path):
    """The last position: blocks are 12 long, so that neither loss nor gradient shows it."""
    spoil = After(2, lambda model: model.transformer.wpe.weight.data[-1].fill_(NAN))
    with pytest.raises(TrainingFailure, match=r"at step 2: a trained weight is NaN .* There is no checkpoint\."):
        trainer(tmp_path, spoil, eval_strategy="no").train()
    assert checkpoints(tmp_path) == []


def test_an_evaluation_that_is_not_finite_is_no_best(tmp_path):
    """All that training saw was finite."""
    spoil = After(4, lambda model: model.register_forward_hook(_without_a_loss))
    broken = trainer(tmp_path, spoil, metric_for_best_model="eval_loss", greater_is_better=False)
    with pytest.raises(TrainingFailure, match=r"at step 4: the validation loss is nan\. .*/checkpoint-2\. "):
        broken.train()
    assert broken.state.best_global_step == 2
    assert checkpoints(tmp_path) == ["checkpoint-2"]


def _without_a_loss(module, inputs, outputs):
    outputs.loss = outputs.loss * NAN
    return outputs


def test_a_healthy_run_is_left_alone(tmp_path, caplog):
    assert trainer(tmp_path).train().global_step == 8
    assert not [record for record in caplog.records if record.name == health.__name__]
    assert checkpoints(tmp_path) == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]


def test_a_step_that_the_loss_scale_spoils_is_no_failure(tmp_path, caplog):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    skipping = Spoil(INFINITY, {2, 3, 4, 7}, gradient=True)
    assert trainer(tmp_path, skipping, scaler=scaler, logging_steps=1).train().global_step == 8
    assert scaler.get_scale() == 2.0**6
    assert not [record for record in caplog.records if record.name == health.__name__]
    assert_all_are_finite(tmp_path)


def test_a_loss_that_is_not_finite_stops_fp16_too(tmp_path):
    with pytest.raises(TrainingFailure, match="at step 3: the training loss"):
        trainer(tmp_path, Spoil(NAN, {3}), scaler=torch.amp.GradScaler("cpu")).train()


def test_a_low_loss_scale_is_warned_of_once(tmp_path, caplog):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    trainer(tmp_path, Spoil(INFINITY, {2, 3, 5, 6}, gradient=True), scaler=scaler).train()
    assert scaler.get_scale() == 0.125
    messages = [record.getMessage() for record in caplog.records if record.name == health.__name__]
    assert messages == ["Step 3: gradients overflow in float16, and the loss scale has fallen to 0.5."]


def test_a_loss_scale_at_which_nothing_is_learned_stops_the_run(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=4 * DEAD_SCALE)
    with pytest.raises(TrainingFailure) as caught:
        trainer(tmp_path, Spoil(INFINITY, range(3, 9), gradient=True), scaler=scaler).train()
    assert "at step 5: gradients overflow in float16 even at a loss scale of 7.6e-06, and steps are" in str(
        caught.value
    )
    assert "The last good checkpoint is" in str(caught.value)
    assert "train in bfloat16" in str(caught.value)


UNIFORM = math.log(VOCAB_SIZE)
BAD = UNIFORM + 0.1


@pytest.mark.parametrize(
    ("losses", "warned_at"),
    [
        ([3.0] * 5 + [BAD] * DIVERGED_LOGS, 5 + DIVERGED_LOGS),
        ([3.0] * 5 + [BAD] * (DIVERGED_LOGS - 1) + [3.0] + [BAD] * (DIVERGED_LOGS - 1), None),
        ([3.0] * 5 + [1e6] + [3.0] * 9, None),  # a spike
        ([UNIFORM + 9 - 0.5 * n for n in range(16)], None),  # a bad start that learns
        ([UNIFORM + 3] * 20, None),  # nothing learned is no divergence
        ([3.0] * 5 + [UNIFORM - 0.1] * 20, None),
        ([BAD] * 3 + [BAD + 1.1] * DIVERGED_LOGS, 3 + DIVERGED_LOGS),
        ([BAD] * 3 + [BAD + 0.9] * 20, None),
    ],
)
def test_divergence(tmp_path, caplog, losses, warned_at):
    watched = trainer(tmp_path)
    for step, loss in enumerate(losses, 1):
        watched.state.global_step = step
        watched.log({"loss": loss})
    warnings = [record.getMessage() for record in caplog.records if record.name == health.__name__]
    assert [message.split(":")[0] for message in warnings] == ([f"Step {warned_at}"] if warned_at else [])
    assert all(f"exceed {UNIFORM:.2f}" in text and f"lowest was {min(losses):.2f}" in text for text in warnings)


def test_divergence_is_seen_in_training_and_after_a_pause(tmp_path, caplog):
    """No NaN, but a model thrown far away; the run that goes on knows how low the loss was."""
    settings = {"logging_steps": 1, "eval_strategy": "no", "max_steps": 2 * DIVERGED_LOGS, "learning_rate": 1e-6}
    settings |= {"save_steps": DIVERGED_LOGS, "metric_for_best_model": None}
    throw = After(2, lambda model: model.lm_head.weight.data.mul_(30.0))
    for path in (None, str(tmp_path / f"checkpoint-{DIVERGED_LOGS}")):
        caplog.clear()
        trainer(tmp_path, throw, **settings).train(resume_from_checkpoint=path)
        assert [record.name for record in caplog.records].count(health.__name__) == 1


TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_embd_wte": 4, "block_size": 16}
RUN = {
    **{"do_train": True, "max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "logging_steps": 2},
    **{"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "disable_tqdm": True},
    **{"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "report_to": ["none"]},
}


@pytest.fixture
def words(tmp_path, corpus):
    """Return a function that makes the words of a run in `run/`."""

    def make(**settings) -> list[str]:
        texts = {f"{split}_file": [str(corpus / f"{split}.jsonl")] for split in ("train", "validation")}
        config = RUN | texts | {"tokenizer": str(corpus / "tokenizer"), "output_dir": str(tmp_path / "run")} | settings
        (tmp_path / "run.json").write_text(json.dumps(config))
        return ["--config", str(tmp_path / "run.json")]

    return make


def spoiled(monkeypatch, spoil: TrainerCallback) -> None:
    """Let every trainer be spoiled."""
    start = FactorizedTrainer.__init__

    def start_spoiled(self, *args, **kwargs):
        start(self, *args, **kwargs)
        self.add_callback(spoil)

    monkeypatch.setattr(FactorizedTrainer, "__init__", start_spoiled)


def test_a_command_that_fails_says_so_in_a_line_and_leaves_no_results(tmp_path, words, monkeypatch, capsys):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoiled(patch, Spoil(NAN, {3}))
        for _ in ("at first", "again, from the last checkpoint"):
            assert run_command(train, words(**TINY)) == 2
            error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            assert len(error) == 1
            assert (
                f"at step 3: the training loss is NaN or infinite. The last good checkpoint is {folder}/" in error[0]
            )
            assert checkpoints(folder) == ["checkpoint-2"]
            assert not (folder / "results.json").exists()
            assert not (folder / "model.safetensors").exists()
    assert run_command(train, words(**TINY)) == 0
    assert (folder / "results.json").exists()


def test_a_model_that_computes_nothing_finite_is_not_measured(tmp_path, words, tokenizer):
    start = tiny_model(vocab_size=len(tokenizer), n_embd_wte=4)
    start.transformer.wpe.weight.data.fill_(1e30)
    start.transformer.ln_f.weight.data.fill_(1e38)
    start.save_pretrained(tmp_path / "start")
    off = {"do_train": False, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    run = parse_run(words(compressed=str(tmp_path / "start"), block_size=16, **off))
    with pytest.raises(UserError, match=r"The model that the run starts from has a validation loss of (nan|inf)"):
        run_experiment(run)
    assert not (tmp_path / "run/results.json").exists()


def test_a_wrong_merge_is_caught_before_a_run_counts_as_finished(tmp_path, words, monkeypatch, tokenizer):
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "start")

    def merge_wrongly(adapted) -> FactorizedGPT2:
        merged = adapted.merge_and_unload()
        merged.transformer.h[1].mlp.mlp_up.weight.data[5] += 0.01
        return merged

    lora = {"compressed": str(tmp_path / "start"), "lora_rank": 2, "block_size": 16, "max_steps": 2}
    run = parse_run(words(**lora))
    with monkeypatch.context() as patch:
        patch.setattr("factorized_gpt2.runs.run.merge", merge_wrongly)
        with pytest.raises(RuntimeError, match=r"saved for .*run does not equal the model in memory: logits differ"):
            run_experiment(run)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"checkpoint-2", "adapter", "run.json"}
    assert not names & {"results.json", "model.safetensors", "config.json"}
    assert not [name for name in names if name.startswith(".")]
    assert run_experiment(run).best_step == 2
