"""The paper's ablation tables beside ours, and whether each contrast came out with the paper's sign.

Tables beyond the paper have nothing to stand beside: there a difference is resolved, or it isn't.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.config import Config, UserError
from pipeline.evidence.results import KEPT, Results, mean_and_spread, results_of, sweep_lines
from pipeline.evidence.variants import EVERY, MORE, TABLES, VARIANTS, more_tables

KEYS = ("mIoU_S", "mIoU_U", "hIoU")
PAGE, MORE_PAGE = Path("docs/ablations.md"), Path("docs/ablations-more.md")
WIDTH = 160  # of a table that goes to a file
Tables = dict[str, list[list[str]]]  # by title, a line a row
AS_PAPER, OPPOSITE, UNRESOLVED, RESOLVED = "as in the paper", "opposite", "not resolved", "resolved"


@dataclass(frozen=True)
class Row:
    """A variant against the full method: hIoU's difference, the larger of their spreads, and what that says."""

    variant: str
    paper: float | None
    difference: float | None = None
    spread: float | None = None
    verdict: str = ""


def rows(table: Mapping[str, float | None], results: Results) -> list[Row]:
    """The rows of a table that were run, the full method first; the numbers are the paper's hIoU, if it has any.

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
        verdict = UNRESOLVED if abs(difference) <= spread else _sign(difference, paper, table["full"])
        found.append(Row(variant, paper, difference, spread, verdict))
    return found


def _sign(difference: float, paper: float | None, paper_full: float | None) -> str:
    if paper is None or paper_full is None:
        return RESOLVED
    return AS_PAPER if (difference < 0) == (paper < paper_full) else OPPOSITE


def _cells(row: Row, results: Results, paper_full: float | None) -> list[str]:
    seeds = results[row.variant]
    cells = [EVERY[row.variant].label, str(len(seeds)), *(mean_and_spread(seeds, key) for key in KEYS)]
    ours = "" if row.difference is None else f"{row.difference:+.1f}"
    if row.paper is None or paper_full is None:
        return [*cells, ours, row.verdict]
    theirs = "" if row.difference is None else f"{row.paper - paper_full:+.1f}"
    return [*cells, ours, f"{row.paper:.1f}", theirs, row.verdict]


HEAD = ("training", "seeds", "mIoU(S)", "mIoU(U)", "hIoU", "to full", "paper", "to full", "verdict")
MORE_HEAD = (*HEAD[:6], "verdict")


def _tables(config: Config, *, quick: bool) -> Tables:
    """Tables 3, 4 and 5 as far as they were run. Raises: UserError when none was."""
    tables = {title: _lines(config, table, quick=quick) for title, table in TABLES.items()}
    return _any_of(
        config, {title: lines for title, lines in tables.items() if lines}, "ablations", quick=quick
    )


def _more_tables(config: Config, only: str, *, quick: bool) -> Tables:
    """Those beyond the paper, of which more was run than the full method. Raises: UserError when none was."""
    tables = {}
    for title, variants in more_tables(config, only).items():
        lines = _lines(config, dict.fromkeys(variants), quick=quick)
        if len(lines) > 1:
            tables[title] = lines
    return _any_of(config, tables, "ablations_more", quick=quick)


def _lines(config: Config, table: Mapping[str, float | None], *, quick: bool) -> list[list[str]]:
    results = results_of(config, tuple(table), quick=quick)
    return [_cells(row, results, table["full"]) for row in rows(table, results)]


def _any_of(config: Config, tables: Tables, target: str, *, quick: bool) -> Tables:
    if not tables:
        more = " --config quick=true" if quick else ""
        raise UserError(
            f"no run of {config.name!r} and its variants is evaluated. Run `snakemake {target} --cores all{more}` "
            "first."
        )
    return tables


def print_tables(config: Config, *, quick: bool = False, more: bool = False, only: str = "") -> None:
    """The paper's tables, or those beyond it, as far as they were run. Raises: UserError when none was."""
    out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)
    tables = _more_tables(config, only, quick=quick) if more else _tables(config, quick=quick)
    for title, lines in tables.items():
        table = Table(title=title if more else f"{title} (paper: PASCAL Context, SegFormer-B0)")
        for head in MORE_HEAD if more else HEAD:
            table.add_column(head, no_wrap=True)
        for line in lines:
            table.add_row(*line)
        out.print(table)
    if more:
        out.print("\n".join(sweep_lines(results_of(config, ("full",), quick=quick))), markup=False)


def keep_tables(config: Config, root: Path = Path(), *, quick: bool = False, more: bool = False) -> None:
    """Writes docs/ablations.md, or docs/ablations-more.md, and every run's metrics.json into docs/results/.

    Raises: UserError when nothing was run.
    """
    tables = _more_tables(config, "", quick=quick) if more else _tables(config, quick=quick)
    results = results_of(config, tuple(MORE | {"full": EVERY["full"]} if more else VARIANTS), quick=quick)
    (root / KEPT).mkdir(parents=True, exist_ok=True)
    for variant, seeds in results.items():
        for seed, metrics in seeds.items():
            name = f"{config.name}-{'quick-' if quick else ''}{variant}-{seed}"
            (root / KEPT / f"{name}.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    page, head = (MORE_PAGE, MORE_HEAD) if more else (PAGE, HEAD)
    lines = _opening(next(iter(results["full"].values())), more=more)
    for title, cells in tables.items():
        lines += ["", f"## {title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [f"| {' | '.join(line)} |" for line in cells]
    if more:
        lines += ["", "## gamma", *sweep_lines({"full": results["full"]})]
    (root / page).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _opening(first: dict[str, Any], *, more: bool) -> list[str]:
    """A page's head: the commands, when and on what, and how to read it."""
    made = first["made"]
    target, option = ("ablations_more", " --more") if more else ("ablations", "")
    beside = "" if more else ", beside the paper's hIoU on PASCAL Context"
    return [
        "# Ablations beyond the paper" if more else "# The paper's ablations",
        "",
        f"`snakemake {target} --cores all`, then `cli.py ablations{option} --keep`. {made['date']}, {made['machine']}, "
        f"torch {made['torch']}, revision {made['revision']}.",
        "",
        f"{first['num_images']} test scenes of the demo, gamma {first['gamma']:g}, percent, mean ± standard deviation "
        f"over training seeds{beside}. A difference counts as resolved when it is larger than the larger of the two "
        "spreads.",
    ]
