"""Stage one, second half: pseudo labels for the ignored area, by multi-scale K-means and mask fusion.

    python cli.py cluster --config config/demo.yaml

A shard of the cache's dense tokens in, a shard of pseudo labels out (`pipeline/teaching/pseudo.py`). With
`cache.tokens: stream` extraction has clustered already, having had the tokens; then this stage reads what
was written, compares it with the record of it, and sums up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache.errors import damaged
from cache.ledger import Ledger, lock, refuse_if_locked
from cache.schema import ARRAYS
from cache.store import SIDES, Store
from cache.verify import NOT_NAMED, OK, read_recorded
from pipeline.config import Config, digest, fingerprint
from pipeline.data.base import data_of
from pipeline.data.survey import never_seen
from pipeline.ops.quantise import dequantised
from pipeline.ops.views import IGNORED
from pipeline.running.checked import check_labels
from pipeline.running.console import say
from pipeline.running.engine import Job
from pipeline.running.labels import make_shards, record_labels, summary_of
from pipeline.running.manifests import asked_of, finish, found_manifest, required_manifest
from pipeline.running.rows import STREAM, current_samples, is_listed, samples_of, stamps_of
from pipeline.teaching.names import object_names
from pipeline.teaching.pseudo import backend_of, cluster_tokens, num_centres, sum_of, written_arrays
from pipeline.teaching.verdict import verdict


def cluster(config: Config, *, workers: int = 0, scheduler: str | None = None) -> dict[str, Any]:
    """Runs the stage to its end, or finds it there; returns the manifest with its summary.

    Raises: MissingCache, StaleCache, CorruptShard, DataError, ConfigError.
    """
    data = data_of(config.data)  # what is wrong with it is said before what is stale
    above = required_manifest(config, "extract")
    manifest = found_manifest(config, "cluster")
    if manifest is None:
        refuse_if_locked(config.cache_path)  # below every mask is looked at
    facts: dict[str, Any] = {"unseen": data.unseen_ids}
    if config.cluster.named_above is not None:
        facts["text"] = above["text"]
    identity = fingerprint(config, "cluster", above["fingerprint"], facts)
    store = Store.open(config.cache_path)
    samples = current_samples(config, data, store)
    stamps = stamps_of(data, samples, "labels")
    content = digest([identity, above["content"], stamps])
    if manifest is not None and manifest.get("content") == content and "summary" in manifest:
        finish(config, "cluster", manifest | asked_of(config, "cluster"))
        say(f"cluster: nothing to do, {len(samples)} images have pseudo labels")
        return manifest
    labels = check_labels(config, data, [s for s in samples if is_listed(s)], is_needed=True)
    with lock(config.cache_path, "cluster"):
        store = Store.open(config.cache_path)
        if config.cache.tokens != STREAM:
            centres = {"K_c": num_centres(config.cluster, store.sizes["h"])}
            store.add_arrays(written_arrays(config.cluster), centres, replace=True)
        backend = backend_of(config.cluster)
        say(f"cluster: {backend.name} on {backend.device}")
        work, job = confirm_shard if config.cache.tokens == STREAM else cluster_shard, Job(config, identity)
        entries = make_shards("cluster", work, job, store, stamps, workers=workers, scheduler=scheduler)
        summary = summary_of("cluster", store, entries, summarise)
        summary["never_seen"] = never_seen(data, labels) if labels else []
        summary["verdict"] = [str(complaint) for complaint in verdict(summary, config.cluster)]
        manifest = {
            "stage": "cluster",
            "fingerprint": identity,
            "content": content,
            **asked_of(config, "cluster"),
            "arrays": list(written_arrays(config.cluster)),
            "upstream": above["fingerprint"],
            "num_samples": store.num_samples,
            "num_shards": store.num_shards,
            "backend": backend.name,
            "device": backend.device,
            "summary": summary,
            "digests": digest([entry["digests"] for entry in entries]),
        }
        store.update_attributes("cluster", {k: manifest[k] for k in ("fingerprint", "backend", "device")})
        finish(config, "cluster", manifest)
    return manifest


def cluster_shard(job: Job, shard: int, *, tick: Any = None) -> int:
    """Makes, writes and records the pseudo labels of one shard; returns its row count."""
    began, config = time.time(), job.config
    data, store = data_of(config.data), Store.open(config.cache_path)
    rows = store.rows(shard)
    samples = samples_of(data, store, rows)
    made = read_recorded(store, shard, {"extract": store.fact(str, "fingerprint")})
    blocks, stats = cluster_tokens(
        config.cluster,
        data,
        samples,
        made["view"],
        made["status"] == 0,
        token_reader(made["tokens"], made.get("token_scale")),
        (store.sizes["h"], store.sizes["C"]),
        store.fact(SIDES, "teacher", "image_size"),
        tick,
    )
    if config.cluster.named_above is not None:
        text, most = torch.from_numpy(store.read_whole("text")), store.sizes["K_c"]
        is_ok = made["status"] == OK
        names = object_names(config, data, samples, made["view"], blocks["pseudo"], is_ok, text, most)
        names[~is_ok] = ARRAYS["named"].fill
        blocks["named"] = names
    digests = {name: store.write_shard(name, shard, block) for name, block in blocks.items()}
    record_labels("cluster", job, store, shard, {"digests": digests, "stats": stats}, began)
    return len(rows)


def token_reader(kept: np.ndarray, scale: np.ndarray | None) -> Callable[[int], Tensor]:
    """Dense tokens of a row of a shard, (V, h, w, C), from how they are kept: float16, or int8 with a scale each."""
    tokens = torch.from_numpy(kept)
    if scale is None:
        return lambda row: tokens[row]
    scales = torch.from_numpy(scale)
    return lambda row: dequantised(tokens[row], scales[row])


def confirm_shard(job: Job, shard: int, *, tick: Any = None) -> int:
    """Records a shard that extraction has clustered, after reading it and comparing; returns its row count.

    Raises: CorruptShard when it isn't what extraction wrote.
    """
    began, store = time.time(), Store.open(job.config.cache_path)
    rows, made = store.rows(shard), Ledger(job.config.cache_path, "extract").entry(shard) or {}
    digests = {name: made.get("digests", {}).get(name) for name in written_arrays(job.config.cluster)}
    for name, wanted in digests.items():
        if store.digest(name, shard) != wanted:
            raise damaged(store.data / name, name, shard, "it is not what extract has recorded")
    if "stats" not in made:
        raise damaged(Ledger(store.path, "extract").path(shard), "pseudo", shard, NOT_NAMED)
    record_labels("cluster", job, store, shard, {"digests": digests, "stats": made["stats"]}, began)
    if tick:
        tick(len(rows))
    return len(rows)


def summarise(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What `cluster` prints at its end; shares in percent, purity None where labels aren't known."""
    total = {name: np.array(value) for name, value in sum_of(parts).items()}
    objects, tokens = total["objects"], total["tokens"]
    num_views, ignored = int(objects.sum()), int(tokens[IGNORED])
    return {
        "views": num_views,
        "objects_per_view": round(float((objects * np.arange(len(objects))).sum() / max(num_views, 1)), 2),
        "objects_histogram": {str(p): int(n) for p, n in enumerate(objects) if n},
        "coverage": round(100 * ignored / max(int(tokens[:2].sum()), 1), 2),
        "tokens_per_mask": round(ignored / max(int(total["masks"][0]), 1), 2),
        "largest_mask_share": round(100 * int(total["largest"][0]) / max(ignored, 1), 2),
        "purity": round(100 * int(total["majority"][0]) / int(total["known"][0]), 2)
        if total["known"][0]
        else None,
        "purity_tokens": int(total["known"][0]),
    }


def print_summary(summary: dict[str, Any]) -> None:
    """The numbers, then what they predict for training; caches from before there were verdicts have none."""
    purity = f"{summary['purity']:.1f} %" if summary["purity"] is not None else "unknown (no full labels)"
    if summary.get("purity_tokens"):
        purity += f" (of {summary['purity_tokens']:,} tokens with a label)"
    say(
        f"pseudo labels: {summary['views']} views, {summary['objects_per_view']} potential objects a view, "
        f"{summary['tokens_per_mask']} tokens each; ignored area {summary['coverage']:.1f} % of the image; "
        f"purity {purity}"
    )
    for complaint in summary.get("verdict", ()):
        say(f"trouble ahead: {complaint}")
    if summary.get("verdict") == []:
        say("pseudo labels: nothing here predicts trouble in training")
