"""Shards to workers: the only door to dask.

`workers=0` runs in this process; the function and its results are the same either way. Results
are small; progress and resume live in the cache's ledger, never here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

WINDOW_PER_WORKER = 2  # shards in flight a worker: one at work, one waiting
RETRIES = 2


def map_shards(
    work: Callable[[int], Any], shards: Sequence[int], *, workers: int = 0, scheduler: str | None = None
) -> Iterator[Any]:
    """Yields work(shard) for each shard, in the order of completion.

    Tasks must be idempotent: dask repeats finished ones after losing a worker. At most
    WINDOW_PER_WORKER shards a worker are in flight.
    """
    if not workers and not scheduler:
        yield from map(work, shards)
        return
    from dask.distributed import Client, LocalCluster, as_completed

    cluster = (
        None if scheduler else LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)
    )
    try:
        with Client(scheduler or cluster) as client:
            window = WINDOW_PER_WORKER * max(len(client.scheduler_info(n_workers=-1)["workers"]), 1)
            waiting = iter(shards)
            flight = as_completed(
                [client.submit(work, shard, pure=False, retries=RETRIES) for shard in islice(waiting, window)]
            )
            for future in flight:
                yield future.result()
                future.release()
                for shard in waiting:
                    flight.add(client.submit(work, shard, pure=False, retries=RETRIES))
                    break
    finally:
        if cluster is not None:
            cluster.close()
