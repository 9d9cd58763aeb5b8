"""What PEFT adapts in this package's models where its user names no `target_modules`: what it adapts in a GPT-2."""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from ..network.configuration_factorized_gpt2 import FactorizedGPT2Config

_TABLES = "peft.utils.constants"  # where PEFT keeps, for each of its methods, a table of model types

# GPT-2's modules by the names they have here.
_RENAMED = {
    "c_attn": ("q_proj", "k_proj", "v_proj"),
    "c_proj": ("c_proj", "mlp_down"),
    "mlp.c_proj": ("mlp.mlp_down",),
    "mlp.c_fc": ("mlp.mlp_up",),
}


def register_with_peft() -> None:
    """Add this package's models to PEFT's tables: now if PEFT is imported already, else as soon as it is."""
    if _TABLES in sys.modules:
        _add_to_tables(sys.modules[_TABLES])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported(MetaPathFinder):
    """Finds PEFT's tables where they are, and sees to it that they are added to once they are loaded."""

    def find_spec(self, fullname: str, path=None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _TABLES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_add(module: ModuleType) -> None:
                execute(module)
                _add_to_tables(module)

            spec.loader.exec_module = execute_and_add
        return spec


def _add_to_tables(module: ModuleType) -> None:
    for name, table in vars(module).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING") and "gpt2" in table:
            modules = [new for old in table["gpt2"] for new in _RENAMED.get(old, (old,))]
            table.setdefault(FactorizedGPT2Config.model_type, modules)
