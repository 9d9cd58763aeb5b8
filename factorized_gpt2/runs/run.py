"""One run, from its settings to its results: model, adapters, Trainer, outcome."""

import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, PrinterCallback, set_seed

from ..common.errors import REFUSED_SETTINGS, UserError, blaming
from ..common.files import replacing_folder, require_space
from ..common.fingerprints import model_content, weights_fingerprint
from ..common.folder_lock import run_alone
from ..common.leftovers import sweep
from ..common.signals import PostponedStop
from ..common.weight_files import MODEL_FILES
from ..models.adapter_base import whole_path
from ..models.adapter_folder import complete_adapter
from ..models.record import compression_record, recorded_spectrum
from ..models.sizes import model_size
from ..models.verification import probe_logits
from ..network.attention_loss import LARGEST_WIDTH, attention_runs
from ..text.blocks import Blocks, collate_blocks, load_blocks, some_of, stream_blocks
from ..text.loss import perplexity
from ..text.tokenizers import load_tokenizer
from ..trainer.adapters import add_lora, merge
from ..trainer.interruption import StopWhenSaved
from ..trainer.progress import LogLines
from ..trainer.trainer import FactorizedTrainer
from .families import run_name
from .folder import ADAPTER_NAME, BASE_NAME, check_folder, least_bytes, save_model, write_identity
from .identity import run_fingerprints
from .provenance import device_name, git_commit, peak_memory_bytes, versions
from .rehearsal import rehearse
from .results import Results
from .settings import Run
from .start import Start, adapted_modules, block_size_of, build_model, distillation_of
from .tracking import finish_tracking, start_tracking

logger = logging.getLogger(__name__)

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
    finished = check_folder(run)
    if may_sweep:  # now that the folder is known to be the run's
        sweep(output_dir)
    if finished is not None:
        logger.info("%s is finished already; --overwrite True runs it again.", output_dir)
        return finished
    set_seed(run.training.seed)
    with run.training.main_process_first(desc="preparing model and data"):
        tokenizer = load_tokenizer(run.data.tokenizer or run.model.compressed or run.model.baseline)
        start = build_model(run, tokenizer)
        asked, run = run, replace(run, data=replace(run.data, block_size=block_size_of(run, start)))
        rehearse(run.training, start)
        train_blocks = _training_blocks(run, tokenizer) if run.training.do_train else None
        validation_blocks = _validation_blocks(run, tokenizer)
        distillation = distillation_of(run, start.config.vocab_size)
    start.loss_backend = run.training.loss_backend
    _check_loss_backend(run, start)
    use_cache = getattr(start.config, "use_cache", None)  # which Trainer switches off for good
    spectrum = recorded_spectrum(run.model.compressed or start.name_or_path)
    rank = start.config.n_embd_wte if start.config.is_factorized else None
    made = compression_record(run.model.compressed)
    family = run.family(start.config.is_factorized, made.get("method"), bool(made.get("refine_steps")))
    bits = _budget(made) if start.config.is_coded else None
    run.training.run_name = run.training.run_name or run_name(family, rank, run.adapter.lora_rank, bits)
    model: Start | PeftModel = start
    if run.adapter.lora_rank:
        lora = run.adapter
        targets = adapted_modules(run, start)  # before anything is written
        _keep_base(asked, start)
        start.name_or_path = whole_path(start.name_or_path)
        model = add_lora(start, lora.lora_rank, lora.lora_alpha, lora.lora_dropout, targets)
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
        write_identity(asked)
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
            with replacing_folder(output_dir / ADAPTER_NAME, ("adapter_*",)) as folder:
                model.save_pretrained(str(folder))
                complete_adapter(folder, output_dir / ADAPTER_NAME)
        model = merge(model)
    disk_bytes = save_model(output_dir, model, tokenizer, probe, expected) if run.training.should_save else None
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
        words=list(run.flags),
        git_commit=git_commit(),
        start_fingerprint=weights_fingerprint(run.start),
        fingerprint=weights_fingerprint(str(output_dir)) if run.training.should_save else None,
        content=run_fingerprints(run) | _lineage(run, output_dir),
        device=device_name(run.training.device),
        processes=run.training.world_size,
        disk_bytes=disk_bytes,
        bits_per_weight=bits,
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


def _budget(record: dict[str, Any]) -> float | None:
    """Read from a compressed model's record what its coded vocabulary was allowed to take."""
    bits = record.get("bits_per_weight")
    return bits if isinstance(bits, int | float) else None


def _lineage(run: Run, output_dir: Path) -> dict[str, str]:
    """Identify what a run's start was once compressed from, and the model that the run left."""
    made_from = compression_record(run.model.compressed).get("baseline_content")
    left = model_content(str(output_dir)) if run.training.should_save else None
    found = {"made_from": made_from, "model": left}
    return {kind: content for kind, content in found.items() if isinstance(content, str)}


def _check_loss_backend(run: Run, model: Start) -> None:
    device, width = run.training.device.type, model.config.n_embd_wte or model.config.hidden_size
    dtype = torch.float16 if run.training.fp16 or run.training.bf16 else torch.float32
    if model.loss_backend == "attention" and not attention_runs(device, dtype, width):
        raise UserError(
            f"loss_backend=attention needs fp16 or bf16 on CUDA, and a head of width {LARGEST_WIDTH} at most; this "
            f"one has "
            f"width {width}, in {str(dtype).removeprefix('torch.')}."
        )
    _try_loss(model)


@torch.no_grad()
def _try_loss(model: Start) -> None:
    """Compute a loss, by which a decoder finds out what follows its head, before random numbers count."""
    asked, ids = model.loss_backend, torch.zeros(1, 2, dtype=torch.long)
    if asked == "cut_cross_entropy":  # not on a CPU; the other needs the same of a head
        model.loss_backend = "attention"
    try:
        model.eval()(ids, labels=ids, skip_logits=True)
    except ValueError as error:
        raise UserError(
            f"loss_backend={asked} needs logits that are a product with one matrix of floats; this model's are more."
        ) from error
    finally:
        model.loss_backend = asked


def _keep_base(run: Run, model: Start) -> None:
    """Save the model under an adapter where no folder holds it yet, so that the adapter can name what it adapts."""
    if model.name_or_path:
        return
    folder = Path(run.training.output_dir).absolute() / BASE_NAME
    model.name_or_path = str(folder)
    if run.training.should_save:
        write_identity(run)
        with replacing_folder(folder, MODEL_FILES) as temporary:
            model.save_pretrained(temporary)


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


def _training_blocks(run: Run, tokenizer: PreTrainedTokenizerBase) -> Any:
    source, block_size = run.data.source("train"), run.data.block_size
    if run.data.streaming:
        return stream_blocks(source, tokenizer, block_size, run.data.shuffle_buffer, run.training.seed)
    return load_blocks(source, tokenizer, block_size, keep_tail=False, num_proc=run.data.preprocessing_num_workers)


def _validation_blocks(run: Run, tokenizer: PreTrainedTokenizerBase) -> Blocks:
    source, block_size, limit = run.data.source("validation"), run.data.block_size, run.data.max_eval_samples
    blocks = load_blocks(source, tokenizer, block_size, keep_tail=True, num_proc=run.data.preprocessing_num_workers)
    return some_of(blocks, range(min(limit, len(blocks)))) if limit else blocks
