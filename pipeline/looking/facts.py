"""What a run's folder and cache say of themselves: arrays, stages, provenance, curves, sister runs.

Everything here only reads, and takes a run that is half done as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from cache.errors import CacheError
from cache.ledger import Ledger, read_manifest
from cache.places import place
from cache.records import Shape, misfit, parsed
from cache.schema import ARRAYS
from cache.store import Store
from pipeline.config import Config, UserError, as_mapping, leaves
from pipeline.running.manifests import found_manifest, run_config
from pipeline.running.table import IN_CACHE, in_cache

SCORES = {"pAcc": "pAcc", "mIoU_S": "mIoU(S)", "mIoU_U": "mIoU(U)", "hIoU": "hIoU"}  # metrics.json's, and for people
_SCORES = dict.fromkeys(SCORES, (float, None))
# What is read of metrics.json; more is in it.
METRICS = {
    **_SCORES,
    "gamma": float,
    "num_images?": int,
    "unseen?": [str],
    "per_class?": {str: (float, None)},
    "gamma_sweep?": {str: {str: (float, None)}},
    "fingerprint?": str,
    "config?": str,
    "best_of_sweep?": ({"gamma": float, "hIoU": float}, None),
    "made?": {"seconds?": (float, None)},
}
REPORTED = METRICS | {key: METRICS[f"{key}?"] for key in ("num_images", "unseen", "per_class", "gamma_sweep")}
ELAPSED = "time/elapsed_s"  # in a loss curve: seconds since training was started or resumed
NOT_A_DIFFERENCE = ("name", "runs", "cache.", "report.")  # of two runs that are to be compared


@dataclass(frozen=True)
class ArrayFact:
    """One array of the cache. bytes_per_view is of the views written so far; None for `text`."""

    name: str
    note: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    num_shards: int
    size_bytes: int
    bytes_per_view: float | None


@dataclass(frozen=True)
class StageFact:
    """How far a stage is. seconds is the work of all its shards together, whoever did them."""

    name: str
    done: int
    total: int
    unit: str
    is_complete: bool
    seconds: float | None = None
    num_images: int | None = None  # that the seconds are of
    size_bytes: int = 0  # of what the stage has written: arrays, weights and checkpoints, metrics


@dataclass(frozen=True)
class Run:
    """A run on a page: its letter where there are several, and the settings in which it differs from the first."""

    config: Config
    metrics: Mapping[str, Any] | None = None
    letter: str = ""
    differences: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sister:
    """A finished run on the same cache: its metrics, and the settings in which it differs."""

    name: str
    metrics: Mapping[str, Any]
    differences: tuple[str, ...] = ()


def found_metrics(path: Path, shape: Shape = METRICS) -> dict[str, Any] | None:
    """The metrics of an evaluation; None when there are none, or they aren't what eval writes.

    Raises: CacheError for a file that can't be read.
    """
    metrics = read_manifest(path, shape)
    try:
        for gamma in (metrics or {}).get("gamma_sweep") or {}:
            float(gamma)
    except ValueError:
        return None
    return metrics


def metrics_path(config: Config) -> Path:
    return config.run_path / "eval" / "metrics.json"


def done_shards(config: Config, stage: str) -> set[int]:
    """Shards that the stage has finished, of its manifest's fingerprint or else of its newest record's."""
    ledger = Ledger(config.cache_path, stage)
    manifest = found_manifest(config, stage)
    if manifest is not None:
        return ledger.done(manifest.get("fingerprint", ""))
    entries = ledger.entries()
    newest = max(entries.values(), key=lambda entry: str(entry.get("time")), default={}).get("fingerprint")
    return {shard for shard, entry in entries.items() if entry.get("fingerprint") == newest}


def array_facts(config: Config, store: Store) -> list[ArrayFact]:
    facts = []
    done = {stage: done_shards(config, stage) for stage in IN_CACHE}
    for name in store.arrays:
        spec = store.spec(name)
        size, per_view = store.size_bytes(name), None
        if spec.is_sharded:
            views = sum(len(store.rows(shard)) for shard in done.get(spec.stage, ())) * store.sizes["V"]
            per_view = size / views if views else None
        num_shards = store.num_shards if spec.is_sharded else 1
        shape = spec.shape(store.sizes)
        facts.append(ArrayFact(name, spec.note, spec.axes, shape, spec.dtype, num_shards, size, per_view))
    return facts


def bytes_per_view(arrays: Sequence[ArrayFact]) -> float | None:
    """What one view of the data set costs on disk, arrays of cluster.debug apart; None before any is written."""
    counted = [fact.bytes_per_view for fact in arrays if not ARRAYS[fact.name].is_debug]
    known = [size for size in counted if size is not None]
    return sum(known) if known else None


def stage_facts(config: Config, store: Store, metrics: Mapping[str, Any] | None) -> list[StageFact]:
    """The stages of this recipe in the order in which they run."""
    facts, sizes = [], {name: (store.spec(name).stage, store.size_bytes(name)) for name in store.arrays}
    for stage in in_cache(config):
        ledger, done = Ledger(config.cache_path, stage), done_shards(config, stage)
        seconds = sum(float((ledger.entry(shard) or {}).get("seconds", 0)) for shard in done)
        num_images = sum(len(store.rows(shard)) for shard in done)
        is_complete = found_manifest(config, stage) is not None and len(done) == store.num_shards
        size = sum(size for made_by, size in sizes.values() if made_by == stage)
        facts.append(StageFact(stage, len(done), store.num_shards, "shards", is_complete, seconds, num_images, size))
    curve, trained = losses(config), found_manifest(config, "train")
    drawn_last = int(curve[-1]["iteration"]) if curve else 0
    done_iterations = trained.get("iterations", drawn_last) if trained else drawn_last
    total = done_iterations if trained else config.train.iterations
    drawn = done_iterations * config.train.batch
    facts.append(
        StageFact(
            "train",
            done_iterations,
            total,
            "iterations",
            trained is not None,
            elapsed_s(curve),
            drawn,
            folder_bytes(config.run_path / "train"),
        )
    )
    tested, took = (int(metrics["num_images"]), metrics.get("made", {}).get("seconds")) if metrics else (0, None)
    size = folder_bytes(config.run_path / "eval")
    facts.append(StageFact("eval", tested, tested, "test images", metrics is not None, took, tested, size))
    return facts


def elapsed_s(curve: Sequence[Mapping[str, float]]) -> float | None:
    """The seconds of a training that may have been resumed: each start counts from zero. None if not logged."""
    clock = [row[ELAPSED] for row in curve if ELAPSED in row]
    ends = [now for now, then in pairwise(clock) if then < now]
    return sum(ends) + clock[-1] if clock else None


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def quarantined(config: Config) -> dict[str, str]:
    """Image ids that can't be used, and why, from the shards that are done."""
    ledger, found = Ledger(config.cache_path, "extract"), dict[str, str]()
    for shard in sorted(done_shards(config, "extract")):
        found |= (ledger.entry(shard) or {}).get("quarantined", {})
    return dict(sorted(found.items()))


