"""Parameters and bytes of a model, and its vocabulary's share of them."""

from dataclasses import dataclass
from pathlib import Path

from transformers import GPT2Config, PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ModelSize:
    """Parameters and bytes of a model, shared weights counted once.

    Attributes:
        parameters: All parameters.
        vocabulary_parameters: Those of token embedding, scale matrices and head.
        bytes: Bytes of all parameters in their dtype.
        vocabulary_bytes: Bytes of the vocabulary's.
    """

    parameters: int
    vocabulary_parameters: int
    bytes: int
    vocabulary_bytes: int


_VOCABULARY_MODULES = ("wte.", "scale_up.", "scale_down.", "lm_head.")


def is_vocabulary(name: str) -> bool:
    """Tell whether a parameter, by its name, belongs to the token embedding, the scale matrices or the head."""
    return name.removeprefix("transformer.").startswith(_VOCABULARY_MODULES)


def vocabulary_width(config: PretrainedConfig) -> int:
    """Say how wide a decoder's token embedding is, before a factorization."""
    return getattr(config, "word_embed_proj_dim", None) or config.hidden_size


def model_size(model: PreTrainedModel) -> ModelSize:
    """Count a model's parameters and bytes, and the vocabulary's share of them."""
    named = list(model.named_parameters())
    ends = filter(None, (model.get_input_embeddings(), model.get_output_embeddings()))
    of_ends = {id(weight) for end in ends for weight in end.parameters()}
    vocabulary = [weight for name, weight in named if id(weight) in of_ends or is_vocabulary(name)]
    weights = [weight for _, weight in named]
    return ModelSize(
        parameters=sum(weight.numel() for weight in weights),
        vocabulary_parameters=sum(weight.numel() for weight in vocabulary),
        bytes=sum(weight.numel() * weight.element_size() for weight in weights),
        vocabulary_bytes=sum(weight.numel() * weight.element_size() for weight in vocabulary),
    )


def stored_bytes(folder: Path) -> int:
    """Count the bytes of the files of weights in a model's folder."""
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))


def least_parameters(config: GPT2Config) -> int:
    """Count the parameters that a configuration asks for, biases and norms left out, without making the model.

    Those of a vocabulary of integers, which may take less than a byte each in a file, are left out too.
    """
    width = config.n_embd
    vocabulary_width = 0 if getattr(config, "is_coded", False) else getattr(config, "embedding_size", width)
    per_layer = 4 * width**2 + 2 * width * (config.n_inner or 4 * width)
    return config.vocab_size * vocabulary_width + config.n_positions * width + config.n_layer * per_layer
