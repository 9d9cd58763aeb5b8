"""Trained models whose vocabulary can be factorized, loaded with every weight accounted for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import AutoConfig, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from .configuration_factorized_gpt2 import FactorizedGPT2Config
from .conversion import fingerprint, from_gpt2
from .errors import UserError, first_line
from .modeling_factorized_gpt2 import FactorizedGPT2


@dataclass(frozen=True)
class Baseline:
    """A trained model whose vocabulary can be factorized.

    Attributes:
        model: Unfactorized, in evaluation mode.
        name: The folder or Hub id it was loaded from.
        fingerprint: SHA-256 of its weights.
    """

    model: FactorizedGPT2
    name: str
    fingerprint: str

    def check_ranks(self, ranks: Sequence[int]) -> None:
        """Refuse ranks that make the model no smaller, or none at all.

        Raises:
            UserError: Naming the rank.
        """
        width, vocab_size = self.model.config.n_embd, self.model.config.vocab_size
        for rank in ranks:
            if not 1 <= rank < min(width, vocab_size + 1):
                raise UserError(
                    f"Rank {rank} is out of range: the baseline is {width} wide and has {vocab_size} tokens, so a "
                    f"rank lies between 1 and {min(width - 1, vocab_size)}."
                )


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with tokens that a trained model does not have.

    Raises:
        UserError: With both sizes.
    """
    vocab_size = model.config.vocab_size
    if len(tokenizer) > vocab_size:
        raise UserError(f"The tokenizer has {len(tokenizer)} tokens, the baseline only {vocab_size}.")


def load_baseline(name_or_path: str) -> Baseline:
    """Load a stock GPT-2, or an unfactorized model of this package.

    Raises:
        UserError: It cannot be found or read, is of another architecture or factorized already, or has weights that
            are missing, misshapen, not accounted for, or NaN or infinite; the message names them.
    """
    model = load_complete(name_or_path)
    if isinstance(model, FactorizedGPT2) and model.config.is_factorized:
        raise UserError(f"{name_or_path} is factorized already (n_embd_wte={model.config.n_embd_wte}).")
    try:
        converted = from_gpt2(model)
    except ValueError as error:
        raise UserError(f"The weights of {name_or_path} cannot be read: {first_line(error)}") from error
    return Baseline(converted, name_or_path, fingerprint(converted))


def load_compressed(name_or_path: str) -> FactorizedGPT2:
    """Load a factorized model, such as `compress.py` makes, in evaluation mode.

    Raises:
        UserError: As `load_baseline`, but for a model that is not factorized.
    """
    model = load_complete(name_or_path)
    if not (isinstance(model, FactorizedGPT2) and model.config.is_factorized):
        raise UserError(f"{name_or_path} is not factorized; compress.py makes it so.")
    return model.eval()


def load_complete(name_or_path: str) -> GPT2LMHeadModel | FactorizedGPT2:
    """Load a model with every weight accounted for and finite.

    Raises:
        UserError: As `load_baseline`, but for what is factorized already.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # a stranger's file can be wrong in every way
        raise UserError(f"No model can be loaded from {name_or_path!r}: {first_line(error)}") from error
    if isinstance(config, FactorizedGPT2Config):
        model_class = FactorizedGPT2
    elif config.model_type == "gpt2":
        model_class = GPT2LMHeadModel
    else:
        raise UserError(f"{name_or_path} is a {config.model_type!r} model; the baseline must be a GPT-2.")
    model, loading = load_weights(model_class, name_or_path)
    problems = [f"{kind.removesuffix('_keys')} {loading[kind]}" for kind in _LOADING_PROBLEMS if loading[kind]]
    if problems:
        raise UserError(f"The weights of {name_or_path} do not make its model: {'; '.join(problems)}.")
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(f"The weight {name!r} of {name_or_path} contains NaN or infinity.")
    return model


def load_weights(model_class: type, name_or_path: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model by one of transformers' classes; no code of a stranger runs, neither a module nor a pickle.

    Returns:
        The model, and what `from_pretrained` says of its weights.

    Raises:
        UserError: It cannot be found or read, or only by running code.
    """
    try:
        return model_class.from_pretrained(name_or_path, output_loading_info=True, trust_remote_code=False)
    except UnpicklingError as error:
        raise UserError(
            f"The weights of {name_or_path} are a pickle that holds more than weights, which is not loaded because it "
            "could do anything; ask whoever made it for safetensors."
        ) from error
    except Exception as error:  # safetensors, torch and transformers each have their own kinds for a damaged file
        raise UserError(f"The weights of {name_or_path} cannot be read: {first_line(error)}") from error


_LOADING_PROBLEMS = ("missing_keys", "mismatched_keys", "unexpected_keys")
