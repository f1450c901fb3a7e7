"""YAML, read strictly: whatever a document holds ends in plain values or in one line that says why not.

Beyond PyYAML's safe loader: repeated keys are errors, aliases and nesting are bounded, dates stay text. Numbers are
YAML 1.2's: `1e-4` is one, `12:30` is none, and `0010` stays text, since readers differ on whether it is 8 or 10.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

MAX_BYTES = 64 << 20  # six times the tags of COCO's 118,287 images
MAX_DEPTH = 50  # PyYAML calls itself five times a level, Python allows 1,000; a config has five levels
MAX_ALIASED = 10_000  # nodes that aliases repeat: ten anchors of ten aliases each would be 10^10
MAX_DIGITS = 300  # of one number: no float reaches 10^309, and Python itself refuses integers of 4,301
PLAIN = {"null", "bool", "int", "float", "str", "seq", "map"}
TAG = "tag:yaml.org,2002:"
INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)\Z")
FLOAT = re.compile(
    r"(?:[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)
# A number with a zero before it, such as an image's id, is none of both.
LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+\Z")
# What no name or path needs and a terminal may obey: controls but tab and line ends, and halves of surrogate pairs.
NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class Unreadable(ValueError):
    """Text that can't be used as YAML: `where` it is and the `reason`, one line."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: not readable as YAML: {reason}")
        self.where, self.reason = where, reason


