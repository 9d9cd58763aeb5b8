"""Hypothesis strategies for good content gone bad: JSON documents, and bytes of any kind."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

LONG, DEEP = "x" * 5_000, "[" * 3_000 + "]" * 3_000

_TEXTS = (
    "",
    " ",
    "x",
    "nan",
    "-1",
    "1e-4",
    "true",
    "a\nb",
    "é\u2028",
    "\0",
    "\ud800",
    "--seed",
    "../x",
    "{}",
    "(",
    LONG,
)
_NUMBERS = (
    *(-1, 0, 1, 2, 3, 7, 2**31, 2**32, 10**12, 2**63, 10**30, -(10**12)),
    *(0.5, -0.5, 1e-30, 1e30, 1e300, float("nan"), float("inf"), -float("inf")),
)
_SCALARS = (None, True, False, *_NUMBERS, *_TEXTS)

weird_values = st.sampled_from(_SCALARS) | st.sampled_from(
    ([], [1], ["x"], ["--seed", "1"], [None], [[1]], [{"a": 1}], {}, {"a": 1}, {"min_lr": "x"}, {"a": {"b": [1.5]}})
)
weird_words = st.sampled_from([str(value) for value in _SCALARS])


@st.composite
def bad_json(draw: st.DrawFn, content: bytes, names: tuple[str, ...] = ("x",)) -> bytes:
    """Change a JSON document in one to three places; now and then its bytes too.

    Args:
        draw: Hypothesis's.
        content: The document.
        names: Keys to add to objects.
    """
    document = json.loads(content)
    for _ in range(draw(st.integers(1, 3))):
        document = draw(_edited(document, names))
    text = json.dumps(document)
    way = draw(st.integers(0, 19))
    if way == 0 and isinstance(document, dict) and document:  # a key twice
        name = draw(st.sampled_from(sorted(document)))
        text = f"{{{json.dumps(name)}: {json.dumps(draw(weird_values))}, {text[1:]}"
    elif way == 1:
        text = text.replace("[", DEEP[:-3000] + "[", 1)
    elif way == 2:
        text = text.replace("1", "1e999", 1)
    data = text.encode()
    return draw(bad_bytes(data)) if way == 3 else data


@st.composite
def bad_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Cut, flip, overwrite, repeat or replace bytes; the beginning, where headers are, more often than the rest."""
    size = len(content)
    place = draw(st.integers(0, min(size, 200)) | st.integers(0, size))
    length = draw(st.integers(1, 64))
    way = draw(st.sampled_from(("cut", "flip", "flips", "zeros", "noise", "insert", "drop", "repeat", "replace")))
    if way == "cut":
        return content[:place]
    if way == "flip" and size:
        flipped = bytearray(content)
        flipped[place % size] ^= 1 << draw(st.integers(0, 7))
        return bytes(flipped)
    if way == "flips" and size:
        flipped = bytearray(content)
        for _ in range(length):
            flipped[draw(st.integers(0, size - 1))] ^= 1 << draw(st.integers(0, 7))
        return bytes(flipped)
    if way == "replace":
        return draw(st.binary(max_size=200))
    put = {"zeros": bytes(length), "repeat": content[place : place + length] * 2, "drop": b""}.get(way)
    put = draw(st.binary(min_size=length, max_size=length)) if put is None else put
    return content[:place] + put + content[place + (0 if way == "insert" else length) :]


@st.composite
def _edited(draw: st.DrawFn, document: Any, names: tuple[str, ...]) -> Any:
    """Change one place: drop it, give it another value or name, or add something beside it."""
    document = copy.deepcopy(document)
    places = list(_places(document))
    if not places or draw(st.integers(0, 30)) == 0:
        return draw(weird_values)
    holder, key = places[draw(st.integers(0, min(len(places), 40) - 1) | st.integers(0, len(places) - 1))]
    way = draw(st.sampled_from(("value", "value", "drop", "rename", "add", "text", "factor", "wrap", "copy")))
    if way == "drop":
        del holder[key]
    elif way == "rename" and isinstance(holder, dict):
        holder[draw(st.sampled_from((key + "s", key[:-1], key.upper(), "")))] = holder.pop(key)
    elif way == "add" and isinstance(holder, dict):
        holder[draw(st.sampled_from(names))] = draw(weird_values)
    elif way == "text":
        holder[key] = str(holder[key])
    elif way == "factor" and isinstance(holder[key], int | float):
        holder[key] = holder[key] * draw(st.sampled_from((-1, 2, 0.5, 1000, 1e20)))
    elif way == "wrap":
        holder[key] = draw(st.sampled_from(([holder[key]], {"a": holder[key]})))
    elif way == "copy":
        other, name = draw(st.sampled_from(places))
        holder[key] = copy.deepcopy(other[name])
    else:
        holder[key] = draw(weird_values)
    return document


def _places(node: Any):
    """Yield every place in a document as its holder and its key or index."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        yield node, key
        yield from _places(value)
