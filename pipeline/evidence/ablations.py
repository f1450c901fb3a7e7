"""The paper's ablation tables beside ours, and whether each contrast came out with the paper's sign."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.config import Config, UserError
from pipeline.evidence.results import KEPT, Results, mean_and_spread, results_of
from pipeline.evidence.variants import TABLES, VARIANTS

KEYS = ("mIoU_S", "mIoU_U", "hIoU")
PAGE = Path("docs/ablations.md")
WIDTH = 160  # of a table that goes to a file
AS_PAPER, OPPOSITE, UNRESOLVED = "as in the paper", "opposite", "not resolved"


@dataclass(frozen=True)
class Row:
    """A variant against the full method: hIoU's difference, the larger of their spreads, and what that says."""

    variant: str
    paper: float
    difference: float | None = None
    spread: float | None = None
    verdict: str = ""


def rows(table: dict[str, float], results: Results) -> list[Row]:
    """The rows of one of the paper's tables that were run, the full method first.

    A difference of hIoU is resolved when it is larger than the larger of the two sample standard deviations.
    """
    hious = {variant: [m["hIoU"] for m in seeds.values()] for variant, seeds in results.items()}
    if "full" not in hious:
        return []
    full, found = hious["full"], [Row("full", table["full"])]
    for variant, paper in table.items():
        if variant == "full" or variant not in hious:
            continue
        difference = statistics.mean(hious[variant]) - statistics.mean(full)
        if min(len(full), len(hious[variant])) < 2:
            found.append(Row(variant, paper, difference, None, f"{UNRESOLVED} (one seed)"))
            continue
        spread = max(statistics.stdev(full), statistics.stdev(hious[variant]))
        same_sign = (difference < 0) == (paper < table["full"])
        verdict = UNRESOLVED if abs(difference) <= spread else AS_PAPER if same_sign else OPPOSITE
        found.append(Row(variant, paper, difference, spread, verdict))
    return found


def _cells(row: Row, results: Results, paper_full: float) -> list[str]:
    seeds = results[row.variant]
    cells = [VARIANTS[row.variant].label, str(len(seeds)), *(mean_and_spread(seeds, key) for key in KEYS)]
    ours = "" if row.difference is None else f"{row.difference:+.1f}"
    theirs = "" if row.difference is None else f"{row.paper - paper_full:+.1f}"
    return [*cells, ours, f"{row.paper:.1f}", theirs, row.verdict]


HEAD = ("training", "seeds", "mIoU(S)", "mIoU(U)", "hIoU", "to full", "paper", "to full", "verdict")


def _tables(config: Config, *, quick: bool) -> dict[str, list[list[str]]]:
    tables = {}
    for title, table in TABLES.items():
        results = results_of(config, tuple(table), quick=quick)
        if found := rows(table, results):
            tables[title] = [_cells(row, results, table["full"]) for row in found]
    if not tables:
        more = " --config quick=true" if quick else ""
        raise UserError(
            f"no run of {config.name!r} and its variants is evaluated. Run `snakemake ablations --cores all{more}` "
            "first."
        )
    return tables


def print_tables(config: Config, *, quick: bool = False) -> None:
    """Tables 3, 4 and 5 as far as they were run. Raises: UserError when none was."""
    out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)
    for title, lines in _tables(config, quick=quick).items():
        table = Table(title=f"{title} (paper: PASCAL Context, SegFormer-B0)")
        for head in HEAD:
            table.add_column(head, no_wrap=True)
        for line in lines:
            table.add_row(*line)
        out.print(table)


def keep_tables(config: Config, root: Path = Path(), *, quick: bool = False) -> None:
    """Writes docs/ablations.md, and the metrics.json of every run into docs/results/. Raises: UserError."""
    tables = _tables(config, quick=quick)
    results = results_of(config, tuple(VARIANTS), quick=quick)
    (root / KEPT).mkdir(parents=True, exist_ok=True)
    for variant, seeds in results.items():
        for seed, metrics in seeds.items():
            name = f"{config.name}-{'quick-' if quick else ''}{variant}-{seed}"
            (root / KEPT / f"{name}.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    first = next(iter(results["full"].values()))
    made = first["made"]
    lines = [
        "# The paper's ablations",
        "",
        f"`snakemake ablations --cores all`, then `cli.py ablations --keep`. {made['date']}, {made['machine']}, torch "
        f"{made['torch']}, revision {made['revision']}.",
        "",
        f"{first['num_images']} test scenes of the demo, gamma {first['gamma']:g}, percent, mean ± standard deviation "
        "over training seeds, beside the paper's hIoU on PASCAL Context. A difference counts as resolved when it is "
        "larger than the larger of the two spreads.",
    ]
    for title, cells in tables.items():
        lines += ["", f"## {title}", "", f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
        lines += [f"| {' | '.join(line)} |" for line in cells]
    (root / PAGE).write_text("\n".join(lines) + "\n", encoding="utf-8")
