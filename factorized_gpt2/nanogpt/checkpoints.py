"""Checkpoints of nanoGPT, and of its factorized descendant ReaLLMASIC/nanoGPT, to models of this package."""

import argparse
import logging
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ..common.errors import UserError, first_line
from ..common.lfs_pointers import refuse_pointers
from ..models.weight_names import plain_name
from ..network.configuration_factorized_gpt2 import FactorizedGPT2Config
from ..network.modeling_factorized_gpt2 import FactorizedGPT2
from .factor_files import SCALE_BIAS, replace_vocabulary
from .options import NAMES_ACTIVATION, OldNetwork, read_options

logger = logging.getLogger(__name__)

_GPT2_END_OF_TEXT = 50256


def load_old_checkpoint(
    path: str | Path,
    *,
    wte_npy: str | Path | None = None,
    scale_npz: str | Path | None = None,
    activation_function: str | None = None,
) -> FactorizedGPT2:
    """Load `ckpt.pt` of nanoGPT or of its factorized descendant; nothing in it is executed.

    Args:
        path: The checkpoint.
        wte_npy: An embedding (V, k) float that takes the place of the checkpoint's, on both sides, as the descendant
            imports it.
        scale_npz: `scale_up` and `scale_down` float, each as (k, d) or (d, k), that take the place of the
            checkpoint's. The protocol's factor files may bring `mean` and `lm_head` too.
        activation_function: As in `from_old_weights`.

    Returns:
        A model in evaluation mode, float32, factorized if the checkpoint is or the files make it so. All rows of
        the vocabulary are there, nanoGPT's padding included; `resize_token_embeddings` cuts them.

    Raises:
        UserError: A file that cannot be read or holds more than weights and plain values; weights that are unknown,
            missing, misshapen, NaN or infinite; an option that this package's network cannot honour. All by name.
    """
    weights, options = _read_checkpoint(Path(path))
    try:
        model = from_old_weights(*replace_vocabulary(weights, options, wte_npy, scale_npz), activation_function)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if activation_function is None and NAMES_ACTIVATION not in options:
        logger.info(
            "%s does not say which GELU its network has: it is taken for the exact one, nanoGPT's since May 2023; "
            "older ones have the tanh approximation, which is --activation_function gelu_new.",
            path,
        )
    return model


