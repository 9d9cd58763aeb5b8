"""What PEFT is told of this package's models.

Where its user names no `target_modules`, it adapts what it adapts in a GPT-2. An adapter that was moved together with
its base finds it (`adapter_base`).
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from ..network.configuration_factorized_gpt2 import FactorizedGPT2Config
from .adapter_base import find_moved_bases

# GPT-2's modules by the names they have here.
_RENAMED = {
    "c_attn": ("q_proj", "k_proj", "v_proj"),
    "c_proj": ("c_proj", "mlp_down"),
    "mlp.c_proj": ("mlp.mlp_down",),
    "mlp.c_fc": ("mlp.mlp_up",),
}


def register_with_peft() -> None:
    """Tell PEFT: now if it is imported already, else as soon as it is."""
    waiting = any(isinstance(finder, _WhenImported) for finder in sys.meta_path)
    for name, tell in _TOLD.items():
        if name in sys.modules:
            tell(sys.modules[name])
        elif not waiting:
            sys.meta_path.insert(0, _WhenImported())
            waiting = True


class _WhenImported(MetaPathFinder):
    """Finds the modules of PEFT that are told something where they are, and tells them once they are loaded."""

    def find_spec(self, fullname: str, path=None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in _TOLD:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_tell(module: ModuleType) -> None:
                execute(module)
                _TOLD[fullname](module)

            spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]  # of this one loader
        return spec


def _add_to_tables(module: ModuleType) -> None:
    for name, table in vars(module).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING") and "gpt2" in table:
            modules = [new for old in table["gpt2"] for new in _RENAMED.get(old, (old,))]
            table.setdefault(FactorizedGPT2Config.model_type, modules)


# Modules of PEFT, and what each is told. The first keeps, for each of PEFT's methods, a table of model types.
_TOLD = {"peft.utils.constants": _add_to_tables, "peft.config": find_moved_bases}
