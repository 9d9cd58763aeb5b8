"""Any causal language model of transformers: its vocabulary matrix, how text uses it, and what text costs with it."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from factorized_gpt2.common.errors import UserError
from factorized_gpt2.common.progress import Progress
from factorized_gpt2.compress.data_aware import VocabularyUse
from factorized_gpt2.compress.row_fit import Side
from factorized_gpt2.compress.vocabulary_refinement import Trunk
from factorized_gpt2.trainer.distillation import divergence_rows

DRAWS = 8  # next tokens drawn from the model's distribution at every position
_ROWS_AT_ONCE = 256  # of logits, (rows, V)


class TiedModel:
    """A causal model whose head is its token embedding, both replaceable by other numbers.

    Args:
        model: Of any class of transformers, in float32, on the CPU; its vocabulary matrix is tied.

    Raises:
        UserError: The head is a matrix of its own, or has a bias.
    """

    def __init__(self, model: nn.Module):
        self.model = model.eval().requires_grad_(False)
        self._embedding, self._head = model.get_input_embeddings(), model.get_output_embeddings()
        if self._head is None or self._head.weight is not self._embedding.weight:
            raise UserError(f"{type(model).__name__} has a head of its own; only tied vocabularies are compared.")
        if getattr(self._head, "bias", None) is not None:
            raise UserError(f"The head of {type(model).__name__} has a bias; only heads without are compared.")
        self._trunk = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        self.original = self._embedding.weight.detach().clone()

    @property
    def table(self) -> np.ndarray:
        """The original vocabulary matrix, (V, d) float32; read it only."""
        return self.original.numpy()

    def trunk(self, dtype: torch.dtype) -> Trunk:
        """Return what makes final hidden states of embeddings, in another precision; float32 in and out."""
        network = copy.deepcopy(self._trunk).to(dtype)

        def run(embedded: torch.Tensor) -> torch.Tensor:
            return network(inputs_embeds=embedded.to(dtype), use_cache=False).last_hidden_state.float()

        return run

    def use_table(self, table: np.ndarray) -> None:
        """Look tokens up in another matrix, (V, d) floats."""
        self._embedding.weight.data.copy_(torch.from_numpy(np.ascontiguousarray(table, dtype=np.float32)))

    @torch.no_grad()
    def hidden_states(self, blocks: torch.Tensor, desc: str | None = None) -> torch.Tensor:
        """Compute final hidden states, what the head is given, of blocks of token ids (n, T): (n, T, d)."""
        rows = Progress(blocks, desc=desc, disable=desc is None)
        return torch.cat([self._trunk(input_ids=row[None], use_cache=False).last_hidden_state for row in rows])

    def calibrate(self, blocks: torch.Tensor, seed: int = 0, desc: str | None = None) -> "Calibration":
        """Run over text, forward and backward, as `factorized_gpt2.compress.calibration.calibrate` does for a GPT-2.

        Args:
            blocks: (n, T) int64 token ids.
            seed: Of the draws.
            desc: Label of the progress bar; `None` for no bar.

        Returns:
            What met the rows of the matrix.
        """
        generator = torch.Generator().manual_seed(seed)
        kept = {name: [] for name in ("ids", "hidden", "gradients", "draws", "variances", "certainties")}
        head_use = torch.zeros(len(self.original), dtype=torch.float64)
        for row in Progress(blocks, desc=desc, disable=desc is None):
            embedded = self._embedding(row[None]).detach().requires_grad_(True)
            hidden = self._trunk(inputs_embeds=embedded, use_cache=False).last_hidden_state
            parts = list(self._draw(hidden.detach()[0], generator, head_use))
            draws, variances, upstream, certainties = (torch.cat(part) for part in zip(*parts, strict=True))
            (gradients,) = torch.autograd.grad(hidden, embedded, upstream[None])
            values = (row, hidden.detach()[0], gradients[0], draws, variances, certainties)
            for kind, value in zip(kept.values(), values, strict=True):
                kind.append(value)
        return Calibration(*(torch.cat(parts).numpy() for parts in kept.values()), head_use.numpy())

    def _draw(
        self, hidden: torch.Tensor, generator: torch.Generator, head_use: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        for rows in hidden.split(_ROWS_AT_ONCE):
            probabilities = nn.functional.linear(rows, self.original).softmax(-1)
            drawn = torch.multinomial(probabilities, DRAWS, replacement=True, generator=generator)
            certainties = probabilities.square().sum(1)
            head_use += (probabilities.sum(0) - probabilities.square().sum(0)).double()
            upstream = probabilities @ self.original - self.original[drawn[:, 0]]
            yield drawn, 1 - probabilities.gather(1, drawn), upstream, certainties


@dataclass(frozen=True)
class Calibration:
    """What met the rows of a vocabulary matrix on N tokens of text.

    Attributes:
        ids: (N,) int64, the text.
        hidden: (N, d) float32, final hidden states.
        gradients: (N, d) float32, of one drawn next token's negative log-likelihood, for the embedding of each token.
        draws: (N, DRAWS) int64, next tokens drawn.
        variances: (N, DRAWS) float32, 1 - p of each draw.
        certainties: (N,) float32, the sum of squared probabilities at each position.
        head_use: (V,) float64, the sum of p (1 - p) over positions: how much the head hears of each token.
    """

    ids: np.ndarray
    hidden: np.ndarray
    gradients: np.ndarray
    draws: np.ndarray
    variances: np.ndarray
    certainties: np.ndarray
    head_use: np.ndarray

    def use(self, token_counts: np.ndarray) -> VocabularyUse:
        """Return it as the package's methods take it, with counts (V,) int64 of these tokens or of all the text."""
        positions = np.arange(len(self.ids))
        return VocabularyUse(
            token_counts=token_counts,
            input_side=Side(self.gradients, self.ids, positions, np.ones(len(self.ids), np.float32)),
            output_side=Side(
                self.hidden, self.draws.ravel(), np.repeat(positions, DRAWS), self.variances.ravel() / DRAWS
            ),
            head_use=self.head_use,
        )