def from_old_weights(
    weights: Mapping[str, torch.Tensor], options: Mapping[str, Any], activation_function: str | None = None
) -> FactorizedGPT2:
    """Convert the weights of nanoGPT or of its factorized descendant.

    Biases that the network does not have become zeros. Where `scale_up` and `scale_down` were one matrix they become
    two of equal values, and so do layers that shared theirs.

    Args:
        weights: The checkpoint's `model`, state dict names, with or without what wrappers leave in them.
        options: The checkpoint's `model_args`.
        activation_function: What the feed-forward networks compute, as transformers names it, where the options do
            not say so: "gelu", the default, or "gelu_new", the approximation that nanoGPT had until May 2023.

    Returns:
        A new model in evaluation mode, float32, which shares no memory with `weights`.

    Raises:
        UserError: As `load_old_checkpoint`.
    """
    network, left = read_options(options, activation_function), _Weights(weights)
    state = _vocabulary(left, network)
    for layer in range(network.n_layer):
        state |= _block(left, network, layer)
    left.refuse_rest()
    end_of_text = _GPT2_END_OF_TEXT if network.vocab_size > _GPT2_END_OF_TEXT else None
    config = FactorizedGPT2Config(
        vocab_size=network.vocab_size,
        n_positions=network.block_size,
        n_embd=network.n_embd,
        n_layer=network.n_layer,
        n_head=network.n_head,
        n_inner=None if network.n_inner == 4 * network.n_embd else network.n_inner,
        n_embd_wte=network.n_embd_wte,
        scale_up_bias=SCALE_BIAS in state,
        activation_function=network.activation,
        resid_pdrop=network.dropout,
        embd_pdrop=network.dropout,
        attn_pdrop=network.dropout,
        tie_word_embeddings=network.tied,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    with torch.device("meta"):
        model = FactorizedGPT2(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def _read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a checkpoint's weights and options, refusing everything that would have to be executed."""
    refuse_pointers([path])
    try:
        # Of the settings of a run, which are plain values in either case.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # of pickles that are no checkpoints, which are refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"{path} holds more than weights and plain values{f' ({culprit[1]})' if culprit else ''}, which is not "
            "loaded because it could do anything; where you trust it, save its 'model' and 'model_args' alone."
        ) from error
    except Exception as error:  # files, archives and storages each have their own kinds
        raise UserError(f"{path} cannot be read as a checkpoint: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is a {type(content).__name__}, not a checkpoint of nanoGPT.")
    for name in ("model", "model_args"):
        if not isinstance(content.get(name), dict):
            raise UserError(f"{path} is not a checkpoint of nanoGPT: it has no {name!r}.")
    if content.get("nan") is True:
        raise UserError(f"{path} was saved when its loss had become NaN; use an earlier checkpoint.")
    unknown = sorted(repr(name) for name in content.keys() - _CONTENT if content[name] is not None)
    if unknown:
        raise UserError(f"{path} holds {', '.join(unknown[:3])}, which a checkpoint of nanoGPT does not contain.")
    return content["model"], content["model_args"]


_CONTENT = {
    *("model", "model_args", "optimizer", "scheduler", "iter_num", "best_val_loss", "best_iter", "config"),
    *("nan", "nan_iter_num"),
}


class _Weights:
    """Weights that are taken one by one, each checked; what is left in the end is unknown."""

    def __init__(self, weights: Mapping[str, torch.Tensor]):
        self._left: dict[str, torch.Tensor] = {}
        for name, weight in weights.items():
            plain = plain_name(str(name))
            if plain in self._left:
                raise UserError(f"The weight {plain!r} is there twice.")
            self._left[plain] = weight

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """Take out a copy of a weight, float32."""
        if name not in self._left:
            raise UserError(f"The weight {name!r} is missing.")
        weight = self._left.pop(name)
        is_dense = isinstance(weight, torch.Tensor) and weight.layout == torch.strided
        if not (is_dense and weight.is_floating_point()):
            raise UserError(f"{name!r} is not a dense tensor of floats.")
        if tuple(weight.shape) != shape:
            raise UserError(f"The weight {name!r} has shape {tuple(weight.shape)}, its options say {shape}.")
        weight = weight.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
        if not torch.isfinite(weight).all():
            raise UserError(f"The weight {name!r} contains NaN or infinity.")
        return weight

    def take_or_zeros(self, name: str, *shape: int, wanted: bool) -> torch.Tensor:
        """Take out a weight that must be there if `wanted`, and else be left to be refused."""
        return self.take(name, *shape) if wanted else torch.zeros(shape)

    def drop_causal_mask(self, name: str) -> None:
        """Take out the mask that nanoGPT keeps where it has no fused attention."""
        mask = self._left.get(name)
        if isinstance(mask, torch.Tensor) and mask.ndim == 4 and torch.equal(mask, torch.ones_like(mask).tril()):
            del self._left[name]

    def refuse_rest(self) -> None:
        if self._left:
            names = sorted(self._left)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"Unknown weights: {', '.join(map(repr, names[:3]))}{more}.")


