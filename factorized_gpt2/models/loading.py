"""Trained models whose vocabulary can be factorized, loaded with every weight accounted for."""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import logging as transformers_logging
from transformers.utils import CONFIG_NAME, find_adapter_config_file

from ..common.errors import UNREADABLE, UserError, blaming, silenced
from ..common.lfs_pointers import refuse_pointers
from ..common.model_places import refuse_missing
from ..common.weight_files import weight_files
from ..network.configuration_factorized_causal_lm import FactorizedCausalLMConfig
from ..network.configuration_factorized_gpt2 import FactorizedGPT2Config
from ..network.decoder_slots import is_encoder, vocabulary_of
from ..network.modeling_factorized_causal_lm import FactorizedCausalLM
from ..network.modeling_factorized_gpt2 import FactorizedGPT2
from ..text.tokenizers import vocabulary_size
from .conversion import digest_of, fingerprint, from_gpt2
from .decoder_conversion import is_tied
from .sizes import least_parameters
from .weight_names import plain_name, some_names, wrapped_name

logger = logging.getLogger(__name__)

_PADDING = 128  # rows of a vocabulary without tokens, which many models have for the sake of speed


@dataclass(frozen=True)
class Baseline:
    """A trained model whose vocabulary can be factorized.

    Attributes:
        model: Unfactorized, in evaluation mode; any decoder but a GPT-2 as transformers has it.
        name: The folder or Hub id it was loaded from.
        fingerprint: SHA-256 of its weights.
    """

    model: FactorizedGPT2 | PreTrainedModel
    name: str
    fingerprint: str


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with tokens that a trained model does not have; warn of one that hardly belongs to it.

    Raises:
        UserError: With both sizes.
    """
    vocab_size, tokens = model.config.get_text_config().vocab_size, vocabulary_size(tokenizer)
    if tokens > vocab_size:
        raise UserError(
            f"The tokenizer has {tokens} tokens, the model only {vocab_size}: name the model's own tokenizer."
        )
    if vocab_size - tokens > _PADDING:
        logger.warning(
            "The tokenizer has %d tokens, the model %d: check that this is the model's own tokenizer.",
            tokens,
            vocab_size,
        )
    ours, named = tokenizer.eos_token_id, model.config.eos_token_id
    if ours is not None and named is not None and ours not in (named if isinstance(named, list) else [named]):
        logger.warning(
            "The tokenizer's end of text is token %d, the model's config has eos_token_id %s: documents end with the "
            "first, generated text with the second.",
            ours,
            named,
        )


def load_baseline(name_or_path: str) -> Baseline:
    """Load a stock GPT-2, an unfactorized model of this package, or any other decoder with one embedding and head.

    Raises:
        UserError: It cannot be found or read, is of another architecture or factorized already, or has weights that
            are missing, misshapen, not accounted for, or NaN or infinite; the message names them.
    """
    model = load_complete(name_or_path)
    if getattr(model.config, "is_factorized", False):
        raise UserError(f"{name_or_path} is factorized already (n_embd_wte={model.config.n_embd_wte}).")
    if not isinstance(model, GPT2LMHeadModel | FactorizedGPT2):
        with blaming(f"{name_or_path} cannot be factorized", ValueError):
            embedding, head, _ = vocabulary_of(model)
        model.config.tie_word_embeddings = is_tied(embedding, head)
        return Baseline(model.eval(), name_or_path, digest_of(model.state_dict()))
    with blaming(f"The weights of {name_or_path} cannot be read", ValueError):
        converted = from_gpt2(model)
    return Baseline(converted, name_or_path, fingerprint(converted))


def load_compressed(name_or_path: str) -> FactorizedGPT2 | FactorizedCausalLM:
    """Load a factorized model, such as `compress.py` makes, in evaluation mode.

    Raises:
        UserError: As `load_baseline`, but for a model that is not factorized.
    """
    model = load_complete(name_or_path)
    if not getattr(model.config, "is_factorized", False):
        raise UserError(f"{name_or_path} is not factorized: compress it with compress.py first.")
    return model.eval()


def load_complete(name_or_path: str) -> PreTrainedModel:
    """Load a model with every weight accounted for and finite.

    Returns:
        The model; its `name_or_path` is empty where transformers alone would load another from there.

    Raises:
        UserError: As `load_baseline`, but for what is factorized already.
    """
    config = _load_config(name_or_path)
    model_class: type
    if isinstance(config, FactorizedGPT2Config):
        model_class = FactorizedGPT2
    elif isinstance(config, FactorizedCausalLMConfig):
        model_class = FactorizedCausalLM
    elif config.model_type == "gpt2":
        model_class = GPT2LMHeadModel
    elif config.is_encoder_decoder or is_encoder(config) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{name_or_path} is a {config.model_type!r} model; a baseline is a GPT-2 or another causal decoder with "
            "one token embedding and one linear head."
        )
    else:
        model_class = AutoModelForCausalLM
    refused = ("missing_keys", "mismatched_keys", "unexpected_keys")
    model = _load(model_class, config, name_or_path, refused[:2] if model_class is AutoModelForCausalLM else refused)
    _mend_generation_config(model.generation_config, name_or_path)
    return model


def _mend_generation_config(config: GenerationConfig, name_or_path: str) -> None:
    """Leave out what transformers reads but would not save again, which would end a run after its training.

    Raises:
        UserError: It would not save it all the same.
    """
    try:
        config.validate(strict=True)
    except ValueError:
        idle: tuple[str, ...] = () if config.do_sample else _SAMPLING
        idle += () if (config.num_beams or 1) > 1 else _BEAMS
        idle += () if config.return_dict_in_generate else _OUTPUTS
        unused = [name for name in idle if getattr(config, name, None) not in (None, False)]
        for name in unused:
            setattr(config, name, getattr(GenerationConfig(), name))
        with blaming(f"The generation_config.json of {name_or_path} is not valid; fix or remove it", ValueError):
            config.validate(strict=True)
        logger.warning(
            "%s sets %s, which has no effect there: it is left out of models made from it.",
            name_or_path,
            ", ".join(unused),
        )


_BEAMS = ("early_stopping", "length_penalty", "diversity_penalty")
_OUTPUTS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")
_SAMPLING = ("temperature", "top_p", "top_k", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def load_causal_lm(name_or_path: str) -> PreTrainedModel:
    """Load a causal language model of any architecture, in evaluation mode; weights it has no use for may be there.

    Raises:
        UserError: It cannot be found or read, is of another kind, or has weights that are missing, misshapen, or NaN
            or infinite.
    """
    config = _load_config(name_or_path)
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{name_or_path} is a {config.model_type!r} model, which is not a causal language model.")
    model = _load(AutoModelForCausalLM, config, name_or_path, ("missing_keys", "mismatched_keys")).eval()
    if getattr(model, "loss_type", None) is None:
        model.loss_type = "ForCausalLM"  # which transformers falls back to, with a warning
    return model


def _load_config(name_or_path: str) -> PretrainedConfig:
    refuse_missing(name_or_path)
    folder = Path(name_or_path)
    refuse_pointers([folder / CONFIG_NAME, *weight_files(folder)])
    with blaming(f"No model can be loaded from {name_or_path!r}", *UNREADABLE):
        try:
            return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            if error.__cause__ is None:  # an answer; a Hub that does not answer is not asked once more
                _refuse_adapter(name_or_path)
            raise


def _refuse_adapter(name_or_path: str) -> None:
    if find_adapter_config_file(name_or_path) is not None:
        raise UserError(
            f"{name_or_path} is an adapter, not a model: if train_hf.py made it, name the folder above it, "
            "which holds the merged model; else merge it into its base with PEFT (`merge_and_unload`) and save that."
        )


def _load(
    model_class: type, config: PretrainedConfig, name_or_path: str, refused: tuple[str, ...]
) -> GPT2LMHeadModel | FactorizedGPT2:
    stored = sum(path.stat().st_size for path in Path(name_or_path).glob("*.safetensors"))
    if isinstance(config, GPT2Config) and 0 < stored < least_parameters(config):  # which would be made before it fails
        raise UserError(
            f"{name_or_path}: config.json describes at least {least_parameters(config):,} weights, and the files of "
            f"weights have {stored:,} bytes; they do not belong together: check that the download is complete."
        )
    if isinstance(config, GPT2Config):
        model, loading = _load_as_stored(model_class, name_or_path, config)
    else:
        model, loading = load_weights(model_class, name_or_path, config=config)
    surplus = {name for name in loading["unexpected_keys"] if not _MASK.search(name)}
    beside = {name for name in surplus if plain_name(name).startswith(_HEADS_BESIDE)}
    loading["unexpected_keys"] = surplus - beside
    problems = [f"{kind.removesuffix('_keys')} {_listed(loading[kind])}" for kind in refused if loading[kind]]
    if problems:
        raise UserError(f"The weights of {name_or_path} do not make its model: {'; '.join(problems)}.")
    for name, weight in model.named_parameters():
        if weight.dtype == torch.int8:  # the codes of a vocabulary of integers
            continue
        if weight.dtype not in _DTYPES:
            raise UserError(f"The weight {name!r} of {name_or_path} has type {weight.dtype}, not a plain float type.")
        if not torch.isfinite(weight).all():
            raise UserError(f"The weight {name!r} of {name_or_path} contains NaN or infinity.")
    if beside:
        logger.warning(
            "%s has another head next to its language model, which is ignored: %s", name_or_path, some_names(beside)
        )
    if (
        isinstance(config, GPT2Config)
        and model.config.tie_word_embeddings
        and not getattr(model.config, "is_coded", False)
        and model.lm_head.weight is not model.transformer.wte.weight
    ):
        logger.warning(
            "%s has a separate head, although its config says that the head is tied: the separate head is kept.",
            name_or_path,
        )
        model.config.tie_word_embeddings = False
        model.name_or_path = ""
    for name in CODE_KEYS:
        vars(model.config).pop(name, None)
    return model


def _load_as_stored(
    model_class: type, name_or_path: str, config: GPT2Config
) -> tuple[GPT2LMHeadModel | FactorizedGPT2, dict[str, Any]]:
    """Load a GPT-2 with its weights as they are stored, under whatever names wrappers gave them.

    The dtype is that of the stored weights, whatever the config says; only a wider one of the config's is taken, which
    rounds nothing.
    """
    named, config.dtype = config.dtype, None
    model, loading = load_weights(model_class, name_or_path, config=config)
    if loading["missing_keys"]:
        wrapped = {wrapped_name(name): name for name in {*loading["missing_keys"], *model.all_tied_weights_keys}}
        model, loading = load_weights(model_class, name_or_path, config=config, key_mapping=wrapped)
        vars(model).pop("_weight_conversions", None)  # by which it would be saved under the names that it had
        model.name_or_path = ""
    if named in _DTYPES and model.dtype in _DTYPES and named != model.dtype:
        if torch.promote_types(named, model.dtype) == named:
            model.config.dtype = named
            return model.to(named), loading
        logger.warning(
            "The weights of %s are %s, although its config says %s: they are kept as they are.",
            *(name_or_path, *(str(dtype).removeprefix("torch.") for dtype in (model.dtype, named))),
        )
        model.name_or_path = ""
    return model, loading


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# The causal mask and its filling, which transformers saved with every GPT-2 up to its fourth version.
_MASK = re.compile(r"\bh\.\d+\.attn\.(masked_)?bias$")

# Of trl's models with a value head, and of GPT2DoubleHeadsModel: the language model beside them is whole.
_HEADS_BESIDE = ("v_head.", "value_head.", "multiple_choice_head.")


def _listed(weights: Iterable) -> str:
    """Name weights, which transformers lists with or without their shapes."""
    return some_names(weight if isinstance(weight, str) else f"{weight[0]} {tuple(weight[1])}" for weight in weights)


def load_weights(model_class: Any, name_or_path: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load a model by one of transformers' classes; no code of a stranger runs, neither a module nor a pickle.

    Args:
        model_class: With `from_pretrained`.
        name_or_path: Folder or Hub id.
        **options: Further arguments of `from_pretrained`.

    Returns:
        The model, and what `from_pretrained` says of its weights.

    Raises:
        UserError: It cannot be found or read, or only by running code.
    """
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # rather than an error without names
    with blaming(f"The weights of {name_or_path} cannot be read", *UNREADABLE), silenced(transformers_logging):
        try:
            return model_class.from_pretrained(name_or_path, trust_remote_code=False, **options)
        except UnpicklingError as error:
            raise UserError(
                f"The weights of {name_or_path} are a pickle file with more than weights in it. It is not loaded "
                "because it could do anything; ask whoever made it for safetensors."
            ) from error


# Where configs of models and tokenizers name code, for those who trust the folder they stand in. What is made of a
# stranger's model must not pass his code on.
CODE_KEYS = ("auto_map", "custom_pipelines")
