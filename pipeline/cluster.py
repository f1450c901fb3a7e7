"""Stage one, second half: pseudo labels for the ignored area, by multi-scale K-means and mask fusion.

    python cli.py cluster --config config/demo.yaml

Per view: the unit-norm dense tokens, window centres at two scales, Lloyd's on the ignored tokens
only, Algorithm 1 on the surviving centres. The split enters here: unseen labels are 255 before a
token's state is asked for, and the full labels are used for nothing but the purity that is printed.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cache.ledger import Ledger, lock, write_manifest
from cache.store import Store
from pipeline.batches import data_of
from pipeline.config import Cluster, Config, ConfigError, config_fingerprint, digest, fingerprint
from pipeline.data.base import DataSet, Sample
from pipeline.engine import map_shards
from pipeline.ops import fusion, kmeans, views
from pipeline.tracking import found_manifest, manifest_path, progress, record_shard, required_manifest, say

IGNORED = 1  # token_state's code of a token in the ignored area
MAX_CENTRES = 253  # the ids that a uint8 pseudo label has: 0, 254 and 255 mean something else
QUARANTINED = 255  # pseudo label of every token of an image without tokens: padding, never trained on


@dataclass(frozen=True)
class Job:
    config: Config
    fingerprint: str


def cluster(config: Config, *, workers: int = 0, scheduler: str | None = None) -> dict[str, Any]:
    """Runs the stage to its end, or finds it there; returns the manifest with its summary.

    Raises: MissingCache, StaleCache, CorruptShard, DataError.
    """
    above = required_manifest(config, "extract")
    data = data_of(config)
    facts = {"labels": data.identity("train", what="labels"), "unseen": data.unseen}
    identity = fingerprint(config, "cluster", above["fingerprint"], facts)
    manifest = found_manifest(config, "cluster")
    if manifest is not None and manifest.get("fingerprint") == identity:
        say(f"cluster: nothing to do, {manifest['num_samples']} images have pseudo labels")
        return manifest
    with lock(config.cache_path, "cluster"):
        store = Store.open(config.cache_path)
        names = ["pseudo", "centroids"] + ["pseudo_raw"] * config.cluster.debug
        store.add_arrays(names, {"K_c": num_centres(config.cluster, store.sizes["h"])}, replace=True)
        ledger = Ledger(config.cache_path, "cluster")
        done = ledger.done(identity)
        todo = [shard for shard in range(store.num_shards) if shard not in done]
        kept = sum(len(store.rows(shard)) for shard in done)
        if kept:
            say(f"cluster: resuming, {kept} of {store.num_samples} images are done")
        say(f"cluster: {config.cluster.backend} on {device_name(config.cluster)}")
        with progress("cluster", store.num_samples, done=kept) as advance:
            local = not workers and not scheduler
            work = functools.partial(cluster_shard, Job(config, identity), tick=advance if local else None)
            for rows in map_shards(work, todo, workers=workers, scheduler=scheduler):
                if not local:
                    advance(rows)
        entries = [ledger.entry(shard) or {} for shard in range(store.num_shards)]
        manifest = {
            "stage": "cluster",
            "fingerprint": identity,
            "config": config_fingerprint(config, "cluster"),
            "upstream": above["fingerprint"],
            "num_samples": store.num_samples,
            "num_shards": store.num_shards,
            "backend": config.cluster.backend,
            "device": device_name(config.cluster),
            "summary": summarise([entry["stats"] for entry in entries]),
            "digests": digest([entry["digests"] for entry in entries]),
        }
        store.update_attributes("cluster", {k: manifest[k] for k in ("fingerprint", "backend", "device")})
        write_manifest(manifest_path(config, "cluster"), manifest)
    return manifest


def num_centres(section: Cluster, side: int) -> int:
    """Initial centres of a view of side x side tokens. Raises: ConfigError for more than uint8 ids."""
    windows = section.sizes if section.window == "grid" else [-(-side // size) for size in section.sizes]
    total = sum(count * count for count in windows)
    if total > MAX_CENTRES or max(windows) > side:
        raise ConfigError(
            f"cluster.sizes {section.sizes} with window {section.window!r} make {total} centres on {side} x {side} "
            f"tokens; want at most {MAX_CENTRES}, and no window smaller than a token."
        )
    return total


def device_name(section: Cluster) -> str:
    """The device that clustering really runs on."""
    if section.backend == "faiss":
        from pipeline.ops import kmeans_faiss

        return kmeans_faiss.device_name(gpu=section.device != "cpu")
    return str(_torch_device(section))


def _torch_device(section: Cluster) -> torch.device:
    wanted = section.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def cluster_shard(job: Job, shard: int, *, tick: Any = None) -> int:
    """Makes, writes and records the pseudo labels of one shard; returns its row count."""
    began, config = time.time(), job.config
    data, store = data_of(config), Store.open(config.cache_path)
    rows = store.rows(shard)
    samples = data.samples("train")[rows.start : rows.stop]
    tokens, boxes, status = (store.read_shard(name, shard) for name in ("tokens", "view", "status"))
    num, num_views, side = tokens.shape[:3]
    sizes = num_centres(config.cluster, side)
    pseudo = np.full((num, num_views, side, side), QUARANTINED, np.uint8)
    raw = pseudo.copy()
    centroids = np.full((num, num_views, sizes, tokens.shape[-1]), np.nan, np.float16)
    stats = new_stats(sizes)
    for row, sample in enumerate(samples):
        if status[row] == 0:
            grid = normalize(torch.from_numpy(tokens[row]).float(), dim=-1)  # (V, h, w, C)
            state, truth = token_states(
                data, sample, boxes[row], side, store.attributes["teacher"]["image_size"]
            )
            maps, means, before = pseudo_labels(grid, state, config.cluster)
            pseudo[row], raw[row] = maps.numpy(), before.numpy()
            centroids[row, :, : means.shape[1]] = means.to(torch.float16).numpy()
            add_stats(stats, maps, state, truth)
        if tick:
            tick(1)
    blocks: dict[str, np.ndarray] = {"pseudo": pseudo, "centroids": centroids}
    if config.cluster.debug:
        blocks["pseudo_raw"] = raw
    digests = {name: store.write_shard(name, shard, block) for name, block in blocks.items()}
    record_shard(
        config,
        "cluster",
        shard,
        {
            "rows": [rows.start, rows.stop],
            "fingerprint": job.fingerprint,
            "digests": digests,
            "quarantined": {},
            "stats": {name: value.tolist() for name, value in stats.items()},
        },
        began,
    )
    return len(rows)


def token_states(
    data: DataSet, sample: Sample, boxes: np.ndarray, side: int, image_size: int
) -> tuple[Tensor, Tensor | None]:
    """State of every token (V, h, w), and its majority class where the full labels are known (V, h, w; 255 none)."""
    labels = data.labels(sample)
    seen = data.seen_labels(sample)
    height, width = labels.shape if labels is not None else data.image(sample).shape[:2]
    states, truths = [], []
    for box in boxes:
        within = views.inside(box, width, height, image_size)
        replayed = views.replay_labels(seen, box, image_size) if seen is not None else None
        states.append(views.token_state(replayed, within, image_size // side))
        if labels is not None:
            truths.append(_majority(views.replay_labels(labels, box, image_size), side))
    return torch.stack([torch.as_tensor(s) for s in states]), torch.stack(truths) if truths else None


def _majority(labels: Tensor, side: int) -> Tensor:
    """Most frequent label of each token's patch: (S, S) uint8 -> (h, w) uint8."""
    patch = labels.shape[0] // side
    blocks = labels.reshape(side, patch, side, patch).permute(0, 2, 1, 3).reshape(side * side, patch * patch)
    return blocks.mode(dim=1).values.reshape(side, side)


