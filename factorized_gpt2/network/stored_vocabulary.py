"""How models whose vocabulary is of integers are saved and loaded: as every model of transformers, entropy-coded."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from .coded_vocabulary import CodedEmbedding, VocabularyNames, decode_state, encode_state, without_codes

_STREAM = "stream"

# What derives from `StoresVocabulary` is such a model.
if TYPE_CHECKING:
    _Model = PreTrainedModel
else:
    _Model = object


class StoresVocabulary(_Model):
    """For models of transformers that have `wte` and `scale_up`, or whose part `transformer` has them.

    What derives from it names this class before `PreTrainedModel`.
    """

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.register_load_state_dict_pre_hook(_decode_on_the_way)

    def _vocabulary_shape(self) -> tuple[int, int, int]:
        """Return V, k and d."""
        raise NotImplementedError

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Save as every model of transformers; a vocabulary of integers is stored entropy-coded.

        Raises:
            ValueError: Integers that are not in memory, but offloaded.
        """
        has_adapters = getattr(self, "_hf_peft_config_loaded", False)  # which are all that is saved then
        if self.config.is_coded and not has_adapters and is_main_process:
            state_dict = self._encoded(self.state_dict() if state_dict is None else state_dict)
        super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)

    def _encoded(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = vocabulary_names("transformer." if "transformer.wte.codes" in state else "")
        if any(tensor.is_meta for tensor in state.values()):
            raise ValueError("Offloaded weights cannot be encoded: load the model without device_map to save it.")
        return encode_state(state, names, cast(CodedEmbedding, self.get_input_embeddings()).stored)

    def _decoded(self, state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        """Put the network's own tensors in the place of the bytes of its vocabulary, if there are any."""
        trunks = (trunk for trunk in ("transformer.", "") if f"{prefix}{trunk}wte.{_STREAM}" in state)
        trunk = next(trunks, None)
        if trunk is None:
            return state
        names = vocabulary_names(trunk, prefix)
        if not self.config.is_coded:
            raise ValueError("The file has an integer vocabulary, but the configuration says floats.")
        absent = {
            *(() if hasattr(self, "lm_head") else names.tied),
            *((names.scale_down,) if getattr(self, "scale_down", None) is None else ()),
            *(() if hasattr(self, "lm_head") and self.config.lm_head_bias else (names.bias,)),
        }
        stored = set(state)
        state, table = decode_state(state, names, self._vocabulary_shape())
        cast(CodedEmbedding, self.get_input_embeddings()).stored = without_codes(table)
        return {name: tensor for name, tensor in state.items() if name in stored or name not in absent}

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """Load as every model of transformers, whose loading has no other place for what is in no tensor's layout."""
        load = PreTrainedModel._load_pretrained_model
        with ExitStack() as files:
            if model.config.is_coded:
                if state_dict is None:
                    state_dict = _open_files(checkpoint_files, files)
                state_dict = model._decoded(state_dict)
            return load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)


def vocabulary_names(trunk: str, prefix: str = "") -> VocabularyNames:
    """Name the tensors of a coded vocabulary in a state whose trunk's names, and all names, begin so."""
    return VocabularyNames(
        codes=f"{prefix}{trunk}wte.codes",
        steps=f"{prefix}{trunk}wte.steps",
        scale_up=f"{prefix}{trunk}scale_up.weight",
        mean=f"{prefix}{trunk}scale_up.bias",
        scale_down=f"{prefix}scale_down.weight",
        bias=f"{prefix}lm_head.bias",
        tied=(f"{prefix}lm_head.codes", f"{prefix}lm_head.steps"),
        stream=f"{prefix}{trunk}wte.{_STREAM}",
    )


def _open_files(paths: list[str], opened: ExitStack) -> dict[str, Any]:
    """List the tensors of files, those that are no bytes of a vocabulary without reading them."""
    state: dict[str, Any] = {}
    for path in paths:
        if Path(path).suffix != ".safetensors":
            raise ValueError(f"An integer vocabulary can only be read from safetensors, not from {Path(path).name}.")
        file = opened.enter_context(safe_open(path, framework="pt"))
        is_stream = {name: name.endswith(f"wte.{_STREAM}") for name in file.keys()}  # noqa: SIM118
        state |= {name: file.get_tensor(name) if is_stream[name] else file.get_slice(name) for name in is_stream}
    return state


def _decode_on_the_way(module: StoresVocabulary, state: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """Let `load_state_dict` take what a file holds, as `Trainer` gives it when it goes on from a checkpoint."""
    decoded = module._decoded(state, prefix)
    if decoded is not state:
        state.clear()
        state.update(decoded)
