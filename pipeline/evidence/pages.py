"""Tables of numbers: on the terminal, and as pages that stay in the repository."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table as Drawn

from cache.files import write_text
from pipeline.looking.facts import SCORES
from pipeline.terminal import Terminal

KEPT, TEST_LOG = Path("docs/results"), Path("docs/test-log.md")
WIDTH = 160  # columns at least: a narrower terminal wraps lines, and no number is left out


@dataclass(frozen=True)
class Table:
    title: str
    head: tuple[str, ...]
    lines: Sequence[Sequence[str]]

    def drawn(self) -> Drawn:
        """For the terminal."""
        drawn = Drawn(title=self.title)
        for head in self.head:
            drawn.add_column(head, no_wrap=True)
        for line in self.lines:
            drawn.add_row(*line)
        return drawn

    def markdown(self) -> list[str]:
        """Without its title."""
        cells = [self.head, *self.lines]
        first, *rest = (f"| {' | '.join(line)} |" for line in cells)
        return [first, "|---" * len(self.head) + "|", *rest]


def console() -> Terminal:
    return Terminal(soft_wrap=True, width=max(WIDTH, Terminal().width))


def write_page(path: Path, lines: Iterable[str], tables: Iterable[Table]) -> None:
    """A page of generated tables; what people wrote from a heading `## What it says` on stays."""
    said = ""
    if path.is_file():
        _, heading, text = path.read_text(encoding="utf-8").partition("\n## What it says")
        said = heading + text
    parts = [*lines]
    for table in tables:
        parts += ["", f"## {table.title}", "", *table.markdown()]
    write_text(path, "\n".join(parts) + "\n" + said)


def made_where(evaluations: Iterable[Mapping[str, Any]]) -> str:
    """Date, machine, torch and revision of evaluations, each said once."""
    made = [metrics["made"] for metrics in evaluations]
    lines = [f"{m['date']}, {m['machine']}, torch {m['torch']}, revision {_revision(m)}" for m in made]
    return "; ".join(dict.fromkeys(lines))


def _revision(made: Mapping[str, Any]) -> str:
    """The training's, and the evaluation's where it is another one."""
    trained, evaluated = made["revision"], made.get("evaluated")
    return f"{trained}, evaluated by {evaluated}" if evaluated not in (None, trained) else str(trained)


def keep_metrics(run: str, results: Mapping[str, Mapping[int, Mapping[str, Any]]], root: Path) -> None:
    """Each metrics.json into docs/results/<run>-<variant>-<seed>.json, and its line in docs/test-log.md, once."""
    log = root / TEST_LOG
    logged = log.read_text(encoding="utf-8") if log.is_file() else ""
    named = {f"{run}-{variant}-{seed}": m for variant, seeds in results.items() for seed, m in seeds.items()}
    for name, metrics in named.items():
        write_text(root / KEPT / f"{name}.json", json.dumps(metrics, indent=1) + "\n")
        made, scores = metrics["made"], " / ".join(f"{metrics[key]:.1f}" for key in tuple(SCORES)[1:])
        line = f"| {made['date']} | {name} | {_revision(made)} | {scores} | {metrics['fingerprint']} |\n"
        logged += line * (line not in logged)
    write_text(log, logged)
