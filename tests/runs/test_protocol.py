"""What the protocol says of training, read off Trainers that are running."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from factorized_gpt2.runs.run import FactorizedTrainer, run_experiment
from factorized_gpt2.runs.settings import parse_run

SMALL = ["--block_size", "16", "--report_to", "none", "--logging_steps", "1", "--disable_tqdm", "True"]
# steps, warm-up, learning rate, its end, weight decay
FIGURES = {"lowrank_scratch_k64": (10_000, 500, 1e-4, 5e-6, 0.1), "pca_lora_k64": (5_000, 100, 5e-5, 1e-6, 0.01)}


class Observer(TrainerCallback):
    """Takes down what a Trainer works with, and stops it after two steps."""

    def __init__(self, trainer: FactorizedTrainer):
        self.trainer, self.clipped_at = trainer, []
        clip = trainer.accelerator.clip_grad_norm_

        def note(parameters, max_norm, *args, **kwargs):
            self.clipped_at.append(max_norm)
            return clip(parameters, max_norm, *args, **kwargs)

        trainer.accelerator.clip_grad_norm_ = note

    def on_step_end(self, args, state, control, model, optimizer, lr_scheduler, **kwargs):
        control.should_training_stop = state.global_step == 2
        if state.global_step > 1:
            return
        modules, weights = dict(model.named_modules()), dict(model.named_parameters())
        self.args, self.max_steps = args, state.max_steps
        self.dropouts = {name: module.p for name, module in modules.items() if isinstance(module, nn.Dropout)}
        self.attention_dropout = model.config.attn_pdrop
        self.resting = [name for name, module in modules.items() if not module.training]
        self.names = {id(weight): name for name, weight in weights.items()}
        self.trained = {name: weight.ndim for name, weight in weights.items() if weight.requires_grad}
        self.optimizer = optimizer.optimizer
        self.rate_at = lambda step: lr_scheduler.base_lrs[0] * lr_scheduler.lr_lambdas[0](step)


@pytest.fixture(scope="module")
def observed(tmp_path_factory, corpus):
    """Run the protocol's configs on a tiny network, its figures being what they are."""
    root = tmp_path_factory.mktemp("protocol")
    texts = ["--train_file", str(corpus / "train.jsonl"), "--validation_file", str(corpus / "validation.jsonl")]
    texts += ["--tokenizer", str(corpus / "tokenizer")]
    shape = ["--n_layer", "2", "--n_head", "2", "--n_embd", "24"]
    start, observers = FactorizedTrainer.__init__, {}

    def run(name: str, *words: str) -> None:
        def start_observed(self, *args, **kwargs):
            start(self, *args, **kwargs)
            observers[name] = Observer(self)
            self.add_callback(observers[name])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FactorizedTrainer, "__init__", start_observed)
            output_dir = ["--output_dir", str(root / name)]
            run_experiment(parse_run(["--config", name, *SMALL, *texts, *output_dir, *words]))

    run("baseline", *shape)
    run("lowrank_scratch_k64", *shape, "--n_embd_wte", "6")
    run("pca_lora_k64", "--n_embd_wte", "6", "--baseline", str(root / "baseline"))
    return observers


@pytest.fixture(params=FIGURES)
def name(request) -> str:
    return request.param


def test_schedule(observed, name):
    """Linear to the learning rate in the warm-up, then half a cosine to its end at the last step."""
    steps, warmup, rate, end, _ = FIGURES[name]
    seen = observed[name]
    assert seen.max_steps == steps
    for step in (0, 1, warmup // 2, warmup):
        assert seen.rate_at(step) == pytest.approx(rate * step / warmup, rel=1e-6)
    for step in (warmup, warmup + 1, (warmup + steps) // 2, steps - 1, steps):
        share = (step - warmup) / (steps - warmup)
        expected = end + (rate - end) * (1 + math.cos(math.pi * share)) / 2
        assert seen.rate_at(step) == pytest.approx(expected, rel=1e-4), step
    logged = [row["learning_rate"] for row in seen.trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx([0.0, rate / warmup], rel=1e-6)


def test_optimizer_and_what_decays(observed, name):
    """Matrices decay, biases and norms do not; every trained weight is in one group."""
    *_, rate, _, decay = FIGURES[name]
    seen = observed[name]
    assert type(seen.optimizer) is torch.optim.AdamW
    groups = {group["weight_decay"]: group for group in seen.optimizer.param_groups}
    assert len(groups) == len(seen.optimizer.param_groups) == 2
    for group in groups.values():
        assert (group["betas"], group["initial_lr"], group["eps"]) == ((0.9, 0.95), rate, 1e-8)
    decaying, staying = ({seen.names[id(weight)] for weight in groups[key]["params"]} for key in (decay, 0.0))
    assert decaying == {name for name, dimensions in seen.trained.items() if dimensions > 1}
    assert staying == {name for name, dimensions in seen.trained.items() if dimensions == 1}


def test_clipping_and_batch(observed, name):
    seen = observed[name]
    assert seen.clipped_at == [1.0, 1.0]
    assert (seen.args.train_batch_size, seen.args.gradient_accumulation_steps) == (4, 4)
    assert seen.trainer.state.num_input_tokens_seen == 0  # counted by steps, without a wait in each
    assert seen.trainer.state.train_batch_size == 4


def test_dropout(observed, name):
    seen = observed[name]
    assert seen.resting == []
    assert set(seen.dropouts.values()) == {0.1}
    assert seen.attention_dropout == 0.1
    of_adapters = [module for module in seen.dropouts if "lora_dropout" in module]
    assert bool(of_adapters) == (name == "pca_lora_k64")
    plain = set(seen.dropouts) - set(of_adapters)
    assert len(plain) >= 1 + 2 * 2  # after the embedding, and twice a block


def test_no_dropout_where_nothing_trains(observed):
    model = observed["lowrank_scratch_k64"].trainer.model.eval()
    ids = torch.arange(2, 12)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids, skip_logits=False).logits, model(ids, skip_logits=False).logits)


def test_the_best_weights_are_kept(observed, name):
    seen = observed[name]
    assert seen.args.load_best_model_at_end
    assert (seen.args.metric_for_best_model, seen.args.greater_is_better) == ("eval_loss", False)
    assert Path(seen.args.output_dir, "model.safetensors").exists()
