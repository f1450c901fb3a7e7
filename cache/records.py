"""Whether a record that was read has the shape that it was written with: anyone may have changed the file since.

A shape is a type (float takes whole numbers, too; none takes a bool), a `range` for whole numbers, None, a tuple of
alternatives, `[shape]` for a list, `{str: shape}` for a mapping, or `{"key": shape, "other?": shape}` for one with
these keys. Those that end in `?` may be missing, and others may be there.
"""

from __future__ import annotations

import json
import math
from typing import Any

Shape = Any


def parsed(content: bytes) -> Any:
    """The JSON in `content`. Raises: ValueError, also for what is nested too deeply."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def misfit(value: Any, shape: Shape, name: str = "it") -> str | None:
    """What doesn't have its shape, in words; None when all of it has."""
    if isinstance(shape, tuple):
        return said(name, value) if all(misfit(value, each) for each in shape) else None
    pairs = None
    if isinstance(shape, list):
        if type(value) is list:
            pairs = [(f"{name}[{i}]", each, shape[0]) for i, each in enumerate(value)]
    elif isinstance(shape, dict):
        if type(value) is dict:
            pairs = _members(value, shape, name)
    else:
        return None if _fits(value, shape) else said(name, value)
    if pairs is None:
        return said(name, value)
    return next((found for place, each, inner in pairs if (found := misfit(each, inner, place))), None)


def _members(value: dict[str, Any], shape: dict[Any, Shape], name: str) -> list[tuple[str, Any, Shape]]:
    if str in shape:
        return [(f"{name}[{key!r}]", each, shape[str]) for key, each in value.items()]
    pairs = [(key.rstrip("?"), inner, key.endswith("?")) for key, inner in shape.items()]
    return [(key, value.get(key), inner) for key, inner, may_miss in pairs if key in value or not may_miss]


def _fits(value: Any, shape: Shape) -> bool:
    if shape is None:
        return value is None
    if isinstance(shape, range):
        return type(value) is int and value in shape
    if shape is float:
        return type(value) is int or (type(value) is float and math.isfinite(value))
    return type(value) is shape


def said(name: str, value: Any) -> str:
    """`name is value`, cut to what a line has room for."""
    text = repr(value)
    return f"{name} is {text if len(text) <= 60 else text[:57] + '...'}"
