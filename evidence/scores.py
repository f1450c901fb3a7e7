"""Scores of a config's variants over their training seeds, read from metrics.json: means, spreads, sweeps of gamma."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.variants import CONTRAST, EVERY, QUICK_SEEDS, SEEDS, only_clip_teacher, run_name
from pipeline.config import Config, UserError
from pipeline.looking.results import KEYS, Table, read_metrics

# What evaluations that share a table have in common.
ALIKE = ("gamma", "num_images", "unseen", "mode", "flip", "scales", "stride", "several_names")


Results = dict[str, dict[int, dict[str, Any]]]  # by contrast and seed, the metrics


def results_of(config: Config, variants: Iterable[str] = CONTRAST, *, quick: bool = False) -> Results:
    """The metrics of the variants' runs that were evaluated, in the order given and of the seeds.

    Raises: UserError for another recipe, and for evaluations that can't share a table.
    """
    only_clip_teacher(config)
    found: Results = {}
    for variant in variants:
        for seed in QUICK_SEEDS if quick else SEEDS:
            run = Path(config.runs) / run_name(config, variant, seed, quick=quick)
            if (metrics := read_metrics(run / "eval" / "metrics.json")) is not None:
                found.setdefault(variant, {})[seed] = metrics
    check_alike(config, [metrics for seeds in found.values() for metrics in seeds.values()])
    return found


def check_alike(config: Config, found: Sequence[Mapping[str, Any]]) -> None:
    """Raises: UserError where evaluations differ in what must not, or a score is missing."""
    if any(metrics[key] is None for metrics in found for key in KEYS):
        raise UserError(
            f"{config.name!r} has no seen or no unseen class that was scored, and these tables want both. Name a split "
            "in its config (data.unseen or data.split); `cli.py results` prints what there is."
        )
    for key in ALIKE:
        values = list(dict.fromkeys(json.dumps(metrics.get(key)) for metrics in found))
        if len(values) > 1:
            raise UserError(
                f"runs of {config.name!r} were evaluated with {key} {values[0]} and {values[1]}: no average. Run "
                "`cli.py eval` of all with one config."
            )
    if len({tuple(metrics.get("gamma_sweep") or ()) for metrics in found}) > 1:
        raise UserError(f"runs of {config.name!r} were evaluated with other eval.gamma_sweep. Evaluate all with one.")


def mean_and_spread(seeds: Mapping[int, Mapping[str, Any]], key: str) -> str:
    values = [metrics[key] for metrics in seeds.values()]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def row_of(label: str, seeds: Mapping[int, Mapping[str, Any]], keys: Sequence[str] = KEYS) -> list[str]:
    """A table's line: label, number of seeds, mean and spread of each score."""
    return [label, str(len(seeds)), *(mean_and_spread(seeds, key) for key in keys)]


def sweep_table(results: Results, title: str = "") -> Table:
    """mIoU(U) and hIoU by gamma, means over the seeds: shown as a sweep, nothing is chosen from it."""
    gammas = list(next(iter(next(iter(results.values())).values()))["gamma_sweep"])
    lines = []
    for variant, seeds in results.items():
        sweeps = [metrics["gamma_sweep"] for metrics in seeds.values()]
        means = [[statistics.mean(sweep[g][key] for sweep in sweeps) for key in KEYS[2:]] for g in gammas]
        lines.append([EVERY[variant].label, *(f"{unseen:.0f} / {both:.0f}" for unseen, both in means)])
    return Table(title, ("mIoU(U) / hIoU at gamma", *gammas), lines)
