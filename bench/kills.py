"""SIGKILL at random moments of extract and of cluster: is anything lost, doubled or wrong afterwards?

    python -m bench.kills                        50 kills of each stage, some minutes
    python -m bench.kills --kills 4 --seed 1
    python -m bench.kills --stage predict        one alone; also prepare, report and snakemake (bench/command_kills.py)

A round starts a stage on a small run, kills it after a random time, starts it again, and so on, until
one start lives to its end. The process killed is a real one that runs `cli.py`; it is forked off a
server that has imported torch already, so that the random moments fall into work and not into imports.
Counted after every kill: records that changed, recorded shards whose bytes aren't those recorded, and
the shards that were begun and have no record (their work is done again). After every round: is the
content that of an uninterrupted run, is any row missing, is any in two records?
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console
from rich.table import Table

from bench import command_kills
from bench.small_run import ROOT, content_digest, forkserver, rows_missing, small_arguments, small_config
from cache.errors import CacheError, MissingCache
from cache.ledger import Ledger
from cache.schema import SHARD
from cache.store import Store
from cache.verify import verify
from pipeline.config import Config

STAGES = ("extract", "cluster")
COMMANDS = ("predict", "prepare", "report", "snakemake")
MOST_SHOWN = 20  # faults listed
IN_FLIGHT = 1  # shards that a run in one process works on at a time


@dataclass
class Count:
    """What was seen of one stage."""

    kills: int = 0
    rounds: int = 0
    before_a_record: int = 0  # kills that left no record yet
    half_a_file: int = 0  # kills that left a .partial
    file_without_record: int = 0  # kills between a shard's first file and its record
    usual_s: float = 0.0  # an uninterrupted run, imports left out
    most_in_flight: int = 0  # shards begun without a record, at the worst kill
    images_redone: int = 0
    faults: list[str] = field(default_factory=list)


# ---- the process that is killed -----------------------------------------------------------------


def run_stage(stage: str, arguments: list[str], trace: Path, log: Path) -> None:
    """`cli.py STAGE` in this process; each image that it touches leaves its id in `trace`."""
    from pipeline.data.demo import DemoDataSet

    os.chdir(ROOT)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    written = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for method in ("image", "labels"):
        _traced(DemoDataSet, method, written)
    import cli

    sys.argv = ["cli.py", stage, *arguments]
    cli.main()


def _traced(kind: Any, method: str, descriptor: int) -> None:
    original: Callable[[Any, Any], Any] = getattr(kind, method)

    def traced(self: Any, sample: Any) -> Any:
        os.write(descriptor, f"{sample.id}\n".encode())
        return original(self, sample)

    setattr(kind, method, traced)


class Starter:
    """Starts stages as processes and counts what each touched."""

    def __init__(self, folder: Path, settings: tuple[str, ...]) -> None:
        self.settings = settings
        folder.mkdir(parents=True, exist_ok=True)
        self.context = forkserver()
        self.trace, self.log = folder / "trace", folder / "log"

    def run(self, stage: str, where: Path, *, kill_after_s: float | None) -> tuple[bool, float]:
        """Whether it was killed (else it ended well), and the seconds it lived."""
        self.trace.unlink(missing_ok=True)
        arguments = (stage, small_arguments(where, *self.settings), self.trace, self.log)
        process = self.context.Process(target=run_stage, args=arguments)
        process.start()
        began = time.monotonic()
        process.join(kill_after_s)
        process.kill()  # SIGKILL; nothing happens to one that has ended
        process.join()
        if process.exitcode not in (0, -9):
            raise SystemExit(f"{stage} failed by itself, exit code {process.exitcode}: {self.log.read_text()}")
        return process.exitcode == -9, time.monotonic() - began

    def touched(self) -> set[str]:
        return set(self.trace.read_text().split()) if self.trace.exists() else set()


# ---- what is looked at after each kill, and after each round ------------------------------------


def records(config: Config, stage: str) -> dict[str, tuple[bytes, int]]:
    folder = Ledger(config.cache_path, stage).folder
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.glob("*.json"))}


def wrong_shards(config: Config, stage: str) -> list[str]:
    """Recorded shards whose bytes on the disk aren't those that were recorded."""
    try:
        store = Store.open(config.cache_path)
    except MissingCache:
        return []
    wrong = []
    for shard, entry in Ledger(config.cache_path, stage).entries().items():
        for name, digest in entry["digests"].items():
            try:
                same = store.digest(name, shard) == digest
            except CacheError:
                same = False
            wrong += [] if same else [f"{name} shard {shard} is recorded, but not on the disk"]
    return wrong


def shard_of(sample: str) -> int:
    return int(sample.rsplit("-", 1)[1]) // SHARD  # the demo's ids are train-00000, train-00001, ...


def look_after_kill(count: Count, config: Config, stage: str, before: dict, touched: set[str]) -> None:
    now = records(config, stage)
    changed = [name for name, found in before.items() if now.get(name) != found]
    count.faults += [f"{stage}: record {name} changed or went" for name in changed]
    count.faults += [f"{stage}: {what}" for what in wrong_shards(config, stage)]
    recorded = set(Ledger(config.cache_path, stage).entries())
    begun = {shard_of(sample) for sample in touched} - recorded
    count.most_in_flight = max(count.most_in_flight, len(begun))
    count.images_redone += sum(shard_of(sample) in begun for sample in touched)
    count.before_a_record += not recorded
    data = config.cache_path / "data.zarr"
    count.half_a_file += bool(list(config.cache_path.rglob("*.partial")))
    first = {"extract": "view", "cluster": "pseudo"}[stage]
    written = {int(path.name.split(".")[1]) for path in data.glob(f"{first}/c.*") if path.suffix != ".partial"}
    count.file_without_record += bool(written - recorded)


