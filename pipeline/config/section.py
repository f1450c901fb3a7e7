"""What a section of the config is: strict about its values, and each key says whether it is content.

`content` keys enter the fingerprint of the stages that read their section; keys that stand `aside` enter none. Which
sections a stage reads is in the table of stages (pipeline/running/table.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticUndefined


class UserError(ValueError):
    """Something that the user can mend: shown as one line, exit code 2. All the pipeline's errors are kin."""


class ConfigError(UserError):
    """The user's config can't be used; the message says which key, what was found and what fits."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """No yes for 1, and no number that is none, in options that the schema doesn't know either."""
        kinds = kinds_of(cls.model_fields[info.field_name or ""].annotation)
        if any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds):
            return value  # a section, which sees to its own fields
        refuse_infinite(value)
        if kinds & {int, float} and not kinds & {bool, Any} and any(v is True or v is False for v in _inside(value)):
            raise ValueError(f"want a number, found {json.dumps(value, default=str)}")
        return value


def content(default: Any = PydanticUndefined, *, first: Any = PydanticUndefined, **options: Any) -> Any:
    """A key that says what a stage makes: it enters the stage's fingerprint, unless it is at its default.

    `first`: the default of earlier versions, where it was another. That one enters no fingerprint then, and the new
    one does: work that was finished with either stays what it is.
    """
    past = {} if first is PydanticUndefined else {"first": first}
    return Field(default, json_schema_extra={"is_content": True, **past}, **options)


def aside(default: Any = PydanticUndefined, **options: Any) -> Any:
    """A key of speed, place or bookkeeping: it enters no fingerprint, and changing it runs nothing again."""
    return Field(default, json_schema_extra={"is_content": False}, **options)


def _inside(value: Any) -> Iterator[Any]:
    """A value's leaves, itself if it is one."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _inside(item)
    else:
        yield value


def refuse_infinite(value: Any) -> None:
    for leaf in _inside(value):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise ValueError(f"{leaf} is not a finite number")


def kinds_of(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    inner = get_args(annotation)
    return {annotation}.union(*map(kinds_of, inner)) if inner else {annotation}
