"""The paper's Table 2 beside ours: students trained on one data set, evaluated on another one as they are."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config, UserError
from pipeline.evidence.contrasts import Contrast, contrast
from pipeline.evidence.pages import Table, console, keep_metrics, made_where, write_page
from pipeline.evidence.results import HEADS, KEYS, mean_and_spread, read_metrics
from pipeline.evidence.variants import SEEDS, run_name

PAGE = Path("docs/transfer.md")
HEAD = ("trained on", "tested on", "seeds", *HEADS)
CLAIMS_HEAD = ("what", "ours", "spread", "paper", "verdict")
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
class Claim:
    """Something that Table 2 says, our contrast, and the range of the paper's."""

    what: str
    ours: Contrast
    paper: tuple[float, float]


def claims(abroad: Seeds, at_home: Seeds) -> list[Claim]:
    """What Table 2 says on Context, which the demo's other set is modelled on: unseen classes above seen ones, since a
    wider training set has labelled most of them, and hIoU above that at home.

    The second is left out unless the same seeds were evaluated at home.
    """
    theirs = [(rows["Context"], rows["COCO-Stuff"]) for rows in PAPER.values()]
    above = [there[2] - there[1] for there, _ in theirs]
    found = [
        _claim(
            "mIoU(U) above mIoU(S), elsewhere", _values(abroad, "mIoU_U"), _values(abroad, "mIoU_S"), above
        )
    ]
    if abroad.keys() <= at_home.keys():
        home = [at_home[seed]["hIoU"] for seed in abroad]
        lift = [there[3] - here[3] for there, here in theirs]
        found.append(_claim("hIoU elsewhere above that at home", _values(abroad, "hIoU"), home, lift))
    return found


def _claim(what: str, ours: list[float], against: list[float], paper: list[float]) -> Claim:
    return Claim(what, contrast(ours, against, statistics.mean(paper)), (min(paper), max(paper)))


def _values(seeds: Seeds, key: str) -> list[float]:
    return [metrics[key] for metrics in seeds.values()]


def evaluations(config: Config, folder: str) -> dict[int, dict[str, Any]]:
    """By seed, what the full method's runs hold in `folder`, as far as they were evaluated."""
    found = {}
    for seed in SEEDS:
        path = Path(config.runs) / run_name(config, "full", seed) / folder / "metrics.json"
        if (metrics := read_metrics(path)) is not None:
            found[seed] = metrics
    return found


def tables_of(config: Config, other: Config) -> list[Table]:
    """Table 2, ours and the paper's rows, and its claims. Raises: UserError when nothing was evaluated, or the other
    set's classes aren't split.
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
    lines = [
        [config.name, where, str(len(seeds)), *(mean_and_spread(dict(seeds), key) for key in KEYS)]
        for where, seeds in ((other.name, abroad), (config.name, at_home))
        if seeds
    ]
    for student, rows in PAPER.items():
        for where, scores in rows.items():
            lines.append([f"COCO-Stuff (paper, {student})", where, "", *(f"{v:.1f}" for v in scores)])
    said = []
    for claim in claims(abroad, at_home):
        spread = "" if claim.ours.spread is None else f"{claim.ours.spread:.1f}"
        low, high = claim.paper
        said.append(
            [
                claim.what,
                f"{claim.ours.difference:+.1f}",
                spread,
                f"{low:+.1f} to {high:+.1f}",
                claim.ours.verdict,
            ]
        )
    return [
        Table("Table 2, another data set without training on it (percent)", HEAD, lines),
        Table("Its contrasts, the paper's on Context", CLAIMS_HEAD, said),
    ]


def print_transfer(config: Config, other: Config) -> None:
    """`tables_of` on the terminal. Raises: as it."""
    out = console()
    for table in tables_of(config, other):
        out.print(table.drawn())


def keep_transfer(config: Config, other: Config, root: Path = Path()) -> None:
    """Writes docs/transfer.md, and every evaluation's metrics.json into docs/results/. Raises: as tables_of."""
    tables = tables_of(config, other)
    abroad = evaluations(config, f"eval-on-{other.name}")
    keep_metrics({f"{config.name}-on-{other.name}-{seed}": m for seed, m in abroad.items()}, root)
    first = next(iter(abroad.values()))
    head = [
        "# On another data set",
        "",
        f"`snakemake transfer --cores all`, then `cli.py transfer --keep`. {made_where(first)}.",
        "",
        f"The students of {config.name}, as they are, on {first['num_images']} test images of {other.name}, gamma "
        f"{first['gamma']:g}, percent, mean ± standard deviation over training seeds. A difference counts as resolved "
        "when it is larger than the larger of the two spreads.",
    ]
    write_page(root / PAGE, head, tables)
