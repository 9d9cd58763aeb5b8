"""Configuration of any causal decoder whose token embedding and head are factorized."""

from typing import Any, cast

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


@strict
class FactorizedCausalLMConfig(PreTrainedConfig):
    """The configuration of a decoder, and what stands in the place of its vocabulary's matrices.

    Fields that are not here are those of `base_config`, to read and to set: `config.hidden_size` is
    `config.base_config.hidden_size`.

    Args:
        base_config: Of a causal language model of transformers, or a dict of its fields with its `model_type`.
        n_embd_wte: Rank k: `wte` is (V, k), `scale_up` (k, d) and `scale_down` (d, k) lead to and from the decoder.
        vocabulary_dtype: `None`: the vocabulary's matrices are floats. "int8": embedding and head share one table of
            integers with a step a row.
        scale_up_bias: Whether `scale_up` carries a bias (d,), the mean that a factorization takes away.
        lm_head_bias: Whether the head adds a number a token, (V,).
        tie_word_embeddings: Whether the head shares the matrix of `wte`; whatever `base_config` says.

    Raises:
        huggingface_hub.errors.StrictDataclassError: When a field has the wrong type or value; the message names it.
    """

    model_type = "factorized_causal_lm"
    sub_configs = {"base_config": AutoConfig}
    has_no_defaults_at_init = True

    base_config: dict | PreTrainedConfig | None = None
    n_embd_wte: int | None = None
    vocabulary_dtype: str | None = None
    scale_up_bias: bool = True
    lm_head_bias: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any):
        if isinstance(self.base_config, dict):
            kind = self.base_config.get("model_type")
            if kind not in CONFIG_MAPPING or kind == self.model_type:
                raise ValueError(f"base_config has model_type {kind!r}, which transformers does not know.")
            self.base_config = CONFIG_MAPPING[kind](**self.base_config)
        super().__post_init__(**kwargs)

    def __getattr__(self, name: str):
        base = self.__dict__.get("base_config")
        if name.startswith("_") or base is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")
        return getattr(base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("base_config")
        is_own = name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        if not is_own and isinstance(base, PreTrainedConfig) and hasattr(base, name):
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    def get_text_config(self, *_: Any, **__: Any) -> PreTrainedConfig:
        """Return the configuration of the decoder, which caches and the vocabulary's size are made by."""
        return cast(PreTrainedConfig, self.base_config)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, without the place where the decoder's own config was found, which may be a local path."""
        fields = super().to_dict()
        if isinstance(fields.get("base_config"), dict):
            fields["base_config"].pop("_name_or_path", None)
        return fields

    @property
    def is_coded(self) -> bool:
        """Whether the vocabulary is of integers."""
        return self.vocabulary_dtype is not None

    @property
    def is_factorized(self) -> bool:
        """As for `FactorizedGPT2Config`; there are always scale matrices."""
        return True

    def validate_architecture(self) -> None:
        """Refuse what the network cannot honour; called whenever a config is made or saved."""
        if not isinstance(self.base_config, PreTrainedConfig):
            raise ValueError("A factorized model needs base_config, the configuration of the model it is made of.")
        if self.n_embd_wte is None or self.n_embd_wte < 1:
            raise ValueError(f"A factorized model needs n_embd_wte, of 1 or more; got {self.n_embd_wte}.")
        if self.vocabulary_dtype not in (None, "int8"):
            raise ValueError(f'vocabulary_dtype must be "int8", or None for floats; got {self.vocabulary_dtype!r}.')
        if self.is_coded and not (self.tie_word_embeddings and self.scale_up_bias):
            raise ValueError("An integer vocabulary needs tie_word_embeddings and scale_up_bias.")


# `Trainer` shifts labels that it smooths for the models in this table alone, though others can be registered.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[FactorizedCausalLMConfig.model_type] = "FactorizedCausalLM"

__all__ = ["FactorizedCausalLMConfig"]
