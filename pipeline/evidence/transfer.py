"""The paper's Table 2 beside ours: students trained on one data set, evaluated on another one as they are."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.config import Config, UserError
from pipeline.evidence.ablations import AS_PAPER, OPPOSITE, UNRESOLVED, WIDTH
from pipeline.evidence.results import KEYS, mean_and_spread, read_metrics
from pipeline.evidence.variants import SEEDS, run_name

Scores = tuple[float, float, float, float]  # pAcc, mIoU(S), mIoU(U), hIoU
# Trained on COCO-Stuff's seen classes: tested at home (Table 1), on PASCAL Context and on VOC (Table 2). Of Swin-B on
# Context the paper's 56.0 does not follow from its S and U, which give 57.3 (method section 9).
PAPER: dict[str, dict[str, Scores]] = {
    "Swin-B": {
        "COCO-Stuff": (62.3, 43.8, 37.7, 40.5),
        "Context": (71.1, 47.5, 72.1, 56.0),
        "VOC": (96.6, 93.1, 92.7, 92.9),
    },
    "SegNeXt": {
        "COCO-Stuff": (62.8, 42.8, 39.3, 41.0),
        "Context": (70.5, 45.8, 67.9, 54.7),
        "VOC": (92.3, 92.3, 90.8, 91.6),
    },
    "SegFormer": {
        "COCO-Stuff": (63.5, 43.3, 41.0, 42.1),
        "Context": (71.2, 45.5, 70.8, 55.4),
        "VOC": (96.8, 93.5, 92.3, 92.9),
    },
}
Seeds = Mapping[int, Mapping[str, Any]]  # by seed, the metrics


@dataclass(frozen=True)
class Contrast:
    """A difference of means over the seeds, the larger spread of its two sides, the paper's range, a verdict."""

    what: str
    difference: float
    spread: float | None
    paper: tuple[float, float]
    verdict: str


def contrasts(abroad: Seeds, at_home: Seeds) -> list[Contrast]:
    """What Table 2 says on Context, which the demo's other set is modelled on: unseen classes above seen ones, since a
    wider training set has labelled most of them, and hIoU above that at home.

    A difference is resolved when it is larger than the larger of the two sample standard deviations; the second is
    left out unless the same seeds were evaluated at home.
    """
    theirs = [(rows["Context"], rows["COCO-Stuff"]) for rows in PAPER.values()]
    sides = {
        "mIoU(U) above mIoU(S), elsewhere": (
            _values(abroad, "mIoU_U"),
            _values(abroad, "mIoU_S"),
            [there[2] - there[1] for there, _ in theirs],
        )
    }
    if abroad.keys() <= at_home.keys():
        home = [at_home[seed]["hIoU"] for seed in abroad]
        sides["hIoU elsewhere above that at home"] = (
            _values(abroad, "hIoU"),
            home,
            [there[3] - here[3] for there, here in theirs],
        )
    return [_contrast(what, *values) for what, values in sides.items()]


def _values(seeds: Seeds, key: str) -> list[float]:
    return [metrics[key] for metrics in seeds.values()]


def _contrast(what: str, ours: list[float], against: list[float], paper: list[float]) -> Contrast:
    difference = statistics.mean(ours) - statistics.mean(against)
    among = (min(paper), max(paper))
    if len(ours) < 2:
        return Contrast(what, difference, None, among, f"{UNRESOLVED} (one seed)")
    spread = max(statistics.stdev(ours), statistics.stdev(against))
    same_sign = (difference > 0) == (statistics.mean(paper) > 0)
    verdict = UNRESOLVED if abs(difference) <= spread else AS_PAPER if same_sign else OPPOSITE
    return Contrast(what, difference, spread, among, verdict)


def evaluations(config: Config, folder: str) -> dict[int, dict[str, Any]]:
    """By seed, what the full method's runs hold in `folder`, as far as they were evaluated."""
    found = {}
    for seed in SEEDS:
        path = Path(config.runs) / run_name(config, "full", seed) / folder / "metrics.json"
        if (metrics := read_metrics(path)) is not None:
            found[seed] = metrics
    return found


def print_transfer(config: Config, other: Config) -> None:
    """Our row and the paper's, then the contrasts with their signs. Raises: UserError when nothing was evaluated,
    or the other set's classes aren't split.
    """
    abroad, at_home = evaluations(config, f"eval-on-{other.name}"), evaluations(config, "eval")
    if not abroad:
        raise UserError(
            f"no run of {config.name!r} is evaluated on {other.name!r}. Run `snakemake transfer --cores all`, or "
            f"`cli.py eval --on {other.name}`, first."
        )
    if any(metrics[key] is None for metrics in abroad.values() for key in KEYS):
        raise UserError(
            f"{other.name!r} has no seen or no unseen class that was scored, and Table 2 wants both. Name a split "
            "in its config (data.unseen or data.split)."
        )
    out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)
    table = Table(title="Table 2, another data set without training on it (percent)")
    for head in ("trained on", "tested on", "seeds", "pAcc", "mIoU(S)", "mIoU(U)", "hIoU"):
        table.add_column(head, no_wrap=True)
    for where, seeds in ((other.name, abroad), (config.name, at_home)):
        if seeds:
            cells = [mean_and_spread(dict(seeds), key) for key in KEYS]
            table.add_row(config.name, where, str(len(seeds)), *cells)
    for student, rows in PAPER.items():
        for where, scores in rows.items():
            table.add_row(f"COCO-Stuff (paper, {student})", where, "", *(f"{v:.1f}" for v in scores))
    out.print(table)
    for found in contrasts(abroad, at_home):
        spread = "" if found.spread is None else f", spread {found.spread:.1f}"
        low, high = found.paper
        out.print(
            f"{found.what}: {found.difference:+.1f}{spread}; the paper {low:+.1f} to {high:+.1f} on Context: "
            f"{found.verdict}"
        )
