"""Injected damage to a cache, and facts around a finished run that change: is all of it found?

    python -m bench.faults                       200 faults of each of six kinds, most of an hour on two cores
    python -m bench.faults --faults 8 --stages 2
    python -m bench.faults --only meanings       the sixth kind alone: nothing is damaged, something has another meaning

The cache is a real one (bench/small_run.py), extracted and clustered here; a second one, of other scenes,
other templates and another split, gives the foreign shards. Each fault hits a random array and shard of
the sound cache, which is put back afterwards. `verify` looks after every fault; of those in arrays that
a stage reads, the first `--stages` of each kind are shown to `cli.py cluster` and `cli.py train` too.
The sixth kind is bench/meanings.py's: class names, masks' values, images, keys of the config. Each is noticed by the
stages, or their result is that of a run made from nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console
from rich.table import Table

from bench.meanings import FAULTS, World
from bench.small_run import ROOT, small_arguments, small_config
from cache.errors import CacheError
from cache.store import Store
from cache.verify import verify

MOST_SHOWN = 20  # faults listed
WIDTH = 120  # columns of the table
MEANINGS = "meanings"  # the sixth kind
WHOLE = ("text", "sample")  # arrays of one file
OTHER = ("name=other", "data.seed=2", "data.unseen=[zebra]", 'text.templates=["a picture of a {}."]')
# What each stage reads of the cache; damage elsewhere can't reach what it makes.
READ = {
    "cluster": {"view", "cls", "tokens", "status", "sample"},
    "train": {"view", "cls", "pseudo", "status", "text", "sample"},
}


@dataclass
class Shard:
    """One file of one array, and where the like of it lies in the other cache."""

    cache: Path
    other: Path
    array: str
    number: int
    file: Path

    @property
    def name(self) -> str:
        return f"{self.array} shard {self.number}"

    @property
    def foreign(self) -> Path:
        return self.other / self.file.relative_to(self.cache)

    def record(self, root: Path) -> Path:
        stage = "cluster" if self.array in ("pseudo", "pseudo_raw", "centroids") else "extract"
        return root / "ledger" / stage / f"{self.number:05d}.json"


@dataclass
class Count:
    injected: int = 0
    found: int = 0
    named: int = 0
    asked: dict[str, int] = field(default_factory=lambda: {"cluster": 0, "train": 0})
    refused: dict[str, int] = field(default_factory=lambda: {"cluster": 0, "train": 0})


# ---- the kinds of damage: each returns the shards that are wrong now, none if it can't be done here ------


def flipped_bit(shard: Shard, shards: list[Shard], random_: random.Random) -> list[Shard]:
    content = bytearray(shard.file.read_bytes())
    content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
    shard.file.write_bytes(content)
    return [shard]


def truncated(shard: Shard, shards: list[Shard], random_: random.Random) -> list[Shard]:
    os.truncate(shard.file, random_.randrange(shard.file.stat().st_size))
    return [shard]


def missing(shard: Shard, shards: list[Shard], random_: random.Random) -> list[Shard]:
    shard.file.unlink()
    return [shard]


def swapped(shard: Shard, shards: list[Shard], random_: random.Random) -> list[Shard]:
    others = [other for other in shards if other.array == shard.array and other is not shard]
    if not others:
        return []  # an array of one file
    other, mine = random_.choice(others), shard.file.read_bytes()
    shard.file.write_bytes(other.file.read_bytes())
    other.file.write_bytes(mine)
    return [shard, other]


def of_another_config(shard: Shard, shards: list[Shard], random_: random.Random) -> list[Shard]:
    """The same shard of the other cache; every second time its record comes with it."""
    shutil.copy(shard.foreign, shard.file)
    if random_.random() < 0.5 and shard.record(shard.cache).exists():
        shutil.copy(shard.record(shard.other), shard.record(shard.cache))
    return [shard]


KINDS: dict[str, Callable[[Shard, list[Shard], random.Random], list[Shard]]] = {
    "a flipped bit": flipped_bit,
    "truncated": truncated,
    "missing": missing,
    "two swapped": swapped,
    "of another config": of_another_config,
}


# ---- what is asked of a damaged cache -----------------------------------------------------------


class Damaged:
    """A run whose cache is broken and mended again and again."""

    def __init__(self, folder: Path, *settings: str) -> None:
        self.folder, self.settings = folder, settings
        for changes in ((), OTHER):
            for stage in ("extract", "cluster"):
                code, said = command(stage, small_arguments(folder, *settings, *changes))
                if code:
                    raise SystemExit(f"{stage} of the sound run: {said}")
        self.cache = small_config(folder, *settings).cache_path
        self.other = small_config(folder, *settings, *OTHER).cache_path
        self.sound = folder / "sound"
        shutil.copytree(self.cache, self.sound)
        data = self.cache / "data.zarr"
        self.shards = [
            Shard(self.cache, self.other, file.parent.name, int(file.name.split(".")[1]), file)
            for file in sorted(data.glob("*/c.*"))
        ]

    def differs(self, shard: Shard) -> bool:
        """Are the values there no longer those of the sound cache, or can't be read?"""
        sound, found = Store.open(self.sound), Store.open(self.cache)
        try:
            if shard.array == "sample":
                return found.samples != sound.samples
            return found.digest(shard.array, shard.number) != sound.digest(shard.array, shard.number)
        except CacheError:
            return True

    def mend(self) -> None:
        shutil.rmtree(self.cache)
        shutil.copytree(self.sound, self.cache)

    def asked(self, stage: str, hurt: list[Shard]) -> str:
        """What the stage said, if that isn't one line and exit code 2 that name a shard that is hurt."""
        done = [Path("cluster.manifest.json"), *(Path(f"ledger/cluster/{s.number:05d}.json") for s in hurt)]
        if stage == "cluster":  # a finished stage has nothing to read; let it have just these to do
            for name in done:
                (self.cache / name).unlink(missing_ok=True)
        code, said = command(stage, small_arguments(self.folder, *self.settings))
        if stage == "cluster":
            for name in filter(lambda name: (self.sound / name).exists(), done):
                shutil.copy2(self.sound / name, self.cache / name)
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        names = [s for s in hurt if f"shard {s.number}" in said or (s.array in WHOLE and s.array in said)]
        is_refused = code == 2 and len(lines) == 1 and "Traceback" not in said and names
        return "" if is_refused else f"exit code {code}: {said}"


