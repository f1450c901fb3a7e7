"""The paper's ablation tables beside ours, and whether each contrast came out with the paper's sign.

Tables beyond the paper have nothing to stand beside: there a difference is resolved, or it isn't.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from evidence.forest import Line, draw_forest
from evidence.pages import HERE, keep_metrics, made_where, refuse_to_lose, write_page
from evidence.scores import Results, mean_and_spread, results_of, row_of, sweep_table
from evidence.variants import ABLATED, DEMO, EVERY, GAMMA, TABLES, THE_DEMO, Asked, more_tables
from evidence.verdicts import RULE, Contrast, contrast
from pipeline.config import Config, UserError
from pipeline.looking.results import HEADS, KEYS, Table, console

SWEPT = KEYS[1:]
HEAD = ("training", "seeds", *HEADS[1:], "to full", "paper", "to full", "verdict")
PAPERS_GAMMA = "5.0"  # of Table 3's row without GLM
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


def rows_by_table(config: Config, results: Results, *, more: bool = False, only: str = "") -> dict[str, list[Row]]:
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
    cells = row_of(EVERY[row.variant].label, seeds, SWEPT)
    cells.append("" if ours is None else f"{ours.difference:+.1f}")
    if row.paper is not None:
        cells += [f"{row.paper:.1f}", "" if row.paper_difference is None else f"{row.paper_difference:+.1f}"]
    return [*cells, "" if ours is None else ours.verdict]


@dataclass(frozen=True)
class Ablations:
    """Tables of a config's variants, as far as they were evaluated."""

    config: Config
    results: Results
    found: dict[str, list[Row]]
    more: bool
    asked: Asked

    @property
    def commands(self) -> str:
        """What makes and keeps them."""
        more = " --more" * self.more
        return f"`{self.asked.snakemake(_target(self.more))}`, then `{self.asked.evidence('ablations')}{more} --keep`"

    @property
    def tables(self) -> list[Table]:
        return tables_of(self.found, self.results)

    @property
    def shown(self) -> Results:
        """The evaluations that stand in these tables."""
        return {row.variant: self.results[row.variant] for rows in self.found.values() for row in rows}

    def show(self) -> None:
        out = console()
        for table in self.tables:
            out.print(table.drawn())

    def keep(self, root: Path = Path()) -> None:
        """Writes ablations.md, or ablations-more.md, of other runs than the demo with their name; a picture beside it;
        and every metrics.json into results/: all in evidence/ below `root`.
        """
        wanted = [name for names in more_tables(self.config).values() for name in names] if self.more else ABLATED
        refuse_to_lose(self.config.name, wanted, self.shown, root, self.asked.snakemake(_target(self.more)))
        keep_metrics(self.config.name, self.shown, root)
        name = "ablations-more" if self.more else "ablations"
        page = root / HERE / (f"{name}.md" if self.config.name == DEMO else f"{name}-{self.config.name}.md")
        lines = {title: _lines(its_rows) for title, its_rows in self.found.items()}
        head = self._opening()
        if draw_forest(lines, page.with_suffix(".png")):
            head += ["", f"![hIoU against the full method's]({page.with_suffix('.png').name})"]
        write_page(page, [*head, *self._at_the_papers_gamma()], self.tables)

    def _opening(self) -> list[str]:
        """A page's head: the commands, when and on what, and how to read it."""
        first, shown = next(iter(self.results["full"].values())), self.shown
        beside = "" if self.more else ", beside the paper's hIoU on PASCAL Context with SegFormer-B0"
        return [
            "# Ablations beyond the paper" if self.more else "# The paper's ablations",
            "",
            f"{self.commands}. {made_where(m for seeds in shown.values() for m in seeds.values())}.",
            "",
            f"{first['num_images']} test images of {self.config.name}, gamma {first['gamma']:g}, percent, mean ± "
            f"standard deviation over training seeds{beside}. {RULE}",
        ]

    def _at_the_papers_gamma(self) -> list[str]:
        """The paper tests the row without GLM, and that one alone, with another gamma (section 4.4)."""
        sweeps = [m["gamma_sweep"] for m in self.results.get("glm_off", {}).values()]
        if self.more or not sweeps or not all(PAPERS_GAMMA in sweep for sweep in sweeps):
            return []
        ours = mean_and_spread({seed: sweep[PAPERS_GAMMA] for seed, sweep in enumerate(sweeps)}, "hIoU")
        return ["", f"The paper's row without GLM is at gamma {PAPERS_GAMMA}; there ours has hIoU {ours}."]


def collect(config: Config, asked: Asked = THE_DEMO, *, more: bool = False) -> Ablations:
    """The paper's tables, or those beyond it, as far as they were run. Raises: UserError when none was."""
    results = results_of(config, tuple(EVERY), quick=asked.quick)
    found = rows_by_table(config, results, more=more, only=asked.table)
    made = Ablations(config, results, found, more, asked)
    if not made.tables:
        missing = "no variant" if "full" in results else "the full method" if results else "no run"
        raise UserError(f"{missing} of {config.name!r} is evaluated yet. Run `{asked.snakemake(_target(more))}` first.")
    return made


def _target(more: bool) -> str:
    return "ablations_more" if more else "ablations"


def _lines(its_rows: list[Row]) -> list[Line]:
    """What the picture shows of a table."""
    return [Line(EVERY[row.variant].label, row.contrast, row.paper_difference) for row in its_rows if row.contrast]
