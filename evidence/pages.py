"""Tables of numbers as pages of this folder, and the metrics.json files that they were made from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cache.files import write_text
from evidence.variants import SEEDS
from pipeline.config import UserError
from pipeline.looking.results import KEYS, Table

HERE = Path("evidence")


def markdown(table: Table) -> list[str]:
    """A table's lines, without its title."""
    first, *rest = (f"| {' | '.join(line)} |" for line in [table.head, *table.lines])
    return [first, "|---" * len(table.head) + "|", *rest]


def write_page(path: Path, lines: Iterable[str], tables: Iterable[Table]) -> None:
    """A page of generated tables; what people wrote from a heading `## What it says` on stays."""
    said = ""
    if path.is_file():
        _, heading, text = path.read_text(encoding="utf-8").partition("\n## What it says")
        said = heading + text
    parts = [*lines]
    for table in tables:
        parts += ["", f"## {table.title}", "", *markdown(table)]
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


def refuse_to_lose(
    run: str, variants: Iterable[str], results: Mapping[str, Mapping[int, Any]], root: Path, command: str
) -> None:
    """A page is never written from fewer evaluations than those that are kept. Raises: UserError naming one."""
    had = {f"{variant}-{seed}" for variant in variants for seed in SEEDS} & {
        path.stem.removeprefix(f"{run}-") for path in (root / HERE / "results").glob(f"{run}-*.json")
    }
    if missing := sorted(had - {f"{variant}-{seed}" for variant, seeds in results.items() for seed in seeds}):
        raise UserError(
            f"--keep would drop {len(missing)} of {len(had)} kept results, {run}-{missing[0]} for one, whose runs are "
            f"not here. Run `{command}` first, or leave --keep out."
        )


def keep_metrics(run: str, results: Mapping[str, Mapping[int, Mapping[str, Any]]], root: Path) -> None:
    """Each metrics.json into results/<run>-<variant>-<seed>.json, and its line in test-log.md, once."""
    log = root / HERE / "test-log.md"
    logged = log.read_text(encoding="utf-8") if log.is_file() else ""
    named = {f"{run}-{variant}-{seed}": m for variant, seeds in results.items() for seed, m in seeds.items()}
    for name, metrics in named.items():
        write_text(root / HERE / "results" / f"{name}.json", json.dumps(metrics, indent=1) + "\n")
        made, scores = metrics["made"], " / ".join(f"{metrics[key]:.1f}" for key in KEYS[1:])
        line = f"| {made['date']} | {name} | {_revision(made)} | {scores} | {metrics['fingerprint']} |\n"
        logged += line * (line not in logged)
    write_text(log, logged)
