"""What text says of a baseline: token frequencies, hidden states, gradients of the embedding."""

import copy

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..common.errors import UserError
from ..common.progress import Progress
from ..network.decoder_slots import vocabulary_of
from ..network.modeling_factorized_causal_lm import FactorizedCausalLM
from ..network.modeling_factorized_gpt2 import FactorizedGPT2
from ..text.blocks import IGNORED_LABEL, Blocks, batches_of, collate_blocks, some_of
from .data_aware import VocabularyUse
from .row_fit import Side

DRAWS = 8  # next tokens drawn from the model's distribution at every position
_ROWS_AT_ONCE = 512  # of logits, (rows, V)


def spread_blocks(blocks: Blocks, tokens: int) -> Blocks:
    """Choose blocks of together at least `tokens` tokens (or all there are), evenly spread over the text."""
    block_size = len(blocks[0]["input_ids"])
    count = min(len(blocks), -(-tokens // block_size))
    return some_of(blocks, np.linspace(0, len(blocks) - 1, count).astype(int).tolist())


def count_tokens(blocks: Blocks, vocab_size: int) -> np.ndarray:
    """Count every token of a text, (V,) int64."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for batch in batches_of(blocks, 1000):
        labels = batch["labels"]
        counts += torch.bincount(labels[labels != IGNORED_LABEL], minlength=vocab_size)
    return counts.numpy()


def calibrate(
    model: FactorizedGPT2 | PreTrainedModel,
    blocks: Blocks,
    token_counts: np.ndarray,
    seed: int = 0,
    device: torch.device | str = "cpu",
    desc: str | None = None,
) -> VocabularyUse:
    """Run a baseline over text, forward and backward, and keep what meets the rows of its vocabulary.

    At every position a next token is drawn from the model's own distribution, and the gradient of the summed negative
    log-likelihood of the draws taken with respect to the token embeddings: its second moment is the Fisher
    information, which is the curvature of KL(baseline || changed model) where nothing is changed yet. A text's real
    tokens would not do: their gradients also hold what the model fits badly. In float32, a block at a time; what is
    kept takes 8 d + 104 bytes a token. Of a GPT-2 there are no more than `_ROWS_AT_ONCE` rows of logits at once, of
    other decoders, which may do more to them than their head does, those of a block and their gradients.

    Args:
        model: Unfactorized, a GPT-2 or another decoder.
        blocks: Rows of `input_ids`.
        token_counts: (V,) int64, of these blocks or of all the text.
        seed: Of the draws.
        device: Where to run.
        desc: Label of the progress bar; `None` for no bar.

    Returns:
        The use of its vocabulary.

    Raises:
        UserError: The baseline computes NaN or infinity on the text.
    """
    model = _in_float32(model, device)
    head = model.get_output_embeddings().weight.detach()
    generator = torch.Generator(device).manual_seed(seed)
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in ("ids", "hidden", "gradients", "draws", "variances")}
    head_use = torch.zeros(len(head), dtype=torch.float64)
    for row in Progress(blocks, desc=desc, disable=desc is None):
        ids = collate_blocks([row])["input_ids"].to(device)
        if isinstance(model, FactorizedGPT2):
            hidden, gradients, draws, variances, heard = _read_gpt2(model, ids, generator)
        else:
            hidden, gradients, draws, variances, heard = _read_decoder(model, ids, generator)
        head_use += heard.cpu()
        values = (ids[0], hidden, gradients, draws, variances)
        for kind, value in zip(kept.values(), values, strict=True):
            kind.append(value.cpu())
    whole = {kind: torch.cat(parts).numpy() for kind, parts in kept.items()}
    positions, drawn = np.arange(len(whole["ids"])), whole["draws"].ravel()
    weights = whole["variances"].ravel() / DRAWS
    return VocabularyUse(
        token_counts=token_counts,
        input_side=Side(whole["gradients"], whole["ids"], positions, np.ones(len(positions), np.float32)),
        output_side=Side(whole["hidden"], drawn, np.repeat(positions, DRAWS), weights),
        head_use=head_use.numpy(),
    )


@torch.no_grad()
def compensated_head(
    compressed: FactorizedGPT2 | FactorizedCausalLM,
    scale_down: np.ndarray,
    blocks: Blocks,
    hidden_states: np.ndarray,
    device: torch.device | str = "cpu",
    desc: str | None = None,
) -> np.ndarray:
    """Fit `scale_down` to the hidden states that a compressed model sees, not those of the baseline.

    With h the baseline's final hidden states and h' the compressed model's on the same text, T = E[h h'^T] E[h'
    h'^T]^-1 predicts h from h' with least squared error, and (T h') takes the place of h before `scale_down`.

    Args:
        compressed: The compressed model.
        scale_down: (d, k) floats, what it has.
        blocks: Rows of `input_ids`.
        hidden_states: (N, d) float32, the baseline's final hidden states of these blocks, as `calibrate` keeps them.
        device: Where to run.
        desc: Label of the progress bar; `None` for no bar.

    Returns:
        The new `scale_down`, (d, k) float32.
    """
    trunk = _in_float32(compressed, device).get_decoder()
    width = hidden_states.shape[1]
    summed_on = "cpu" if torch.device(device).type == "mps" else device  # MPS has no float64
    own, cross = (torch.zeros(width, width, dtype=torch.float64, device=summed_on) for _ in range(2))
    done = 0
    for row in Progress(blocks, desc=desc, disable=desc is None):
        ids = collate_blocks([row])["input_ids"].to(device)
        seen = trunk(input_ids=ids, use_cache=False).last_hidden_state[0].to(summed_on).double()
        true = torch.from_numpy(hidden_states[done : done + len(seen)]).to(summed_on, torch.float64)
        done += len(seen)
        own += seen.T @ seen
        cross += seen.T @ true
    # A ridge towards T = I: where the text says too little, hidden states stay as they are.
    ridge = _COMPENSATION_RIDGE * own.trace() / width * torch.eye(width, dtype=torch.float64, device=summed_on)
    transform = torch.linalg.solve(own + ridge, cross + ridge).cpu().numpy()  # T^T, (d, d)
    return np.ascontiguousarray(transform @ scale_down, dtype=np.float32)


_COMPENSATION_RIDGE = 1e-3


Read = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Of a block: hidden states (T, d), gradients of embeddings (T, d), draws and their variances, what the head hears."""


def _read_gpt2(model: FactorizedGPT2, ids: torch.Tensor, generator: torch.Generator) -> Read:
    """Read a block (1, T), with some rows of logits at a time."""
    head, parts = model.lm_head.weight.detach(), []
    embedded = model.transformer.wte(ids).detach().requires_grad_(True)
    hidden = model.transformer(inputs_embeds=embedded, use_cache=False).last_hidden_state[0]  # [T, d]
    _check_finite(hidden)
    for rows in hidden.detach().split(_ROWS_AT_ONCE):
        *drawn, by_logits, heard = _draw(nn.functional.linear(rows, head), generator)
        parts.append((*drawn, by_logits @ head, heard.sum(0)))
    draws, variances, upstream = (torch.cat(each) for each in list(zip(*parts, strict=True))[:3])
    (gradients,) = torch.autograd.grad(hidden, embedded, upstream)
    return hidden.detach(), gradients[0], draws, variances, sum(part[3] for part in parts)


def _read_decoder(model: PreTrainedModel, ids: torch.Tensor, generator: torch.Generator) -> Read:
    """Read a block (1, T) with any decoder, whatever it does to embeddings and logits beside its two matrices."""
    embedding, head, scale = vocabulary_of(model)
    states: list[torch.Tensor] = []
    watch = head.register_forward_hook(lambda _, inputs, output: states.extend((inputs[0], output)))
    embedded = embedding(ids).detach().requires_grad_(True)
    try:
        logits = model(inputs_embeds=embedded, use_cache=False).logits
    finally:
        watch.remove()
    hidden, products = states
    _check_finite(hidden)
    # How far a logit moves with what the head computes of it: 1, unless the decoder scales or caps its logits.
    slopes = torch.ones_like(products)
    if logits is not products:
        (slopes,) = torch.autograd.grad(logits.sum(), products, retain_graph=True)
    pairs = zip(*(each.detach()[0].split(_ROWS_AT_ONCE) for each in (logits, slopes)), strict=True)
    drawn = [(*_draw(rows, generator), of_rows.square()) for rows, of_rows in pairs]
    draws, upstream = (torch.cat([each[place] for each in drawn]) for place in (0, 2))
    (gradients,) = torch.autograd.grad(logits, embedded, upstream[None])
    variances = torch.cat([variance * squares.gather(1, tokens) for tokens, variance, _, _, squares in drawn])
    heard = sum((each[3] * each[4]).sum(0) for each in drawn)
    return hidden.detach()[0], scale * gradients[0], draws, variances, heard


def _check_finite(hidden: torch.Tensor) -> None:
    if not torch.isfinite(hidden).all():
        raise UserError("The baseline computes NaN or infinity on the calibration text: its weights are too large.")


def _draw(
    logits: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw next tokens by logits (T, V).

    Returns:
        The tokens (T, DRAWS) and 1 - p of each: drawn with probability p, they add up to weights p (1 - p); the
        gradient of the first draws' negative log-likelihood with respect to the logits, (T, V); and p (1 - p) of all
        tokens, (T, V).
    """
    probabilities = logits.softmax(-1)
    drawn = torch.multinomial(probabilities, DRAWS, replacement=True, generator=generator)
    variances, heard = 1 - probabilities.gather(1, drawn), probabilities - probabilities.square()
    first = drawn[:, :1]
    return drawn, variances, probabilities.scatter_add_(1, first, -torch.ones_like(first, dtype=logits.dtype)), heard


def _in_float32(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """Return a model in float32 on a device and without dropout; a copy, unless it is so already."""
    if model.dtype != torch.float32 or model.device.type != torch.device(device).type or model.training:
        model = nn.Module.to(copy.deepcopy(model), device, torch.float32).eval()
    return model
