"""Refinement: a baseline's small vocabulary alone, trained for a few steps to match the baseline's predictions."""

import copy
import logging
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..common.errors import UserError
from ..network.modeling_factorized_causal_lm import FactorizedCausalLM
from ..network.modeling_factorized_gpt2 import FactorizedGPT2
from ..text.blocks import Blocks
from .calibration import spread_blocks
from .original import Original
from .vocabulary_refinement import Teacher, TrainableVocabulary, refine_vocabulary

HELD_OUT = 16  # one of so many blocks decides whether what was refined is kept
LARGEST_LEARNING_RATE = 3e-3
_FAR = 0.25  # divergence of a start, in nats a token, from which on factors learn at the largest rate

logger = logging.getLogger(__name__)


def refine(
    model: FactorizedGPT2 | FactorizedCausalLM,
    baseline: PreTrainedModel,
    blocks: Blocks,
    steps: int,
    seed: int = 0,
    progress: bool = False,
    device: torch.device | str = "cpu",
) -> FactorizedGPT2 | FactorizedCausalLM:
    """Train `wte`, `scale_up`, `scale_down` (and an untied `lm_head`) on KL(baseline || model); the trunk is frozen.

    Args:
        model: Factorized, of floats. It is not changed.
        baseline: The model that it was made of.
        blocks: As in `refine_against`, as are all that follow.
        steps: How many.
        seed: Of the order of the blocks.
        progress: Whether to show a bar.
        device: Where to train.

    Returns:
        The refined model, in evaluation mode, in the dtype and on the device of `model`.

    Raises:
        UserError: As `refine_against`.
    """
    vocabulary = RefinableFactors(model)
    refine_against(baseline, vocabulary, blocks, steps, seed, progress, device)
    refined = copy.deepcopy(model)
    for name, module in _vocabulary_modules(refined).items():
        module.load_state_dict(vocabulary.get_submodule(name).state_dict())
    return refined.eval()


def refine_against(
    baseline: PreTrainedModel,
    vocabulary: TrainableVocabulary,
    blocks: Blocks,
    steps: int,
    seed: int = 0,
    progress: bool = False,
    device: torch.device | str = "cpu",
) -> None:
    """Train a vocabulary in place, to predict with its baseline's trunk what the baseline predicts.

    Both compute in float32: half precision alone moves a teacher by as much as a good start is away from it.

    Args:
        baseline: Unfactorized, a GPT-2 or another decoder. It is not changed.
        vocabulary: In the place of the baseline's own; it is on `device` afterwards.
        blocks: Text to match on, rows of `input_ids`; used more than once if it is too short. One block of `HELD_OUT`
            is kept back, to tell whether the result is nearer to the baseline; if it is not, that is warned of, and
            the vocabulary is what it was.
        steps: How many.
        seed: Of the order of the blocks.
        progress: Whether to show a bar.
        device: Where to train.

    Raises:
        UserError: Text of one block; NaN or infinity on the way; a baseline that `Original` refuses.
    """
    tokens = steps * vocabulary.tokens_per_step
    blocks = spread_blocks(blocks, tokens + tokens // HELD_OUT)
    if len(blocks) < 2:
        raise UserError("The calibration text is one block; refinement needs one more, to be judged by.")
    rows = [torch.as_tensor(blocks[number]["input_ids"], dtype=torch.int64) for number in range(len(blocks))]
    original = Original(baseline, device)
    embedding = None if original.embedding is original.head else original.embedding
    text = Teacher(original.head, torch.stack(rows).to(device), embedding=embedding, finish=original.finish)
    is_held_out = torch.arange(len(rows)) % HELD_OUT == min(HELD_OUT, len(rows)) - 1
    before, after = refine_vocabulary(
        vocabulary.to(device), original.trunk, text[~is_held_out], text[is_held_out], steps, seed, progress
    )
    if after < before:
        logger.info("Refinement: the divergence from the baseline falls from %.3g to %.3g nats.", before, after)
    else:
        logger.warning(
            "Refinement for %d steps did not come nearer to the baseline than %.3g nats a token, over %d tokens of "
            "its text, and was taken back. Give it more text, or other steps.",
            *(steps, before, int(is_held_out.sum()) * len(rows[0])),
        )


class RefinableFactors(TrainableVocabulary):
    """The factors of a model, all of them trainable.

    The divergence is quadratic in the distance of the weights, so the learning rate goes with the root of the start's
    divergence, up to `LARGEST_LEARNING_RATE`: a good start takes small steps, and keeps what it has.

    Args:
        model: Factorized, of floats. It is not changed.
    """

    tokens_per_step = 2048

    def __init__(self, model: FactorizedGPT2 | FactorizedCausalLM):
        super().__init__()
        self._dtype = model.dtype
        copies = copy.deepcopy(_vocabulary_modules(model))  # at once, so that what is tied stays tied
        self.wte, self.scale_up, self.scale_down = (copies[name] for name in ("wte", "scale_up", "scale_down"))
        self.lm_head = cast(nn.Linear, copies["lm_head"])
        self.to(torch.float32)
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        if self.lm_head.bias is not None:
            self.lm_head.bias.requires_grad_(False)  # it is the baseline's, which adds it to what is scored

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Look tokens (B, T) up: (B, T, d)."""
        return self.scale_up(self.wte(ids))

    def score(self, states: torch.Tensor) -> torch.Tensor:
        """Compute products (n, V) of states (n, d) with the head's matrix."""
        return nn.functional.linear(self.scale_down(states), self.lm_head.weight)

    def parameter_groups(self, divergence: float) -> list[dict]:
        """Return parameters with their largest learning rates, as an optimizer takes them."""
        rate = LARGEST_LEARNING_RATE * min(1.0, divergence / _FAR) ** 0.5
        return [{"params": [each for each in self.parameters() if each.requires_grad], "lr": rate, "eps": 1e-8}]

    @torch.no_grad()
    def round(self) -> None:
        """Round parameters to the model's dtype."""
        for parameter in self.parameters():
            parameter.copy_(parameter.to(self._dtype))


def _vocabulary_modules(model: FactorizedGPT2 | FactorizedCausalLM) -> dict[str, nn.Module]:
    inside = model.transformer if isinstance(model, FactorizedGPT2) else model
    return {
        "wte": inside.wte,
        "scale_up": inside.scale_up,
        "scale_down": model.scale_down,
        "lm_head": model.lm_head,
    }
