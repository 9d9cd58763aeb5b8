"""GPT-2 weights to factorized weights and back. Pure: models in, models out."""

import copy
import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ..network.coded_table import CodedTable
from ..network.coded_vocabulary import table_tensors, without_codes
from ..network.configuration_factorized_gpt2 import FactorizedGPT2Config
from ..network.modeling_factorized_gpt2 import FactorizedGPT2
from ..network.stored_vocabulary import vocabulary_names
from .factors import Factors

_QKV = ("q_proj", "k_proj", "v_proj")


def from_gpt2(model: GPT2LMHeadModel | FactorizedGPT2, factors: Factors | CodedTable | None = None) -> FactorizedGPT2:
    """Convert a GPT-2 into the model of this package, exactly, or with its vocabulary side factorized.

    Args:
        model: A stock GPT-2, or an unfactorized `FactorizedGPT2`. It is not changed.
        factors: Factors of its vocabulary matrices; with an `lm_head` of their own they untie a tied model. A coded
            table of the matrix, which must be tied, makes a vocabulary of integers. `None` keeps the matrices whole:
            the same network, the same logits.

    Returns:
        A new model in evaluation mode, in the dtype and on the device of `model`.

    Raises:
        ValueError: A weight that is missing, not accounted for or of the wrong shape, by name; factors that do not
            fit the model.
        TypeError: `model` is neither of the two.
    """
    trunk, wte, lm_head = _split_vocabulary(model)
    tied = lm_head is None and getattr(factors, "lm_head", None) is None
    config = _factorized_config(model.config, factors, tied)
    if factors is None:
        vocabulary = {"transformer.wte.weight": wte, "lm_head.weight": wte if lm_head is None else lm_head}
    else:
        if isinstance(factors, Factors) and factors.rank >= wte.shape[1]:
            raise ValueError(f"Factors of rank {factors.rank} do not make a model of width {wte.shape[1]} smaller.")
        vocabulary = factor_weights(factors, (len(wte), wte.shape[1]), must_untie=lm_head is not None)
    made = _build(FactorizedGPT2, config, trunk | vocabulary, like=wte, generation_config=model.generation_config)
    if isinstance(factors, CodedTable):
        made.transformer.wte.stored = without_codes(factors)
    return made


def to_gpt2(model: FactorizedGPT2) -> GPT2LMHeadModel:
    """Convert into a stock GPT-2, for tools that know nothing else.

    An unfactorized model converts back exactly. A factorized one is expanded: the embedding becomes
    `wte @ scale_up + bias` and the head `scale_down @ lm_head`, two different matrices, so the result is untied and
    its vocabulary takes 2 V d numbers. Its logits are those of `model`, up to rounding.

    Args:
        model: The model to convert. It is not changed. Adapters must have been merged.

    Returns:
        A new model in evaluation mode, in the dtype and on the device of `model`.

    Raises:
        ValueError: A weight that is missing, not accounted for or of the wrong shape, by name; a bias on the head.
    """
    if model.config.lm_head_bias:
        raise ValueError("The head has a bias, which GPT-2's head cannot have.")
    model = model.dequantize() if model.config.is_coded else model
    config = model.config
    state = dict(model.state_dict())
    wte, lm_head = _take(state, "transformer.wte.weight"), _take(state, "lm_head.weight")
    tied = not config.is_factorized and _is_tied(model, wte, lm_head)
    if config.is_factorized:
        scale_up, scale_down = _take(state, "transformer.scale_up.weight"), _take(state, "scale_down.weight")
        bias = state.pop("transformer.scale_up.bias", None)
        wte = wte @ scale_up.T
        wte = wte if bias is None else wte + bias
        lm_head = lm_head @ scale_down
    weights = {"transformer.wte.weight": wte, "lm_head.weight": wte if tied else lm_head}
    for source, targets in _trunk_names(config.n_layer):
        parts = [_oriented(source, _take(state, name)) for name in targets]
        weights[source] = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    _refuse_leftovers(state)
    fields = {name: value for name, value in config.to_dict().items() if name not in _NOT_GPT2}
    fields["tie_word_embeddings"] = tied
    # transformers dropped n_ctx, but what reads older GPT-2s, as llama.cpp's converter does, asks for it.
    fields |= {"n_ctx": config.n_positions, "attn_implementation": config._attn_implementation}
    return _build(GPT2LMHeadModel, GPT2Config(**fields), weights, like=wte, generation_config=model.generation_config)


