"""What a person sees of a running stage: lines, bars, the log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from cache.files import new_log, writing
from pipeline.terminal import Terminal, as_called

console = Terminal(stderr=True, soft_wrap=True)


_log: list[tuple[Path, Terminal]] = []
_is_quiet: ContextVar[bool] = ContextVar("is_quiet", default=False)


@contextmanager
def quiet(is_quiet: bool = True) -> Iterator[None]:
    """While this lasts, bars and what is only mentioned are left out; the log has it all the same."""
    token = _is_quiet.set(is_quiet)
    try:
        yield
    finally:
        _is_quiet.reset(token)


def log_to(path: Path) -> None:
    """From here on, what is said goes to this file too (bars don't). Raises: CacheWriteFailed."""
    _log.append((path, Terminal(file=new_log(path), soft_wrap=True)))


def say(what: Any) -> None:
    """One line, or a rich table, to the terminal and to the log: a result or a warning, shown with --quiet too.

    Raises: CacheWriteFailed for the log.
    """
    _told(what, is_shown=True)


def mention(line: str) -> None:
    """A line of what goes on, which --quiet leaves out. Raises: CacheWriteFailed for the log."""
    _told(line, is_shown=not _is_quiet.get())


def _told(what: Any, *, is_shown: bool) -> None:
    if isinstance(what, str):
        what = as_called(what).replace("\n", "\\n")  # of a name: what looks like a line is one of ours
    if is_shown:
        console.print(what)
        console.file.flush()
    for path, log in _log:
        with writing(path):
            log.print(what)
            log.file.flush()


class RateColumn(ProgressColumn):
    """Units per second, measured by the bar itself."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} {task.fields.get('unit', 'it')}/s" if speed else "")


@contextmanager
def progress(what: str, total: int, *, done: int = 0, unit: str = "images") -> Iterator[Any]:
    """A bar with rate and remaining time; yields `advance(n, **fields)`. A file gets its last state only."""
    columns = (TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn(), RateColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, *times, console=console, disable=_is_quiet.get()) as bar:
        task = bar.add_task(what, total=total, completed=done, unit=unit, note="")
        yield lambda count=1, note="": bar.update(task, advance=count, note=note)
