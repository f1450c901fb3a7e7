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
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache.errors import CorruptShard, StaleCache, damaged
from cache.files import remove
from cache.ledger import Ledger, lock, refuse_if_locked
from cache.shards import block_digest
from cache.store import Store
from cache.verify import NOT_NAMED, OK, whole_digests
from pipeline.config import OPTIONS, Config, digest, version
from pipeline.data.base import DataError, DataSet, Sample, data_of
from pipeline.data.prompts import prompts
from pipeline.data.words import names_of_classes, other_names
from pipeline.learning.text import features_of_file
from pipeline.models.clip import description_of, unlike_openai, weights_files
from pipeline.models.second import second_digests
from pipeline.models.teacher import Teacher, located
from pipeline.models.weights import file_digest
from pipeline.ops.quantise import dequantised
from pipeline.running.checked import check_labels
from pipeline.running.console import mention, progress, say
from pipeline.running.engine import map_shards
from pipeline.running.manifests import asked_of, finish, found_manifest, record_shard, reopen, save_config
from pipeline.running.rows import (
    NOT_LISTED,
    changed_rows,
    check_unchanged,
    current_samples,
    different_classes,
    in_row_order,
    is_listed,
    made_from,
    samples_of,
    span,
)
from pipeline.running.table import (
    IN_CACHE,
    SAMPLES,
    STREAM,
    asked,
    below,
    config_fingerprint,
    data_options,
    difference,
    fingerprint,
)
from pipeline.teaching.encode import (
    BAD_IMAGE,
    STORAGE,
    VERSIONS,
    axis_sizes,
    mean_colour,
    said_of,
    second_blocks,
    second_of,
    shard_blocks,
    teacher_of,
)
from pipeline.teaching.maps import refuse_cams
from pipeline.teaching.pseudo import cluster_tokens, num_centres, sum_of, written_arrays

# An audit fails below this cosine. int8 alone costs about 3e-5, bfloat16 on another machine 1e-4.
AUDIT_COSINE = 0.999
KEPT = {"stamps", "quarantined"}  # of a record beside what all have; one without them is of no shard that is done


def extract(config: Config, *, workers: int = 0, scheduler: str | None = None, renew: bool = False) -> dict[str, Any]:
    """Runs the stage to its end, or finds it there; returns the manifest.

    `renew` makes the shards again whose images have changed, which are an error otherwise.
    Raises: DataError, TeacherError, CacheError (each one line that says what to do).
    """
    data, path = data_of(config.data), config.cache_path
    manifest = found_manifest(config, "extract")
    if manifest is None:
        refuse_if_locked(path)  # below every image is looked at
    facts = _as_noted(config, _facts(config, data))
    identity = fingerprint(config, "extract", None, facts)
    if manifest is not None and manifest.get("fingerprint") != identity:
        raise StaleCache(
            f"{path}: holds an extraction in which {_differs(config, manifest, facts)}. Point cache.path elsewhere, "
            "put that back, or delete the folder yourself if the teacher is to run again."
        )
    cached = Store.open(path).samples if Store.is_at(path) else []
    samples = in_row_order(data, cached)
    stamps = made_from(config.cache.tokens, data, samples)
    content = digest([identity, [sample.id for sample in samples], stamps])
    text = _text_identity(config, data)
    if manifest is not None and (manifest.get("content"), manifest.get("text")) == (content, text):
        finish(config, "extract", manifest | _asked(config))
        mention(f"extract: nothing to do, {len(samples)} images are cached in {path}")
        return manifest
    refuse_cams(config)  # before hours of the teacher's work
    if manifest is None or manifest.get("content") != content:
        listed = [sample for sample in samples if is_listed(sample)]
        check_labels(data, listed, are_tags=config.reads_tags, is_needed=config.cache.tokens == STREAM)
    with lock(path, "extract"):
        ledger = Ledger(path, "extract")
        if not cached:  # records without the arrays that they vouch for
            for stage in IN_CACHE:
                Ledger(path, stage).clear()
        if renew:
            for shard in {shard for _, shard, _, _ in changed_rows(ledger, identity, samples, stamps)}:
                remove(ledger.path(shard))
        check_unchanged(ledger, identity, samples, stamps)
        save_config(config)
        if manifest is not None and manifest.get("content") == content:
            mention(f"extract: {_renewed(manifest, data)}; the text features alone are made again")
        elif cached and len(samples) > len(cached):
            mention(f"extract: {len(samples) - len(cached)} images are new, {len(cached)} keep their rows")
        features = _text_features(config, data, teacher_of(config.teacher))  # a mistake in them comes before any change
        store = _open_store(config, data, identity, samples)
        is_text_alone = manifest is not None and manifest.get("content") == content
        entries = {s: entry for s, entry in ledger.entries_of(identity).items() if entry.keys() >= KEPT}
        for shard in [s for s, entry in entries.items() if not _has_files(store, s, entry)]:
            remove(ledger.path(shard))  # it vouches for what is gone: all of it is made again
            del entries[shard]
        todo = [s for s in range(store.num_shards) if not _is_whole(store, s, entries.get(s))]
        codes = _other_codes(store, entries, samples, todo)
        # From here on what is made again is not complete; labels stay complete where their tokens do.
        for stage in below("extract") if todo or codes else ("extract",):
            reopen(config, stage)
        _write_text(config, data, store, features)
        _write_codes(store, ledger, codes)
        kept = sum(entry["rows"][1] - entry["rows"][0] for entry in entries.values())
        if kept and not is_text_alone:
            mention(f"extract: resuming, {kept} of {len(samples)} images are done")
        bad: dict[str, str] = {}
        for entry in entries.values():
            bad |= entry["quarantined"]
        _stop_if_too_many(bad, config.cache.max_bad)  # a run that stopped for them must not pass when repeated
        with progress("extract", len(samples), done=kept) as advance:
            local = not workers and not scheduler
            work = functools.partial(extract_shard, config, identity, tick=advance if local else None)
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
            "text": text,
            **_asked(config),
            "facts": facts,
            "classes": list(data.classes),
            "teacher": config.teacher.model,
            "num_samples": len(samples),
            "num_views": config.views.num,
            "tokens": config.cache.tokens,
            "num_shards": store.num_shards,
            "quarantined": dict(sorted(bad.items())),
            "arrays": [name for name in store.arrays if store.spec(name).stage == "extract"],
            "not_listed": [sample.id for sample in samples if not is_listed(sample)],
            "whole": whole_digests(store, "extract"),
            "digests": digest({s: (ledger.entry(s) or {}).get("digests") for s in range(store.num_shards)}),
        }
        finish(config, "extract", manifest)
    return manifest