def vocabulary_matrices(model: GPT2LMHeadModel | FactorizedGPT2) -> tuple[np.ndarray, np.ndarray | None]:
    """Read the matrices that a factorization replaces.

    Returns:
        The token embedding (V, d) float32, and the head's own (V, d) float32, or `None` when it is tied.

    Raises:
        ValueError: The model is factorized already.
    """
    _, wte, lm_head = _split_vocabulary(model)
    return wte.float().cpu().numpy(), None if lm_head is None else lm_head.float().cpu().numpy()


def fingerprint(model: GPT2LMHeadModel | FactorizedGPT2) -> str:
    """Identify an unfactorized model by its weights, in whichever of the two layouts they come.

    Returns:
        SHA-256 over names, dtypes, shapes and bytes of the weights, as 64 hexadecimal digits.
    """
    trunk, wte, lm_head = _split_vocabulary(model)
    return digest_of(trunk | {"wte": wte} | ({} if lm_head is None else {"lm_head": lm_head}))


def digest_of(weights: dict[str, torch.Tensor]) -> str:
    """Compute SHA-256 over names, dtypes, shapes and bytes of weights, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.view(torch.uint8).numpy().data)
    return digest.hexdigest()


# Fields that GPT2Config does not have, or that a new model writes itself.
_NOT_GPT2 = {
    *("n_embd_wte", "scale_up_bias", "vocabulary_dtype", "lm_head_bias"),
    *("model_type", "architectures", "transformers_version", "auto_map", "n_ctx"),
}


def _split_vocabulary(
    model: GPT2LMHeadModel | FactorizedGPT2,
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None]:
    """Return the trunk's weights under this package's names, the token embedding, and the head when it is untied."""
    if not isinstance(model, GPT2LMHeadModel | FactorizedGPT2):
        raise TypeError(f"Expected a GPT2LMHeadModel or a FactorizedGPT2, got {type(model).__name__}.")
    state = {name: weight.detach() for name, weight in model.state_dict().items()}
    if isinstance(model, FactorizedGPT2) and model.config.is_factorized:
        raise ValueError(f"The model is factorized already (n_embd_wte={model.config.n_embd_wte}).")
    wte = _take(state, "transformer.wte.weight", (model.config.vocab_size, model.config.n_embd))
    lm_head = _take(state, "lm_head.weight", tuple(wte.shape))
    trunk: dict[str, torch.Tensor] = {}
    for source, targets in _trunk_names(model.config.n_layer):
        if isinstance(model, FactorizedGPT2):
            trunk |= {name: _take(state, name) for name in targets}
        elif len(targets) == 1:
            trunk[targets[0]] = _oriented(source, _take(state, source))
        else:
            fused = _take(state, source, _qkv_shape(source, model.config.n_embd))
            parts = fused.split(model.config.n_embd, dim=-1)
            trunk |= {name: _oriented(source, part) for name, part in zip(targets, parts, strict=True)}
    _refuse_leftovers(state)
    return trunk, wte, None if _is_tied(model, wte, lm_head) else lm_head


def _is_tied(model: GPT2LMHeadModel | FactorizedGPT2, wte: torch.Tensor, lm_head: torch.Tensor) -> bool:
    """Tell whether a head is the embedding in truth: a config may say so of a model with a head of its own."""
    if not model.config.tie_word_embeddings:
        return False
    is_shared = model.lm_head.weight is model.transformer.wte.weight
    return is_shared or lm_head.is_meta or torch.equal(lm_head, wte)


def _trunk_names(n_layer: int) -> Iterator[tuple[str, list[str]]]:
    """Pair every weight of a GPT-2 trunk with its name here; the fused q, k, v with three names."""
    for name in ("wpe.weight", "ln_f.weight", "ln_f.bias"):
        yield f"transformer.{name}", [f"transformer.{name}"]
    for layer in range(n_layer):
        block = f"transformer.h.{layer}"
        for kind in ("weight", "bias"):
            for norm in ("ln_1", "ln_2"):
                yield f"{block}.{norm}.{kind}", [f"{block}.{norm}.{kind}"]
            yield f"{block}.attn.c_attn.{kind}", [f"{block}.attn.{name}.{kind}" for name in _QKV]
            yield f"{block}.attn.c_proj.{kind}", [f"{block}.attn.c_proj.{kind}"]
            yield f"{block}.mlp.c_fc.{kind}", [f"{block}.mlp.mlp_up.{kind}"]
            yield f"{block}.mlp.c_proj.{kind}", [f"{block}.mlp.mlp_down.{kind}"]


def _oriented(gpt2_name: str, weight: torch.Tensor) -> torch.Tensor:
    """Transpose what GPT-2's Conv1D stores as [in, out] and nn.Linear as [out, in]; leave the rest."""
    is_conv1d = gpt2_name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return weight.T.contiguous() if is_conv1d else weight


