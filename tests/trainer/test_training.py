"""Loss and gradients of the network."""

import warnings

import pytest
import torch
from conftest import VOCAB_SIZE, checkpoint_activations, random_ids, tiny_config, tiny_model
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from factorized_gpt2 import FactorizedGPT2
from factorized_gpt2.text.loss import sum_loss
from factorized_gpt2.trainer.trainer import FactorizedTrainer


def cross_entropy_by_hand(logits, targets, divisor=None):
    """Mean over the targets that count, in float64."""
    counted = targets != -100
    log_probabilities = logits.double().log_softmax(-1)[counted]
    losses = -log_probabilities.gather(-1, targets[counted][:, None])
    return losses.sum() / (divisor or counted.sum())


def gradients(model, ids, **options):
    model.zero_grad()
    model(ids, labels=ids, **options).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_loss_is_the_cross_entropy_of_the_next_token(model, ids):
    outputs = model(ids, labels=ids)
    expected = cross_entropy_by_hand(outputs.logits[:, :-1], ids[:, 1:])
    assert outputs.loss.dtype is torch.float32
    assert outputs.loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_no_labels_no_loss(model, ids):
    assert model(ids).loss is None


def test_ignored_labels_do_not_count(model, ids):
    labels = ids.clone()
    labels[0, 2:7] = labels[1, 9] = -100
    outputs = model(ids, labels=labels)
    expected = cross_entropy_by_hand(outputs.logits[:, :-1], labels[:, 1:])
    assert outputs.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert abs(outputs.loss.item() - model(ids, labels=ids).loss.item()) > 1e-3


@pytest.mark.parametrize("count", [7, torch.tensor(123)])
def test_num_items_in_batch_divides_the_sum(model, ids, count):
    outputs = model(ids, labels=ids, num_items_in_batch=count)
    expected = cross_entropy_by_hand(outputs.logits[:, :-1], ids[:, 1:], divisor=int(count))
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_micro_batches_add_up_to_the_batch(model):
    ids = random_ids(batch=4)
    labels = ids.clone()
    labels[0, 3:] = -100  # micro-batches of unequal token counts: their means do not average to the mean
    counted = (labels[:, 1:] != -100).sum()
    parts = [model(ids[i : i + 2], labels=labels[i : i + 2], num_items_in_batch=counted).loss for i in (0, 2)]
    assert sum(parts).item() == pytest.approx(model(ids, labels=labels).loss.item(), abs=1e-5)


def test_shift_labels_replace_labels(model, ids):
    targets = torch.randint(VOCAB_SIZE, ids.shape)
    outputs = model(ids, labels=ids, shift_labels=targets)
    assert outputs.loss.item() == pytest.approx(cross_entropy_by_hand(outputs.logits, targets).item(), abs=1e-5)


def test_loss_of_a_bfloat16_model_is_float32(ids):
    outputs = tiny_model().bfloat16()(ids, labels=ids)
    assert outputs.loss.dtype is torch.float32
    expected = cross_entropy_by_hand(outputs.logits[:, :-1], ids[:, 1:])
    assert outputs.loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_loss_type_is_known_and_silent(ids, capfd):
    logging.get_logger().warning_once.cache_clear()
    model = FactorizedGPT2(tiny_config())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, labels=ids)
    assert model.loss_type == "ForCausalLM"
    assert "loss" not in capfd.readouterr().err


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_no_gradient(variant, ids, use_reentrant, dropout):
    model = tiny_model(**variant, resid_pdrop=dropout, attn_pdrop=dropout).double().train()
    torch.manual_seed(1)
    expected = gradients(model, ids)
    checkpoint_activations(model, use_reentrant=use_reentrant)
    calls = []
    hook = model.transformer.h[0].ln_1.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(1)
    actual = gradients(model, ids)
    hook.remove()
    assert len(calls) == 2  # once forward and once more backward
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-10)


def test_gradient_checkpointing_with_frozen_embeddings_trains_the_rest(ids):
    model = tiny_model().train()
    model.requires_grad_(False)
    model.transformer.h[0].attn.q_proj.requires_grad_(True)
    checkpoint_activations(model, use_reentrant=True)
    model.enable_input_require_grads()
    model(ids, labels=ids).loss.backward()
    assert model.transformer.h[0].attn.q_proj.weight.grad.abs().max() > 1e-6


