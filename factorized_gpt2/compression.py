"""A trained baseline to factor files and compressed model folders."""

import logging
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, GPT2LMHeadModel, PreTrainedTokenizerBase

from .configuration_factorized_gpt2 import FactorizedGPT2Config
from .conversion import fingerprint, from_gpt2, vocabulary_matrices
from .errors import UserError, first_line
from .factorization import Factors, factorize_ranks
from .files import read_json, replacing_file, replacing_folder, write_json
from .modeling_factorized_gpt2 import FactorizedGPT2

logger = logging.getLogger(__name__)

RECORD_NAME = "compression.json"


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

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer with tokens that the model does not have.

        Raises:
            UserError: With both sizes.
        """
        vocab_size = self.model.config.vocab_size
        if len(tokenizer) > vocab_size:
            raise UserError(f"The tokenizer has {len(tokenizer)} tokens, the baseline only {vocab_size}.")


def load_baseline(name_or_path: str) -> Baseline:
    """Load a stock GPT-2, or an unfactorized model of this package, with every weight accounted for.

    Raises:
        UserError: It cannot be found or read, is of another architecture or factorized already, or has weights that
            are missing, misshapen, not accounted for, or NaN or infinite; the message names them.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(f"No model can be loaded from {name_or_path!r}: {first_line(error)}") from error
    if isinstance(config, FactorizedGPT2Config):
        if config.is_factorized:
            raise UserError(f"{name_or_path} is factorized already (n_embd_wte={config.n_embd_wte}).")
        model_class = FactorizedGPT2
    elif config.model_type == "gpt2":
        model_class = GPT2LMHeadModel
    else:
        raise UserError(f"{name_or_path} is a {config.model_type!r} model; the baseline must be a GPT-2.")
    try:
        model, loading = model_class.from_pretrained(name_or_path, output_loading_info=True)
        problems = [f"{kind.removesuffix('_keys')} {loading[kind]}" for kind in _LOADING_PROBLEMS if loading[kind]]
        if problems:
            raise UserError(f"The weights of {name_or_path} do not make its model: {'; '.join(problems)}.")
        for name, weight in model.named_parameters():
            if not torch.isfinite(weight).all():
                raise UserError(f"The weight {name!r} of {name_or_path} contains NaN or infinity.")
        converted = from_gpt2(model)
    except UserError:
        raise
    except Exception as error:  # safetensors, torch and transformers each have their own kinds for a damaged file
        raise UserError(f"The weights of {name_or_path} cannot be read: {first_line(error)}") from error
    return Baseline(converted, name_or_path, fingerprint(converted))


_LOADING_PROBLEMS = ("missing_keys", "mismatched_keys", "unexpected_keys")


def factors_folder(root: Path) -> Path:
    """Where the protocol keeps the factors of a PCA."""
    return root / "pca_factorized"


def model_folder(root: Path, rank: int) -> Path:
    """Where the protocol keeps a model compressed by PCA and not trained since."""
    return root / f"gpt_pca_nofinetune_k{rank}"


def pca_factors(baseline: Baseline, ranks: Sequence[int], root: Path, overwrite: bool = False) -> dict[int, Factors]:
    """Read the factor files of a baseline, or make them, all missing ranks with one decomposition.

    Args:
        baseline: The trained model.
        ranks: Ranks k.
        root: Folder above `pca_factorized/`, where `wte_pca_k{k}.npy` and `scale_mats_pca_k{k}.npz` stand.
        overwrite: Whether factor files of another baseline may be replaced.

    Returns:
        Factors by rank.

    Raises:
        UserError: A rank out of range; factor files of another baseline, unless `overwrite`.
    """
    baseline.check_ranks(ranks)
    folder = factors_folder(root)
    factors = {}
    for rank in ranks:
        stored = read_factors(folder, rank, baseline, overwrite)
        if stored is not None:
            logger.info("Factors of rank %d belong to this baseline and are reused: %s", rank, folder)
            factors[rank] = stored
    missing = [rank for rank in ranks if rank not in factors]
    if missing:
        embedding, head = vocabulary_matrices(baseline.model)
        made = factorize_ranks(embedding, missing, head)
        for rank in missing:
            write_factors(folder, made[rank], baseline)
        factors |= made
    return factors