def _qkv_shape(name: str, n_embd: int) -> tuple[int, ...]:
    return (n_embd, 3 * n_embd) if name.endswith("weight") else (3 * n_embd,)


def _take(state: dict[str, torch.Tensor], name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    if name not in state:
        raise ValueError(f"The model has no weight {name!r}.")
    weight = state.pop(name)
    if shape is not None and tuple(weight.shape) != shape:
        raise ValueError(f"Weight {name!r} has shape {tuple(weight.shape)}, expected {shape}.")
    return weight


def _refuse_leftovers(state: dict[str, torch.Tensor]) -> None:
    if state:
        raise ValueError(f"The model has weights that GPT-2 does not have: {', '.join(sorted(state))}.")


def _factorized_config(config: GPT2Config, factors: Factors | CodedTable | None, tied: bool) -> FactorizedGPT2Config:
    fields = {name: value for name, value in config.to_dict().items() if name not in _NOT_GPT2}
    if isinstance(factors, CodedTable):
        fields |= {"n_embd_wte": factors.codes.shape[1], "vocabulary_dtype": "int8"}
        fields["lm_head_bias"] = bool(factors.bias_codes.any())
    else:
        fields |= {"n_embd_wte": None if factors is None else factors.rank}
    fields |= {"scale_up_bias": True, "tie_word_embeddings": tied, "attn_implementation": config._attn_implementation}
    return FactorizedGPT2Config(**fields)


def factor_weights(
    factors: Factors | CodedTable, shape: tuple[int, int], must_untie: bool, trunk: str = "transformer."
) -> dict[str, torch.Tensor]:
    """Lay factors out as models store them: nn.Linear holds the transpose of the matrix that it applies.

    Args:
        factors: Or a coded table.
        shape: V and d of the model.
        must_untie: Whether the model's head has a matrix of its own.
        trunk: What the names of `wte` and `scale_up` begin with.

    Returns:
        The weights by their names, those of a tied head included.

    Raises:
        ValueError: Factors that do not fit the model.
    """
    if isinstance(factors, CodedTable):
        found = (len(factors.codes), len(factors.mean))
        if found != shape:
            raise ValueError(f"The coded table is for a matrix of shape {found}, but the model's has {shape}.")
        if must_untie:
            raise ValueError("A coded table is for a head that is tied, but the model's is not.")
        names = vocabulary_names(trunk)
        tensors = table_tensors(factors, names)
        return {name: made for name, made in tensors.items() if name != names.bias or factors.bias_codes.any()}
    if must_untie and factors.lm_head is None:
        raise ValueError("The factors are for a head that is tied, but the model's is not.")
    (vocab_size, width), rank = shape, factors.rank
    matrices = {
        f"{trunk}wte.weight": (factors.wte, (vocab_size, rank)),
        f"{trunk}scale_up.weight": (factors.scale_up.T, (width, rank)),
        f"{trunk}scale_up.bias": (factors.mean, (width,)),
        "scale_down.weight": (factors.scale_down.T, (rank, width)),
        "lm_head.weight": (factors.wte if factors.lm_head is None else factors.lm_head.T, (vocab_size, rank)),
    }
    for name, (array, needed) in matrices.items():
        if array.shape != needed:
            raise ValueError(f"The factor for {name!r} has shape {array.shape}, the model needs {needed}.")
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, (array, _) in matrices.items()}


def _build(model_class, config, weights, like: torch.Tensor, generation_config):
    """Make a model of `config` holding copies of exactly these weights."""
    with torch.device("meta"):
        model = model_class(config)
    expected = model.state_dict()
    copies = {}
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            shapes = tuple(weight.shape), tuple(expected[name].shape)
            raise ValueError(f"Weight {name!r} has shape {shapes[0]}, expected {shapes[1]}.")
        dtype = like.dtype if expected[name].is_floating_point() else expected[name].dtype
        copies[name] = weight.to(like.device, dtype, copy=True)
    model.load_state_dict(copies, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = copy.deepcopy(generation_config)
    return model.eval()