def _asked(config: Config) -> dict[str, Any]:
    """What the config asks of this stage, for the stages that compare."""
    return asked_of(config, "extract") | {f"text_{key}": value for key, value in asked_of(config, "text").items()}


def _differs(config: Config, manifest: dict[str, Any], facts: dict[str, Any]) -> str:
    """Which fact of the teacher's work is another one than in the manifest, both values named."""
    which = {f"data.{name}" for name, option in OPTIONS.items() if option.bears_on == SAMPLES}
    was = {key: value for key, value in dict(manifest.get("asked") or {}).items() if key not in which}
    if said := difference(was, asked(config, "extract", apart_from=SAMPLES)):
        return said
    there = dict(manifest.get("facts") or {})
    for what in facts:
        if there.get(what) != facts[what]:
            return f"{FACTS[what]} was {there.get(what)!r} and is {facts[what]!r}"
    return "fingerprints are counted otherwise: another version of this program made it"


def _renewed(manifest: dict[str, Any], data: DataSet) -> str:
    """Why the text features are made again."""
    was = list(manifest.get("classes") or [])
    if was != list(data.classes):
        return different_classes(was, data.classes)
    return "text templates, synonyms or features have changed"


def _is_whole(store: Store, shard: int, entry: dict[str, Any] | None) -> bool:
    """Whether a shard's record speaks of all its rows, and the files that it vouches for are there."""
    return entry is not None and entry["rows"] == span(store.rows(shard)) and _has_files(store, shard, entry)


def _has_files(store: Store, shard: int, entry: Mapping[str, Any]) -> bool:
    """Whether the files that a record vouches for are there; whether they are sound is asked where they are read."""
    return all(store.size_bytes(name, shard) for name in entry["digests"])


def _other_codes(
    store: Store, entries: Mapping[int, dict[str, Any]], samples: Sequence[Sample], todo: Sequence[int]
) -> dict[int, np.ndarray]:
    """By shard, the codes of `status` that are to be written: images went from the list, or came back to it."""
    found = {}
    for shard, entry in entries.items():
        if shard not in todo:
            codes = _codes(samples[slice(*entry["rows"])], entry["quarantined"])
            if (store.read_shard("status", shard) != codes).any():
                found[shard] = codes
    return found


def _write_codes(store: Store, ledger: Ledger, codes: Mapping[int, np.ndarray]) -> None:
    """Takes rows of images that are no longer listed out of use, and those that are listed again back into it."""
    out, back = 0, 0
    for shard, now in codes.items():
        was, entry = store.read_shard("status", shard), ledger.entry(shard) or {}
        out += int(((now == NOT_LISTED) & (was != now)).sum())
        back += int(((was == NOT_LISTED) & (was != now)).sum())
        digests = entry["digests"] | {"status": store.write_shard("status", shard, now)}
        ledger.record(shard, entry | {"digests": digests})
    if out:
        mention(f"extract: {out} images are no longer listed; their rows are out of use")
    if back:
        mention(f"extract: {back} images are listed again; their rows are in use again")


