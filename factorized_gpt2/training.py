"""One run, from its settings to its results: model, adapters, Trainer, outcome."""

import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerBase, PrinterCallback, set_seed

from .adapters import DROPOUTS, add_lora, lora_targets, merge, set_dropout, untie_head
from .arguments import ModelArguments, Run
from .attention_loss import LARGEST_WIDTH, attention_runs
from .baseline import check_tokenizer, load_baseline, load_compressed
from .compression import RECORD_NAME, Compressor, Recipe
from .configuration_factorized_gpt2 import FactorizedGPT2Config
from .data import collate_blocks, load_blocks, load_tokenizer, stream_blocks, vocabulary_size
from .distillation import Distillation
from .errors import REFUSED_SETTINGS, UserError, blaming
from .evaluation import least_parameters, model_size, perplexity
from .families import run_name
from .files import read_json, replacing_folder, require_space
from .fingerprints import weights_fingerprint
from .folder_lock import compress_alone, run_alone
from .identity import contents
from .interruption import PostponedStop, StopWhenSaved
from .leftovers import sweep
from .modeling_factorized_gpt2 import FactorizedGPT2
from .progress import LogLines
from .provenance import device_name, git_commit, peak_memory_bytes, versions
from .rehearsal import rehearse
from .results import Results
from .run_folder import ADAPTER_NAME, BASE_NAME, claim, finish, least_bytes, mark
from .tracking import finish_tracking, start_tracking
from .trainer import FactorizedTrainer
from .verification import probe_logits

logger = logging.getLogger(__name__)

_POSITIONS = 1024  # of a model from scratch for which no block size is set
PROBE_TOKENS = 256  # of a block, to compare a saved model with the trained one


def run_experiment(run: Run) -> Results:
    """Do what a run says, and leave a loadable model folder and `results.json` in its output folder.

    Trains (or fine-tunes, or only evaluates), keeps the best checkpoint, and saves the plain model at the top of the
    output folder, for LoRA beside the adapter in `adapter/`. A run that was cut off goes on from its last checkpoint;
    one that is finished is not repeated.

    Args:
        run: The settings.

    Returns:
        The results.

    Raises:
        UserError: Anything that the settings, the data or the output folder make impossible.
    """
    if run.training.process_index != 0:  # the first process holds the folder for all
        return _run_alone(run)
    with run_alone(Path(run.training.output_dir)) as is_alone:
        return _run_alone(run, is_alone)


def _run_alone(run: Run, may_sweep: bool = False) -> Results:
    began = time.perf_counter()
    output_dir = Path(run.training.output_dir)
    finished = claim(run)
    if may_sweep:  # now that the folder is known to be the run's
        sweep(output_dir)
    if finished is not None:
        logger.info("%s is finished already; --overwrite_output_dir runs it again.", output_dir)
        return finished
    set_seed(run.training.seed)
    with run.training.main_process_first(desc="preparing model and data"):
        tokenizer = load_tokenizer(run.data.tokenizer or run.model.compressed or run.model.baseline)
        model = build_model(run, tokenizer)
        asked, run = run, replace(run, data=replace(run.data, block_size=_block_size(run, model)))
        rehearse(run.training, model)
        train_blocks = _training_blocks(run, tokenizer) if run.training.do_train else None
        validation_blocks = _validation_blocks(run, tokenizer)
        distillation = _distillation(run, model.config.vocab_size)
    model.loss_backend = run.training.loss_backend
    _check_loss_backend(run, model)
    use_cache = model.config.use_cache  # which Trainer switches off for good
    spectrum = _spectrum(model.name_or_path)
    rank = model.config.n_embd_wte if model.config.is_factorized else None
    family = run.family(model.config.is_factorized, _compression_record(run.model.compressed or "").get("method"))
    run.training.run_name = run.training.run_name or run_name(family, rank, run.adapter.lora_rank)
    if run.adapter.lora_rank:
        lora = run.adapter
        lora_targets(model, lora.lora_rank, lora.lora_target_modules)  # before anything is written
        _keep_base(asked, model)
        model.name_or_path = _from_anywhere(model.name_or_path)
        model = add_lora(model, lora.lora_rank, lora.lora_alpha, lora.lora_dropout, lora.lora_target_modules)
    if run.training.should_save:
        require_space(output_dir, least_bytes(model, run.training), "the run")
    with blaming("The Trainer cannot use these settings", *REFUSED_SETTINGS):
        trainer = FactorizedTrainer(
            distillation=distillation,
            model=model,
            args=run.training,
            train_dataset=train_blocks,
            eval_dataset=validation_blocks,
            data_collator=collate_blocks,
            processing_class=tokenizer,
        )
    if run.training.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(LogLines)
    if run.training.should_save:
        mark(asked)
    start_tracking(run.training)
    trainer.accelerator.wait_for_everyone()  # all look for the same checkpoint in the same folder
    outcome = _train(trainer, output_dir, run.data.block_size) if run.training.do_train else {}
    eval_loss = trainer.state.best_metric if trainer.has_best else trainer.evaluate()["eval_loss"]

    peak_memory = peak_memory_bytes(run.training.device)
    model = trainer.trained_model()
    model.config.use_cache = use_cache
    probe = collate_blocks([validation_blocks[0]])["input_ids"][:, :PROBE_TOKENS]
    expected = probe_logits(model, probe)
    if isinstance(model, PeftModel):
        if run.training.should_save:
            with replacing_folder(output_dir / ADAPTER_NAME) as folder:
                model.save_pretrained(folder)
                (folder / "README.md").unlink(missing_ok=True)  # PEFT's card, which tells of a folder on this machine
        model = merge(model)
    disk_bytes = finish(output_dir, model, tokenizer, probe, expected) if run.training.should_save else None
    results = Results(
        run_name=run.training.run_name,
        family=family,
        n_embd_wte=rank,
        eval_loss=eval_loss,
        perplexity=perplexity(eval_loss),
        **asdict(model_size(model)),
        **outcome,
        settings=run.settings(),
        versions=versions(),
        words=list(run.words),
        git_commit=git_commit(),
        start_fingerprint=weights_fingerprint(run.start),
        fingerprint=weights_fingerprint(str(output_dir)) if run.training.should_save else None,
        content=contents(run),
        device=device_name(run.training.device),
        processes=run.training.world_size,
        disk_bytes=disk_bytes,
        peak_memory_bytes=peak_memory,
        spectrum=spectrum,
        seconds=time.perf_counter() - began,
    )
    if run.training.should_save:
        results.write(output_dir)
    finish_tracking(
        run.training,
        {
            "best_iteration": results.best_step,
            "best_tokens": results.best_tokens,
            "validation_loss": results.eval_loss,
            "training_loss": results.train_loss,
        },
    )
    trainer.accelerator.wait_for_everyone()
    return results


