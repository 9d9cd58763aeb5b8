"""Factors as the factorized descendant of nanoGPT keeps them in files, in and out.

In its network `scale_up` and `scale_down` are both (d, k), and the second is applied transposed. It exports them as
they are, and imports them transposed: the files it reads hold (k, d) twice. `wte` is (V, k) in any case.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.errors import UserError, first_line
from ..common.files import replacing_file
from ..common.lfs_pointers import refuse_pointers
from ..models.factors import Factors
from ..models.weight_names import plain_name
from ..network.modeling_factorized_gpt2 import FactorizedGPT2

SCALE_BIAS = "transformer.scale_up.bias"  # a name that no checkpoint has, for the mean in the protocol's files

_SCALES = ("scale_up", "scale_down")
_PROTOCOL = {*_SCALES, "mean", "lm_head", "explained_variance_ratio", "baseline_fingerprint", "wte_fingerprint"}


def replace_vocabulary(
    weights: Mapping[str, torch.Tensor],
    options: Mapping[str, Any],
    wte_npy: str | Path | None = None,
    scale_npz: str | Path | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Put factors from files in the place of a checkpoint's own.

    Args:
        weights: The checkpoint's `model`. It is not changed.
        options: The checkpoint's `model_args`. It is not changed.
        wte_npy: File of `wte` (V, k) float, or (V, d) for a network that is not factorized. The head is tied to it.
        scale_npz: File of `scale_up` and `scale_down` float, each (k, d) or (d, k); with `mean` (d,) and `lm_head`
            (k, V) if it is one of the protocol's.

    Returns:
        Weights and options with those of the files among them.

    Raises:
        UserError: A file that cannot be read, or arrays that are unknown, missing, misshapen or no floats, by name.
    """
    options, new = dict(options), {}
    width = options.get("n_embd")
    if wte_npy is not None:
        wte = _read_npy(Path(wte_npy))
        new["transformer.wte.weight"] = new["lm_head.weight"] = wte
        vocab_size, rank = wte.shape
        is_alone = scale_npz is None and not options.get("n_embd_wte")
        if is_alone and rank != width:
            raise UserError(
                f"{wte_npy} has width {rank}, but the checkpoint has {width}: give the scale matrices (scale_npz) too."
            )
        options |= {"vocab_size": vocab_size, "n_embd_wte": None if is_alone else rank, "wte_weight_tying": True}
    if scale_npz is not None:
        arrays, rank = _read_npz(Path(scale_npz)), options.get("n_embd_wte")
        if not rank:
            raise UserError(f"{scale_npz} has no effect without wte_npy, because the checkpoint is not factorized.")
        for name in _SCALES:
            new[f"transformer.{name}.weight"] = _oriented(arrays[name], width, rank, f"{name} in {scale_npz}")
        scale_up, scale_down = (new[f"transformer.{name}.weight"] for name in _SCALES)
        options["n_embd_wte_scale_tying"] = torch.equal(scale_up, scale_down)
        if "mean" in arrays:
            new[SCALE_BIAS] = arrays["mean"]
        if "lm_head" in arrays:
            new["lm_head.weight"] = arrays["lm_head"].T
            options |= {"wte_weight_tying": False, "import_wte_npy": None}
    kept = {name: weight for name, weight in weights.items() if plain_name(str(name)) not in new}
    return kept | new, options


