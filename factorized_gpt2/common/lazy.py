"""Names that a package exports without importing the modules that define them, until somebody asks."""

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any


def exporting(package: str, names: dict[str, Iterable[str]]) -> Callable[[str], Any]:
    """Make a package's `__getattr__` (PEP 562), so that importing one of its modules does not import all others.

    Args:
        package: The package's `__name__`.
        names: What it exports, by the module that defines it, as in `{"pca": ["factorize"]}`.

    Returns:
        A function from a name to what it names; it raises `AttributeError` for other names.
    """
    module_of = {name: module for module, exported in names.items() for name in exported}

    def find(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{module_of[name]}"), name)

    return find
