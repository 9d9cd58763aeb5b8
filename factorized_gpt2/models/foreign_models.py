"""Causal language models of any architecture, as `evaluation` measures them: their loss is summed from logits."""

import inspect

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from ..common.errors import UserError, first_line
from ..network.modeling_factorized_causal_lm import FactorizedCausalLM
from ..network.modeling_factorized_gpt2 import FactorizedGPT2
from ..text.blocks import IGNORED_LABEL

_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "context_length")
_ROWS_AT_ONCE = 512  # of logits, in float32
_LOOKED_AT = 8  # positions before a changed token
_ROUNDING = 0.65  # power of a dtype's epsilon, in standard deviations of logits: far above what kernels differ by


def positions_of(config: PretrainedConfig) -> int | None:
    """Return how many tokens a model reads at once, as its configuration says; `None` where it says nothing."""
    lengths = (getattr(config.get_text_config(), name, None) for name in _LENGTHS)
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


def measurable(model: PreTrainedModel) -> nn.Module:
    """Return what `sum_loss` takes for a model: one of this package itself, any other as its logits."""
    return model if isinstance(model, FactorizedGPT2 | FactorizedCausalLM) else LossOfLogits(model)


class LossOfLogits(nn.Module):
    """A causal language model whose loss is computed from its logits, whatever its own loss would be.

    Some models ignore `num_items_in_batch`, some shift no labels: their own losses are no sums over tokens.

    Args:
        model: Maps `input_ids` (B, T) to `logits` (B, T, V).
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.train(model.training)
        takes_cache = "use_cache" in inspect.signature(model.forward).parameters
        self._options = {"use_cache": False} if takes_cache else {}

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Compute the logits (B, T, V) of tokens (B, T)."""
        outputs = self.model(input_ids=input_ids, **self._options)
        return outputs[0] if isinstance(outputs, tuple) else outputs.logits

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, shift_labels: torch.Tensor | None = None, **_: object
    ) -> CausalLMOutput:
        """Sum the cross-entropy of the labels, in float32 some rows at a time.

        Args:
            input_ids: (B, T) int64.
            labels: (B, T) int64, not shifted. -100 is ignored.
            shift_labels: (B, T) int64, shifted already; `labels` are then not looked at.
            **_: What a model of this package takes beside them.

        Returns:
            `loss`, scalar float64 on the CPU, in nats.
        """
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
        rows = self.logits(input_ids).flatten(0, 1).split(_ROWS_AT_ONCE)
        targets = shift_labels.flatten().split(_ROWS_AT_ONCE)
        losses = [
            nn.functional.cross_entropy(logits.float(), wanted, ignore_index=IGNORED_LABEL, reduction="sum")
            for logits, wanted in zip(rows, targets, strict=True)
        ]
        return CausalLMOutput(loss=torch.stack(losses).cpu().double().sum())

    @torch.no_grad()
    def check(self, block_size: int, name: str) -> None:
        """Try the model on a block, and see that what it predicts does not depend on later tokens.

        Args:
            block_size: Tokens of the block, at least 2.
            name: What to call the model.

        Raises:
            UserError: It cannot compute logits of text alone, or of so many tokens; it looks ahead.
        """
        vocab_size = self.model.config.get_text_config().vocab_size
        ids = torch.arange(block_size, device=self.model.device)[None] % vocab_size
        changed = ids.clone()
        changed[0, -1] = (changed[0, -1] + 1) % vocab_size
        try:
            first, second = (self._last_logits(each) for each in (ids, changed))
        except (
            TypeError,
            ValueError,
            AttributeError,
            LookupError,
            AssertionError,
            RuntimeError,
            ImportError,
        ) as error:
            raise UserError(
                f"{name} cannot be evaluated in blocks of {block_size} tokens: {first_line(error)}"
            ) from error
        if (first - second).abs().max() > torch.finfo(self.model.dtype).eps ** _ROUNDING * first.std():
            raise UserError(f"{name} is not a causal language model: its predictions depend on later tokens.")

    def _last_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Compute float32 logits (n, V) of the last positions but one."""
        logits = self.logits(ids)
        if logits.shape[:2] != ids.shape:
            raise ValueError(f"it computes logits of shape {tuple(logits.shape)}, not one row for each token.")
        return logits[0, -1 - _LOOKED_AT : -1].float()
