"""Pseudo labels of one shard's tokens, wherever these come from: the cache, or the teacher a moment ago.

Per view: the unit-norm dense tokens, window centres at two scales, Lloyd's on the ignored tokens
only, Algorithm 1 on the surviving centres. The split enters here: unseen labels are IGNORE before a
token's state is asked for, and the full labels are used for nothing but the purity that is printed.

Axes: n rows of a shard, V views, h = w tokens a side, C channels, K_c initial centres.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.config import Cluster, ConfigError
from pipeline.data.base import DataSet, Sample
from pipeline.ops import fusion, kmeans, views
from pipeline.ops.labels import IGNORE, MOST_CLASSES
from pipeline.ops.quantise import dequantised
from pipeline.running.devices import device_of

QUARANTINED = 255  # pseudo label of every token of an image without tokens: padding, never trained on


def written_arrays(section: Cluster) -> tuple[str, ...]:
    """The arrays that clustering makes. Centroids are in the teacher's space, where a second model has none."""
    debug = ("centroids", "pseudo_raw")[section.teacher is not None :] if section.debug else ()
    return ("pseudo", *debug, *(("named",) if section.named_above is not None else ()))


def cluster_tokens(
    section: Cluster,
    data: DataSet,
    samples: Sequence[Sample],
    boxes: np.ndarray,
    usable: np.ndarray,
    grid_of: Callable[[int], Tensor],
    shape: tuple[int, int],
    image_size: int,
    tick: Any = None,
) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """The arrays of `written_arrays` for n samples, and counts for the summary.

    Shapes: boxes (n, V, 4), usable (n,) bool; grid_of(row) the dense tokens (V, h, w, C) of a usable row,
    any norm; shape (h, C). Raises: DataError, ConfigError (too many centres).
    """
    (num, num_views), (side, channels) = boxes.shape[:2], shape
    sizes = num_centres(section, side)
    pseudo = np.full((num, num_views, side, side), QUARANTINED, np.uint8)
    blocks: dict[str, np.ndarray] = {"pseudo": pseudo}
    if section.debug:
        blocks["pseudo_raw"] = pseudo.copy()
        if section.teacher is None:
            blocks["centroids"] = np.full((num, num_views, sizes, channels), np.nan, np.float16)
    stats = new_stats(sizes)
    for row, sample in enumerate(samples):
        if usable[row]:
            grid = normalize(grid_of(row).float(), dim=-1)  # (V, h, w, C)
            state, truth = token_states(data, sample, boxes[row], side, image_size)
            maps, means, before = pseudo_labels(grid, state, section)
            pseudo[row] = maps.numpy()
            if section.debug:
                blocks["pseudo_raw"][row] = before.numpy()
            if "centroids" in blocks:
                blocks["centroids"][row, :, : means.shape[1]] = means.to(torch.float16).numpy()
            add_stats(stats, maps, state, truth)
        if tick:
            tick(1)
    return blocks, {name: value.tolist() for name, value in stats.items()}


def token_reader(kept: np.ndarray, scale: np.ndarray | None) -> Callable[[int], Tensor]:
    """Dense tokens of a row of a shard, (V, h, w, C), from how they are kept: float16, or int8 with a scale each."""
    tokens = torch.from_numpy(kept)
    if scale is None:
        return lambda row: tokens[row]
    scales = torch.from_numpy(scale)
    return lambda row: dequantised(tokens[row], scales[row])