def provenance(store: Store) -> dict[str, dict[str, str]]:
    """Section by section, key by key, what the cache says it was made from."""
    groups: dict[str, dict[str, str]] = {"cache": {}}
    for key, value in store.attributes.items():
        if isinstance(value, dict):
            groups[key] = {k: _word(v) for k, v in value.items()}
        elif key == "classes" and isinstance(value, list):
            groups["cache"][key] = f"{len(value)}: {', '.join(map(str, value))}"
        else:
            groups["cache"][key] = _word(value)
    return {name: group for name, group in groups.items() if group}


def _word(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(_word, value)) if isinstance(value, list) else str(value)


def losses(config: Config) -> list[dict[str, float]]:
    """The logged values by iteration; a line that was cut off is left out."""
    path, found = config.run_path / "train" / "losses.jsonl", []
    if path.is_file():
        for line in path.read_bytes().splitlines():
            with suppress(ValueError):
                row = parsed(line)
                if misfit(row, {"iteration": int}) is None and set(map(type, row.values())) <= {int, float}:
                    found.append(row)
    return found


def sisters(config: Config) -> list[Sister]:
    """Other runs beside this one that were evaluated and read the same cache, by name."""
    found = []
    for path in sorted(config.run_path.parent.glob("*/config.yaml")):
        try:
            other = run_config(path.parent)
            metrics = found_metrics(path.parent / "eval" / "metrics.json")
        except (UserError, CacheError):
            continue  # somebody else's folder
        is_same = path.parent.resolve() == config.run_path.resolve()
        if metrics is None or is_same or place(other.cache_path).resolve() != place(config.cache_path).resolve():
            continue
        found.append(Sister(path.parent.name, metrics, differences(config, other)))
    return found


def differences(config: Config, other: Config) -> tuple[str, ...]:
    """The settings of another run that aren't this one's, as `key = value`."""
    own, theirs = settings_of(config), settings_of(other)
    keys = dict.fromkeys([*theirs, *own])
    return tuple(f"{key} = {_word(theirs.get(key))}" for key in keys if theirs.get(key) != own.get(key))


def settings_of(config: Config) -> dict[str, Any]:
    """The config's leaves by dotted key, without what has no bearing on results."""
    found = leaves(as_mapping(config))
    return {key: value for key, value in found.items() if not key.startswith(NOT_A_DIFFERENCE)}


def human_bytes(size: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def human_seconds(seconds: float) -> str:
    """4 -> '4.0 s', 4000 -> '1 h 7 min'."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