def build_model(run: Run, tokenizer: PreTrainedTokenizerBase) -> FactorizedGPT2:
    """Make the model that a run starts from.

    That is a compressed model, the baseline, or, when `n_embd_wte` is smaller than its width, the model that PCA makes
    of it, whose folder and factor files stand beside the run's output folder; with neither, a random start.

    Returns:
        The model; its `name_or_path` is the folder that holds exactly this model, or empty where there is none.

    Raises:
        UserError: Settings that contradict the baseline or the tokenizer.
    """
    arguments = run.model
    if run.is_from_scratch:
        block_size = run.data.block_size or _POSITIONS
        model = FactorizedGPT2(_scratch_config(arguments, tokenizer, block_size))
    else:
        model = _trained_start(run, tokenizer)
        if arguments.dropout is not None:
            set_dropout(model, arguments.dropout)
    if not arguments.tie_word_embeddings and model.config.tie_word_embeddings:
        untie_head(model)
        model.name_or_path = ""
    return model.float() if run.training.do_train else model  # optimizers and merges need more than half precision


def _block_size(run: Run, model: FactorizedGPT2) -> int:
    """Say how many tokens a block has: as asked, else as many as the model has positions."""
    return run.data.block_size or model.config.n_positions


def _trained_start(run: Run, tokenizer: PreTrainedTokenizerBase) -> FactorizedGPT2:
    arguments, training = run.model, run.training
    baseline = None if arguments.compressed else load_baseline(arguments.baseline)
    model = baseline.model if baseline else load_compressed(arguments.compressed)
    check_tokenizer(model, tokenizer)
    if _block_size(run, model) > model.config.n_positions:
        raise UserError(
            f"block_size {run.data.block_size} exceeds the {model.config.n_positions} positions of the baseline."
        )
    if baseline is None:
        model.name_or_path = arguments.compressed
    elif arguments.n_embd_wte is None:
        model.name_or_path = ""
    else:
        root = Path(training.output_dir).parent
        compressor = Compressor(baseline, Recipe(), root, tokenizer, overwrite=training.overwrite_output_dir)
        model = compressor.load(arguments.n_embd_wte)
        if model is None:
            with compress_alone(root, wait=True):
                model, _ = compressor.load_or_make(arguments.n_embd_wte)
        model.name_or_path = str(compressor.folder(arguments.n_embd_wte))
    return model


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


