"""What the Snakefile needs: its --config read, words for the shell, and locks of a killed Snakemake taken away."""

from __future__ import annotations

import difflib
import fcntl
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.config import Config, UserError, nearest_keys

KNOWN = ("set", "quick", "table", "on", "on_set")
QUOTES = ("'", '"')
OTHER_DATA = "demo_other"  # what `snakemake transfer` evaluates on unless --config on= says otherwise
# A setting begins at a key and its =; not inside YAML's quotes, which open where a value or an item does.
SETTING = re.compile(
    r"""(?<![^\s=\[{,:])(?:'(?:[^']|'')*'|"(?:\\.|[^"\\])*")|(?:^|(?<=\s))(?P<key>['"]?[A-Za-z_][\w.-]*=)"""
)


@dataclass(frozen=True)
class Options:
    """What `snakemake --config` may give."""

    settings: tuple[str, ...] = ()
    quick: bool = False
    table: str = ""
    on: str = OTHER_DATA
    on_settings: tuple[str, ...] = ()


def options(given: Mapping[str, Any], words: Sequence[str] = ()) -> Options:
    """The options in Snakemake's --config, `words` being its command line. Raises: UserError."""
    for key, value in given.items():
        if key not in KNOWN:
            raise UserError(
                f"--config knows {', '.join(KNOWN[:-1])} and {KNOWN[-1]}, not {key!r}; {_instead(key, value)}."
            )
    text = {key: _text(key, given[key], words) for key in given}
    quick = text.get("quick", "").lower()
    if quick not in ("", "true", "false"):
        raise UserError(f"--config quick={quick}: want true or false.")
    return Options(
        settings=split_settings(text.get("set", ""), "set"),
        quick=quick == "true",
        table=text.get("table", ""),
        on=text.get("on") or OTHER_DATA,
        on_settings=split_settings(text.get("on_set", ""), "on_set"),
    )


def _instead(key: str, value: Any) -> str:
    if near := difflib.get_close_matches(key, KNOWN, 1):
        return f"the nearest is {near[0]!r}"
    fitting = [known for known in nearest_keys(key) if known.rpartition(".")[2] == key]
    if not fitting or isinstance(value, Mapping | list):
        return "give what a run changes as --config set='section.key=value ...'"
    others = f" (or {', '.join(fitting[1:])})" if fitting[1:] else ""
    return f"write --config set='{fitting[0]}={value}'{others}"


def _text(key: str, value: Any, words: Sequence[str]) -> str:
    """An option as it was written, which Snakemake has read as YAML: a comment in it, say, is lost by then."""
    if value is None:
        return ""
    written = [word.partition("=")[2] for word in words if word.startswith(f"{key}=")]
    for text in written:
        if text[:1] in QUOTES and text[-1] != text[0]:  # Snakemake takes the first one away
            raise _misplaced(key, text)
    written = [text.strip("'\" ") for text in written]
    if isinstance(value, Mapping | list) or (isinstance(value, str) and written and value not in written):
        raise UserError(
            f"--config {key}={written[0] if written else value}: Snakemake reads it as YAML and finds {value!r}. Put "
            "what holds ' #' or ': ' into the run's YAML instead."
        )
    return str(value)


def split_settings(text: str, option: str = "set") -> tuple[str, ...]:
    """The settings of `a.b=1 c.d=[3, 7] e.f='two words'`: each goes on to the next key, blanks inside included.

    Raises: UserError for text that begins with no key.
    """
    if not text.strip():
        return ()
    starts = [found.start() for found in SETTING.finditer(text) if found["key"]]
    if not starts or text[: starts[0]].strip():
        raise _misplaced(option, text)
    pieces = [text[start:end].strip() for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
    if any(piece[0] in QUOTES for piece in pieces):
        raise _misplaced(option, text)
    value = pieces[-1].partition("=")[2]
    if value[:1] in QUOTES and (len(value) == 1 or value[-1] != value[0]):
        pieces[-1] += value[0]  # Snakemake takes a quote at the very end away
    return tuple(pieces)


def _misplaced(option: str, text: str) -> UserError:
    return UserError(
        f"--config {option}={text}: write section.key=value, several separated by blanks, with quotes around the "
        f"value alone: {option}=\"data.root='/my data' train.lr=1e-4\"."
    )


def shell_words(settings: Iterable[str], option: str = "--set") -> str:
    """Settings for a shell, each in quotes, always: with them params stay as they are, and finished jobs finished."""
    return " ".join(f"{option} {_quoted(setting)}" for setting in settings)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\"'\"'") + "'"


def check_paths(config: Config) -> None:
    """Raises: UserError for folders that Snakemake can't have in its rules."""
    for key, path in (("runs", config.runs), ("cache.path", str(config.manifest_folder))):
        if "{" in path or "}" in path:
            raise UserError(
                f"{key} = {path!r}: Snakemake takes braces for wildcards. Choose another folder, or run the stages one "
                "by one with cli.py."
            )


def clear_dead_locks(folder: Path = Path(".snakemake")) -> IO[str] | None:
    """Removes Snakemake's locks on a working directory if whoever took them is dead; a killed one leaves them.

    Each Snakemake here holds a shared lock of the kernel's as long as it lives: the file that is returned, to be kept
    open. Only who can have it alone removes anything. None where the file system has no such locks.
    """
    try:
        folder.mkdir(exist_ok=True)
        alive = (folder / "alive").open("a", encoding="utf-8")
        try:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for lock in (folder / "locks").glob("*.lock"):
                lock.unlink(missing_ok=True)
        except BlockingIOError:
            pass  # another one is at work, and Snakemake says so where they meet
        fcntl.flock(alive, fcntl.LOCK_SH)
        return alive
    except OSError:
        return None
