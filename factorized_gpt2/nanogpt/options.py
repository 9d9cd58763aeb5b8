"""Options of nanoGPT checkpoints: what they say of a network, and which networks this package cannot compute."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..common.errors import UserError

NAMES_ACTIVATION = "activation_variant"  # the descendant's option; nanoGPT has none


@dataclass(frozen=True)
class OldNetwork:
    """The network of a checkpoint, as far as its options tell.

    Attributes:
        n_layer: Number of blocks.
        n_head: Attention heads a block.
        n_embd: Width d of the hidden states.
        block_size: Number of positions.
        vocab_size: Rows of the token embedding, padding included.
        n_embd_wte: Rank k, `None` when the vocabulary is not factorized.
        n_inner: Width of the feed-forward networks.
        activation: Name of their activation, as transformers has it.
        dropout: Probability, the same everywhere.
        bias: Whether norms and attention have biases.
        up_bias: Whether the first layers of the feed-forward networks have.
        down_bias: Whether the second have.
        tied: Whether `lm_head` is `wte`.
        scales_tied: Whether `scale_down` is the transpose of `scale_up`.
    """

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    n_embd_wte: int | None
    n_inner: int
    activation: str
    dropout: float
    bias: bool
    up_bias: bool
    down_bias: bool
    tied: bool
    scales_tied: bool


def read_options(options: Mapping[str, Any], activation_function: str | None = None) -> OldNetwork:
    """Read `model_args` of nanoGPT or of its factorized descendant.

    An option that is in no list below is taken for a feature, and must be off: `None`, `False` or an empty list.

    Args:
        options: Options by name. Those that nanoGPT does not have may be missing.
        activation_function: What the feed-forward networks compute, as transformers names it, where the options do
            not say so; by default the exact GELU.

    Returns:
        The network.

    Raises:
        UserError: An option that is missing, mistyped, or asks for what a GPT-2 does not compute, by name; another
            activation function than that of the options.
    """
    _refuse_other_networks(options)
    size = {name: _size(options, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    width = size["n_embd"]
    if width % size["n_head"]:
        raise UserError(f"n_embd={width} is not a multiple of n_head={size['n_head']}.")
    if options.get("n_kv_group") not in (None, size["n_head"]):
        raise UserError(f"n_kv_group={_shown(options['n_kv_group'])}: grouped keys and values are not supported.")
    rank = _size(options, "n_embd_wte") if options.get("n_embd_wte") else None
    if rank is not None and rank >= width:
        raise UserError(
            f"n_embd_wte={rank} is not smaller than n_embd={width}: such a factorization is not supported."
        )
    dropout = options.get("dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(f"dropout={_shown(dropout)} is not a probability.")
    inner = (
        _size(options, "mlp_size") if options.get("mlp_size") else width * _size(options, "mlp_expansion_factor", 4)
    )
    bias = _switch(options, "bias", True)
    return OldNetwork(
        **size,
        n_embd_wte=rank,
        n_inner=inner,
        activation=_activation(options, activation_function),
        dropout=float(dropout),
        bias=bias,
        up_bias=_switch(options, "mlp_up_bias", bias),
        down_bias=_switch(options, "mlp_down_bias", bias),
        # Whoever imports an embedding ties it, whatever the option says.
        tied=_switch(options, "wte_weight_tying", True) or bool(options.get("import_wte_npy")),
        scales_tied=_switch(options, "n_embd_wte_scale_tying", True),
    )


def _activation(options: Mapping[str, Any], asked: str | None) -> str:
    if NAMES_ACTIVATION not in options:
        return asked or "gelu"
    variant = options[NAMES_ACTIVATION]
    if not isinstance(variant, str) or variant not in _ACTIVATIONS:
        raise UserError(f"{NAMES_ACTIVATION}={_shown(variant)} is not supported, only {', '.join(_ACTIVATIONS)}.")
    named = _ACTIVATIONS[variant]
    if asked not in (None, named):
        raise UserError(
            f"activation_function={asked} contradicts the checkpoint's own {NAMES_ACTIVATION}={variant!r}."
        )
    return named


def _refuse_other_networks(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if not isinstance(name, str):
            raise UserError(f"The name of the option {_shown(name)} is not text.")
        if not isinstance(value, bool | int | float | str | list | tuple | None):
            raise UserError(f"{name!r} is a {type(value).__name__}, which is not valid for an option.")
        if name in _REQUIRED:
            if value != _REQUIRED[name] and not (value is None and name.startswith("linear_variant_")):
                raise UserError(f"{name}={_shown(value)} is not supported, only {name}={_REQUIRED[name]!r}.")
        elif name in _READ or name in _IDLE or name.startswith(_IDLE_PREFIXES) or name.endswith(_IDLE_SUFFIXES):
            continue
        elif value is not None and value is not False and value != []:
            raise UserError(
                f"{_shown(name)[1:-1]}={_shown(value)} is not supported: GPT-2 has nothing that corresponds to it."
            )


def _size(options: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = options.get(name, default)
    if value is None:
        raise UserError(f"The option {name!r} is missing.")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name}={_shown(value)} is not a positive whole number.")
    return value


def _switch(options: Mapping[str, Any], name: str, default: bool) -> bool:
    value = options.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UserError(f"{name}={_shown(value)} is neither true nor false.")
    return value


def _shown(value: Any) -> str:
    """Show a stranger's value in one line of bearable length."""
    text = repr(value)
    return " ".join((text if len(text) <= 60 else text[:59] + "…").split())


