"""Extract and cluster over dask, undisturbed and with its parts killed: is the content always the same?

    python -m bench.workers                     1, 2 and 4 workers; 10 kills of a worker, 10 of the scheduler
    python -m bench.workers --kills 20 --seed 1

The small run of `bench/small_run.py`, on a scheduler and workers that are processes of their own. A kill is SIGKILL
after a random record of extract or of cluster. A killed worker's shards go to the others; a killed scheduler ends
the command with one line, then a new cluster is started at its address and the same command given again. The
content of each finished cache is compared with that of one process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console
from rich.table import Table

from bench.small_run import ROOT, content_digest, forkserver, small_config
from cache.ledger import Ledger
from cache.store import Store
from pipeline.cluster import cluster
from pipeline.config import Config
from pipeline.extract import extract
from pipeline.running.engine import EngineError

HOST = "127.0.0.1"
STAGES: dict[str, Callable[..., object]] = {"extract": extract, "cluster": cluster}


# ---- a cluster whose parts can be killed --------------------------------------------------------


def _serve(kind: str, *arguments: object, **options: object) -> None:
    """A dask scheduler or worker, until it is ended."""
    import distributed

    async def serve() -> None:
        async with getattr(distributed, kind)(*arguments, **options) as server:
            await server.finished()

    logging.disable(logging.WARNING)
    asyncio.run(serve())


class Cluster:
    """A scheduler and `num` workers of one thread, each a process, forked off a server that has imported torch."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.context = forkserver()
        with socket.socket() as probe:  # a port that is free now
            probe.bind((HOST, 0))
            self.port = probe.getsockname()[1]
        self.address = f"tcp://{HOST}:{self.port}"
        self.processes: list[multiprocessing.Process] = []

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def start(self) -> None:
        self.scheduler = self._started("Scheduler", host=HOST, port=self.port, dashboard=False)
        for _ in range(self.num):
            self._started("Worker", self.address, nthreads=1, dashboard=False)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes.clear()

    def _started(self, kind: str, *arguments: object, **options: object) -> multiprocessing.Process:
        process = self.context.Process(target=_serve, args=(kind, *arguments), kwargs=options)
        process.start()
        self.processes.append(process)
        return process


# ---- kills --------------------------------------------------------------------------------------


def records(config: Config, stage: str) -> dict[int, dict]:
    return Ledger(config.cache_path, stage).entries()


def kill_process(entry: dict) -> None:
    """Ends the process that has written a record."""
    os.kill(entry["pid"], signal.SIGKILL)


@contextlib.contextmanager
def killed_after(
    config: Config, stage: str, kill: Callable[[dict], None], *, num: int = 1, wait_s: float = 0.0
) -> Iterator[list[int]]:
    """Meanwhile waits for the `num`-th new record, then hands it to `kill`; yields a list for the records then."""
    before, is_over = set(records(config, stage)), threading.Event()
    seen: list[int] = []

    def wait() -> None:
        while not is_over.is_set():
            new = {shard: entry for shard, entry in records(config, stage).items() if shard not in before}
            if len(new) >= num:
                time.sleep(wait_s)
                kill(next(iter(new.values())))
                seen.append(len(records(config, stage)))
                return
            time.sleep(0.005)

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()


# ---- rounds -------------------------------------------------------------------------------------


def content(config: Config) -> tuple[str, list[bytes]]:
    """One number for all that the cache holds, and the manifests."""
    manifests = [(config.cache_path / f"{stage}.manifest.json").read_bytes() for stage in STAGES]
    return content_digest(config.cache_path), manifests


def undisturbed(config: Config, num: int) -> float:
    """Both stages on `num` workers, 0 in this process; the seconds that they took."""
    with Cluster(num) if num else contextlib.nullcontext() as dask:
        began = time.monotonic()
        for run in STAGES.values():
            run(config, scheduler=dask.address if dask else None)
        return time.monotonic() - began


def disturbed(config: Config, part: str, random_: random.Random) -> bool:
    """Both stages on two workers, one of them disturbed; whether the kill came before its end."""
    disturbed_stage, num, wait_s = random_.choice([*STAGES]), random_.randint(1, 3), random_.uniform(0, 0.3)
    with Cluster(2) as dask:
        kills = {"worker": kill_process, "scheduler": lambda _: dask.scheduler.kill()}
        for stage, run in STAGES.items():
            if stage != disturbed_stage:
                run(config, scheduler=dask.address)
                continue
            lost = contextlib.suppress(EngineError)  # what a lost scheduler ends in
            with killed_after(config, stage, kills[part], num=num, wait_s=wait_s) as records_then, lost:
                run(config, scheduler=dask.address)
            if not dask.scheduler.is_alive():
                dask.end()
                dask.start()
                run(config, scheduler=dask.address)
    return bool(records_then) and records_then[0] < Store.open(config.cache_path).num_shards


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4], help="0: this process")
    parser.add_argument("--kills", type=int, default=10, help="of a worker, and of the scheduler")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    os.chdir(ROOT)
    random_, table, has_failed = (random.Random(chosen.seed), Table("", "runs", "same content", "seconds"), False)
    with tempfile.TemporaryDirectory() as folder:

        def run(name: str) -> Config:
            return small_config(Path(folder) / name)

        undisturbed(run("whole"), 0)
        wanted = content(run("whole"))
        for num in chosen.workers:
            config = run(f"workers-{num}")
            taken = undisturbed(config, num)
            same = content(config) == wanted
            has_failed |= not same
            table.add_row(f"{num} workers" if num else "one process", "1", str(int(same)), f"{taken:.1f}")
        for part in ("worker", "scheduler"):
            done = in_time = same = 0
            while done < chosen.kills:
                config = run(f"{part}-{done}")
                in_time += disturbed(config, part, random_)
                same += content(config) == wanted
                done += 1
            has_failed |= same < done
            table.add_row(f"{part} killed ({in_time} before the last record)", str(done), str(same), "")
    out = Console(highlight=False, soft_wrap=True)
    out.print(table)
    out.print(f"seed {chosen.seed}: {'FAILED' if has_failed else 'always the same content'}")
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
