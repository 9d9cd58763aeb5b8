"""What a run starts from: a random, a trained or a compressed model, and its teacher."""

import logging
from pathlib import Path
from typing import cast

import psutil
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..common.errors import UserError
from ..common.folder_lock import compress_alone
from ..compress.compressor import Compressor
from ..compress.recipe import Recipe
from ..models.foreign_models import positions_of
from ..models.loading import check_tokenizer, load_baseline, load_compressed
from ..models.record import teacher_of
from ..models.sizes import least_parameters
from ..network.configuration_factorized_gpt2 import FactorizedGPT2Config
from ..network.modeling_factorized_causal_lm import FactorizedCausalLM
from ..network.modeling_factorized_gpt2 import FactorizedGPT2
from ..settings.text_arguments import block_size_for
from ..text.tokenizers import vocabulary_size
from ..trainer.adapters import ALL_LINEAR, DROPOUTS, lora_targets, set_dropout, untie_head
from ..trainer.distillation import Distillation, has_plain_logits
from .fields import LORA_TARGETS, ModelArguments
from .settings import Run

logger = logging.getLogger(__name__)

Start = FactorizedGPT2 | FactorizedCausalLM

_POSITIONS = 1024  # of a model from scratch for which no block size is set


def build_model(run: Run, tokenizer: PreTrainedTokenizerBase) -> Start:
    """Make the model that a run starts from.

    That is a compressed model, the baseline, or, when `n_embd_wte` is smaller than its width, the model that PCA makes
    of it, whose folder and factor files stand beside the run's output folder; with neither, a random start.

    Returns:
        The model; its `name_or_path` is the folder that holds exactly this model, or empty where there is none.

    Raises:
        UserError: Settings that contradict the baseline or the tokenizer.
    """
    arguments = run.model
    model: Start
    if run.is_from_scratch:
        block_size = run.data.block_size or _POSITIONS
        model = FactorizedGPT2(_scratch_config(arguments, tokenizer, block_size))
    else:
        model = _trained_start(run, tokenizer)
        if arguments.dropout is not None:
            _set_dropout(model, arguments.dropout)
    if not arguments.tie_word_embeddings and model.config.is_coded:
        raise UserError("A vocabulary of integers is tied: leave tie_word_embeddings as it is, or set dequantize.")
    if not arguments.tie_word_embeddings and model.config.tie_word_embeddings:
        untie_head(model)
        model.name_or_path = ""
    return model.float() if run.training.do_train else model  # optimizers and merges need more than half precision


def block_size_of(run: Run, model: PreTrainedModel) -> int:
    """Say how many tokens a block has: as asked, else as many as the model has positions, unless they are very many.

    Raises:
        UserError: More than there are positions.
    """
    return block_size_for(run.data.block_size, positions_of(model.config), run.start or "The model")


def adapted_modules(run: Run, model: Start) -> list[str]:
    """Name the modules that get adapters, if they all can have them; see `lora_targets`."""
    asked = run.adapter.lora_target_modules
    if not isinstance(model, FactorizedGPT2) and set(asked) == set(LORA_TARGETS):
        asked = [ALL_LINEAR]
    targets = lora_targets(model, run.adapter.lora_rank, asked)
    if ALL_LINEAR in asked:
        logger.info("LoRA adapters on %s", ", ".join(targets))
    return targets


def _set_dropout(model: Start, probability: float) -> None:
    names = set_dropout(model, probability)
    if not names:
        logger.warning("dropout=%g is ignored: the model's config has none.", probability)
    elif not set(DROPOUTS) <= set(names):
        logger.info("dropout=%g sets %s; the model has no other.", probability, ", ".join(names))


def _trained_start(run: Run, tokenizer: PreTrainedTokenizerBase) -> Start:
    arguments, training = run.model, run.training
    baseline = None if arguments.compressed else load_baseline(arguments.baseline)
    model: PreTrainedModel = baseline.model if baseline else load_compressed(arguments.compressed)
    check_tokenizer(model, tokenizer)
    if run.data.block_size is not None:
        block_size_of(run, model)
    if arguments.n_embd_wte is None and not isinstance(model, Start):
        raise UserError(
            f"{arguments.baseline} is a {type(model).__name__}: set n_embd_wte, the rank to factorize it at; "
            "unfactorized, train_hf.py trains GPT-2s alone."
        )
    if arguments.dequantize:
        if not model.config.is_coded:
            raise UserError(f"dequantize: the vocabulary of {arguments.compressed} is of floats already.")
        model = cast(Start, model).dequantize()
        model.name_or_path = ""
    elif baseline is not None and arguments.n_embd_wte is None:
        model.name_or_path = ""
    elif baseline is not None:
        root = Path(training.output_dir).parent
        compressor = Compressor(baseline, Recipe(), root, tokenizer, overwrite=training.overwrite)
        made, folder = compressor.load(arguments.n_embd_wte), compressor.folder(arguments.n_embd_wte)
        if made is None:
            with compress_alone(root, wait=True):
                ((_, made, _),) = compressor.load_or_make([arguments.n_embd_wte])
            logger.info("The compressed baseline is beside the run's folder, for other runs to start from: %s", folder)
        model = made
        model.name_or_path = str(folder)
    return cast(Start, model)


def _scratch_config(
    arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_size: int
) -> FactorizedGPT2Config:
    shape = {name: getattr(arguments, name) for name in ("n_layer", "n_head", "n_embd", "activation_function")}
    dropouts = dict.fromkeys(DROPOUTS, arguments.dropout)
    try:
        config = FactorizedGPT2Config(
            vocab_size=vocabulary_size(tokenizer),
            n_positions=block_size,
            n_embd_wte=arguments.n_embd_wte,
            tie_word_embeddings=arguments.tie_word_embeddings,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **{name: value for name, value in (shape | dropouts).items() if value is not None},
        )
    except (StrictDataclassError, ValueError) as error:
        raise UserError(str(error).strip().splitlines()[-1].strip()) from error
    needed, there = 4 * least_parameters(config), psutil.virtual_memory().total
    if needed > there:
        raise UserError(
            f"A model with n_layer={config.n_layer}, n_embd={config.n_embd}, block_size={block_size} and "
            f"{config.vocab_size} tokens takes {needed / 1e9:,.1f} GB, more than this machine's {there / 1e9:.1f} GB."
        )
    return config


def distillation_of(run: Run, vocab_size: int) -> Distillation | None:
    """Load the teacher of a run that has one.

    Raises:
        UserError: It cannot be loaded, or its tokens or positions do not fit.
    """
    asked = run.distillation
    if not (asked.distillation_weight and run.training.do_train):
        return None
    name = teacher_of(asked.teacher, run.model.baseline, run.model.compressed)
    if name is None:
        raise UserError(f"{run.model.compressed} does not say what it was compressed from: name a teacher.")
    teacher = load_baseline(name)
    config = teacher.model.config
    if config.vocab_size != vocab_size:
        raise UserError(f"The teacher {teacher.name} has {config.vocab_size} tokens, the model {vocab_size}.")
    positions = positions_of(config)
    if positions is not None and positions < run.data.block_size:
        raise UserError(f"block_size {run.data.block_size} exceeds the {positions} positions of the teacher.")
    if not has_plain_logits(teacher.model):
        raise UserError(f"The teacher {teacher.name} scales or caps its logits, which distillation does not know.")
    return Distillation(teacher.model, asked.distillation_weight, asked.distillation_temperature)