# Activations by their name there, with transformers' name.
_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "squared_relu": "relu2", "silu": "silu", "tanh": "tanh"}

_READ = {
    *("n_layer", "n_head", "n_kv_group", "n_embd", "block_size", "vocab_size", "n_embd_wte", "mlp_size"),
    *("mlp_expansion_factor", NAMES_ACTIVATION, "dropout", "bias", "mlp_up_bias", "mlp_down_bias"),
    *("wte_weight_tying", "n_embd_wte_scale_tying"),
}

# Choices among networks, and which of them is GPT-2's.
_REQUIRED = {
    "attention_variant": "causal",
    "mlp_variant": "mlp",
    "mlp_down_projs": 1,
    "n_down_projs": 1,
    "n_lpe": 0,
    "norm_variant_attn": "layernorm",
    "norm_variant_output": "layernorm",
    "layernorm_variant": "layernorm",
    "softmax_variant": "softmax",
    "softmax_variant_attn": "softmax",
    "softmax_variant_output": "softmax",
    "use_abs_pos_embeddings": True,
    "use_pre_ln": True,
    "linear_variant": "linear",
    **{f"linear_variant_{part}": "linear" for part in ("attn", "mlp", "q", "k", "v", "attn_proj")},
    **{f"linear_variant_mlp_{part}": "linear" for part in ("up", "down")},
}

# What follows shapes features that are off where they are refused when on, concerns initialisation, training or
# logging, or is held by the weights themselves: offsets of activations, layers that share their weights.
_IDLE = {
    *("use_gradient_checkpointing", "recompute_backward_pass", "disable_flash_attention", "use_flex_attn"),
    *("eval_interval", "full_quant_iteration", "start_quant_level", "quant_scheduler", "activations_quant_method"),
    *("mlp_x_offset", "mlp_y_offset", "learn_mlp_x_offset", "learn_mlp_y_offset", "n_experts", "triadic_loops"),
    *("n_latent", "n_qk_head_dim", "n_v_head_dim", "n_cproj", "mod_fn", "store_activations", "div_by_seq_len"),
    *("apply_vector_file", "apply_vector_scaling_factor", "obtain_vector_file", "obtain_vector_at_layer_idx"),
    *("shared_mlp_size", "shared_mlp_sym", "shared_mlp_seq", "shared_attn_size", "shared_attn_sym", "shared_attn_seq"),
    *("apply_lsv_at_layer_idx", "attn_confidence_variant", "mlp_confidence_variant", "sym_rot_num_angles"),
    *("ln_f_input_mixer_variant", "ln_f_mixer_top_k", "import_wte_npy", "import_wte_freeze", "export_wte_npy"),
    *("use_flash_lobo_per_head", "use_flash_obo_const", "flash_lobo_log_const", "softmax_io_log_interval"),
    *("attn_resid_const", "mlp_resid_const", "use_attn_resid_const", "use_mlp_resid_const"),
    *("learn_attn_resid_const", "learn_mlp_resid_const", "import_scale_matrices_npz", "export_scale_matrices_npz"),
    *("import_scale_matrices_freeze", "softmax_io_logging", "consmax_beta_gamma_logging"),
    *("export_wte_each_eval", "export_scale_matrices_each_eval", "plot_statistics", "softmax_IO_interval"),
    *("shared_mlp_grouping", "shared_attn_grouping", "num_of_points", "quant_level", "max_iters"),
}
_IDLE_PREFIXES = (
    *("consmax_", "constantmax_", "exppolymax_", "pfla_", "polymax_", "relu2max_", "relumax_", "sigmoidmax_"),
    *("sigsoftmax_", "softermax_", "softplus_", "squareplus_", "strongermax_"),
    *("dact_", "hsnorm_", "krmsnorm_", "prmsnorm_", "kan_", "lsa_", "pla_", "shifted_gelu_", "moe_", "ssm_", "mla_"),
    *("fire_", "rope_", "shortrope_", "lpe_", "lsv_", "target_layer_", "quantization_", "quantize_linear_"),
    *(
        "dual_path_",
        "embedding_mean_",
        "embedding_std_",
        "gaussian_",
        "init_",
        "linear_mean_",
        "linear_std_",
        "resid_gaussian_",
    ),
)
_IDLE_SUFFIXES = ("_bits", "_method")
