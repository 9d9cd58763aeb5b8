"""The options of transformers' `TrainingArguments`, read from its source: importing it takes seconds, of torch."""

import ast
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from transformers.utils import logging

_CLASS = "TrainingArguments"
_TYPES: dict[str, type] = {kind.__name__: kind for kind in (str, int, float, bool, list, dict, tuple)}
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
    types = _TYPES | {name: _enumeration(node) for name, node in classes.items() if _is_enumeration(node)}
    contents: dict[str, Any] = {"__annotations__": {}}
    for node in classes[_CLASS].body:
        if isinstance(node, ast.AnnAssign):
            name = _name(node.target)
            contents["__annotations__"][name] = _type_of(node.annotation, types)
            contents[name] = _field(node.value)
    outline: type = dataclass(type(_CLASS, (), contents))
    if len(fields(outline)) < 50:
        raise ValueError(f"{_CLASS} has few fields")
    return outline


def _is_enumeration(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id in ("ExplicitEnum", "Enum") for base in node.bases)


def _enumeration(node: ast.ClassDef) -> Any:
    members = [
        (_name(line.targets[0]), ast.literal_eval(line.value)) for line in node.body if isinstance(line, ast.Assign)
    ]
    return Enum(node.name, members, type=str)


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    raise ValueError(f"{ast.unparse(node)} is no plain name")


def _type_of(node: ast.expr, types: dict[str, type]) -> Any:
    """Read an annotation, such as `list[str] | None`; a type that is not known is `object`."""
    match node:
        case ast.Constant(value=None):
            return NoneType
        case ast.Name(id=name):
            return types.get(name, object)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _type_of(left, types) | _type_of(right, types)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            return Literal[ast.literal_eval(choices)]
        case ast.Subscript(value=of, slice=ast.Tuple(elts=inner)):
            return _type_of(of, types)[tuple(_type_of(one, types) for one in inner)]
        case ast.Subscript(value=of, slice=inner):
            return _type_of(of, types)[_type_of(inner, types)]
    raise ValueError(f"{ast.unparse(node)} is a type of another form")


def _field(node: ast.expr | None) -> Any:
    """Make a field of `field(...)` or of a plain default."""
    if not isinstance(node, ast.Call):
        return field(default=ast.literal_eval(node))
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    options: dict[str, Any] = {name: ast.literal_eval(keywords[name]) for name in ("init", "repr") if name in keywords}
    if "metadata" in keywords:
        about = keywords["metadata"]
        if not isinstance(about, ast.Dict):
            raise ValueError(f"{ast.unparse(about)} is no metadata written out")
        options["metadata"] = {
            ast.literal_eval(key): _said(value) for key, value in zip(about.keys, about.values, strict=True)
        }
    if "default_factory" in keywords:
        return field(default_factory=_TYPES[_name(keywords["default_factory"])], **options)
    try:
        return field(default=ast.literal_eval(keywords["default"]), **options)
    except ValueError:  # computed from what is installed
        return field(default=None, **options)


def _said(node: ast.expr) -> Any:
    """Read what is said about a field: text, or choices."""
    if ast.unparse(node) == "trainer_log_levels.keys()":
        return (logging.get_log_levels_dict() | {"passive": -1}).keys()
    return ast.literal_eval(node)