def pseudo_labels(grid: Tensor, state: Tensor, section: Cluster) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 on V views at once.

    Shapes: grid (V, h, w, C) unit norm, state (V, h, w) -> pseudo (V, h, w) uint8, centroids of the
    fused masks (V, K_c, C), NaN beyond a view's masks, and the K-means map before fusion (V, h, w) uint8.
    """
    num, _, _, channels = grid.shape
    centres, alive = kmeans.window_centres(grid, state, section.sizes, section.window)
    flat, active = grid.reshape(num, -1, channels), (state == IGNORED).reshape(num, -1)
    if section.backend == "faiss":
        from pipeline.ops import kmeans_faiss

        gpu = device_name(section) != "cpu"
        found = kmeans_faiss.lloyd_faiss(flat, active, centres, alive, section.iterations, gpu=gpu)
        similar = torch.stack(
            [kmeans_faiss.similar_centres(found.centres[view], section.threshold) for view in range(num)]
        )
    else:
        device = _torch_device(section)
        tokens, is_active, starts, living = (x.to(device) for x in (flat, active, centres, alive))
        found = kmeans.lloyd(tokens, is_active, starts, living, section.iterations)
        found = kmeans.Clusters(*(x.cpu() for x in found))
        similar = fusion.similar_pairs(found.centres, found.alive, section.threshold)
    maps, means, before = [], torch.full((num, centres.shape[1], channels), float("nan")), []
    for view in range(num):
        group = fusion.fuse(similar[view], found.alive[view])
        pseudo = fusion.pseudo_map(found.assign[view], group, state[view])
        count = int(group.max()) if len(group) else 0
        means[view, :count] = fusion.mask_centroids(grid[view], pseudo, count)
        maps.append(pseudo)
        before.append(fusion.pseudo_map(found.assign[view], torch.arange(1, len(group) + 1), state[view]))
    return torch.stack(maps), means, torch.stack(before)


def new_stats(centres: int) -> dict[str, np.ndarray]:
    """Counts that add up over shards: objects[p] views with p masks, tokens by state, purity's two sums."""
    zero = np.zeros(1, np.int64)
    return {"objects": np.zeros(centres + 1, np.int64), "tokens": np.zeros(3, np.int64)} | {
        name: zero.copy() for name in ("masks", "largest", "majority", "known")
    }


def add_stats(stats: dict[str, np.ndarray], maps: Tensor, state: Tensor, truth: Tensor | None) -> None:
    for view in range(len(maps)):
        ids, counts = maps[view][state[view] == IGNORED].unique(return_counts=True)
        stats["objects"][len(ids)] += 1
        stats["masks"] += len(ids)
        stats["largest"] += int(counts.max()) if len(counts) else 0
        stats["tokens"] += np.bincount(state[view].flatten().numpy(), minlength=3)[:3]
        if truth is not None:
            majority, known = fusion.purity(maps[view], truth[view])
            stats["majority"] += majority
            stats["known"] += known


def summarise(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What `cluster` prints at its end; shares in percent, purity None where labels aren't known."""
    total = {name: np.sum([part[name] for part in parts], axis=0) for name in parts[0]}
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
    }


def print_summary(summary: dict[str, Any]) -> None:
    purity = f"{summary['purity']:.1f} %" if summary["purity"] is not None else "unknown (no full labels)"
    say(
        f"pseudo labels: {summary['views']} views, {summary['objects_per_view']} potential objects a view, "
        f"{summary['tokens_per_mask']} tokens each; ignored area {summary['coverage']:.1f} % of the image; "
        f"purity {purity}"
    )
