"""What the Snakefiles need: the run that is asked for, what its jobs depend on, and locks of a killed Snakemake."""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import functools
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from pipeline.config import Config, UserError, digest, nearest_keys
from pipeline.data.base import DataSet, open_data_set
from pipeline.running.table import IN_CACHE, STAGES, above, config_fingerprint
from pipeline.terminal import complain

QUOTES = ("'", '"')
# A setting begins at a key and its =; not inside YAML's quotes, which open where a value or an item does.
SETTING = re.compile(
    r"""(?<![^\s=\[{,:])(?:'(?:[^']|'')*'|"(?:\\.|[^"\\])*")|(?:^|(?<=\s))(?P<key>['"]?[A-Za-z_][\w.-]*=)"""
)


@contextlib.contextmanager
def mistakes_end_it() -> Iterator[None]:
    """A user's mistake ends the process as it ends cli.py: with one line, and exit code 2."""
    try:
        yield
    except UserError as error:
        sys.exit(complain(error))


def one_config_file(given: Iterable[object]) -> str:
    """Snakemake's --configfile, or else the demo's. Raises: UserError for several."""
    files = [str(file) for file in given] or ["config/demo.yaml"]
    if len(files) > 1:
        raise UserError(f"one --configfile is read, and there are {len(files)}: {', '.join(files)}.")
    return files[0]


def options(words: Iterable[str], known: Sequence[str] = ("set",)) -> dict[str, str]:
    """Snakemake's --config by key, as it was typed: what Snakemake makes of it as YAML is not looked at.

    `words` are its workflow.config_settings.config_args. Raises: UserError for a key that isn't in `known`.
    """
    given = {}
    for word in words:
        key, _, text = word.partition("=")
        if key not in known:
            *others, last = known
            names = f"{', '.join(others)} and {last}" if others else last
            raise UserError(f"--config knows {names}, not {key!r}; {_instead(key, text, known)}.")
        is_quoted = len(text) > 1 and text[0] in QUOTES and text[-1] == text[0]
        given[key] = text[1:-1] if is_quoted else text
    return given


def _instead(key: str, text: str, known: Sequence[str]) -> str:
    if near := difflib.get_close_matches(key, known, 1):
        return f"the nearest is {near[0]!r}"
    fitting = [name for name in nearest_keys(key) if name.rpartition(".")[2] == key]
    if not fitting or text.startswith("{"):
        return "give what a run changes as --config set='section.key=value ...'"
    others = f" (or {', '.join(fitting[1:])})" if fitting[1:] else ""
    return f"write --config set='{fitting[0]}={text}'{others}"


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
    return tuple(pieces)


def _misplaced(option: str, text: str) -> UserError:
    return UserError(
        f"--config {option}={text}: write section.key=value, several separated by blanks, with quotes around the "
        f"value alone: {option}=\"data.root='/my data' train.lr=1e-4\"."
    )


def shell_words(settings: Iterable[str], option: str = "--set") -> str:
    """Settings as options of cli.py, in a shell's quotes."""
    return " ".join(f"{option} {shlex.quote(setting)}" for setting in settings)


def check_paths(config: Config) -> None:
    """Raises: UserError for folders that Snakemake can't have in its rules."""
    for key, path in (("runs", config.runs), ("cache.path", str(config.manifest_folder))):
        if "{" in path or "}" in path:
            raise UserError(
                f"{key} = {path!r}: Snakemake takes braces for wildcards. Choose another folder, or run the stages one "
                "by one with cli.py."
            )


def stage_files(config: Config) -> dict[str, tuple[list[str], str]]:
    """Of each stage the files that it stands on and the one that it writes last; by name, from the ground up."""
    last = {}
    for name, stage in STAGES.items():
        # The others' labels can be made beside those of this recipe; figures are drawn of one recipe.
        is_possible = stage.is_in(config) and (stage.in_cache or stage.recipe in ("", config.recipe))
        if stage.last and is_possible:
            folder = config.manifest_folder if stage.in_cache else config.run_path / name
            last[name] = (folder / stage.last).as_posix()
    return {name: ([last[over] for over in _stands_on(config, name)], file) for name, file in last.items()}


def _stands_on(config: Config, name: str) -> list[str]:
    """The stage above, and if it is one of the cache those above it: text features are extract's."""
    over = above(config, name)
    if over is None:
        return []
    return [over, *(_stands_on(config, over) if STAGES[over].in_cache else [])]


def stage_triggers(config: Config) -> dict[str, str]:
    """What Snakemake watches: the config fingerprint of every stage, and what it reads of the data set.

    Of files their names, sizes and times count: whether the content is another one only the stage can tell.
    """
    triggers = {stage: config_fingerprint(config, stage) for stage in STAGES}
    options = json.dumps(config.data.model_dump(mode="json"), sort_keys=True)
    triggers["extract"] = digest([triggers["extract"], triggers["text"], _listing(options, "train", "image")])
    for stage in (name for name in IN_CACHE if "labels" in STAGES[name].reads):
        triggers[stage] = digest([triggers[stage], _listing(options, "train", "mask")])
    triggers["eval"] = digest([triggers["eval"], _listing(options, "test", "image"), _listing(options, "test", "mask")])
    return triggers


@functools.cache
def _listing(options: str, part: str, what: str) -> str:
    """Digest of a part's images or masks by name, size and time, and of the files that describe the data set.

    `options` is the config's section `data` as JSON. A data set that isn't there has a digest as well: the plan of a
    run can be looked at before its data has come.
    """
    try:
        data = _opened(options)
        samples = data.samples(part)  # listed once a data set
    except UserError as error:
        return digest([str(error)])
    files = [(sample.image, sample.mask)[what == "mask"] for sample in samples]
    others = sorted({*data.files(part)} - {path for sample in samples for path in (sample.image, sample.mask)})
    return digest([list(data.classes), list(data.unseen), [_state(file) for file in (*others, *files)]])


@functools.cache
def _opened(options: str) -> DataSet:
    section = json.loads(options)
    return open_data_set(section.pop("kind"), **section)


def _state(path: str | None) -> list[Any]:
    """Name, size and time of a file; the name alone of what is none, such as a scene that is rendered."""
    try:
        found = os.stat(path) if path else None
    except OSError:
        found = None
    return [path] if found is None else [path, found.st_size, found.st_mtime_ns]


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