@torch.no_grad()
def token_losses(
    hidden: torch.Tensor, head: torch.Tensor, blocks: torch.Tensor, bias: torch.Tensor | None = None
) -> np.ndarray:
    """Compute the negative log-likelihood of every token but the first of its block, in nats.

    Args:
        hidden: (n, T, d) floats, final hidden states.
        head: (V, d), of the same dtype.
        blocks: (n, T) int64, token ids.
        bias: (V,), added to the logits.

    Returns:
        (n (T - 1),) float32.
    """
    inputs, labels = hidden[:, :-1].flatten(0, 1), blocks[:, 1:].flatten()
    losses = [
        nn.functional.cross_entropy(nn.functional.linear(rows, head, bias).float(), targets, reduction="none")
        for rows, targets in zip(inputs.split(_ROWS_AT_ONCE), labels.split(_ROWS_AT_ONCE), strict=True)
    ]
    return torch.cat(losses).numpy()


@torch.no_grad()
def divergence(
    hidden: torch.Tensor,
    head: torch.Tensor,
    original_hidden: torch.Tensor,
    original_head: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> float:
    """Compute KL(original || changed), the mean over all positions but the last of their block, in nats.

    Args:
        hidden: (n, T, d) floats, final hidden states of the changed model.
        head: (V, d), of the same dtype.
        original_hidden: As `hidden`.
        original_head: As `head`.
        bias: (V,), added to the changed model's logits.
    """
    pairs = ((states[:, :-1].flatten(0, 1).split(_ROWS_AT_ONCE)) for states in (hidden, original_hidden))
    nats = [
        divergence_rows(nn.functional.linear(changed, head, bias).float(), original @ original_head.T)[0].sum()
        for changed, original in zip(*pairs, strict=True)
    ]
    return float(sum(nats)) / (len(hidden) * (hidden.shape[1] - 1))
