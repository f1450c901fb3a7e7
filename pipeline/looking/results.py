"""Result tables of finished runs, from their metrics.json, as the terminal shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table as Drawn

from cache.errors import CacheError
from cache.ledger import read_manifest
from pipeline.config import UserError
from pipeline.looking.facts import SCORES, found_metrics
from pipeline.terminal import Terminal

KEYS, HEADS = tuple(SCORES), tuple(SCORES.values())
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


def console() -> Terminal:
    return Terminal(soft_wrap=True, width=max(WIDTH, Terminal().width))


def read_metrics(path: Path) -> dict[str, Any] | None:
    """The metrics of an evaluation, or None when there are none that can be read."""
    try:
        return found_metrics(path)
    except CacheError:
        return None


def stale(run: Path, metrics: Mapping[str, Any]) -> str:
    """A mark where the student that was evaluated is no longer the run's: " (stale: ...)", else nothing."""
    trained = read_manifest(run / "train" / "train.manifest.json")
    if trained is None:
        return " (stale: the run's training has not ended)" if (run / "train").is_dir() else ""
    return "" if metrics.get("student") == trained.get("fingerprint") else " (stale: of another student)"


def result_table(results: dict[str, dict[str, Any]]) -> Table:
    """Run by run: pAcc, mIoU(S), mIoU(U), hIoU in percent at the configured gamma; pAcc, mIoU of closed sets."""
    is_closed = all(result.get("unseen") == [] for result in results.values())
    keys, heads = (KEYS[:2], ("run", "pAcc", "mIoU")) if is_closed else (KEYS, ("run", *HEADS, "gamma"))
    lines = []
    for name, result in results.items():
        values = ["-" if (value := result[key]) is None else f"{value:.1f}" for key in keys]
        lines.append([name, *values] if is_closed else [name, *values, f"{result['gamma']:g}"])
    left_out = {name: said for name, result in results.items() if (said := _scored(result))}
    title = "test images, percent"
    if len(results) == 1 and left_out:
        title += f"; {next(iter(left_out.values()))} classes scored"
    elif left_out:  # what isn't a mean over all classes says so beside its name
        title += "; (classes scored)"
        lines = [[f"{name} ({left_out[name]})" if name in left_out else name, *line] for name, *line in lines]
    return Table(title, heads, lines)


def _scored(result: Mapping[str, Any]) -> str:
    """How many classes have a score, "" where all have, or an older evaluation didn't count them."""
    groups = result.get("scored") or {}
    if all(group["occur"] == group["classes"] for group in groups.values()):
        return ""
    said = []
    for name, group in groups.items():
        if group["classes"]:
            absent = group["scored"] - group["occur"]  # predicted where they aren't: 0 in the mean
            more = f" ({absent} without a test pixel)" if absent else ""
            said.append(f"{group['scored']} of {group['classes']} {name}{more}")
    return ", ".join(said)


def print_results(runs: Sequence[Path]) -> None:
    """The table of the runs that were evaluated, and where the first one's report lies."""
    names = [run.name for run in runs]
    labels = {run: run.name if names.count(run.name) == 1 else run.as_posix() for run in runs}
    found = {}
    for run, label in labels.items():
        if (m := read_metrics(run / "eval" / "metrics.json")) is not None:
            found[f"{label}{stale(run, m)}"] = m
    for run, label in labels.items():
        for path in sorted(run.glob("eval-on-*/metrics.json")):
            if (m := read_metrics(path)) is not None:
                found[f"{label} on {path.parent.name.removeprefix('eval-on-')}{stale(run, m)}"] = m
    if not found:
        raise UserError(f"none of {', '.join(map(str, runs))} holds eval/metrics.json. Run `cli.py eval` first.")
    out = console()
    out.print(result_table(found).drawn())
    for run in runs:
        page = run / "report" / "index.html"
        if page.is_file():
            out.print(f"report: {page.as_posix()}")
