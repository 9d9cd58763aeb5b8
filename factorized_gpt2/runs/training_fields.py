"""The options of `TrainingArguments` that a run honours, those that change its result, and names from elsewhere."""

from dataclasses import fields

from ..settings.setting_values import COUNT, NOT_NEGATIVE, OUTPUT_FOLDER, POSITIVE, SEED, SHARE, Limit, Range
from .training_outline import training_outline

# What changes the weights that come of a run, or their loss.
MATERIAL = frozenset(
    (
        *("do_train", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *("auto_find_batch_size", "average_tokens_across_devices", "learning_rate", "lr_scheduler_type", "optim"),
        *("lr_scheduler_kwargs", "warmup_steps", "optim_args", "optim_target_modules", "weight_decay", "adam_beta1"),
        *("adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "bf16"),
        *("fp16", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode", "seed", "data_seed"),
        *("full_determinism", "dataloader_drop_last", "dataloader_in_order", "train_sampling_strategy"),
        *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    )
)
# When it is evaluated and saved changes which weights are the best, if the best are kept.
MATERIAL_FOR_THE_BEST = frozenset(
    ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_strategy", "save_steps")
)
# Where, how fast and how verbosely it runs.
_IMMATERIAL = frozenset(
    (
        *("output_dir", "run_name", "project", "report_to", "disable_tqdm", "log_level", "log_level_replica"),
        *("log_on_each_node", "logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter"),
        *("do_eval", "per_device_eval_batch_size", "save_total_limit", "use_cpu", "torch_empty_cache_steps"),
        *("push_to_hub", "hub_revision"),
        *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
        *("activation_checkpointing", "activation_checkpointing_kwargs"),  # their names in later versions
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
        *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
        *("ddp_backend", "ddp_timeout", "fsdp", "fsdp_config"),
    )
)
# Of what values can be, by name.
LIMITS: dict[str, Limit] = {
    **{"output_dir": OUTPUT_FOLDER, "seed": SEED, "data_seed": SEED},
    **{"max_steps": Range(-1), "num_train_epochs": Range(0, 1e9), "warmup_steps": NOT_NEGATIVE},
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), POSITIVE),
    **dict.fromkeys(("learning_rate", "min_lr", "weight_decay", "max_grad_norm", "eval_delay"), NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Range(0, 1, is_open_above=True)),
    **{"adam_epsilon": POSITIVE, "label_smoothing_factor": SHARE, "neftune_noise_alpha": NOT_NEGATIVE},
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "torch_empty_cache_steps"), COUNT),
    **{"dataloader_num_workers": Range(0, 1024), "dataloader_prefetch_factor": COUNT, "save_total_limit": COUNT},
    **{"ddp_timeout": COUNT, "ddp_bucket_cap_mb": COUNT},
}
SUPPORTED = MATERIAL | MATERIAL_FOR_THE_BEST | _IMMATERIAL

_REASONS = {
    "save_only_model": "a run that was cut off could not go on as it was without the optimizer's state.",
    "ignore_data_skip": "a run that was cut off would see its first blocks twice.",
    "enable_jit_checkpoint": "these runs save a checkpoint by themselves when they are told to stop.",
    "resume_from_checkpoint": "a run goes on from the checkpoints in its output_dir.",
    "use_liger_kernel": "this model has kernels of its own (loss_backend).",
    "do_predict": "a run ends with its validation loss; evaluate_models.py measures any other text.",
    "hub_strategy": "a run publishes its model once, at its end.",
    "hub_always_push": "a run publishes its model once, at its end.",
    "deepspeed": "models are sharded by FSDP (fsdp, or accelerate launch).",
    "debug": "these runs look for NaN and overflow by themselves.",
    "include_num_input_tokens_seen": "results.json has the tokens that were seen.",
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), "evaluations compute as training does."),
    "hub_model_id": "it is push_to_hub.",
    "hub_private_repo": "it is private.",
    "hub_token": "log in with `hf auth login`, or set HF_TOKEN.",
    "use_cache": "training needs no cache, and the saved model has one.",
}
NOTHING = "it would do nothing in these runs"


def refused() -> dict[str, str]:
    """Say of every option of the installed `TrainingArguments` that a run does not honour why it is not taken."""
    names = (item.name for item in fields(training_outline()))
    # Some names of earlier versions are still options of the oldest that is supported.
    reasons = {name: f"{successor}." for name, successor in ELSEWHERE.items()} | _REASONS
    return {name: reasons.get(name, f"{NOTHING}.") for name in names if name not in SUPPORTED}


