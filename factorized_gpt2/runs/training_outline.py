"""The options of transformers' `TrainingArguments`, read from its source: importing it takes seconds, of torch."""

import ast
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from transformers.utils import logging

_CLASS = "TrainingArguments"
_FILES = ("training_args.py", "trainer_utils.py", "debug_utils.py")  # the class, and the enumerations it names


@cache
def training_outline() -> type:
    """Make a dataclass with the fields of the installed `TrainingArguments`, and nothing that computes.

    Returns:
        One whose fields have the same names, types and metadata, and the same defaults as far as they are written out
        (others are `None`). Where the source is laid out otherwise than it is read here, `TrainingArguments` itself.
    """
    try:
        return _outline()
    except Exception:  # of whatever kind: another layout costs seconds, and nothing else
        from transformers import TrainingArguments

        return TrainingArguments


def _outline() -> type:
    folder = Path(find_spec("transformers").origin).parent
    classes = {
        node.name: node
        for name in _FILES
        for node in ast.parse((folder / name).read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }
    names = _Names({name: _enumeration(node) for name, node in classes.items() if _is_enumeration(node)})
    contents: dict[str, Any] = {"__annotations__": {}}
    for node in classes[_CLASS].body:
        if isinstance(node, ast.AnnAssign):
            name = node.target.id
            contents["__annotations__"][name] = _value_of(node.annotation, names)
            contents[name] = _field(node.value, names)
    outline = dataclass(type(_CLASS, (), contents))
    if len(fields(outline)) < 50:
        raise ValueError(f"{_CLASS} has few fields")
    return outline


class _Names(dict):
    """What the source's names mean; a type that is not known is `object`."""

    def __init__(self, enumerations: dict[str, type]):
        super().__init__(enumerations, Any=Any, Literal=Literal, str=str, int=int, float=float, bool=bool)
        self.update(list=list, dict=dict, tuple=tuple)
        self.update(trainer_log_levels=logging.get_log_levels_dict() | {"passive": -1})

    def __missing__(self, name: str) -> Any:
        return object


def _is_enumeration(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id in ("ExplicitEnum", "Enum") for base in node.bases)


def _enumeration(node: ast.ClassDef) -> type:
    members = [
        (line.targets[0].id, ast.literal_eval(line.value)) for line in node.body if isinstance(line, ast.Assign)
    ]
    return Enum(node.name, members, type=str)


def _value_of(node: ast.expr, names: _Names) -> Any:
    return eval(compile(ast.Expression(node), _CLASS, "eval"), {"__builtins__": {}}, names)


def _field(node: ast.expr | None, names: _Names) -> Any:
    """Make a field of `field(...)` or of a plain default."""
    if not isinstance(node, ast.Call):
        return field(default=ast.literal_eval(node))
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    options: dict[str, Any] = {"metadata": _value_of(keywords["metadata"], names)} if "metadata" in keywords else {}
    options |= {name: ast.literal_eval(keywords[name]) for name in ("init", "repr") if name in keywords}
    if "default_factory" in keywords:
        factory = _value_of(keywords["default_factory"], names)
        return field(default_factory=factory, **options)
    if "default" not in keywords:
        raise ValueError("a field without a default")
    try:
        return field(default=ast.literal_eval(keywords["default"]), **options)
    except ValueError:  # computed from what is installed
        return field(default=None, **options)
