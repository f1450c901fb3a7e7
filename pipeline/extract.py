"""Stage one, first half: the frozen teacher once over every view of every training image.

    python cli.py extract --config config/demo.yaml

One shard of 64 images is one unit of work: decoded and cut into views by a few threads, run
through the teacher in padded batches of fixed size (so that a row never depends on its
neighbours), written, read back, and only then recorded in the ledger. A killed run redoes at most
the shards in flight; a second run of a finished stage does nothing.
"""

from __future__ import annotations

import functools
import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache.errors import StaleCache
from cache.ledger import Ledger, lock, write_manifest
from cache.store import Store
from pipeline.batches import data_of
from pipeline.config import Config, config_fingerprint, digest, fingerprint
from pipeline.data.base import BadImage, DataError, DataSet
from pipeline.data.prompts import prompts
from pipeline.engine import map_shards
from pipeline.models.teacher import Teacher, TeacherError
from pipeline.ops.views import draw_views, replay_image
from pipeline.tracking import found_manifest, manifest_path, progress, record_shard, save_config, say

DECODE_THREADS = 2
OK, BAD_IMAGE = 0, 1  # codes of the `status` array


@dataclass(frozen=True)
class Job:
    """What a worker needs to make a shard; small and picklable."""

    config: Config
    fingerprint: str


@functools.lru_cache(maxsize=1)
def _teacher(section: Any) -> Teacher:
    device = section.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Teacher.load(
        section.model,
        section.pretrained,
        image_size=section.image_size,
        quick_gelu=section.quick_gelu,
        precision=section.precision,
        device=device,
    )


def extract(config: Config, *, workers: int = 0, scheduler: str | None = None) -> dict[str, Any]:
    """Runs the stage to its end, or finds it there; returns the manifest.

    Raises: DataError, TeacherError, CacheError (each one line that says what to do).
    """
    data = data_of(config)
    samples = data.samples("train")
    identity = fingerprint(config, "extract", None, _facts(config, data))
    manifest = found_manifest(config, "extract")
    if manifest is not None and manifest.get("fingerprint") == identity:
        say(f"extract: nothing to do, {len(samples)} images are cached in {config.cache_path}")
        return manifest
    if manifest is not None:
        raise StaleCache(
            f"{config.cache_path}: holds an extraction with fingerprint {manifest.get('fingerprint')} (teacher "
            f"{manifest.get('teacher')!r}, {manifest.get('num_samples')} images, {manifest.get('num_views')} views); "
            f"this config and data ask for {identity} (teacher {config.teacher.model!r}, {len(samples)} images, "
            f"{config.views.num} views). Delete that folder, or point cache.path elsewhere."
        )
    with lock(config.cache_path, "extract"):
        save_config(config)
        store = _open_store(config, data, identity)
        ledger = Ledger(config.cache_path, "extract")
        done = ledger.done(identity)
        todo = [shard for shard in range(store.num_shards) if shard not in done]
        kept = sum(len(store.rows(shard)) for shard in done)
        if kept:
            say(f"extract: resuming, {kept} of {len(samples)} images are done")
        bad = _quarantined(ledger, done)
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
            "config": config_fingerprint(config, "extract"),
            "teacher": config.teacher.model,
            "num_samples": len(samples),
            "num_views": config.views.num,
            "num_shards": store.num_shards,
            "quarantined": dict(sorted(bad.items())),
            "digests": digest({s: (ledger.entry(s) or {}).get("digests") for s in range(store.num_shards)}),
        }
        write_manifest(manifest_path(config, "extract"), manifest)
    return manifest


def extract_shard(job: Job, shard: int, *, tick: Any = None) -> dict[str, Any]:
    """Makes, writes and records one shard; returns its row count and its quarantined images."""
    began, config = time.time(), job.config
    data, teacher, store = data_of(config), _teacher(config.teacher), Store.open(config.cache_path)
    rows = store.rows(shard)
    samples = data.samples("train")[rows.start : rows.stop]
    blocks, bad = _shard_blocks(config, data, teacher, samples, tick)
    digests = {name: store.write_shard(name, shard, block) for name, block in blocks.items()}
    record_shard(
        config,
        "extract",
        shard,
        {
            "rows": [rows.start, rows.stop],
            "fingerprint": job.fingerprint,
            "digests": digests,
            "quarantined": bad,
        },
        began,
    )
    return {"num_rows": len(rows), "quarantined": bad}


