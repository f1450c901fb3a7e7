"""The same K-means with FAISS doing the search. The only file of the project that imports faiss.

Axes as in kmeans.py: B views, L tokens, C channels, K centres.

faiss.Kmeans is not used: it splits big clusters to refill empty ones, where the method drops them.
FAISS makes the inner products, exact ones (on the GPU, an IndexFlatIP's best); the loop is `kmeans.lloyd_by_view`.
Ties go to the lower index, as in torch. Two centres whose scores differ by less than float32 rounding may be told
apart differently, because the sums run in another order.

OpenMP: faiss and torch each load a libgomp of their own. Both import orders were run with one and two
threads (faiss-gpu 1.15.1 and torch 2.15.0 wheels, Linux, CPU) without a crash: faiss's copy carries another
file name, so the two don't mix. Other builds (conda's, macOS's libomp) have crashed; hence nothing else
imports this file when it is imported, and one process uses one OpenMP thread in faiss: small searches
are slower on several.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import faiss
import numpy as np
import torch
from torch import Tensor

from pipeline.ops.kmeans import ITERATIONS, Clusters, lloyd_by_view, ranked

RANKS = 3  # centres asked for: the third bounds all behind it; more take longer than the searches they save


@contextmanager
def _one_thread() -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@cache
def _gpu_resources() -> "faiss.StandardGpuResources":
    """One set of GPU scratch memory per process; building it takes longer than a search."""
    return faiss.StandardGpuResources()


def _num_gpus() -> int:
    return faiss.get_num_gpus()


def device_name(gpu: bool = False) -> str:
    """Where a search will really run: "cpu", or "cuda:0 (name)" when a GPU is asked for and there.

    FAISS itself falls back to the CPU without a word, so this is what to log.
    """
    if not gpu or _num_gpus() == 0:
        return "cpu"
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "unnamed"
    return f"cuda:0 ({name})"


def build_name() -> str:
    """Which FAISS this is: version, processor options, and what it sees of GPUs."""
    gpus = f"{_num_gpus()} GPUs seen" if hasattr(faiss, "StandardGpuResources") else "CPU build"
    return f"{faiss.__version__} ({faiss.get_compile_options().strip()}; {gpus})"


def _array(values: Tensor) -> np.ndarray:
    return np.ascontiguousarray(values.detach().cpu().numpy(), np.float32)


def _search(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All inner products, exactly bounding every rival: less work than IndexFlatIP's three best, and fewer searches."""
    scores = faiss.pairwise_distances(_array(points), _array(centres), faiss.METRIC_INNER_PRODUCT)  # (n, K)
    return ranked(torch.from_numpy(scores))


def _search_on_gpu(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The RANKS best of an index on the GPU; little comes back from there."""
    num = min(RANKS, len(centres))
    index = faiss.index_cpu_to_gpu(_gpu_resources(), 0, faiss.IndexFlatIP(centres.shape[1]))
    index.add(_array(centres))
    scores, found = map(torch.from_numpy, index.search(_array(points), num))
    bounds = scores[:, -1:].repeat(1, len(centres)).scatter_(1, found, scores)
    best, nearest = scores[:, 0], found[:, 0]
    if num > 1 and bool((is_tie := best == scores[:, 1]).any()):
        # Of equal scores the lower index, whichever the search put first.
        nearest = nearest.where(~is_tie, found.where(scores == best[:, None], len(centres)).amin(1))
    return nearest, best, bounds.scatter_(1, nearest[:, None], -torch.inf)


def lloyd_faiss(
    tokens: Tensor, active: Tensor, centres: Tensor, alive: Tensor, iterations: int = ITERATIONS, gpu: bool = False
) -> Clusters:
    """`kmeans.lloyd` with the search by FAISS, one a view and iteration.

    `gpu` moves only the search; tokens and means are on the CPU. Shapes, result and errors: see `lloyd`.
    Raises: ValueError also when `gpu` is set and FAISS sees none.
    """
    if gpu and _num_gpus() == 0:
        raise ValueError("gpu=True, but faiss sees no GPU. Use gpu=False, or faiss-gpu on a machine with one.")

    search = _search_on_gpu if gpu else _search
    with _one_thread():
        clusters = lloyd_by_view(search, tokens.cpu(), active.cpu(), centres.cpu(), alive.cpu(), iterations)
    return Clusters(*(x.to(tokens.device) for x in clusters))
