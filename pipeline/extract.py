"""Stage one, first half: the frozen teacher once over every view of every training image.

    python cli.py extract --config config/demo.yaml

One shard of 64 images is one unit of work: run through the teacher (`pipeline/teaching/encode.py`), written, read
back, and only then recorded in the ledger. A killed run redoes at most the shards in flight; a second
run of a finished stage does nothing.

`cache.tokens` says what becomes of the dense tokens: kept as float16 or int8, or, with `stream`,
clustered here and forgotten.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache.errors import CorruptShard, StaleCache, damaged
from cache.ledger import Ledger, lock, refuse_if_locked
from cache.schema import block_digest
from cache.store import Store
from cache.verify import OK, whole_digests
from pipeline.config import Config, config_fingerprint, data_options, digest, fingerprint
from pipeline.data.base import DataError, DataSet, Sample
from pipeline.data.prompts import prompts
from pipeline.data.words import names_of_classes, other_names
from pipeline.learning.batches import data_of
from pipeline.learning.text import features_of_file
from pipeline.looking.checked import check_labels
from pipeline.models.teacher import Teacher
from pipeline.ops.quantise import dequantised
from pipeline.teaching.encode import STORAGE, axis_sizes, mean_colour, shard_blocks, teacher_of
from pipeline.teaching.engine import Job, map_shards
from pipeline.teaching.pseudo import cluster_tokens, num_centres, sum_of, written_arrays
from pipeline.teaching.rows import (
    STREAM,
    cached_samples,
    check_unchanged,
    in_row_order,
    made_from,
    samples_of,
    span,
)
from pipeline.tracking import finish, found_manifest, progress, record_shard, reopen, save_config, say

# An audit fails below this cosine. int8 alone costs about 3e-5, bfloat16 on another machine 1e-4.
AUDIT_COSINE = 0.999


def extract(config: Config, *, workers: int = 0, scheduler: str | None = None) -> dict[str, Any]:
    """Runs the stage to its end, or finds it there; returns the manifest.

    Raises: DataError, TeacherError, CacheError (each one line that says what to do).
    """
    data, path = data_of(config), config.cache_path
    manifest = found_manifest(config, "extract")
    if manifest is None:
        refuse_if_locked(path)  # below every image is looked at
    identity = fingerprint(config, "extract", None, _facts(config, data))
    if manifest is not None and manifest.get("fingerprint") != identity:
        raise StaleCache(
            f"{path}: holds an extraction with fingerprint {manifest.get('fingerprint')} (teacher "
            f"{manifest.get('teacher')!r}, {manifest.get('num_views')} views, tokens {manifest.get('tokens')}); this "
            f"config and data ask for {identity} (teacher {config.teacher.model!r}, {config.views.num} views, tokens "
            f"{config.cache.tokens}). Delete that folder, or point cache.path elsewhere."
        )
    cached = Store.open(path).samples if Store.is_at(path) else []
    samples = in_row_order(data, cached, path)
    stamps = made_from(config, data, samples)
    content = digest([identity, [sample.id for sample in samples], stamps])
    if manifest is not None and manifest.get("content") == content:
        finish(config, "extract", manifest)
        say(f"extract: nothing to do, {len(samples)} images are cached in {path}")
        return manifest
    check_labels(config, data, samples, is_needed=config.cache.tokens == STREAM)
    with lock(path, "extract"):
        ledger = Ledger(path, "extract")
        check_unchanged(ledger, identity, samples, stamps)
        save_config(config)
        if cached and len(samples) > len(cached):
            say(f"extract: {len(samples) - len(cached)} images are new, {len(cached)} keep their rows")
        for stage in ("extract", "cluster", "cams"):  # from here on none is complete
            reopen(config, stage)
        store = _open_store(config, data, identity, samples)
        entries = ledger.entries_of(identity)
        todo = [s for s in range(store.num_shards) if entries.get(s, {}).get("rows") != span(store.rows(s))]
        kept = sum(entry["rows"][1] - entry["rows"][0] for entry in entries.values())
        if kept:
            say(f"extract: resuming, {kept} of {len(samples)} images are done")
        bad: dict[str, str] = {}
        for entry in entries.values():
            bad |= entry["quarantined"]
        _stop_if_too_many(
            bad, config.cache.max_bad
        )  # a run that stopped for them must not pass when repeated
        job = Job(config, identity)
        with progress("extract", len(samples), done=kept) as advance:
            local = not workers and not scheduler
            work = functools.partial(extract_shard, job, tick=advance if local else None)
            for entry in map_shards(work, todo, workers=workers, scheduler=scheduler):
                if not local:
                    advance(entry["num_rows"])
                bad |= entry["quarantined"]
                _stop_if_too_many(bad, config.cache.max_bad)
        for name, why in bad.items():
            say(f"quarantined {name}: {why}")
        manifest = {
            "stage": "extract",
            "fingerprint": identity,
            "content": content,
            "config": config_fingerprint(config, "extract"),
            "teacher": config.teacher.model,
            "num_samples": len(samples),
            "num_views": config.views.num,
            "tokens": config.cache.tokens,
            "num_shards": store.num_shards,
            "quarantined": dict(sorted(bad.items())),
            "whole": whole_digests(store),
            "digests": digest({s: (ledger.entry(s) or {}).get("digests") for s in range(store.num_shards)}),
        }
        finish(config, "extract", manifest)
    return manifest


def extract_shard(job: Job, shard: int, *, tick: Any = None) -> dict[str, Any]:
    """Makes, writes and records one shard; returns the number of images it made and its quarantined ones.

    A shard that was recorded when the data set was shorter keeps its rows and gets the new ones.
    Raises: CorruptShard when what it should keep isn't what was recorded.
    """
    began, config = time.time(), job.config
    data, teacher, store = data_of(config), teacher_of(config.teacher), Store.open(config.cache_path)
    rows = store.rows(shard)
    samples = samples_of(data, store, rows)
    old, parts = _recorded_rows(job, store, shard)
    num_old = old["rows"][1] - rows.start if old else 0
    new = samples[num_old:]
    blocks, bad = shard_blocks(config, data, teacher, new, tick)
    entry: dict[str, Any] = {"rows": span(rows), "fingerprint": job.fingerprint}
    entry["stamps"] = old.get("stamps", []) + made_from(config, data, new)
    entry["quarantined"] = {**old.get("quarantined", {}), **bad}
    if config.cache.tokens == STREAM:
        stats = _cluster(config, data, teacher, new, blocks)
        entry["stats"] = sum_of([old["stats"], stats]) if old else stats
    if old:
        blocks = {name: np.concatenate([parts[name], block]) for name, block in blocks.items()}
    entry["digests"] = {name: store.write_shard(name, shard, block) for name, block in blocks.items()}
    record_shard(config, "extract", shard, entry, began)
    return {"num_rows": len(new), "quarantined": bad}


def _recorded_rows(job: Job, store: Store, shard: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The record of a shard and the rows it speaks of, by array; both empty when there is none to keep."""
    entry = Ledger(job.config.cache_path, "extract").entry(shard)
    if entry is None or entry.get("fingerprint") != job.fingerprint:
        return {}, {}
    rows = np.arange(*entry["rows"])
    blocks = {name: store.read_rows(name, rows) for name in entry["digests"]}
    for name, block in blocks.items():
        if block_digest(name, shard, block) != entry["digests"][name]:
            raise damaged(store.data / name, name, shard, "it is not what was recorded")
    return entry, blocks