def look_after_round(count: Count, config: Config, stage: str, wanted: tuple[str, bytes]) -> None:
    store = Store.open(config.cache_path)
    ranges = [entry["rows"] for entry in Ledger(config.cache_path, stage).entries().values()]
    rows = [row for low, high in ranges for row in range(low, high)]
    if sorted(rows) != list(range(store.num_samples)):
        count.faults.append(f"{stage}: {len(rows)} rows recorded, {len(set(rows))} different ones")
    stages = STAGES[: STAGES.index(stage) + 1]
    count.faults += [f"{stage}: missing {what}" for what in rows_missing(config.cache_path, stages)]
    count.faults += [f"{stage}: {finding}" for finding in verify(config.cache_path)]
    if content(config, stage) != wanted:
        count.faults.append(f"{stage}: content or manifest differ from those of an uninterrupted run")
    left = list(config.cache_path.rglob("*.partial"))
    count.faults += [f"{stage}: {path} was left" for path in left]


def content(config: Config, stage: str) -> tuple[str, bytes]:
    return content_digest(config.cache_path), (config.cache_path / f"{stage}.manifest.json").read_bytes()


# ---- rounds -------------------------------------------------------------------------------------


def kill_stage(stage: str, kills: int, seed: int, folder: Path, *settings: str) -> Count:
    """Rounds of one stage until `kills` kills have been dealt out."""
    count, random_, starter = Count(), random.Random(f"{stage} {seed}"), Starter(folder, settings)
    whole, upstream = folder / "whole", folder / "upstream"
    for above in STAGES[: STAGES.index(stage)]:
        starter.run(above, upstream, kill_after_s=None)
    _fresh(upstream, whole)
    _, count.usual_s = starter.run(stage, whole, kill_after_s=None)
    wanted = content(small_config(whole, *settings), stage)
    while count.kills < kills:
        here = folder / f"{stage}-{count.rounds}"
        _fresh(upstream, here)
        config, was_killed = small_config(here, *settings), True
        while was_killed:
            before = records(config, stage)
            limit = random_.uniform(0, count.usual_s) if count.kills < kills else None
            was_killed, lived_s = starter.run(stage, here, kill_after_s=limit)
            if not was_killed and not before:
                count.usual_s = min(count.usual_s, lived_s)  # the first one may have met a busy machine
            if was_killed:
                count.kills += 1
                look_after_kill(count, config, stage, before, starter.touched())
        count.rounds += 1
        look_after_round(count, config, stage, wanted)
        shutil.rmtree(here)
    if count.most_in_flight > IN_FLIGHT:
        count.faults.append(f"{stage}: {count.most_in_flight} shards were lost by one kill, want {IN_FLIGHT}")
    return count


def _fresh(upstream: Path, folder: Path) -> None:
    """`folder` as the stages above left it."""
    shutil.rmtree(folder, ignore_errors=True)
    if upstream.exists():
        shutil.copytree(upstream, folder)


def table_of(counts: dict[str, Count]) -> Table:
    table = Table("", *counts, title="killed at random moments, then run to the end")
    for what, value in {
        "uninterrupted, s": lambda c: f"{c.usual_s:.1f}",
        "kills": lambda c: c.kills,
        "rounds, each ended by one start that lived": lambda c: c.rounds,
        "kills before the first record": lambda c: c.before_a_record,
        "kills that left half a file": lambda c: c.half_a_file,
        "kills between a shard's file and its record": lambda c: c.file_without_record,
        "shards begun and lost, the worst kill": lambda c: c.most_in_flight,
        "images done again, a kill": lambda c: f"{c.images_redone / max(c.kills, 1):.1f}",
        "lost, doubled, changed or different": lambda c: len(c.faults),
    }.items():
        table.add_row(what, *(str(value(count)) for count in counts.values()))
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of each stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=(*STAGES, *COMMANDS), help="only this one")
    chosen = parser.parse_args(arguments)
    began, counts, others = time.monotonic(), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for stage in [chosen.stage] if chosen.stage else (*STAGES, *COMMANDS):
            where = Path(folder) / stage
            if stage in STAGES:
                counts[stage] = kill_stage(stage, chosen.kills, chosen.seed, where)
            elif stage == "snakemake":
                others[stage] = command_kills.kill_snakemake(chosen.kills, chosen.seed, where)
            else:
                others[stage] = command_kills.kill_command(stage, chosen.kills, chosen.seed, where)
    out = Console(highlight=False, soft_wrap=True)
    if counts:
        out.print(table_of(counts))
    for name, count in others.items():
        out.print(
            f"{name}: {count.kills} kills in {count.rounds} rounds ({count.usual_s:.1f} s uninterrupted), "
            f"{count.half_done} of them half done, {len(count.faults)} lost, changed or left"
        )
    faults = [fault for count in (*counts.values(), *others.values()) for fault in count.faults]
    for fault in faults[:MOST_SHOWN]:
        out.print(fault, markup=False)
    out.print(f"seed {chosen.seed}, {time.monotonic() - began:.0f} s: {'FAILED' if faults else 'nothing lost'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
