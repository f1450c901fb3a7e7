"""What the ablations beyond the paper still need, and how long that takes: said before any of it begins."""

from __future__ import annotations

import sys
from pathlib import Path

from cache.ledger import Ledger, read_manifest
from evidence.variants import MORE, QUICK_SEEDS, QUICK_SHARE, SEEDS, more_tables, own_cache, run_name, run_names, varied
from pipeline.config import Config
from pipeline.looking.facts import elapsed_s, human_seconds, losses
from pipeline.running.table import config_fingerprint


def announced(config: Config, only: str = "", *, quick: bool = False) -> list[str]:
    """The evaluations that these tables need. Snakemake asks when it plans them: `foretold` goes to standard error."""
    print(foretold(config, only, quick=quick), file=sys.stderr)
    tables = more_tables(config, only).values()
    runs = dict.fromkeys(run for variants in tables for run in run_names(config, variants, quick=quick))
    return [f"{config.runs}/{run}/eval/metrics.json" for run in runs]


def foretold(config: Config, only: str = "", *, quick: bool = False) -> str:
    """How many trainings and caches are missing, and the hours from the run's own times. Raises: UserError.

    Times are one after the other: where trainings go side by side it is less.
    """
    variants = tuple(dict.fromkeys(name for names in more_tables(config, only).values() for name in names))
    seeds = QUICK_SEEDS if quick else SEEDS
    runs = [Path(config.runs) / run_name(config, name, seed, quick=quick) for name in variants for seed in seeds]
    missing = [run for run in runs if not (run / "eval" / "metrics.json").is_file()]
    caches = {name: cache for name in variants if (cache := own_cache(config, name)) is not None}
    absent = [name for name, cache in caches.items() if not (cache / "cluster.manifest.json").is_file()]
    made = f"{len(missing)} of {len(runs)} trainings and {len(absent)} of {len(caches)} caches"
    what = f"ablations_more: {made} are to be made"
    if not missing and not absent:
        return what
    done = read_manifest(config.run_path / "train" / "train.manifest.json")
    a_training = elapsed_s(losses(config)) if done else None
    if a_training is None:
        return f"{what}; the time of a training is known once {config.name} itself is trained"
    trainings = len(missing) * a_training / (QUICK_SHARE if quick else 1)
    making = sum(cache_seconds(config, name) for name in absent)
    times = f"{human_seconds(trainings)} and {human_seconds(making)} one after the other"
    return f"{what}: {times}, by {config.name}'s own times"


def cache_seconds(config: Config, variant: str) -> float:
    """Of the stages that a variant's cache needs, in proportion to its views."""
    other = varied(config, MORE[variant].settings)
    is_same = config_fingerprint(other, "extract") == config_fingerprint(config, "extract")
    stages = ("cluster",) if is_same else ("extract", "cluster")
    spent = sum(
        float(entry.get("seconds", 0))
        for stage in stages
        for entry in Ledger(config.cache_path, stage).entries().values()
    )
    return spent * other.views.num / config.views.num