def read_yaml(text_or_path: str | Path, *, where: str, keys_are_text: bool = False, is_text: bool = False) -> Any:
    """The value of a YAML text, or of the file at a Path: null, bool, int, float, str, list and dict.

    `keys_are_text` keeps every key as it is written: `0001:` is "0001" and `no:` is "no"; `is_text` every scalar.
    Raises: Unreadable, for files that can't be read, too.
    """
    try:
        text = _content(text_or_path) if isinstance(text_or_path, Path) else text_or_path
        if len(text) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
        loader = _Strict(text, keys_are_text, is_text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise Unreadable(where, place + _line(_problem(error))) from None
    except yaml.reader.ReaderError as error:
        character = error.character if isinstance(error.character, int) else ord(error.character[:1])
        raise Unreadable(where, f"character {error.position + 1} is U+{character:04X}, which is no text") from None
    except OSError as error:
        raise Unreadable(where, error.strerror or _line(error)) from None
    except Exception as error:  # PyYAML raises nearly anything on odd tags and escapes
        raise Unreadable(where, _line(error) or type(error).__name__) from None


def yaml_text(value: Any) -> str:
    """Plain values as YAML that `read_yaml` reads back the same, and readers of YAML 1.1 do."""
    return yaml.dump(value, Dumper=_Written, sort_keys=False)


def _content(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1).decode("utf-8-sig")


def _problem(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or "unknown"
    return f"{error.context}, {problem}" if problem.startswith("but ") else problem


def _line(text: object) -> str:
    return " ".join(str(text).split())


def _resolvers(inherited: dict[Any, Any], dropped: set[str]) -> dict[Any, Any]:
    return {
        first: [(tag, pattern) for tag, pattern in rules if tag.removeprefix(TAG) not in dropped]
        for first, rules in inherited.items()
    }


class _Strict(yaml.SafeLoader):
    """PyYAML's safe loader with the limits above; it composes one document."""

    yaml_implicit_resolvers = _resolvers(
        yaml.SafeLoader.yaml_implicit_resolvers, {"timestamp", "value", "int", "float"}
    )
    yaml_constructors: ClassVar = {
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is not None and tag.removeprefix(TAG) in PLAIN
    }

    def __init__(self, text: str, keys_are_text: bool, is_text: bool) -> None:
        super().__init__(text)
        self.keys_are_text, self.is_text = keys_are_text, is_text
        self.depth = self.aliased = 0
        self.extents: dict[yaml.Node, tuple[int, int]] = {}  # of what is composed: nodes, and levels

    def compose_node(self, parent: Any, index: Any) -> Any:
        node: Any
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            return self._repeated(node, event.start_mark)
        self._check_depth(1, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        inner = [self.extents.get(part, (1, 1)) for part in _parts(node)]
        levels = 1 + max((levels for _, levels in inner), default=0)
        self.extents[node] = (1 + sum(size for size, _ in inner), levels)
        return node

    def _repeated(self, node: yaml.Node, mark: Any) -> yaml.Node:
        """The node that an alias stands for, if it may be repeated here."""
        if node not in self.extents:
            raise ComposerError(None, None, "an alias inside its own anchor", mark)
        size, levels = self.extents[node]
        self.aliased += size
        if self.aliased > MAX_ALIASED:
            raise ComposerError(None, None, f"aliases repeat more than {MAX_ALIASED:,} values", mark)
        self._check_depth(levels, mark)
        return node

    def _check_depth(self, levels: int, mark: Any) -> None:
        if self.depth + levels > MAX_DEPTH:
            raise ComposerError(None, None, f"more than {MAX_DEPTH} levels of nesting", mark)

    def compose_scalar_node(self, anchor: Any) -> Any:
        node = super().compose_scalar_node(anchor)
        if odd := NOT_TEXT.search(node.value):  # written as an escape
            raise ComposerError(None, None, f"U+{ord(odd[0]):04X}, which is no text", node.start_mark)
        return _as_text(node) if self.is_text else node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        if self.keys_are_text:
            node.value[:] = [(_as_text(key), value) for key, value in node.value]
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == f"{TAG}merge":
                continue
            name, line = self.construct_object(key), key.start_mark.line + 1
            if not isinstance(name, Hashable):
                continue  # an error of the constructor's
            if name in lines:
                raise ComposerError(
                    None, None, f"key {key.value!r} is given twice, first in line {lines[name]}", key.start_mark
                )
            lines[name] = line
        return node

    def construct_undefined(self, node: yaml.Node) -> Any:
        raise ConstructorError(None, None, f"tag {node.tag!r} is not known here", node.start_mark)

    def read_int(self, node: yaml.ScalarNode) -> int:
        text = self._number(node)
        return int(text, 10 if text.lstrip("+-").isdecimal() else 0)

    def read_float(self, node: yaml.ScalarNode) -> float:
        text = self._number(node).lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))

    def read_bool(self, node: yaml.ScalarNode) -> bool:
        text = str(self.construct_scalar(node)).lower()
        if text not in self.bool_values:
            raise ConstructorError(None, None, f"{text!r} is neither true nor false", node.start_mark)
        return self.bool_values[text]

    def _number(self, node: yaml.ScalarNode) -> str:
        text = str(self.construct_scalar(node)).replace("_", "")
        if len(text) > MAX_DIGITS:
            raise ConstructorError(
                None, None, f"a number of {len(text):,} characters; at most {MAX_DIGITS} are read", node.start_mark
            )
        return text


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _as_text(key: yaml.Node) -> yaml.Node:
    if not isinstance(key, yaml.ScalarNode) or key.tag == f"{TAG}merge":
        return key
    return yaml.ScalarNode(f"{TAG}str", key.value, key.start_mark, key.end_mark, style=key.style)


class _Written(yaml.SafeDumper):
    """PyYAML's safe dumper, which also quotes the text that `read_yaml` would take for a number."""

    yaml_implicit_resolvers = _resolvers(yaml.SafeDumper.yaml_implicit_resolvers, set())


_STARTS = list("-+0123456789.")
_Strict.add_implicit_resolver(f"{TAG}str", LEADING_ZERO, list("-+0"))  # of several the first that fits counts
for _rules in (_Strict, _Written):
    _rules.add_implicit_resolver(f"{TAG}int", INTEGER, _STARTS)
    _rules.add_implicit_resolver(f"{TAG}float", FLOAT, _STARTS)
_Strict.add_constructor(f"{TAG}int", _Strict.read_int)
_Strict.add_constructor(f"{TAG}float", _Strict.read_float)
_Strict.add_constructor(f"{TAG}bool", _Strict.read_bool)
_Strict.add_constructor(None, _Strict.construct_undefined)