def write_factors(folder: Path, factors: Factors, baseline: Baseline) -> None:
    """Write `wte_pca_k{k}.npy` and, with all that belongs to it, `scale_mats_pca_k{k}.npz`; float32."""
    with replacing_file(_wte_path(folder, factors.rank)) as path:
        np.save(path, factors.wte, allow_pickle=False)
    arrays = {
        "scale_up": factors.scale_up,
        "scale_down": factors.scale_down,
        "mean": factors.mean,
        "explained_variance_ratio": np.float64(factors.explained_variance_ratio),
        "baseline_fingerprint": np.array(baseline.fingerprint),
    }
    if factors.lm_head is not None:
        arrays["lm_head"] = factors.lm_head
    with replacing_file(_scales_path(folder, factors.rank)) as path:
        np.savez(path, **arrays)


def read_factors(folder: Path, rank: int, baseline: Baseline, overwrite: bool = False) -> Factors | None:
    """Read the factor files of one rank.

    Returns:
        The factors; `None` when there are no files, or others that may be replaced.

    Raises:
        UserError: Files that cannot be read or belong to another baseline, unless `overwrite`.
    """
    if not (_wte_path(folder, rank).exists() and _scales_path(folder, rank).exists()):
        return None
    try:
        wte = np.load(_wte_path(folder, rank), allow_pickle=False)
        with np.load(_scales_path(folder, rank), allow_pickle=False) as arrays:
            if str(arrays["baseline_fingerprint"]) == baseline.fingerprint:
                return Factors(
                    wte=wte,
                    scale_up=arrays["scale_up"],
                    scale_down=arrays["scale_down"],
                    mean=arrays["mean"],
                    explained_variance_ratio=float(arrays["explained_variance_ratio"]),
                    lm_head=arrays.get("lm_head"),
                )
        problem = "belong to another baseline"
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        problem = f"cannot be read ({str(error) or type(error).__name__})"
    if overwrite:
        return None
    raise UserError(f"The factor files of rank {rank} in {folder} {problem}; remove or overwrite them.")


def compressed_model(
    baseline: Baseline,
    rank: int,
    root: Path,
    tokenizer: PreTrainedTokenizerBase,
    overwrite: bool = False,
    factors: Factors | None = None,
) -> tuple[FactorizedGPT2, Path]:
    """Load the PCA-compressed model of a baseline, or make its folder first.

    Args:
        baseline: The trained model.
        rank: Rank k.
        root: Folder of the model folders and factor files.
        tokenizer: Goes into the folder.
        overwrite: Whether what was made from another baseline may be replaced.
        factors: Its factors at this rank; `None` takes them from the factor files, or makes those.

    Returns:
        The compressed model, in evaluation mode, and its folder.

    Raises:
        UserError: The folder holds something else, unless `overwrite`.
    """
    folder = model_folder(root, rank)
    if folder.exists() and any(folder.iterdir()):
        record = read_json(folder / RECORD_NAME) if (folder / RECORD_NAME).exists() else {}
        if record.get("baseline_fingerprint") == baseline.fingerprint:
            return FactorizedGPT2.from_pretrained(folder).eval(), folder
        if not overwrite:
            raise UserError(f"{folder} was not made from {baseline.name}; remove or overwrite it.")
    if factors is None:
        factors = pca_factors(baseline, [rank], root, overwrite)[rank]
    model = from_gpt2(baseline.model, factors)
    record = CompressionRecord(
        method="pca",
        n_embd_wte=rank,
        explained_variance_ratio=factors.explained_variance_ratio,
        baseline=baseline.name,
        baseline_fingerprint=baseline.fingerprint,
    )
    with replacing_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / RECORD_NAME, asdict(record))
    return model, folder


@dataclass(frozen=True)
class CompressionRecord:
    """What a compressed model was made from, as `compression.json` beside it says."""

    method: str
    n_embd_wte: int
    explained_variance_ratio: float
    baseline: str
    baseline_fingerprint: str


def _wte_path(folder: Path, rank: int) -> Path:
    return folder / f"wte_pca_k{rank}.npy"


def _scales_path(folder: Path, rank: int) -> Path:
    return folder / f"scale_mats_pca_k{rank}.npz"
