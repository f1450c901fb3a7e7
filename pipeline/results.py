"""Result tables of finished runs, printed from their metrics.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.config import CONTRAST_SEEDS, CONTRASTS, Config, UserError, contrast_name

KEYS = ("pAcc", "mIoU_S", "mIoU_U", "hIoU")


def read_metrics(path: Path) -> dict[str, Any] | None:
    """The metrics of an evaluation, or None when there are none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def result_table(results: dict[str, dict[str, Any]]) -> Table:
    """Run by run: pAcc, mIoU(S), mIoU(U), hIoU in percent at the configured gamma."""
    table = Table("run", "pAcc", "mIoU(S)", "mIoU(U)", "hIoU", "gamma", title="test images, percent")
    for name, result in results.items():
        values = (result[key] for key in ("pAcc", "mIoU_S", "mIoU_U", "hIoU"))
        table.add_row(name, *("-" if v is None else f"{v:.1f}" for v in values), f"{result['gamma']:g}")
    return table


def print_results(runs: Sequence[Path]) -> None:
    """The table of the runs that were evaluated, and where the first one's report lies."""
    found = {run.name: m for run in runs if (m := read_metrics(run / "eval" / "metrics.json")) is not None}
    if not found:
        raise UserError(
            f"none of {', '.join(map(str, runs))} holds eval/metrics.json. Run `cli.py eval` first."
        )
    out = Console(highlight=False, soft_wrap=True)
    out.print(result_table(found))
    for run in runs:
        page = run / "report" / "index.html"
        if page.is_file():
            out.print(f"report: {page.as_posix()}")


def contrast_rows(config: Config) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and standard deviation over the seeds, by contrast and metric; contrasts not run are left out."""
    rows: dict[str, dict[str, tuple[float, float]]] = {}
    for contrast in CONTRASTS:
        names = [contrast_name(config, contrast, seed) for seed in CONTRAST_SEEDS]
        paths = [Path(config.runs) / name / "eval" / "metrics.json" for name in names]
        found: list[dict[str, Any]] = [m for path in paths if (m := read_metrics(path)) is not None]
        if len(found) == len(CONTRAST_SEEDS):
            values = {key: [result[key] for result in found] for key in KEYS}
            rows[contrast] = {key: (statistics.mean(v), statistics.stdev(v)) for key, v in values.items()}
    return rows


def print_contrast(config: Config) -> None:
    rows = contrast_rows(config)
    if not rows:
        raise UserError(
            f"no contrast run of {config.name!r} is complete. Run `snakemake --cores all contrast` first."
        )
    table = Table(
        "training", "pAcc", "mIoU(S)", "mIoU(U)", "hIoU", title=f"{len(CONTRAST_SEEDS)} seeds, mean +- std"
    )
    for contrast, values in rows.items():
        table.add_row(contrast, *(f"{mean:.1f} +- {std:.1f}" for mean, std in (values[key] for key in KEYS)))
    out = Console(highlight=False, soft_wrap=True)
    out.print(table)
    if {"full", "glm_off"} <= set(rows):
        lift = rows["full"]["mIoU_U"][0] - rows["glm_off"]["mIoU_U"][0]
        spread = max(rows["full"]["mIoU_U"][1], rows["glm_off"]["mIoU_U"][1])
        word = "shown" if lift > spread else "not resolved"
        out.print(f"GLM lifts mIoU(U) by {lift:+.1f} points; the larger spread is {spread:.1f}: {word}")