# Options of earlier versions of transformers, of its example scripts, of nanoGPT and of PEFT: what stands for them.
ELSEWHERE = {
    **dict.fromkeys(("evaluation_strategy", "evaluate_during_training"), "it is eval_strategy"),
    **dict.fromkeys(("no_cuda", "use_mps_device"), "set use_cpu for a CPU; any other device is found"),
    **dict.fromkeys(("fp16_backend", "half_precision_backend", "fp16_opt_level"), "fp16 or bf16 alone say it"),
    **dict.fromkeys(("dtype", "torch_dtype", "mixed_precision"), "set bf16 or fp16, or neither"),
    "save_safetensors": "weights are always saved as safetensors",
    "logging_dir": "TensorBoard's folder is TENSORBOARD_LOGGING_DIR in the environment",
    "warmup_ratio": "set warmup_steps: below 1 it is a share of all steps",
    "group_by_length": "all blocks are equally long",
    "adafactor": "set optim=adafactor",
    "torchdynamo": "set torch_compile",
    "jit_mode_eval": "set torch_compile",
    "xpu_backend": "it is ddp_backend",
    "sharded_ddp": "it is fsdp",
    **dict.fromkeys(("fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap"), "it is a key of fsdp_config"),
    **dict.fromkeys(("use_ipex", "tpu_num_cores", "tpu_metrics_debug"), "these runs know CPUs, CUDA and MPS"),
    **dict.fromkeys(("past_index", "mp_parameters", "ray_scope", "use_legacy_prediction_loop"), NOTHING),
    **dict.fromkeys(("split_batches", "dispatch_batches", "include_inputs_for_metrics", "low_cpu_mem_usage"), NOTHING),
    "include_tokens_per_second": "results.json has them",
    **dict.fromkeys(("push_to_hub_token", "use_auth_token", "token"), "log in with `hf auth login`, or set HF_TOKEN"),
    "push_to_hub_model_id": "it is push_to_hub",
    "push_to_hub_organization": "it is a part of push_to_hub",
    "model_name_or_path": "it is baseline",
    **dict.fromkeys(
        ("config_name", "config_overrides", "model_type"),
        "n_layer, n_head, n_embd and activation_function describe a network, or baseline names one",
    ),
    "model_revision": "fetch that revision with `hf download`, and name its folder as baseline",
    "cache_dir": "set HF_HOME",
    "trust_remote_code": "no code of others runs here",
    "use_fast_tokenizer": NOTHING,
    "tokenizer_name": "it is tokenizer",
    "max_train_samples": "set max_steps",
    **dict.fromkeys(("max_length", "max_seq_length", "model_max_length", "n_ctx", "n_positions"), "it is block_size"),
    "validation_split_percentage": "give the held-out part as validation_file",
    "max_iters": "it is max_steps",
    "lr_decay_iters": "the schedule ends with max_steps",
    "decay_lr": "set lr_scheduler_type",
    "warmup_iters": "it is warmup_steps",
    "eval_interval": "it is eval_steps",
    "eval_iters": "it is max_eval_samples, which counts blocks",
    "log_interval": "it is logging_steps",
    "save_interval": "it is save_steps",
    **dict.fromkeys(
        ("batch_size", "train_batch_size", "per_gpu_train_batch_size"), "it is per_device_train_batch_size"
    ),
    "per_gpu_eval_batch_size": "it is per_device_eval_batch_size",
    "min_lr": 'set lr_scheduler_type=cosine_with_min_lr and lr_scheduler_kwargs={"min_lr": ...}',
    "lr": "it is learning_rate",
    "epochs": "it is num_train_epochs",
    "grad_clip": "it is max_grad_norm",
    **{f"beta{number}": f"it is adam_beta{number}" for number in (1, 2)},
    "out_dir": "it is output_dir",
    "init_from": "set baseline, or nothing for a random start",
    "compile": "it is torch_compile",
    "device": "set use_cpu for a CPU; any other device is found",
    "dataset": "set dataset_name, or train_file and validation_file",
    "eval_only": "set do_train=false",
    "bias": "every layer has one, as GPT-2's do",
    "wandb_log": "set report_to=wandb",
    "wandb_project": "it is project",
    "wandb_run_name": "it is run_name",
    "wandb_entity": "set WANDB_ENTITY",
    **dict.fromkeys(("lora_r", "r"), "it is lora_rank"),
    "vocab_size": "the tokenizer says it",
    "target_modules": "it is lora_target_modules",
}
