"""Configuration of a GPT-2 whose token embedding and head are factorized."""

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


@strict
class FactorizedGPT2Config(GPT2Config):
    """Everything a [`GPT2Config`] holds, plus the rank of the vocabulary factorization.

    The fields of `GPT2Config` mean what they mean for `GPT2LMHeadModel`. The `summary_*` fields configure the
    double-heads model only; they are kept, so that a conversion back to GPT-2 loses nothing. Cross-attention is
    refused: the model is a decoder without an encoder.

    Args:
        n_embd_wte: Rank k of the token embedding, 1 <= k <= `n_embd`. `None` or `n_embd`: not factorized, there are
            no scale matrices and the model is GPT-2. Below `n_embd`: `wte` is (V, k) and two matrices, `scale_up`
            (k, d) and `scale_down` (d, k), lead to and from the hidden states.
        scale_up_bias: Whether `scale_up` carries a bias (d,). A principal component analysis centres the embedding:
            the mean it takes away comes back here. Without effect when the model is not factorized.
        vocabulary_dtype: `None`: the vocabulary's matrices are floats. "int8": embedding and head share one table of
            integers with a step a row, k wide, and there are scale matrices whatever k is, which may exceed `n_embd`.
        lm_head_bias: Whether the head adds a number a token, (V,).

    Raises:
        huggingface_hub.errors.StrictDataclassError: When a field has the wrong type or value; the message names it.

    Example:
        >>> FactorizedGPT2Config(n_embd_wte=64).is_factorized
        True
    """

    model_type = "factorized_gpt2"

    n_embd_wte: int | None = None
    scale_up_bias: bool = True
    vocabulary_dtype: str | None = None
    lm_head_bias: bool = False

    @property
    def is_factorized(self) -> bool:
        """Whether there are scale matrices: the token embedding is narrower than the hidden states, or of integers."""
        return self.is_coded or (self.n_embd_wte is not None and self.n_embd_wte < self.n_embd)

    @property
    def is_coded(self) -> bool:
        """Whether the vocabulary is of integers."""
        return self.vocabulary_dtype is not None

    @property
    def embedding_size(self) -> int:
        """Width of `wte`, of the head's input and of `inputs_embeds`: k when factorized, else d."""
        return self.n_embd_wte if self.is_factorized else self.n_embd

    def validate_architecture(self) -> None:
        """Refuse what the network cannot honour; called whenever a config is made or saved."""
        if self.vocabulary_dtype not in (None, "int8"):
            raise ValueError(f'vocabulary_dtype must be "int8", or None for floats; got {self.vocabulary_dtype!r}.')
        if self.is_coded:
            if self.n_embd_wte is None or self.n_embd_wte < 1:
                raise ValueError(f"An integer vocabulary needs n_embd_wte, of 1 or more; got {self.n_embd_wte}.")
            if not (self.tie_word_embeddings and self.scale_up_bias):
                raise ValueError("An integer vocabulary needs tie_word_embeddings and scale_up_bias.")
        elif self.n_embd_wte is not None and not 1 <= self.n_embd_wte <= self.n_embd:
            raise ValueError(
                f"n_embd_wte must lie between 1 and n_embd ({self.n_embd}), or be None for an unfactorized model; "
                f"got {self.n_embd_wte}."
            )
        if self.n_head < 1 or self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head}).")
        if self.add_cross_attention:
            raise ValueError("add_cross_attention=True is not supported: FactorizedGPT2 is a decoder-only model.")


# `Trainer` shifts labels that it smooths for the models in this table alone, though others can be registered.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[FactorizedGPT2Config.model_type] = "FactorizedGPT2"

__all__ = ["FactorizedGPT2Config"]