def _cluster(
    config: Config, data: DataSet, teacher: Teacher, samples: Sequence[Sample], blocks: dict[str, np.ndarray]
) -> dict[str, list[int]]:
    """Puts the pseudo labels into `blocks` in place of the dense tokens; returns their counts."""
    tokens, good = torch.from_numpy(blocks.pop("tokens")), blocks["status"] == OK
    shape = (tokens.shape[2], tokens.shape[4])
    made, stats = cluster_tokens(
        config.cluster, data, samples, blocks["view"], good, tokens.__getitem__, shape, teacher.image_size
    )
    blocks |= made
    return stats


def audit(config: Config, count: int) -> str:
    """Recomputes `count` random rows and compares them with the cache; returns what was found, in a line.

    Kept tokens are compared with the teacher's in float16, so the line shows what int8 costs.
    Raises: CorruptShard when a vector's cosine is below AUDIT_COSINE, DataError for an image that can't be read now.
    """
    data, teacher, store = data_of(config), teacher_of(config.teacher), Store.open(config.cache_path)
    good = np.flatnonzero(store.read_rows("status", np.arange(store.num_samples)) == OK)
    if not len(good):
        raise DataError(f"{config.cache_path}: no image of it could be used, so there is nothing to compare.")
    rows = np.sort(np.random.default_rng().choice(good, min(count, len(good)), replace=False))
    samples = cached_samples(data, store)
    unpacked = config.model_copy(update={"cache": config.cache.model_copy(update={"tokens": "float16"})})
    fresh, bad = shard_blocks(unpacked, data, teacher, [samples[row] for row in rows], None)
    if bad:
        listed = "; ".join(f"{name}: {why}" for name, why in bad.items())
        raise DataError(f"audit: what was cached can't be read any more: {listed}. Restore the images.")
    said, lowest = [], 1.0
    for name in ("cls", "tokens"):
        if not store.has(name):
            said.append(f"{name} not compared, they are not kept (cache.tokens: {config.cache.tokens})")
            continue
        stored, new = _vectors(store, name, rows), fresh[name].astype(np.float32)
        cosine = (stored * new).sum(-1) / (np.linalg.norm(stored, axis=-1) * np.linalg.norm(new, axis=-1))
        lowest = float(np.minimum(lowest, cosine.min()))  # NaN stays
        kept = f" (kept as {store.spec(name).dtype})"
        said.append(
            f"{name}{kept}: largest difference {np.abs(stored - new).max():.3g}, lowest cosine {cosine.min():.6f}"
        )
    line = f"audit of {len(rows)} rows: {'; '.join(said)}"
    if not lowest >= AUDIT_COSINE:  # NaN too
        raise CorruptShard(
            f"{config.cache_path}: {line}; want at least {AUDIT_COSINE}. This teacher on this machine doesn't make "
            "what is cached: run `cli.py verify`, then extract again into another cache.path."
        )
    return line


