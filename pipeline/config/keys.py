"""A config key by key: dotted names, defaults, and which keys are content.

`digest` makes a fingerprint of plain values. Nothing here knows of stages.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.config.schema import Config


def digest(value: Any) -> str:
    """16 hex digits of a JSON-able value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def settings_apart_from_defaults(config: Config) -> dict[str, Any]:
    """Dotted key -> value of all that isn't at its default."""
    usual = defaults()
    return {key: value for key, value in leaves(as_mapping(config)).items() if usual.get(key) != value}


@functools.cache
def defaults() -> dict[str, Any]:
    """Dotted key -> default value of every key; where it has changed between versions the first one, see `content`."""
    extras = {key: field.json_schema_extra for key, field in fields(Config)}
    firsts = {key: extra["first"] for key, extra in extras.items() if isinstance(extra, dict) and "first" in extra}
    return leaves(as_mapping(Config())) | firsts


@functools.cache
def aside_keys() -> frozenset[str]:
    """The dotted keys that enter no fingerprint."""
    return frozenset(key for key, field in fields(Config) if not is_content(field))


def is_content(field: FieldInfo) -> bool:
    """A key's policy. Raises: KeyError for a key that has none."""
    return bool(dict(field.json_schema_extra or {})["is_content"])  # type: ignore[arg-type]


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted key and field of every key of a schema, sections walked into."""
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{key}.")
        else:
            yield key, field


def as_mapping(config: Config) -> dict[str, Any]:
    """The resolved config as YAML and JSON have it."""
    return config.model_dump(mode="json", by_alias=True)


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted key."""
    if not isinstance(value, dict) or not value:
        return {key: value}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= leaves(inner, f"{key}.{name}" if key else name)
    return found
