"""The protocol's factor files: a PCA of a baseline, by rank, as arrays on disk.

They are made of the baseline's vocabulary matrices alone, and so known by its weights; the second file of a rank knows
the first by its content.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..common.errors import UserError, is_defect
from ..common.files import replacing_file
from ..common.lfs_pointers import refuse_pointers
from ..models.decoder_conversion import vocabulary_matrices_of
from ..models.factors import Factors
from ..models.loading import Baseline
from ..models.sizes import vocabulary_width
from .pca import factorize_ranks

logger = logging.getLogger(__name__)


def factors_folder(root: Path) -> Path:
    """Where the protocol keeps the factors of a PCA."""
    return root / "pca_factorized"


def pca_factors(baseline: Baseline, ranks: Sequence[int], root: Path, overwrite: bool = False) -> dict[int, Factors]:
    """Read the factor files of a baseline, or make them, all missing ranks with one decomposition.

    Args:
        baseline: The trained model.
        ranks: Ranks k that `ranks.check_ranks` lets pass.
        root: Folder above `pca_factorized/`, where `wte_pca_k{k}.npy` and `scale_mats_pca_k{k}.npz` stand.
        overwrite: Whether factor files of another baseline may be replaced.

    Returns:
        Factors by rank.

    Raises:
        UserError: Factor files of another baseline, unless `overwrite`.
    """
    folder = factors_folder(root)
    factors = {}
    for rank in ranks:
        stored = read_factors(folder, rank, baseline, overwrite)
        if stored is not None:
            logger.info("Factors of rank %d belong to this baseline and are reused: %s", rank, folder)
            factors[rank] = stored
    missing = [rank for rank in ranks if rank not in factors]
    if missing:
        embedding, head = vocabulary_matrices_of(baseline.model)
        made = factorize_ranks(embedding, missing, head)
        for rank in missing:
            write_factors(folder, made[rank], baseline)
        factors |= made
    return factors


def write_factors(folder: Path, factors: Factors, baseline: Baseline) -> None:
    """Write `wte_pca_k{k}.npy` and, with all that belongs to it, `scale_mats_pca_k{k}.npz`; float32.

    While they do not belong together the second, without which the first does not count, is not there.
    """
    _scales_path(folder, factors.rank).unlink(missing_ok=True)
    with replacing_file(_wte_path(folder, factors.rank)) as path:
        np.save(path, factors.wte, allow_pickle=False)
    arrays: dict[str, np.ndarray] = {
        "scale_up": factors.scale_up,
        "scale_down": factors.scale_down,
        "mean": factors.mean,
        "explained_variance_ratio": np.asarray(factors.explained_share, np.float64),
        "baseline_fingerprint": np.array(baseline.fingerprint),
        "wte_fingerprint": np.array(_digest(factors.wte)),
    }
    if factors.lm_head is not None:
        arrays["lm_head"] = factors.lm_head
    with replacing_file(_scales_path(folder, factors.rank)) as path:
        np.savez(path, **arrays)  # type: ignore[arg-type]  # which it takes none of for `allow_pickle`


def read_factors(folder: Path, rank: int, baseline: Baseline, overwrite: bool = False) -> Factors | None:
    """Read the factor files of one rank.

    Returns:
        The factors; `None` when there are no files, or others that may be replaced.

    Raises:
        UserError: Files that cannot be read or belong to another baseline, unless `overwrite`.
    """
    if not (_wte_path(folder, rank).exists() and _scales_path(folder, rank).exists()):
        return None
    refuse_pointers([_wte_path(folder, rank), _scales_path(folder, rank)])
    try:
        wte = np.load(_wte_path(folder, rank), allow_pickle=False)
        with np.load(_scales_path(folder, rank), allow_pickle=False) as arrays:
            if str(arrays.get("wte_fingerprint", _digest(wte))) != _digest(wte):  # earlier versions wrote none
                raise ValueError(f"{_wte_path(folder, rank).name} is of another factorization")
            if str(arrays["baseline_fingerprint"]) == baseline.fingerprint:
                stored = Factors(
                    wte=wte,
                    scale_up=arrays["scale_up"],
                    scale_down=arrays["scale_down"],
                    mean=arrays["mean"],
                    explained_share=float(arrays["explained_variance_ratio"]),
                    lm_head=arrays.get("lm_head"),
                )
                _check_fit(stored, rank, baseline)
                return stored
        problem = "belong to another baseline"
    except Exception as error:  # numpy, zipfile and zlib each have their own kinds
        if is_defect(error):
            raise
        problem = f"cannot be read ({str(error) or type(error).__name__})"
    if overwrite:
        return None
    raise UserError(f"The factor files of rank {rank} in {folder} {problem}; remove or overwrite them.")


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, dtype=np.float32).data).hexdigest()


def _check_fit(factors: Factors, rank: int, baseline: Baseline) -> None:
    vocab_size, width = baseline.model.config.vocab_size, vocabulary_width(baseline.model.config)
    shapes = {"wte": (vocab_size, rank), "scale_up": (rank, width), "scale_down": (width, rank), "mean": (width,)}
    if not baseline.model.config.tie_word_embeddings:
        shapes["lm_head"] = (rank, vocab_size)
    for name, shape in shapes.items():
        array = getattr(factors, name)
        if array is None or array.shape != shape or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise ValueError(f"{name} is not a finite array of floats of shape {shape}")


def _wte_path(folder: Path, rank: int) -> Path:
    return folder / f"wte_pca_k{rank}.npy"


def _scales_path(folder: Path, rank: int) -> Path:
    return folder / f"scale_mats_pca_k{rank}.npz"