def _vocabulary(left: _Weights, network: OldNetwork) -> dict[str, torch.Tensor]:
    """Take what is not in the blocks."""
    rank, width = network.n_embd_wte, network.n_embd
    wte, head = (
        left.take(name, network.vocab_size, rank or width) for name in ("transformer.wte.weight", "lm_head.weight")
    )
    if network.tied and not torch.equal(wte, head):
        raise UserError(
            "The weight 'lm_head.weight' differs from 'transformer.wte.weight', although the options say that they "
            "are tied."
        )
    state = {
        "transformer.wte.weight": wte,
        "lm_head.weight": head,
        "transformer.wpe.weight": left.take("transformer.wpe.weight", network.block_size, width),
        "transformer.ln_f.weight": left.take("transformer.ln_f.weight", width),
        "transformer.ln_f.bias": left.take_or_zeros("transformer.ln_f.bias", width, wanted=network.bias),
    }
    if rank is not None:
        scale_up, scale_down = (
            left.take(f"transformer.{name}.weight", width, rank) for name in ("scale_up", "scale_down")
        )
        if network.scales_tied and not torch.equal(scale_up, scale_down):
            raise UserError(
                "'transformer.scale_down.weight' differs from 'transformer.scale_up.weight', although the options say "
                "that they are tied."
            )
        state |= {"transformer.scale_up.weight": scale_up, "scale_down.weight": scale_down.T.contiguous()}
        if SCALE_BIAS in left:
            state[SCALE_BIAS] = left.take(SCALE_BIAS, width)
    return state


def _block(left: _Weights, network: OldNetwork, layer: int) -> dict[str, torch.Tensor]:
    """Take a block: nn.Linear there as here, with q, k, v fused in nanoGPT and apart in its descendant."""
    block, width, inner, bias = f"transformer.h.{layer}", network.n_embd, network.n_inner, network.bias
    left.drop_causal_mask(f"{block}.attn.bias")
    new_norms = f"{block}.pre_ln_attn.weight" in left
    state = {}
    for norm, renamed in (("ln_1", "pre_ln_attn"), ("ln_2", "pre_ln_mlp")):
        source = f"{block}.{renamed if new_norms else norm}"
        state[f"{block}.{norm}.weight"] = left.take(f"{source}.weight", width)
        state[f"{block}.{norm}.bias"] = left.take_or_zeros(f"{source}.bias", width, wanted=bias)
    attn = f"{block}.attn"
    if f"{attn}.c_attn.weight" in left:
        weights = left.take(f"{attn}.c_attn.weight", 3 * width, width).split(width)
        biases = left.take_or_zeros(f"{attn}.c_attn.bias", 3 * width, wanted=bias).split(width)
    else:
        weights = [left.take(f"{attn}.c_attn_{role}.weight", width, width) for role in "qkv"]
        biases = [left.take_or_zeros(f"{attn}.c_attn_{role}.bias", width, wanted=bias) for role in "qkv"]
    for role, weight, its_bias in zip("qkv", weights, biases, strict=True):
        state |= {f"{attn}.{role}_proj.weight": weight.clone(), f"{attn}.{role}_proj.bias": its_bias.clone()}
    state[f"{attn}.c_proj.weight"] = left.take(f"{attn}.c_proj.weight", width, width)
    state[f"{attn}.c_proj.bias"] = left.take_or_zeros(f"{attn}.c_proj.bias", width, wanted=bias)

    mlp = f"{block}.mlp"
    up, down = left.take(f"{mlp}.c_fc.weight", inner, width), left.take(f"{mlp}.c_proj.weight", width, inner)
    up_bias = left.take_or_zeros(f"{mlp}.c_fc.bias", inner, wanted=network.up_bias)
    down_bias = left.take_or_zeros(f"{mlp}.c_proj.bias", width, wanted=network.down_bias)
    # The descendant computes act(x - x_offset) - y_offset between the two layers.
    x_offset, y_offset = (
        left.take_or_zeros(name, wanted=name in left)
        for name in (f"{mlp}.activation_x_offset", f"{mlp}.activation_y_offset")
    )
    state |= {f"{mlp}.mlp_up.weight": up, f"{mlp}.mlp_up.bias": up_bias - x_offset}
    return state | {f"{mlp}.mlp_down.weight": down, f"{mlp}.mlp_down.bias": down_bias - y_offset * down.sum(dim=1)}