def old_factors(source: FactorizedGPT2 | Factors) -> dict[str, np.ndarray]:
    """Lay factors out as the descendant of nanoGPT imports them.

    It has no bias after `scale_up`. One that is not zero becomes a further rank: a column of ones in `wte`, a row of
    `scale_up`, and zeros in `scale_down`, so that the head does not see it.

    Args:
        source: A factorized model, or factors; their head must be tied, for the import ties it.

    Returns:
        `wte` (V, k), `scale_up` (k, d) and `scale_down` (k, d), float32, with k + 1 for k where there is a bias.

    Raises:
        UserError: The source is not factorized, or untied.
    """
    if isinstance(source, FactorizedGPT2):
        if not source.config.is_factorized:
            raise UserError("The model is not factorized.")
        if source.config.is_coded:
            raise UserError("The model has an integer vocabulary: convert it to floats with `dequantize()` first.")
        tied, up = source.config.tie_word_embeddings, source.transformer.scale_up
        wte, scale_up, scale_down = (
            _array(module.weight) for module in (source.transformer.wte, up, source.scale_down)
        )
        scale_up, mean = scale_up.T, np.zeros(0) if up.bias is None else _array(up.bias)
    else:
        tied, mean = source.lm_head is None, source.mean
        wte, scale_up, scale_down = source.wte, source.scale_up, source.scale_down.T
    if not tied:
        raise UserError(
            "The head has its own matrix (lm_head), which these files cannot store: they always have a tied head."
        )
    if mean.any():
        wte = np.concatenate([wte, np.ones_like(wte[:, :1])], axis=1)
        scale_up = np.concatenate([scale_up, mean[None]])
        scale_down = np.concatenate([scale_down, np.zeros_like(scale_down[:1])])
    arrays = {"wte": wte, "scale_up": scale_up, "scale_down": scale_down}
    return {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()}


def write_old_factors(source: FactorizedGPT2 | Factors, wte_npy: str | Path, scale_npz: str | Path) -> dict[str, Any]:
    """Write the files that the descendant of nanoGPT reads with `--import_wte_npy` and `--import_scale_matrices_npz`.

    Args:
        source: As in `old_factors`.
        wte_npy: Where to write `wte`.
        scale_npz: Where to write `scale_up` and `scale_down`.

    Returns:
        The options to give there, by name.

    Raises:
        UserError: As `old_factors`.
    """
    arrays = old_factors(source)
    wte = arrays.pop("wte")
    with replacing_file(Path(wte_npy)) as path, path.open("wb") as file:
        np.save(file, wte, allow_pickle=False)
    with replacing_file(Path(scale_npz)) as path, path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # which it takes none of for `allow_pickle`
    return {
        "import_wte_npy": str(wte_npy),
        "import_scale_matrices_npz": str(scale_npz),
        "n_embd_wte": wte.shape[1],
        "n_embd_wte_scale_tying": np.array_equal(arrays["scale_up"], arrays["scale_down"]),
    }


def _read_npy(path: Path) -> torch.Tensor:
    refuse_pointers([path])
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy has many kinds for what is not its own
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2:
        raise UserError(f"{path} does not hold one matrix (V, k).")
    return _tensor(array, f"wte in {path}")


def _read_npz(path: Path) -> dict[str, torch.Tensor]:
    refuse_pointers([path])
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except Exception as error:  # numpy, zipfile and zlib each have their own kinds
        raise UserError(f"{path} cannot be read as .npz: {first_line(error)}") from error
    for name in _SCALES:
        if name not in arrays:
            raise UserError(f"{path} has no {name!r}.")
    unknown = sorted(arrays.keys() - _PROTOCOL)
    if unknown:
        raise UserError(f"{path} holds {unknown[0]!r}, which is not known here.")
    return {
        name: _tensor(arrays[name], f"{name} in {path}") for name in (*_SCALES, "mean", "lm_head") if name in arrays
    }


def _tensor(array: np.ndarray, what: str) -> torch.Tensor:
    if array.dtype.kind != "f":
        raise UserError(f"{what} has type {array.dtype}, not a float type.")
    with np.errstate(over="ignore"):  # what becomes infinite is refused with the weights
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def _oriented(scale: torch.Tensor, width: int, rank: int, what: str) -> torch.Tensor:
    """Turn a scale matrix so that it is (d, k)."""
    if tuple(scale.shape) == (width, rank):
        return scale
    if tuple(scale.shape) == (rank, width):
        return scale.T
    raise UserError(f"{what} has shape {tuple(scale.shape)}, expected ({rank}, {width}) or its transpose.")


def _array(weight: torch.Tensor) -> np.ndarray:
    return weight.detach().float().cpu().numpy()