def test_gradients_reach_hidden_states_and_attentions(variant, ids):
    model = tiny_model(**variant, attn_implementation="eager")
    outputs = model(ids, output_hidden_states=True, output_attentions=True)
    kept = [outputs.hidden_states[0], outputs.hidden_states[1], *outputs.attentions]
    for tensor in kept:
        tensor.retain_grad()
    outputs.logits.sum().backward()
    for tensor in kept:
        assert tensor.grad.abs().max() > 0


def test_a_tied_matrix_collects_the_gradients_of_both_its_uses(ids):
    """The gradient of the shared matrix is the sum of those of two separate, equal ones."""
    tied = tiny_model()
    untied = tiny_model(tie_word_embeddings=False)
    untied.load_state_dict(tied.state_dict())
    of_tied, of_untied = gradients(tied, ids), gradients(untied, ids)
    both_uses = of_untied["transformer.wte.weight"] + of_untied["lm_head.weight"]
    torch.testing.assert_close(of_tied["transformer.wte.weight"], both_uses, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["transformer.wte", "transformer.scale_up", "scale_down", "transformer.h.1.mlp.mlp_up"]
)
def test_gradient_is_the_slope_of_the_loss(name, ids):
    model = tiny_model().double()
    weight = model.get_submodule(name).weight
    slope = gradients(model, ids)[f"{name}.weight"]
    direction = torch.randn_like(weight)
    step = 1e-5
    losses = []
    with torch.no_grad():
        for sign in (1, -2):  # the second step leads to the other side
            weight += sign * step * direction
            logits = model(ids).logits
            losses.append(cross_entropy_by_hand(logits[:, :-1], ids[:, 1:]).item())
    measured = (losses[0] - losses[1]) / (2 * step)
    assert (slope * direction).sum().item() == pytest.approx(measured, rel=1e-4)


def test_overfits_one_batch(variant):
    model = FactorizedGPT2(tiny_config(**variant)).train()
    ids = random_ids(batch=2, length=12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    losses = []
    for _ in range(150):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 4
    assert losses[-1] < 0.1
    assert (model(ids).logits[:, :-1].argmax(-1) == ids[:, 1:]).all()


def test_every_parameter_gets_a_gradient(model, ids):
    model.train()(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        # A key's bias shifts all scores of a query alike, which softmax does not see.
        if not name.endswith("k_proj.bias"):
            assert parameter.grad.abs().max() > 1e-6, name


def test_a_head_with_a_hook():
    model, ids = tiny_model(tie_word_embeddings=False).train(), random_ids()
    model.lm_head.register_forward_hook(lambda module, args, logits: 2 * logits)
    expected = model(ids, labels=ids, skip_logits=False).loss
    assert model(ids, labels=ids).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_trainer_that_wants_logits_gets_them(model, ids):
    skipped = model.train()(ids, labels=ids)
    model.loss_backend = "logits"
    outputs = model(ids, labels=ids)
    assert skipped.logits is None
    assert outputs.logits.shape == (2, 10, VOCAB_SIZE)
    assert outputs.loss.item() == pytest.approx(skipped.loss.item(), rel=1e-5)
    assert model(ids, labels=ids, skip_logits=True).logits is None


def test_positions_to_keep(variant):
    model, ids = tiny_model(**variant).train(), random_ids()
    given = {"labels": ids, "shift_labels": ids[:, -3:].contiguous(), "logits_to_keep": 3}
    assert model(ids, **given).loss.item() == pytest.approx(model(ids, **given, skip_logits=False).loss.item())
    with pytest.raises(ValueError, match="as many labels"):
        model(ids, labels=ids[:, :5])


def test_a_checkpoint_without_tied_weights_lacks_nothing(monkeypatch):
    told = []
    monkeypatch.setattr(Trainer, "_issue_warnings_after_load", lambda self, loaded: told.append(loaded.missing_keys))
    trainer = object.__new__(FactorizedTrainer)
    for tied in (True, False):
        trainer.model = tiny_model(tie_word_embeddings=tied)
        kept = {name: value for name, value in trainer.model.state_dict().items() if name != "lm_head.weight"}
        trainer._issue_warnings_after_load(trainer.model.load_state_dict(kept, strict=False))
    assert told == [[], ["lm_head.weight"]]


def test_evaluation_texts_by_name(tmp_path):
    texts = {
        name: [{"input_ids": row} for row in random_ids(3, 12, seed).numpy()] for seed, name in enumerate(("a", "b"))
    }
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    model = tiny_model()
    metrics = FactorizedTrainer(model=model, args=args, eval_dataset=texts).evaluate()
    for name, blocks in texts.items():
        assert metrics[f"eval_{name}_loss"] == pytest.approx(sum_loss(model, blocks, 2).loss, rel=1e-6)
