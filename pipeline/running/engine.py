"""Shards to workers: the only door to dask.

`workers=0` runs in this process; the function and its results are the same either way. Results
are small; progress and resume live in the cache's ledger, never here. A worker that dies is replaced and
its shards go to another; what ends a run is one line, and the same command goes on from the ledger.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from pipeline.config import UserError
from pipeline.running.console import say
from pipeline.running.processes import most_processes

WINDOW_PER_WORKER = 2  # shards in flight a worker: one at work, one waiting
RETRIES = 2
# Of a worker: torch, open_clip and data 0.7, measured, and ViT-B/16 in float32 0.6.
WORKER_BYTES = 1.3e9
SERVERS = ("scheduler", "worker")  # that answer over HTTP, too
RECOUNT_S = 1.0  # between two looks at how many workers there are: a question to the scheduler each


class EngineError(UserError):
    """The cluster can't do the work; the message says what happened and how to go on."""


def _num_workers(wanted: int) -> int:
    """As many as cores and memory allow, but one; fewer than wanted are told of."""
    num, reason = most_processes(wanted, WORKER_BYTES)
    num = max(num, 1)
    if num < wanted:
        say(f"--workers is {wanted}; {num} {'is' if num == 1 else 'are'} started: {reason}")
    return num


def _own_keys() -> Any:
    """Keys that only this command and its workers hold: nobody else's connection is taken."""
    from distributed.security import Security

    try:
        return Security.temporary()
    except ImportError as error:
        raise EngineError(
            "--workers: the package cryptography, with which the workers are closed to other users of this machine, "
            f"can't be loaded ({error}). Run `pip install cryptography`, or leave --workers out."
        ) from None


def map_shards(
    work: Callable[[int], Any], shards: Sequence[int], *, workers: int = 0, scheduler: str | None = None
) -> Iterator[Any]:
    """Yields work(shard) for each shard, in the order of completion.

    Tasks must be idempotent: dask repeats finished ones after losing a worker. At most
    WINDOW_PER_WORKER shards a worker are in flight; workers that join later are given theirs.
    Our own workers, and nobody else, reach our own scheduler (TLS with keys made for it).
    Raises: EngineError for a scheduler that can't be reached or is lost, a shard that ends every worker, or
    `workers` without the package cryptography.
    """
    if not workers and not scheduler:
        yield from map(work, shards)
        return
    import dask

    dask.config.set({"logging.distributed": "warning"})  # before it is imported: else all that starts and ends is told
    from dask.distributed import Client, LocalCluster, as_completed
    from distributed.client import FutureCancelledError
    from distributed.comm import CommClosedError
    from distributed.scheduler import KilledWorker

    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # what it says is said below, once
    with ExitStack() as stack:
        security = None
        if not scheduler:
            # Else any process of this machine could have the workers run its code, and read about them over HTTP.
            security = _own_keys()
            stack.enter_context(dask.config.set({f"distributed.{who}.http.routes": [] for who in SERVERS}))
            cluster = LocalCluster(
                n_workers=_num_workers(workers),
                threads_per_worker=1,
                dashboard_address=None,
                security=security,
                scheduler_kwargs={"dashboard": False},
            )
            scheduler = stack.enter_context(cluster).scheduler_address
        try:
            client = stack.enter_context(Client(scheduler, security=security))
        except (OSError, ValueError) as error:  # ValueError: not an address
            raise EngineError(
                f"--scheduler {scheduler}: can't be reached ({' '.join(str(error).split())}). Start it with `dask "
                "scheduler`, or correct the address (tcp://host:port)."
            ) from None
        waiting, flight = iter(shards), as_completed()
        window, counted = 1, -RECOUNT_S

        def fill() -> None:
            nonlocal window, counted
            if time.monotonic() - counted >= RECOUNT_S:
                window = max(WINDOW_PER_WORKER * len(client.scheduler_info(n_workers=-1)["workers"]), 1)
                counted = time.monotonic()
            for _ in range(window - flight.count()):
                shard = next(waiting, None)
                if shard is None:
                    return
                flight.add(client.submit(work, shard, pure=False, retries=RETRIES))

        try:
            fill()
            for future in flight:
                yield future.result()
                future.release()
                fill()
        except KilledWorker as error:
            raise EngineError(
                f"a shard has ended {error.allowed_failures + 1} workers in a row, the last was "
                f"{error.last_worker.address}: memory may be short (fewer --workers, a smaller teacher.batch), or read "
                "that worker's log. What is recorded stays; the same command resumes."
            ) from None
        except (FutureCancelledError, CommClosedError):
            raise EngineError(
                f"the connection to the scheduler {scheduler} was lost, it has ended or can't be reached. What is "
                "recorded stays; start a scheduler and workers again, then the same command resumes."
            ) from None
