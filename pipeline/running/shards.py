"""The engine of the stages that make arrays of the cache shard by shard from what the stage above made.

Such a stage is a `ShardStage`: what it rests on, which arrays, the work on one shard, and, where the whole data set
counts, a `reduce` over all shards. Everything else is here and the same for all: the data set opened, the stage above
asked for, what is done already found in the ledger, the rest handed to processes, the manifest written last.

A shard is done while its record speaks of these rows, of these labels, and of what the stage above holds now.
"""

from __future__ import annotations

import contextlib
import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cache.errors import CacheError, CorruptShard
from cache.ledger import Ledger, lock, refuse_if_locked
from cache.schema import ARRAYS, OF_CLASSES
from cache.store import Store
from cache.verify import read_recorded, read_whole
from pipeline.config import Config, UserError, digest
from pipeline.data.base import DataSet, Sample, data_of
from pipeline.ops.labels import cached_dtype
from pipeline.running.console import mention, progress
from pipeline.running.engine import map_shards
from pipeline.running.manifests import (
    asked_of,
    finish,
    found_manifest,
    record_shard,
    reopen,
    required_manifest,
    save_config,
)
from pipeline.running.rows import check_labels_unchanged, current_samples, samples_of, span, stamps_of
from pipeline.running.table import STAGES, Stage, above, all_above, below, fingerprint


@dataclass
class Run:
    """A stage at work, as its hooks see it; `above` is the manifest of the stage that it stands on."""

    config: Config
    data: DataSet
    above: Mapping[str, Any]
    samples: Sequence[Sample] = ()  # by row; known from `look` on
    looked: Any = None  # what `look` returned


@dataclass(frozen=True)
class Part:
    """One shard's rows of the cache."""

    config: Config
    data: DataSet
    store: Store
    shard: int
    samples: list[Sample]
    tick: Any = None  # tick(n): so many more images are done

    def read(self, stage: str, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """What a stage recorded of this shard, by array. Raises: CorruptShard, StaleCache."""
        keys = ("fingerprint",) if stage == "extract" else (stage, "fingerprint")
        return read_recorded(self.store, self.shard, {stage: self.store.fact(str, *keys)}, names)

    def whole(self, array: str) -> np.ndarray:
        """An array without a sample axis, as its stage left it. Raises: CorruptShard."""
        return read_whole(self.store, array, found_manifest(self.config, ARRAYS[array].stage) or {})


@dataclass(frozen=True)
class Made:
    """What became of a shard: its blocks, counts to be added up, digests of arrays that were there before."""

    blocks: Mapping[str, np.ndarray]
    stats: Mapping[str, list[Any]] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)


