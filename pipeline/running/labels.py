"""What the stages share that make labels for training, cluster and cams: which shards are done, and their records.

A shard is done while its record speaks of these rows, of these labels, and of what extraction holds now.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from cache.errors import CorruptShard
from cache.ledger import Ledger
from cache.store import Store
from pipeline.config import digest
from pipeline.data.base import DataError, DataSet, Sample, data_of
from pipeline.running.console import progress, say
from pipeline.running.engine import Job, map_shards
from pipeline.running.manifests import record_shard
from pipeline.running.rows import samples_of, span, stamps_of


def done_shards(stage: str, fingerprint: str, store: Store, stamps: Sequence[str]) -> set[int]:
    """The shards of a stage that need not be made again; `stamps` are those of all labels, by row."""
    made, done = Ledger(store.path, "extract").entries(), set()
    for shard, entry in Ledger(store.path, stage).entries_of(fingerprint).items():
        if shard >= store.num_shards:
            continue
        rows = store.rows(shard)
        if not all(store.size_bytes(name, shard) for name in entry.get("digests") or {}):
            continue  # a file that the record vouches for is gone
        now = (span(rows), list(stamps[rows.start : rows.stop]), digest(made.get(shard, {}).get("digests")))
        if (entry["rows"], entry.get("stamps"), entry.get("upstream")) == now and "stats" in entry:
            done.add(shard)
    return done


def make_shards(
    stage: str,
    work: Callable[..., int],
    job: Job,
    store: Store,
    stamps: Sequence[str],
    *,
    workers: int = 0,
    scheduler: str | None = None,
) -> list[dict[str, Any]]:
    """Makes the shards of a stage that aren't done, and returns the records of all, by shard.

    `work(job, shard, tick=...)` makes and records one and returns its rows. Raises: EngineError and what `work` does.
    """
    done = done_shards(stage, job.fingerprint, store, stamps)
    todo = [shard for shard in range(store.num_shards) if shard not in done]
    if kept := sum(len(store.rows(shard)) for shard in done):
        say(f"{stage}: resuming, {kept} of {store.num_samples} images are done")
    is_local = not workers and not scheduler
    with progress(stage, store.num_samples, done=kept) as advance:
        made = functools.partial(work, job, tick=advance if is_local else None)
        for rows in map_shards(made, todo, workers=workers, scheduler=scheduler):
            if not is_local:
                advance(rows)
    ledger = Ledger(store.path, stage)
    return [ledger.entry(shard) or {} for shard in range(store.num_shards)]


def summary_of(
    stage: str, store: Store, records: Sequence[dict[str, Any]], summarise: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """`summarise` of all records' counts. Raises: CorruptShard where they can't be added up."""
    try:
        return summarise([record["stats"] for record in records])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CorruptShard(
            f"{Ledger(store.path, stage).folder}: the counts of its records don't fit together ({error}). Delete this "
            f"folder and run `cli.py {stage}` again."
        ) from error


def record_labels(stage: str, job: Job, store: Store, shard: int, made: dict[str, Any], began: float) -> None:
    """Records a shard of labels with what it was made from."""
    data, rows = data_of(job.config.data), store.rows(shard)
    above = Ledger(job.config.cache_path, "extract").entry(shard) or {}
    entry = {"rows": span(rows), "fingerprint": job.fingerprint, "quarantined": {}, **made}
    entry["stamps"] = stamps_of(data, samples_of(data, store, rows), "labels")
    entry["upstream"] = digest(above.get("digests"))
    record_shard(job.config, stage, shard, entry, began)


def checked_tags(data: DataSet, sample: Sample) -> tuple[int, ...]:
    """The image-level labels of an image. Raises: DataError for one that is no class, or is the background."""
    tags = data.tags(sample)
    strange = [tag for tag in tags if not 0 <= tag < len(data.classes) or tag == data.background]
    if strange:
        raise DataError(
            f"{data.name}: image {sample.id} has the label {strange[0]}, which is none of its "
            f"{len(data.classes) - (data.background is not None)} foreground classes. Correct its list of labels."
        )
    return tuple(tags)