def _distillation(run: Run, vocab_size: int) -> Distillation | None:
    asked = run.distillation
    if not (asked.distillation_weight and run.training.do_train):
        return None
    teacher = load_baseline(asked.teacher or run.model.baseline or _compressed_from(run.model.compressed))
    config = teacher.model.config
    if config.vocab_size != vocab_size:
        raise UserError(f"The teacher {teacher.name} has {config.vocab_size} tokens, the model {vocab_size}.")
    if config.n_positions < run.data.block_size:
        raise UserError(f"block_size {run.data.block_size} exceeds the {config.n_positions} positions of the teacher.")
    return Distillation(teacher.model, asked.distillation_weight, asked.distillation_temperature)


def _compressed_from(folder: str) -> str:
    """Read from a compressed model's record which baseline it was made from."""
    name = _compression_record(folder).get("baseline")
    if not isinstance(name, str):
        raise UserError(f"{folder} does not say what it was compressed from: name a teacher.")
    return name


def _spectrum(folder: str) -> list[float] | None:
    """Read from the record of the compressed model that a run starts from what each rank keeps."""
    spectrum = _compression_record(folder).get("spectrum")
    if not (spectrum is None or (isinstance(spectrum, list) and all(isinstance(share, float) for share in spectrum))):
        raise UserError(f"The spectrum in {Path(folder) / RECORD_NAME} is no list of shares; compress once more.")
    return spectrum


def _compression_record(folder: str) -> dict[str, Any]:
    """Read the record in a folder; empty where there is none, or no folder is named."""
    path = Path(folder) / RECORD_NAME
    return read_json(path) if folder and path.exists() else {}


def _check_loss_backend(run: Run, model: FactorizedGPT2) -> None:
    device, width = run.training.device.type, model.config.embedding_size
    dtype = torch.float16 if run.training.fp16 or run.training.bf16 else torch.float32
    if model.loss_backend == "attention" and not attention_runs(device, dtype, width):
        raise UserError(
            f"loss_backend=attention needs fp16 or bf16 on CUDA, and a head at most {LARGEST_WIDTH} wide; this one is "
            f"{width} wide, in {str(dtype).removeprefix('torch.')}."
        )


def _keep_base(run: Run, model: FactorizedGPT2) -> None:
    """Save the model under an adapter where no folder holds it yet, so that the adapter can name what it adapts."""
    if model.name_or_path:
        return
    folder = Path(run.training.output_dir).absolute() / BASE_NAME
    model.name_or_path = str(folder)
    if run.training.should_save:
        mark(run)
        with replacing_folder(folder) as temporary:
            model.save_pretrained(temporary)


def _from_anywhere(name_or_path: str) -> str:
    """Name a model so that it is found from every folder: a local one by its whole path, others by their Hub id."""
    return str(Path(name_or_path).absolute()) if Path(name_or_path).exists() else name_or_path


def _train(trainer: FactorizedTrainer, output_dir: Path, block_size: int) -> dict[str, Any]:
    """Train, going on from the last checkpoint if there is one; return what `Results` holds of it."""
    args = trainer.args
    checkpoint = trainer.last_checkpoint()
    trained_parameters = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    began = time.perf_counter()
    with PostponedStop() as stop:
        trainer.add_callback(StopWhenSaved(stop, trainer.accelerator))
        trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - began - trainer.evaluation_seconds
    state = trainer.state
    tokens_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * block_size
    steps_here = state.global_step - (0 if checkpoint is None else int(checkpoint.rsplit("-", 1)[1]))
    best_step = trainer.kept_step
    curves = {
        name: [[row["step"], row[name]] for row in state.log_history if name in row] for name in ("loss", "eval_loss")
    }
    return {
        "train_loss": curves["loss"][-1][1] if curves["loss"] else None,
        "best_step": best_step,
        "best_tokens": best_step * tokens_per_step,
        "trained_parameters": trained_parameters,
        "train_seconds": seconds,
        "tokens_per_second": steps_here * tokens_per_step / seconds,
        "training_curve": curves["loss"],
        "validation_curve": curves["eval_loss"],
    }


def _training_blocks(run: Run, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    source, block_size = run.data.source("train"), run.data.block_size
    if run.data.streaming:
        return stream_blocks(source, tokenizer, block_size, run.data.shuffle_buffer, run.training.seed)
    return load_blocks(source, tokenizer, block_size, keep_tail=False, num_proc=run.data.preprocessing_num_workers)


def _validation_blocks(run: Run, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    source, block_size, limit = run.data.source("validation"), run.data.block_size, run.data.max_eval_samples
    blocks = load_blocks(source, tokenizer, block_size, keep_tail=True, num_proc=run.data.preprocessing_num_workers)
    return Subset(blocks, range(min(limit, len(blocks)))) if limit else blocks