class ShardStage(ABC):
    """What is a stage's own. Hooks in the order in which they are called; all but `make` may be left as they are."""

    name: str
    makes = "what it makes"  # of an image, in words

    def facts(self, run: Run) -> dict[str, Any]:
        """What its work rests on beside the config. Raises for what the user has to mend before anything else."""
        return {}

    def look(self, run: Run) -> Any:
        """A look at the data before the work begins; not where the stage has nothing to do."""
        return None

    def arrays(self, config: Config) -> tuple[str, ...]:
        """The arrays that it writes under this config."""
        return STAGES[self.name].arrays

    def dtypes(self, config: Config) -> dict[str, str]:
        """Of those that aren't of class ids and may have several."""
        return {}

    def sizes(self, run: Run, store: Store) -> dict[str, int] | None:
        """Of the axes that are new; None where the arrays are there already."""
        return {}

    def announced(self, config: Config) -> str:
        """A line that is said before the bar."""
        return ""

    @abstractmethod
    def make(self, part: Part) -> Made:
        """The work on one shard, in any process; must be idempotent."""

    def reduce(self, run: Run, store: Store, stats: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Arrays without a sample axis, from all shards: from their counts, or read from the store."""
        return {}

    def summary(self, run: Run, stats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What is printed at the end and kept in the manifest."""
        return {}

    def says(self, run: Run) -> dict[str, Any]:
        """What the manifest says beside what all say."""
        return {}

    def attributes(self, run: Run) -> dict[str, Any]:
        """Provenance beside the fingerprint, kept in the cache's attributes."""
        return {}


def run_stage(name: str, config: Config, *, workers: int = 0, scheduler: str | None = None) -> dict[str, Any]:
    """Runs a stage of the table to its end, or finds it there; returns the manifest with its summary.

    Raises: MissingCache, StaleCache, CorruptShard, DataError, EngineError and what the stage's own hooks do.
    """
    entry, stage = STAGES[name], STAGES[name].loaded()
    data = data_of(config.data)  # what is wrong with it is said before what is stale
    run = Run(config, data, required_manifest(config, str(above(config, name))))
    manifest = found_manifest(config, name)
    if manifest is None:
        refuse_if_locked(config.cache_path)  # below every mask is looked at
    identity = fingerprint(config, name, run.above["fingerprint"], stage.facts(run))
    store = Store.open(config.cache_path)
    run.samples = current_samples(data, store)
    for over in (over for over in all_above(config, name) if "labels" in STAGES[over].reads):
        made, now = required_manifest(config, over)["fingerprint"], stamps_of(data, run.samples, "labels")
        check_labels_unchanged(Ledger(store.path, over), made, run.samples, now)
    stamps = _stamps(entry, data, run.samples)
    content = digest([identity, run.above["content"], stamps])
    if manifest is not None and manifest.get("content") == content and "summary" in manifest:
        finish(config, name, manifest | asked_of(config, name))
        mention(f"{name}: nothing to do, {len(run.samples)} images have {stage.makes}")
        return manifest
    run.looked = stage.look(run)
    with lock(config.cache_path, name):
        save_config(config)  # whoever opens the run asks for what is made here, not for what extract was run with
        store = Store.open(config.cache_path)
        arrays = stage.arrays(config)
        if (sizes := stage.sizes(run, store)) is not None:
            of_classes = {array: cached_dtype(len(data.classes)).name for array in arrays if array in OF_CLASSES}
            dtypes = of_classes | stage.dtypes(config)
            store.add_arrays(arrays, sizes, replace=True, dtypes=dtypes)
        if line := stage.announced(config):
            mention(line)
        records = _make_shards(config, entry, identity, store, stamps, workers, scheduler)
        stats = [record["stats"] for record in records if "stats" in record]
        with _counts_of(store, name, stats):
            found, summary = stage.reduce(run, store, stats), stage.summary(run, stats)
        whole = {array: store.write_whole(array, values) for array, values in found.items()}
        manifest = {
            "stage": name,
            "fingerprint": identity,
            "content": content,
            **asked_of(config, name),
            "arrays": list(arrays),
            "upstream": run.above["fingerprint"],
            "num_samples": store.num_samples,
            "num_shards": store.num_shards,
            **stage.says(run),
            "summary": summary,
            "digests": digest([record["digests"] for record in records]),
        }
        if whole:
            manifest["whole"] = whole
        store.update_attributes(name, {"fingerprint": identity, **stage.attributes(run)})
        finish(config, name, manifest)
    return manifest


def make_shard(name: str, config: Config, identity: str, shard: int, *, tick: Any = None) -> int:
    """Makes, writes and records one shard of a stage; returns its row count."""
    began, entry = time.time(), STAGES[name]
    data, store = data_of(config.data), Store.open(config.cache_path)
    rows = store.rows(shard)
    samples = samples_of(data, store, rows)
    made = entry.loaded().make(Part(config, data, store, shard, samples, tick))
    digests = {array: store.write_shard(array, shard, block) for array, block in made.blocks.items()}
    over = Ledger(store.path, str(above(config, name))).entry(shard) or {}
    record = {
        "rows": span(rows),
        "fingerprint": identity,
        "quarantined": {},
        "digests": {**digests, **made.digests},
        "stats": dict(made.stats),
        "stamps": _stamps(entry, data, samples),
        "upstream": digest(over.get("digests")),
    }
    record_shard(config, name, shard, record, began)
    return len(rows)


def _stamps(entry: Stage, data: DataSet, samples: Sequence[Sample]) -> list[str]:
    """Of each row's labels, for a stage that reads them."""
    return stamps_of(data, samples, "labels") if "labels" in entry.reads else []


def _done(config: Config, entry: Stage, identity: str, store: Store, stamps: Sequence[str]) -> set[int]:
    """The shards that need not be made again; `stamps` are those of all labels, by row."""
    over, done = Ledger(store.path, str(above(config, entry.name))).entries(), set()
    for shard, record in Ledger(store.path, entry.name).entries_of(identity).items():
        if shard >= store.num_shards:
            continue
        rows = store.rows(shard)
        if not all(store.size_bytes(name, shard) for name in record.get("digests") or {}):
            continue  # a file that the record vouches for is gone
        now = (span(rows), list(stamps[rows.start : rows.stop]), digest(over.get(shard, {}).get("digests")))
        if (record["rows"], record.get("stamps"), record.get("upstream")) == now and "stats" in record:
            done.add(shard)
    return done


def _make_shards(
    config: Config,
    entry: Stage,
    identity: str,
    store: Store,
    stamps: Sequence[str],
    workers: int,
    scheduler: str | None,
) -> list[dict[str, Any]]:
    """Makes the shards that aren't done, and returns the records of all, by shard."""
    done = _done(config, entry, identity, store, stamps)
    todo = [shard for shard in range(store.num_shards) if shard not in done]
    if todo:
        for other in below(entry.name)[1:]:
            reopen(config, other)
    if kept := sum(len(store.rows(shard)) for shard in done):
        mention(f"{entry.name}: resuming, {kept} of {store.num_samples} images are done")
    is_local = not workers and not scheduler
    with progress(entry.name, store.num_samples, done=kept) as advance:
        work = functools.partial(make_shard, entry.name, config, identity, tick=advance if is_local else None)
        for rows in map_shards(work, todo, workers=workers, scheduler=scheduler):
            if not is_local:
                advance(rows)
    ledger = Ledger(store.path, entry.name)
    return [ledger.entry(shard) or {} for shard in range(store.num_shards)]


@contextlib.contextmanager
def _counts_of(store: Store, name: str, stats: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Around what adds up a stage's counts. Raises: CorruptShard where they can't be."""
    try:
        if len(stats) != store.num_shards:
            raise KeyError("stats")
        yield
    except (CacheError, UserError):
        raise
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CorruptShard(
            f"{Ledger(store.path, name).folder}: the counts of its records don't fit together ({error}). Delete this "
            f"folder and run `cli.py {name}` again."
        ) from error