def command(stage: str, arguments: list[str]) -> tuple[int, str]:
    """`cli.py STAGE` in this process: exit code, and what it said on stderr."""
    import cli
    from pipeline.data import base

    sys.argv, said, code = ["cli.py", stage, *arguments], io.StringIO(), 0
    base._data.cache_clear()
    with contextlib.redirect_stderr(said), contextlib.chdir(ROOT):
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, said.getvalue()


def inject(run: Damaged, kind: str, faults: int, stages: int, seed: int) -> tuple[Count, list[str]]:
    """`faults` faults of one kind; up to `stages` of them are shown to each stage. The counts, the misses."""
    count, missed, random_ = Count(), list[str](), random.Random(f"{kind} {seed}")
    while count.injected < faults:
        changed = KINDS[kind](random_.choice(run.shards), run.shards, random_)
        hurt = [shard for shard in changed if run.differs(shard)]
        if not hurt:
            run.mend()
            continue  # the same values after all, as of two shards without a broken image: no damage
        count.injected += 1
        what = f"{kind}: {', '.join(shard.name for shard in hurt)}"
        findings = [str(finding) for finding in verify(run.cache)]
        named = all(any(_names(finding, shard) for finding in findings) for shard in hurt)
        count.found, count.named = count.found + bool(findings), count.named + named
        missed += [] if named else [f"{what}: verify says {findings or 'sound'}"]
        for stage, arrays in READ.items():
            if hurt[0].array in arrays and count.asked[stage] < stages:
                count.asked[stage] += 1
                took_it = run.asked(stage, hurt)
                count.refused[stage] += not took_it
                missed += [f"{what}: {stage} took it, {took_it}"] if took_it else []
        run.mend()
    return count, missed


def _names(finding: str, shard: Shard) -> bool:
    """Arrays of one file are named by their name alone; a record of another config, by stage and shard."""
    if shard.array in WHOLE:
        return f"/{shard.array}" in finding
    return f"{shard.array} shard {shard.number}:" in finding or f"shard {shard.number} is of" in finding


def table_of(counts: dict[str, Count]) -> Table:
    names = ("a shard that is", "injected", "found", "shard named", "cluster refused", "train refused")
    table = Table(*names, title="injected faults")
    for kind, c in counts.items():
        stages = (f"{c.refused[stage]} of {c.asked[stage]}" for stage in READ)
        table.add_row(kind, str(c.injected), str(c.found), str(c.named), *stages)
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200, help="of each kind")
    parser.add_argument("--stages", type=int, default=40, help="of each kind shown to cluster and to train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("damage", MEANINGS), help="five kinds of damage, or the sixth kind")
    chosen = parser.parse_args(arguments)
    began, counts, missed = time.monotonic(), {}, list[str]()
    out = Console(highlight=False, width=WIDTH)
    if chosen.only != MEANINGS:
        damage(chosen, counts, missed)
        out.print(table_of(counts))
    if chosen.only != "damage":
        tried, more = meanings(chosen.faults, chosen.seed)
        missed += more
        out.print(f"{sum(tried.values())} facts changed, {sum(tried.values()) - len(more)} noticed or without effect:")
        out.print(", ".join(f"{what} {num}" for what, num in tried.items()))
    for miss in missed[:MOST_SHOWN]:
        out.print(miss, markup=False)
    word = f"{len(missed)} MISSED" if missed else "none missed"
    out.print(f"seed {chosen.seed}, {time.monotonic() - began:.0f} s: {word}")
    return 1 if missed else 0


def meanings(faults: int, seed: int) -> tuple[Counter[str], list[str]]:
    """`faults` changes of facts, all of FAULTS in turn; how many of each, and what went unnoticed."""
    tried, missed = Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for number in range(faults):
            what = list(FAULTS)[number % len(FAULTS)]
            tried[what] += 1
            if wrong := world.tried(what, seed * faults + number):
                missed.append(wrong)
                print(wrong, file=sys.stderr)
    return tried, missed


def damage(chosen: argparse.Namespace, counts: dict[str, Count], missed: list[str]) -> None:
    """The five kinds of damage."""
    with tempfile.TemporaryDirectory() as folder:
        run = Damaged(Path(folder))
        if verify(run.cache):
            missed.append(f"the sound cache has findings: {verify(run.cache)}")
        for kind in KINDS:
            counts[kind], more = inject(run, kind, chosen.faults, chosen.stages, chosen.seed)
            missed += more


if __name__ == "__main__":
    sys.exit(main())