def _shard_blocks(
    config: Config, data: DataSet, teacher: Teacher, samples: list[Any], tick: Any
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of one shard. Rows of quarantined images keep the fill values (NaN), status says so."""
    num, views, side, channels = (
        len(samples),
        config.views.num,
        teacher.image_size // teacher.patch,
        teacher.channels,
    )
    blocks: dict[str, Any] = {
        "view": np.full((num, views, 4), np.nan, np.float32),
        "cls": np.full((num, views, channels), np.nan, np.float16),
        "tokens": np.full((num, views, side, side, channels), np.nan, np.float16),
        "status": np.full(num, OK, np.uint8),
    }
    bad: dict[str, str] = {}
    waiting: list[tuple[int, int, torch.Tensor]] = []

    def flush() -> None:
        for (row, view, _), cls, tokens in zip(
            waiting, *_encode_padded(config, teacher, waiting), strict=True
        ):
            blocks["cls"][row, view] = cls
            blocks["tokens"][row, view] = tokens
        waiting.clear()

    load = functools.partial(_load_views, config, data, mean_colour(teacher.mean))
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        for row, loaded in enumerate(pool.map(load, samples)):
            if isinstance(loaded, str):
                bad[samples[row].id], blocks["status"][row] = loaded, BAD_IMAGE
            else:
                boxes, images = loaded
                blocks["view"][row] = boxes
                for view, image in enumerate(images):
                    waiting.append((row, view, image))
                    if len(waiting) == config.teacher.batch:
                        flush()
            if tick:
                tick(1)
    if waiting:
        flush()
    good = blocks["status"] == OK
    if not (np.isfinite(blocks["cls"][good]).all() and np.isfinite(blocks["tokens"][good]).all()):
        raise TeacherError(
            f"the teacher {config.teacher.model!r} gave values that are not finite in float16 for images "
            f"{samples[0].id} to {samples[-1].id}: try teacher.precision fp32."
        )
    return blocks, bad


def _load_views(
    config: Config, data: DataSet, mean: np.ndarray, sample: Any
) -> tuple[np.ndarray, list[torch.Tensor]] | str:
    """Boxes (V, 4) and V views (3, S, S) uint8 of one image, or why there are none."""
    size = config.teacher.image_size
    try:
        image = data.image(sample)
    except BadImage as error:
        return str(error)
    height, width = image.shape[:2]
    boxes = draw_views(data.name, sample.id, config.views.num, width, height, size)
    return boxes, [replay_image(image, box, size, mean) for box in boxes]


def _encode_padded(config: Config, teacher: Teacher, waiting: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    images = torch.stack([image for _, _, image in waiting])
    missing = config.teacher.batch - len(waiting)
    if missing:
        images = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
    cls, tokens = teacher.encode(images)
    count = len(waiting)
    return cls[:count].to(torch.float16).cpu().numpy(), tokens[:count].to(torch.float16).cpu().numpy()


def mean_colour(mean: tuple[float, ...]) -> np.ndarray:
    """The colour outside of an image, (3,) uint8: what the teacher's normalisation takes to zero."""
    return np.round(np.array(mean) * 255).astype(np.uint8)


def audit(config: Config, count: int) -> dict[str, float]:
    """Recomputes `count` random rows and compares them with the cache: largest differences and lowest cosine."""
    data, teacher, store = data_of(config), _teacher(config.teacher), Store.open(config.cache_path)
    good = np.flatnonzero(store.read_rows("status", np.arange(store.num_samples)) == OK)
    rows = np.sort(np.random.default_rng().choice(good, min(count, len(good)), replace=False))
    samples = data.samples("train")
    found, worst = [samples[row] for row in rows], {"cls": 0.0, "tokens": 0.0, "cosine": 1.0}
    fresh, _ = _shard_blocks(config, data, teacher, found, None)
    for name in ("cls", "tokens"):
        stored = store.read_rows(name, rows).astype(np.float32)
        new = fresh[name].astype(np.float32)
        worst[name] = float(np.abs(stored - new).max())
        cosine = (stored * new).sum(-1) / (np.linalg.norm(stored, axis=-1) * np.linalg.norm(new, axis=-1))
        worst["cosine"] = min(worst["cosine"], float(cosine.min()))
    return worst


def _facts(config: Config, data: DataSet) -> dict[str, Any]:
    """What the fingerprint covers beside the config: images, and files of weights and text features."""
    files = [config.text.features, config.teacher.pretrained]
    if config.teacher.model.startswith("local-dir:"):
        files += sorted(str(p) for p in Path(config.teacher.model.partition(":")[2]).glob("*.safetensors"))
    hashed = {str(p): _file_digest(Path(p)) for p in files if p and Path(p).is_file()}
    return {"images": data.identity("train"), "classes": data.classes, "files": sorted(hashed.values())}


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text_features(config: Config, data: DataSet, teacher: Teacher) -> np.ndarray:
    """(K, C) float32, unit norm: of the configured file, else of the teacher's text encoder."""
    if config.text.features is None:
        groups = [prompts(config.text.templates, name) for name in data.classes]
        return teacher.encode_text(groups).numpy()
    path = Path(config.text.features)
    try:
        features = np.load(path, allow_pickle=False).astype(np.float32)
    except (OSError, ValueError) as error:
        raise DataError(
            f"text.features {str(path)!r}: not a .npy of numbers: {' '.join(str(error).split())}"
        ) from None
    wanted = (len(data.classes), teacher.channels)
    if features.shape != wanted or not np.isfinite(features).all():
        raise DataError(
            f"text.features {str(path)!r}: found shape {features.shape}, want {wanted} finite numbers "
            f"(the {wanted[0]} classes of {data.name}, the teacher's {wanted[1]} channels)."
        )
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def _open_store(config: Config, data: DataSet, identity: str) -> Store:
    teacher = _teacher(config.teacher)
    side = teacher.image_size // teacher.patch
    sizes = {
        "N": len(data.samples("train")),
        "V": config.views.num,
        "C": teacher.channels,
        "h": side,
        "w": side,
    }
    sizes["K"] = len(data.classes)
    attributes = {
        "fingerprint": identity,
        "data": {"kind": config.data.kind, "name": data.name, **config.data.options()},
        "classes": list(data.classes),
        "text": {"templates": config.text.templates, "features": config.text.features},
        "teacher": teacher.provenance,
        "mean_colour": [int(value) for value in mean_colour(teacher.mean)],
        "views": {"num": config.views.num, "size": teacher.image_size},
    }
    ids = [sample.id for sample in data.samples("train")]
    arrays = ("view", "cls", "tokens", "status", "text")
    try:
        store = Store.create(
            config.cache_path, sizes=sizes, arrays=arrays, samples=ids, attributes=attributes
        )
    except StaleCache as error:
        raise StaleCache(f"{error} (an unfinished extraction of another config or other data)") from None
    store.write_whole("text", _text_features(config, data, teacher))
    return store


def _stop_if_too_many(bad: dict[str, str], max_bad: int) -> None:
    if len(bad) > max_bad:
        listed = "; ".join(f"{name}: {why}" for name, why in list(bad.items())[:3])
        raise DataError(
            f"{len(bad)} images can't be used, more than cache.max_bad = {max_bad}: {listed}. "
            "Mend or remove them, or raise cache.max_bad; what is extracted stays."
        )


def _quarantined(ledger: Ledger, done: set[int]) -> dict[str, str]:
    found: dict[str, str] = {}
    for shard in sorted(done):
        found |= (ledger.entry(shard) or {}).get("quarantined", {})
    return found
