"""Configs as files: a YAML and settings read into a `Config`, and a run's config as it is kept for later versions."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.config.keys import as_mapping, settings_apart_from_defaults
from pipeline.config.places import CHECKOUT, config_file, preset_names
from pipeline.config.reading import Unreadable, read_yaml
from pipeline.config.schema import Config
from pipeline.config.section import ConfigError, Section

SHOWN = 300  # characters of a value in an error
WRITTEN_BY = "written_by"  # section of a config that the program has written


def version() -> str:
    """This program's version; "unknown" where it isn't installed."""
    try:
        return metadata.version("clipteacher")
    except metadata.PackageNotFoundError:
        return "unknown"


def kept(config: Config) -> dict[str, Any]:
    """The config as the program keeps it in a run folder and in a student: with the version, and the keys set.

    An older version that reads it passes over keys that it doesn't know while they aren't among those.
    """
    keys = sorted(settings_apart_from_defaults(config))
    return {**as_mapping(config), WRITTEN_BY: {"version": version(), "keys": keys}}


def _readable(values: dict[str, Any], where: str) -> dict[str, Any]:
    """A kept config without the keys that this version doesn't know, if they are at their defaults.

    Raises: ConfigError naming the version that wrote one that isn't.
    """
    written = values.pop(WRITTEN_BY, None)
    if not isinstance(written, dict):
        return values
    keys = found if isinstance(found := written.get("keys"), list) else []
    for unknown in _unknown_keys(values, Config):
        if any(key == unknown or str(key).startswith(f"{unknown}.") for key in keys):
            raise ConfigError(
                f"{where}: was written by version {written.get('version')}, which knows {unknown!r} and has it set; "
                f"this is version {version()}. Upgrade this program, or make that run again with it."
            )
        *path, last = unknown.split(".")
        section = values
        for name in path:
            section = section[name]
        del section[last]
    return values


def _unknown_keys(values: Mapping[str, Any], model: Any, prefix: str = "") -> list[str]:
    """Dotted keys of `values` that the schema lacks; what is not a section is left to the schema's own check."""
    fields = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    found = []
    for name, value in values.items():
        if name not in fields:
            found += [] if model.model_config.get("extra") == "allow" else [f"{prefix}{name}"]
        elif isinstance(value, dict) and isinstance(fields[name], type) and issubclass(fields[name], Section):
            found += _unknown_keys(value, fields[name], f"{prefix}{name}.")
    return found


def load(path: str | Path, settings: Iterable[str] = ()) -> Config:
    """Reads a YAML file, or a preset by its name, and applies `a.b=value` settings. Raises: ConfigError, one line."""
    path = config_file(path)
    if not os.path.exists(path):
        near = sorted(p.as_posix() for p in Path(CHECKOUT).glob("*.yaml"))
        there = f"There are: {', '.join(near)}." if near else f"There are the presets {', '.join(preset_names())}."
        raise ConfigError(f"{path}: no such config file. {there}")
    try:
        raw = read_yaml(path, where=str(path), keys_are_text=True)
    except Unreadable as error:
        raise ConfigError(str(error)) from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, found {type(raw).__name__}.")
    return from_mapping(raw, settings, where=str(path))


def from_mapping(raw: Mapping[str, Any], settings: Iterable[str] = (), *, where: str = "config") -> Config:
    values = json.loads(json.dumps(raw, default=str))  # a copy; a date without quotes is a name, too
    values = _readable(values, where)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {_short(setting)}: write it as section.key=value, for example train.lr=1e-4.")
        _assign(values, key.strip().split("."), _value(setting, text), setting)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(where, item) for item in error.errors())) from None


def _value(setting: str, text: str) -> Any:
    """What stands behind the = of a setting, read as YAML."""
    if not text:
        return None
    try:
        value = read_yaml(text, where="--set", keys_are_text=True)
    except Unreadable as error:
        raise ConfigError(
            f"--set {_short(setting)}: the value is not YAML ({error.reason}). Put it in quotes."
        ) from None
    head, *comment = re.split(r"(?:^|\s)#", text, maxsplit=1)
    if comment:
        with suppress(Unreadable):  # a quote that is open: the # is inside
            if read_yaml(head, where="--set", keys_are_text=True) == value:
                raise ConfigError(f"--set {_short(setting)}: in YAML # begins a comment. Put the value in quotes.")
    return value


def _assign(values: dict[str, Any], keys: list[str], value: Any, setting: str) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {_short(setting)}: {key!r} is a value, not a section.")
    values[keys[-1]] = value


def _explain(where: str, item: Any) -> str:
    keys = [str(part) for part in item["loc"]]
    name = ".".join(keys)
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown key {name!r}; {nearest_key(name)}."
    if item["type"] == "value_error":
        return f"{where}: {name}{': ' if name else ''}{item['msg'].removeprefix('Value error, ')}."
    if item["type"] == "string_pattern_mismatch":
        return (
            f"{where}: {name} = {_short(item['input'])}: want letters, digits, '.', '_' and '-', a letter or "
            "digit first and no '.' last."
        )
    is_bare = item["type"] == "string_type" and isinstance(item["input"], int | float)
    hint = " (text that YAML takes for a number, or for yes, needs quotes)" if is_bare else ""
    return f"{where}: {name} = {_short(item['input'])}: {item['msg'][0].lower()}{item['msg'][1:]}{hint}."


def nearest_key(name: str) -> str:
    """A few words on where a key that isn't known may belong."""
    if name in _known_keys(Config):
        section, _, key = name.rpartition(".")
        return f"write it inside its section, {section}: {{{key}: ...}}"
    return f"the nearest valid one is {' or '.join(map(repr, nearest_keys(name)))}"


def nearest_keys(name: str) -> list[str]:
    """The keys that one which isn't known may stand for: the same in other sections, or the nearest beside it."""
    known = list(_known_keys(Config))
    section, _, last = name.rpartition(".")
    if owners := [key for key in known if key.rpartition(".")[2] == last and key != last]:
        return owners
    beside = [key for key in known if key.rpartition(".")[0] == section]
    return difflib.get_close_matches(name, beside or known, 1, 0.0)


def _known_keys(model: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a schema, sections too."""
    for field_name, field in model.model_fields.items():
        key = prefix + (field.alias or field_name)
        yield key
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _known_keys(field.annotation, f"{key}.")


def _short(value: Any) -> str:
    """As Python writes it; of what fills pages the beginning."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
