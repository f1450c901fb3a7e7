"""The paper's ablation tables beside ours, and whether each contrast came out with the paper's sign.

Tables beyond the paper have nothing to stand beside: there a difference is resolved, or it isn't.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config, UserError
from pipeline.evidence.contrasts import Contrast, contrast
from pipeline.evidence.forest import Line, draw_forest
from pipeline.evidence.pages import Table, console, keep_metrics, made_where, write_page
from pipeline.evidence.results import Results, mean_and_spread, results_of, sweep_table
from pipeline.evidence.variants import EVERY, GAMMA, MORE, QUICK, TABLES, VARIANTS, more_tables

KEYS = ("mIoU_S", "mIoU_U", "hIoU")
PAGE, MORE_PAGE = Path("docs/ablations.md"), Path("docs/ablations-more.md")
HEAD = ("training", "seeds", "mIoU(S)", "mIoU(U)", "hIoU", "to full", "paper", "to full", "verdict")
MORE_HEAD = (*HEAD[:6], "verdict")


@dataclass(frozen=True)
class Row:
    """A variant, hIoU against the full method's, and the paper's hIoU and difference if it has them."""

    variant: str
    contrast: Contrast | None = None
    paper: float | None = None
    paper_difference: float | None = None


def rows(table: Mapping[str, float | None], results: Results) -> list[Row]:
    """The rows of a table that were run, the full method first; the numbers are the paper's hIoU, if it has any."""
    hious = {variant: [m["hIoU"] for m in seeds.values()] for variant, seeds in results.items()}
    if "full" not in hious:
        return []
    full, found = table["full"], [Row("full", paper=table["full"])]
    for variant, paper in table.items():
        if variant != "full" and variant in hious:
            theirs = None if paper is None or full is None else paper - full
            found.append(Row(variant, contrast(hious[variant], hious["full"], theirs), paper, theirs))
    return found


def rows_by_table(
    config: Config, results: Results, *, more: bool = False, only: str = ""
) -> dict[str, list[Row]]:
    """Of the paper's tables, or of those beyond it."""
    wanted: Mapping[str, Mapping[str, float | None]] = TABLES
    if more:
        wanted = {title: dict.fromkeys(names) for title, names in more_tables(config, only).items()}
    return {title: rows(table, results) for title, table in wanted.items()}


def tables_of(found: Mapping[str, list[Row]], results: Results) -> list[Table]:
    """Those with more than the full method; gamma's has nothing else, every evaluation sweeps it."""
    tables = []
    for title, its_rows in found.items():
        if title == GAMMA and its_rows:
            tables.append(sweep_table({"full": results["full"]}, title))
        elif len(its_rows) > 1:
            is_papers = its_rows[0].paper is not None
            lines = [_cells(row, results) for row in its_rows]
            tables.append(Table(title, HEAD if is_papers else MORE_HEAD, lines))
    return tables


def _cells(row: Row, results: Results) -> list[str]:
    seeds, ours = results[row.variant], row.contrast
    cells = [EVERY[row.variant].label, str(len(seeds)), *(mean_and_spread(seeds, key) for key in KEYS)]
    cells.append("" if ours is None else f"{ours.difference:+.1f}")
    if row.paper is not None:
        cells += [f"{row.paper:.1f}", "" if row.paper_difference is None else f"{row.paper_difference:+.1f}"]
    return [*cells, "" if ours is None else ours.verdict]


def print_tables(config: Config, *, quick: bool = False, more: bool = False, only: str = "") -> None:
    """The paper's tables, or those beyond it, as far as they were run. Raises: UserError when none was."""
    results = results_of(config, tuple(EVERY), quick=quick)
    tables = _any_of(
        config, tables_of(rows_by_table(config, results, more=more, only=only), results), quick, more
    )
    out = console()
    for table in tables:
        out.print(table.drawn())


def keep_tables(config: Config, root: Path = Path(), *, quick: bool = False, more: bool = False) -> None:
    """Writes docs/ablations.md, or docs/ablations-more.md, a picture beside it, and every run's metrics.json into
    docs/results/. Raises: UserError when nothing was run.
    """
    results = results_of(config, ("full", *MORE) if more else tuple(VARIANTS), quick=quick)
    found = rows_by_table(config, results, more=more)
    tables = _any_of(config, tables_of(found, results), quick, more)
    prefix = f"{config.name}-{QUICK}" if quick else config.name
    keep_metrics(
        {f"{prefix}-{v}-{seed}": m for v, seeds in results.items() for seed, m in seeds.items()}, root
    )
    page = root / (MORE_PAGE if more else PAGE)
    write_page(page, _opening(next(iter(results["full"].values())), page, more=more), tables)
    draw_forest(
        {title: forest_lines(its_rows) for title, its_rows in found.items()}, page.with_suffix(".png")
    )


def forest_lines(its_rows: list[Row]) -> list[Line]:
    """What the picture shows of a table."""
    return [
        Line(EVERY[row.variant].label, row.contrast, row.paper_difference) for row in its_rows if row.contrast
    ]


def _any_of(config: Config, tables: list[Table], quick: bool, more: bool) -> list[Table]:
    if not tables:
        target, options = "ablations_more" if more else "ablations", " --config quick=true" if quick else ""
        raise UserError(
            f"no run of {config.name!r} and its variants is evaluated. Run `snakemake {target} --cores all{options}` "
            "first."
        )
    return tables


def _opening(first: Mapping[str, Any], page: Path, *, more: bool) -> list[str]:
    """A page's head: the commands, when and on what, and how to read it."""
    target, option = ("ablations_more", " --more") if more else ("ablations", "")
    beside = "" if more else ", beside the paper's hIoU on PASCAL Context with SegFormer-B0"
    return [
        "# Ablations beyond the paper" if more else "# The paper's ablations",
        "",
        f"`snakemake {target} --cores all`, then `cli.py ablations{option} --keep`. {made_where(first)}.",
        "",
        f"{first['num_images']} test scenes of the demo, gamma {first['gamma']:g}, percent, mean ± standard deviation "
        f"over training seeds{beside}. A difference counts as resolved when it is larger than the larger of the two "
        "spreads.",
        "",
        f"![hIoU against the full method's]({page.with_suffix('.png').name})",
    ]
