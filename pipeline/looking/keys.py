"""config/README.md: every key of the schema and every option of a data set, with default, values and meaning.

python -m pipeline.looking.keys > config/README.md
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline.config import OPTIONS, Config
from pipeline.data.base import KINDS, DataError, options_of

HEAD = """<!-- Written by `python -m pipeline.looking.keys > config/README.md`; a test holds that it is up to date. -->
# Presets and keys

A run is one YAML. What it leaves out has the default below; `--set section.key=value` overrides it, unknown keys are
errors that name the nearest valid one, a key given twice is one, too. Dates and numbers with leading zeros are text,
`1e-4` is a number, and none is infinite. A preset begins with its command and what to expect of it:

"""


def page() -> str:
    """The whole page, Markdown. Raises: DataError for an option of a data set that OPTIONS lacks."""
    paths = sorted(path for path in Path("config").glob("*.yaml") if path.name != "environment.yaml")
    presets = [f"- [{path.name}]({path.name}): {_first_sentence(path)}" for path in paths]
    parts = [HEAD + "\n".join(presets), _table("Top level", Config)]
    for name, field in Config.model_fields.items():
        if _is_section(field):
            parts.append(_table(f"`{name}`", field.annotation, f"{name}."))
    parts.insert(3, _data_options())  # after `data`
    return "\n\n".join(parts) + "\n"


def _first_sentence(path: Path) -> str:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        lines.append(line[2:].strip())
    return " ".join(lines).partition(". ")[0].removesuffix(".") + "."


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _table(title: str, model: Any, prefix: str = "") -> str:
    """One section: its docstring's first line and a row a key, sections inside it included."""
    has_words = model is not Config and model.__doc__
    said = f"{model.__doc__.strip().splitlines()[0]}\n\n" if has_words else ""
    rows = "\n".join(_rows(model, prefix))
    return f"## {title}\n\n{said}| key | default | values | meaning |\n|---|---|---|---|\n{rows}"


def _rows(model: Any, prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        if not _is_section(field):
            meaning = (field.description or "").replace("|", "\\|")
            yield f"| `{key}` | {_shown(field)} | {_values(field)} | {meaning} |"
        elif prefix:
            yield from _rows(field.annotation, f"{key}.")


def _shown(field: FieldInfo) -> str:
    """A key's default as YAML has it."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or value == "":
        return ""
    return f"`{value if isinstance(value, str) else f'{value:.4g}' if isinstance(value, float) else json.dumps(value)}`"


def _values(field: FieldInfo) -> str:
    """What may stand there: the words of a Literal, else types, with the limits that the schema sets."""
    said = " or ".join(_type_names(field.annotation))
    limits = [
        f"{sign} {getattr(rule, word):g}"
        for rule in field.metadata
        for word, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if hasattr(rule, word)
    ]
    return f"{said} {' and '.join(limits)}".strip()


TYPE_NAMES = {str: "text", int: "whole number", float: "number", bool: "true, false", type(None): "null"}


def _type_names(annotation: Any) -> list[str]:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return [", ".join(map(str, inner))]
    if origin in (list, tuple):
        return ["list"]
    if origin is dict:
        return ["mapping"]
    if inner:  # a union
        return [name for part in inner for name in _type_names(part)]
    return [TYPE_NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))]


def _data_options() -> str:
    """A row a kind of data set, its module's first line and what it takes; then what those words mean."""
    rows, used = [], set()
    for kind, (module, name) in KINDS.items():
        place = importlib.import_module(module)
        parameters = options_of(getattr(place, name))
        defaults = {
            option: "" if parameter.default is parameter.empty else f" {json.dumps(parameter.default)}"
            for option, parameter in parameters.items()
        }
        options = [f"`{option}`{default}" for option, default in defaults.items()]
        title = (place.__doc__ or "").strip().partition("\n")[0].rstrip(".:")
        rows.append(f"| `{kind}` | {title} | {', '.join(options)} |")
        used |= set(parameters)
    if used - set(OPTIONS):
        raise DataError(f"{__name__}: config.OPTIONS has no meaning for {sorted(used - set(OPTIONS))}.")
    meanings = [f"- `{name}`: {option.meaning}" for name, option in OPTIONS.items() if name in used]
    head = ["### `data`, by kind", "", "| kind | what | options, with their defaults |", "|---|---|---|"]
    return "\n".join([*head, *rows, "", *meanings])


if __name__ == "__main__":
    print(page(), end="")