def _codes(samples: Sequence[Sample], quarantined: Mapping[str, str]) -> np.ndarray:
    """(rows,) uint8, the codes of `status`."""
    usual = [BAD_IMAGE if sample.id in quarantined else OK for sample in samples]
    return np.array([c if is_listed(s) else NOT_LISTED for c, s in zip(usual, samples, strict=True)], np.uint8)


def extract_shard(config: Config, identity: str, shard: int, *, tick: Any = None) -> dict[str, Any]:
    """Makes, writes and records one shard; returns the number of images it made and its quarantined ones.

    A shard that was recorded when the data set was shorter keeps its rows and gets the new ones.
    Raises: CorruptShard when what it should keep isn't what was recorded.
    """
    began = time.time()
    data, teacher, store = data_of(config.data), teacher_of(config.teacher), Store.open(config.cache_path)
    rows = store.rows(shard)
    samples = samples_of(data, store, rows)
    old, parts = _recorded_rows(config, identity, store, shard)
    num_old = old["rows"][1] - rows.start if old else 0
    new = samples[num_old:]
    blocks, bad = shard_blocks(
        data,
        teacher,
        new,
        num_views=config.views.num,
        batch=config.teacher.batch,
        tokens=config.cache.tokens,
        tick=tick,
    )
    bad = {sample.id: bad[sample.id] for sample in new if sample.id in bad and is_listed(sample)}
    entry: dict[str, Any] = {"rows": span(rows), "fingerprint": identity}
    entry["stamps"] = old.get("stamps", []) + made_from(config.cache.tokens, data, new)
    entry["quarantined"] = {**old.get("quarantined", {}), **bad}
    if config.cache.tokens == STREAM:
        stats = _cluster(config, data, teacher, new, blocks)
        entry["stats"] = sum_of([old["stats"], stats]) if old else stats
    if old:
        if absent := sorted(blocks.keys() - parts.keys()):
            raise damaged(Ledger(store.path, "extract").path(shard), absent[0], shard, NOT_NAMED)
        blocks = {name: np.concatenate([parts[name], block]) for name, block in blocks.items()}
    blocks["status"] = _codes(samples, entry["quarantined"])
    entry["digests"] = {name: store.write_shard(name, shard, block) for name, block in blocks.items()}
    record_shard(config, "extract", shard, entry, began)
    return {"num_rows": len(new), "quarantined": bad}


