"""What a person sees of a running stage: lines, bars, the log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
from pipeline.terminal import Terminal

console = Terminal(stderr=True, soft_wrap=True)


_log: list[tuple[Path, Terminal]] = []


def log_to(path: Path) -> None:
    """From here on, what is said goes to this file too (bars don't). Raises: CacheWriteFailed."""
    _log.append((path, Terminal(file=new_log(path), soft_wrap=True)))


def say(what: Any) -> None:
    """One line, or a rich table, to the terminal and to the log. Raises: CacheWriteFailed for the log."""
    if isinstance(what, str):
        what = what.replace("\n", "\\n")  # of a name: what looks like a line is one of ours
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
    """A bar with rate and remaining time; yields `advance(n, **fields)`. A log file gets its last state only."""
    columns = (TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn(), RateColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, *times, console=console) as bar:
        task = bar.add_task(what, total=total, completed=done, unit=unit, note="")
        yield lambda count=1, note="": bar.update(task, advance=count, note=note)