def num_centres(section: Cluster, side: int) -> int:
    """Initial centres of a view of side x side tokens. Raises: ConfigError for more than uint8 ids."""
    windows = section.sizes if section.window == "grid" else [-(-side // size) for size in section.sizes]
    total = sum(count * count for count in windows)
    if total > fusion.MAX_MASKS or max(windows) > side:
        raise ConfigError(
            f"cluster.sizes {section.sizes} with window {section.window!r} make {total} centres on {side} x {side} "
            f"tokens; want at most {fusion.MAX_MASKS}, and no window smaller than a token."
        )
    return total


class Backend(NamedTuple):
    """What clusters, and where."""

    name: str  # "faiss" or "torch"
    device: str  # on which it searches
    lloyd: Callable[[Tensor, Tensor, Tensor, Tensor], kmeans.Clusters]  # kmeans.lloyd's arguments, on the CPU


def backend_of(section: Cluster) -> Backend:
    """What the config's `backend`, `distance` and `device` come to on this machine: decided here alone.

    FAISS searches by inner products only, so the Euclidean K-means is torch's.
    Raises: ConfigError for a device that isn't there.
    """
    if section.backend == "faiss" and section.distance is None:
        from pipeline.ops import kmeans_faiss

        where = kmeans_faiss.device_name(gpu=section.device != "cpu")
        if section.device not in ("auto", "cpu", "cuda", "cuda:0") or (section.device[:4] == "cuda" and where == "cpu"):
            raise ConfigError(
                f"cluster.device is {section.device!r}: FAISS clusters on auto, cpu or cuda, its first GPU, and this "
                f"FAISS is {kmeans_faiss.build_name()}. Set it to auto, or cluster.backend to torch."
            )
        lloyd_faiss = partial(kmeans_faiss.lloyd_faiss, iterations=section.iterations, gpu=where != "cpu")
        return Backend("faiss", where, lloyd_faiss)
    device = device_of("cluster.device", section.device)
    lloyd_torch = partial(kmeans.lloyd, iterations=section.iterations, distance=section.distance or "cosine")

    def lloyd(*views: Tensor) -> kmeans.Clusters:
        return kmeans.Clusters(*(x.cpu() for x in lloyd_torch(*(x.to(device) for x in views))))

    return Backend("torch", str(device), lloyd)


def token_states(
    data: DataSet, sample: Sample, boxes: np.ndarray, side: int, image_size: int
) -> tuple[Tensor, Tensor | None]:
    """State of every token (V, h, w), and its majority class where the full labels are known (V, h, w; IGNORE none)."""
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
    """Most frequent label of each token's patch: (S, S) int16 -> (h, w) int16; at a tie the lower class."""
    patch = labels.shape[0] // side
    blocks = labels.reshape(side, patch, side, patch).permute(0, 2, 1, 3).reshape(side * side, patch * patch)
    found = blocks.where(blocks != IGNORE, MOST_CLASSES).mode(dim=1).values  # the lowest at a tie
    return found.where(found != MOST_CLASSES, IGNORE).reshape(side, side)


def pseudo_labels(grid: Tensor, state: Tensor, section: Cluster) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 on V views at once.

    Shapes: grid (V, h, w, C) unit norm, state (V, h, w) -> pseudo (V, h, w) uint8, centroids of the
    fused masks (V, K_c, C), NaN beyond a view's masks, and the K-means map before fusion (V, h, w) uint8.
    """
    num, _, _, channels = grid.shape
    centres, alive = kmeans.window_centres(grid, state, section.sizes, section.window)
    flat, active = grid.reshape(num, -1, channels), (state == views.IGNORED).reshape(num, -1)
    found = backend_of(section).lloyd(flat, active, centres, alive)
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
        ids, counts = maps[view][state[view] == views.IGNORED].unique(return_counts=True)
        stats["objects"][len(ids)] += 1
        stats["masks"] += len(ids)
        stats["largest"] += int(counts.max()) if len(counts) else 0
        stats["tokens"] += np.bincount(state[view].flatten().numpy(), minlength=3)[:3]
        if truth is not None:
            majority, known = fusion.purity(maps[view], truth[view])
            stats["majority"] += majority
            stats["known"] += known


def sum_of(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts of several parts together."""
    return {name: np.sum([part[name] for part in parts], axis=0).tolist() for name in parts[0]}