def _vectors(store: Store, name: str, rows: np.ndarray) -> np.ndarray:
    values = store.read_rows(name, rows)
    if values.dtype != np.int8:
        return values.astype(np.float32)
    scale = torch.from_numpy(store.read_rows("token_scale", rows))
    return dequantised(torch.from_numpy(values), scale).numpy()


def _facts(config: Config, data: DataSet) -> dict[str, Any]:
    """What the fingerprint covers beside the config: classes, files of weights and of text features."""
    files = [config.text.features, config.teacher.pretrained]
    if config.teacher.model.startswith("local-dir:"):
        files += sorted(str(p) for p in Path(config.teacher.model.partition(":")[2]).glob("*.safetensors"))
    hashed = {str(p): _file_digest(Path(p)) for p in files if p and Path(p).is_file()}
    facts = {"classes": data.classes, "files": sorted(hashed.values())}
    return facts | {"unseen": data.unseen} if config.cache.tokens == STREAM else facts


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text_features(config: Config, data: DataSet, teacher: Teacher) -> np.ndarray:
    """(K, C) float32, unit norm: of the configured file, else of the teacher's text encoder."""
    if config.text.features is None:
        named = names_of_classes(data.classes, config.text.synonyms)
        groups = [[p for name in names for p in prompts(config.text.templates, name)] for names in named]
        return teacher.encode_text(groups).numpy()
    return features_of_file(config.text.features, (len(data.classes), teacher.channels), data.name)


def _open_store(config: Config, data: DataSet, identity: str, samples: Sequence[Sample]) -> Store:
    teacher = teacher_of(config.teacher)
    text = _text_features(config, data, teacher)  # a mistake in it must not leave a store behind
    sizes = {"N": len(samples), "K": len(data.classes), **axis_sizes(config, teacher)}
    storage = STORAGE[config.cache.tokens]
    arrays = ["view", "cls", "status", "text", *(storage.arrays if storage.is_kept else ())]
    if config.cache.tokens == STREAM:
        arrays += written_arrays(config.cluster)
        sizes["K_c"] = num_centres(config.cluster, sizes["h"])
    attributes = {
        "fingerprint": identity,
        "data": {"kind": config.data.kind, "name": data.name, **data_options(config, "extract")},
        "classes": list(data.classes),
        "text": {
            "templates": config.text.templates,
            "features": config.text.features,
            "synonyms": other_names(data.classes, config.text.synonyms) or None,
        },
        "teacher": teacher.provenance,
        "mean_colour": [int(value) for value in mean_colour(teacher.mean)],
        "views": {"num": config.views.num, "size": teacher.image_size},
        "tokens": config.cache.tokens,
    }
    try:
        store = Store.create(
            config.cache_path,
            sizes=sizes,
            arrays=arrays,
            samples=[sample.id for sample in samples],
            attributes=attributes,
            dtypes=storage.dtypes,
        )
    except StaleCache as error:
        raise StaleCache(f"{error} (an unfinished extraction of another config or other data)") from None
    store.write_whole("text", text)
    return store


def _stop_if_too_many(bad: dict[str, str], max_bad: int) -> None:
    if len(bad) > max_bad:
        listed = "; ".join(f"{name}: {why}" for name, why in list(bad.items())[:3])
        raise DataError(
            f"{len(bad)} images can't be used, more than cache.max_bad = {max_bad}: {listed}. "
            "Mend or remove them, or raise cache.max_bad; what is extracted stays."
        )