def _recorded_rows(
    config: Config, identity: str, store: Store, shard: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The record of a shard and the rows it speaks of, by array; both empty when there is none to keep."""
    entry = Ledger(config.cache_path, "extract").entry(shard)
    if entry is None or entry["fingerprint"] != identity or not entry.keys() >= KEPT:
        return {}, {}
    if entry["rows"][0] != store.rows(shard).start or (config.cache.tokens == STREAM and "stats" not in entry):
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
    kept, boxes, good = blocks.pop("tokens"), blocks["view"], blocks["status"] == OK
    if config.cluster.teacher is not None:
        model = second_of(config, teacher.side)
        kept = second_blocks(data, model, samples, boxes, good, batch=config.teacher.batch, tokens=STREAM)["tokens"]
    tokens = torch.from_numpy(kept)
    shape = (tokens.shape[2], tokens.shape[4])
    made, stats = cluster_tokens(
        config.cluster, data, samples, boxes, good, tokens.__getitem__, shape, teacher.image_size
    )
    blocks |= made
    return stats


def audit(config: Config, count: int) -> str:
    """Recomputes `count` random rows and compares them with the cache; returns what was found, in a line.

    Kept tokens are compared with the teacher's in float16, so the line shows what int8 costs.
    Raises: CorruptShard when a vector's cosine is below AUDIT_COSINE, DataError for an image that can't be read now.
    """
    data, teacher, store = data_of(config.data), teacher_of(config.teacher), Store.open(config.cache_path)
    good = np.flatnonzero(store.read_rows("status", np.arange(store.num_samples)) == OK)
    if not len(good):
        raise DataError(f"{config.cache_path}: no image of it could be used, so there is nothing to compare.")
    rows = np.sort(np.random.default_rng().choice(good, min(count, len(good)), replace=False))
    samples = current_samples(data, store)
    fresh, bad = shard_blocks(
        data,
        teacher,
        [samples[row] for row in rows],
        num_views=config.views.num,
        batch=config.teacher.batch,
        tokens="float16",
    )
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


# What the teacher's work rests on beside the config, in words.
FACTS = {
    "name": "the data set's name, by which views are drawn,",
    "weights": "the SHA-256 of the teacher's weights",
    "normalisation": "the mean and standard deviation that the teacher's images are normalised with",
    "description": "the description of the teacher in its folder (its model and how images are normalised)",
    "second": "the SHA-256 of the weights of cluster.teacher",
    "unseen": "the list of unseen classes (streamed tokens are clustered at once)",
}


def _facts(config: Config, data: DataSet) -> dict[str, Any]:
    """What the teacher's work rests on beside the config; see FACTS."""
    model, pretrained = located(config.teacher)
    hashed = sorted(map(file_digest, weights_files(model, pretrained)))
    facts: dict[str, Any] = {"name": data.name, "weights": hashed}
    if (normalisation := unlike_openai(model, pretrained)) is not None:
        facts["normalisation"] = normalisation
    if (description := description_of(model)) is not None:
        facts["description"] = description
    if config.cache.tokens != STREAM:
        return facts
    second = {} if config.cluster.teacher is None else {"second": second_digests(config.cluster)}
    return facts | {"unseen": list(data.unseen_ids), **second}


def _as_noted(config: Config, facts: dict[str, Any]) -> dict[str, Any]:
    """The facts; in a cache of a version that took no note of a folder's description, those that this one did."""
    before = {name: value for name, value in facts.items() if name != "description"}
    if before == facts or not Store.is_at(config.cache_path):
        return facts
    made = Store.open(config.cache_path).attributes.get("fingerprint")
    return before if made == fingerprint(config, "extract", None, before) else facts


def _text_identity(config: Config, data: DataSet) -> str:
    """What the text features rest on: class names in order, templates, synonyms, a file's bytes."""
    path = config.text.features
    file = file_digest(Path(path)) if path and Path(path).is_file() else None
    return digest([config_fingerprint(config, "text", apart_from=SAMPLES), list(data.classes), file])


def _text_features(config: Config, data: DataSet, teacher: Teacher) -> np.ndarray:
    """(K, C) float32, unit norm: of the configured file, else of the teacher's text encoder."""
    if config.text.features is None:
        named = names_of_classes(data.classes, config.text.synonyms)
        groups = [[p for name in names for p in prompts(config.text.templates, name)] for names in named]
        return teacher.encode_text(groups).numpy()
    return features_of_file(config.text.features, (len(data.classes), teacher.channels), data.name)


def _open_store(config: Config, data: DataSet, identity: str, samples: Sequence[Sample]) -> Store:
    teacher = teacher_of(config.teacher)
    sizes = {"N": len(samples), **axis_sizes(teacher, config.views.num)}
    storage = STORAGE[config.cache.tokens]
    arrays = ["view", "cls", "status", *(storage.arrays if storage.is_kept else ())]
    if config.cache.tokens == STREAM:
        arrays += written_arrays(config.cluster)
        sizes["K_c"] = num_centres(config.cluster, sizes["h"])
    attributes = {
        "fingerprint": identity,
        "data": {"kind": config.data.kind, "name": data.name, **data_options(config, "extract")},
        "teacher": said_of(teacher),
        "mean_colour": [int(value) for value in mean_colour(teacher.mean)],
        "views": {"num": config.views.num, "size": teacher.image_size},
        "tokens": config.cache.tokens,
    }
    if config.cache.tokens == STREAM and config.cluster.teacher is not None:
        attributes["encode"] = said_of(second_of(config, teacher.side))
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
    made_with = {key: teacher.provenance[key] for key in VERSIONS if key in teacher.provenance}
    made_with["clipteacher"] = version()
    before = store.attributes.get("made_with", made_with)
    if before != made_with:
        say(f"extract: rows so far were made with {before}, new ones are with {made_with}")
    store.replace_attributes({"made_with": made_with})
    return store


def _write_text(config: Config, data: DataSet, store: Store, features: np.ndarray) -> None:
    """Writes the text features (K, C) and what they are of."""
    store.add_arrays(["text"], {"K": len(data.classes)}, replace=True)
    store.write_whole("text", features)
    described = {
        "templates": config.text.templates,
        "features": config.text.features,
        "synonyms": other_names(data.classes, config.text.synonyms) or None,
    }
    store.replace_attributes({"classes": list(data.classes), "text": described})


def _stop_if_too_many(bad: dict[str, str], max_bad: int) -> None:
    if len(bad) > max_bad:
        listed = "; ".join(f"{name}: {why}" for name, why in list(bad.items())[:3])
        raise DataError(
            f"{len(bad)} images can't be used, more than cache.max_bad = {max_bad}: {listed}. "
            "Mend or remove them, or raise cache.max_bad; what is extracted stays."
        )
