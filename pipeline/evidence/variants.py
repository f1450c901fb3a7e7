"""One run and its variants: the same cache, seeds and budget, a part of the method taken away or exchanged.

The variants share the run's cache, so that the teacher and the clusters are computed once for all of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import STAGES, Config, config_fingerprint, digest, from_mapping


@dataclass(frozen=True)
class Variant:
    """A row of a table: its name there, and what it changes."""

    label: str
    settings: tuple[str, ...] = ()


VARIANTS = {
    "full": Variant("full method"),
    "glm_off": Variant("without GLM", ("train.glm=off",)),
    "seen_only": Variant(
        "seen labels only (no GLM, no potential objects)", ("train.glm=off", "train.potential=false")
    ),
    "nel_off": Variant("without focal and dice", ("train.nel=off",)),
    "ce_off": Variant("without cross-entropy", ("train.weights.ce=0",)),
    "generate_off": Variant("without L_generate", ("train.generate=false",)),
    "glm_max": Variant("GLM by max pooling", ("train.glm=max",)),
    "glm_mean": Variant("GLM by mean pooling", ("train.glm=mean",)),
    "vla_mlp": Variant("VLA an MLP", ("train.vla=mlp",)),
    "vla_original": Variant("no VLA, original features", ("train.vla=original",)),
}
SEEDS = (0, 1, 2)
CONTRAST = ("full", "glm_off", "seen_only")  # what the paper's main claim rests on (Table 3)
# The paper's ablations and their hIoU on PASCAL Context, SegFormer-B0, 20k iterations.
TABLES: dict[str, dict[str, float]] = {
    "Table 3, components": {
        "full": 45.4,
        "nel_off": 44.6,
        "ce_off": 38.4,
        "glm_off": 13.2,
        "generate_off": 45.2,
    },
    "Table 4, GLM": {"full": 45.4, "glm_max": 35.5, "glm_mean": 42.0},
    "Table 5, VLA": {"full": 45.4, "vla_mlp": 45.2, "vla_original": 45.1},
}
ABLATED = tuple(dict.fromkeys(variant for rows in TABLES.values() for variant in rows))
# One seed and a fifth of the iterations: to see that everything runs, not to see a difference.
QUICK, QUICK_SEEDS, QUICK_SHARE = "quick", (0,), 5


def run_name(config: Config, variant: str, seed: int, *, quick: bool = False) -> str:
    """The run of one variant and seed; the run itself stands for its own seed of the full method."""
    if quick:
        return f"{config.name}-{QUICK}-{variant}-{seed}"
    is_itself = not VARIANTS[variant].settings and seed == config.train.seed
    return config.name if is_itself else f"{config.name}-{variant}-{seed}"


def run_names(config: Config, variants: Iterable[str], *, quick: bool = False) -> list[str]:
    """The runs of some variants, all seeds."""
    seeds = QUICK_SEEDS if quick else SEEDS
    return [run_name(config, variant, seed, quick=quick) for variant in variants for seed in seeds]


def variant_runs(
    config: Config, settings: Iterable[str], *, quick: bool = False
) -> dict[str, tuple[str, ...]]:
    """Run names and their settings: the run itself, then each variant and seed, all on the run's cache."""
    settings, cache = tuple(settings), config.cache_path
    runs = {config.name: settings}
    shorter = (f"train.iterations={max(config.train.iterations // QUICK_SHARE, 1)}",) if quick else ()
    for variant, changed in VARIANTS.items():
        for seed in QUICK_SEEDS if quick else SEEDS:
            name = run_name(config, variant, seed, quick=quick)
            where = f"cache.path={cache.as_posix() if isinstance(cache, Path) else cache}"
            own = (*changed.settings, *shorter, *side_by_side(), f"name={name}", where, f"train.seed={seed}")
            runs.setdefault(name, (*settings, *own))
    return runs


def side_by_side() -> tuple[str, ...]:
    """Settings of variants that train at the same time, a core each: without a GPU two small students on two cores
    end sooner than one after the other on both (bench/README.md). On a GPU nothing, and one at a time.
    """
    return () if shutil.which("nvidia-smi") else ("train.threads=1",)


def stage_triggers(raw: Mapping[str, Any], settings: Iterable[str]) -> dict[str, str]:
    """What Snakemake watches: the config fingerprint of every stage."""
    config = from_mapping(raw, settings)
    return {stage: config_fingerprint(config, stage) for stage in STAGES}


def transfer_trigger(of_eval: str, other: Config) -> str:
    """The same of an evaluation on another config's data set: of it, data and text count."""
    return digest(
        [of_eval, other.name, other.data.model_dump(mode="json"), other.text.model_dump(mode="json")]
    )
