"""Pseudo labels of a view, ours from tokens to fused map, against K-means alone by faiss and scikit-learn.

    python bench/cluster.py                 one thread; 1,024 tokens x 512 channels, 58 centres, at most 20 iterations
    python bench/cluster.py --views 64      on a GPU: the batched torch backend over a whole shard

Ours includes what the others leave out: window centres, mask fusion, the pseudo map, the masks' centroids.
faiss.Kmeans and scikit-learn start from our initial centres. Tokens are smooth random fields, on which Lloyd's
iterations run as long as on photographs; all of the view is ignored area (the most work there is).
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import torch
import torch.nn.functional as F
from interleaved import heading, medians, verdict
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from pipeline.config import Cluster
from pipeline.ops import kmeans
from pipeline.teaching.pseudo import pseudo_labels

SIDE, CHANNELS, FIELD, NOISE = 32, 512, 6, 0.5


def tokens_of(views: int) -> torch.Tensor:
    """Smooth fields plus noise, unit norm: (V, 32, 32, 512)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(views, CHANNELS, FIELD, FIELD, generator=generator)
    field = F.interpolate(coarse, (SIDE, SIDE), mode="bicubic", align_corners=False)
    noise = NOISE * torch.randn(field.shape, generator=generator)
    return F.normalize((field + noise).permute(0, 2, 3, 1), dim=-1).contiguous()


def faiss_kmeans(tokens, centres) -> None:
    """faiss.Kmeans a view, spherical, from our centres, without its subsampling (facts: its defaults)."""
    for view, start in zip(tokens, centres, strict=True):
        clusters = faiss.Kmeans(
            CHANNELS,
            len(start),
            niter=kmeans.ITERATIONS,
            spherical=True,
            min_points_per_centroid=1,
            max_points_per_centroid=10**6,
        )
        clusters.train(view, init_centroids=start)
        clusters.index.search(view, 1)


def sklearn_kmeans(tokens, centres) -> None:
    for view, start in zip(tokens, centres, strict=True):
        KMeans(len(start), init=start, n_init=1, max_iter=kmeans.ITERATIONS, tol=0).fit(view)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=8, help="views handed over at once")
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    grid = tokens_of(chosen.views)
    state = torch.ones(grid.shape[:3], dtype=torch.uint8)  # views.IGNORED everywhere
    centres, alive = kmeans.window_centres(grid, state)
    flat = grid.flatten(1, 2)
    steps = kmeans.lloyd(flat, torch.ones(flat.shape[:2], dtype=torch.bool), centres, alive).num_iterations
    heading(f"cluster: {chosen.views} views of 1,024 x 512 tokens, 58 centres; median {int(steps.median())} iterations")
    points, starts = flat.numpy(), centres.numpy()
    sides = {
        "ours, faiss": lambda: pseudo_labels(grid, state, Cluster(backend="faiss", device="cpu")),
        "ours, torch": lambda: pseudo_labels(grid, state, Cluster(backend="torch", device="cpu")),
        "faiss.Kmeans": lambda: faiss_kmeans(points, starts),
        "scikit-learn": lambda: sklearn_kmeans(points, starts),
    }
    if torch.cuda.is_available():
        on_gpu = Cluster(backend="torch", device="cuda")
        sides["ours, torch, GPU"] = lambda: pseudo_labels(grid, state, on_gpu)
        sides["the same, a view at a time"] = lambda: [
            pseudo_labels(grid[i : i + 1], state[i : i + 1], on_gpu) for i in range(len(grid))
        ]
    with threadpool_limits(1):
        seconds = medians(sides, chosen.rounds)
    for name, value in seconds.items():
        print(f"  {name:<28} {1e3 * value / chosen.views:8.2f} ms a view, {chosen.views / value:8.0f} views/s")
    best = min(seconds["ours, faiss"], seconds["ours, torch"])
    verdict("ours (faiss) / faiss.Kmeans", seconds["ours, faiss"] / seconds["faiss.Kmeans"], 1.0, at_most=True)
    verdict("ours (torch) / faiss.Kmeans", seconds["ours, torch"] / seconds["faiss.Kmeans"], 1.0, at_most=True)
    verdict("ours / scikit-learn", best / seconds["scikit-learn"], 0.2, at_most=True)
    if torch.cuda.is_available():
        gpu, single = seconds["ours, torch, GPU"], seconds["the same, a view at a time"]
        verdict("GPU views/s", chosen.views / gpu, 5000, at_most=False)
        verdict("GPU: a view at a time / batched", single / gpu, 20, at_most=False)


if __name__ == "__main__":
    main()
