"""What a person sees of a running stage, and what the next stage reads of it: progress, manifests.

A manifest is the small file that a stage writes last. It names the stage's fingerprint and the
config's, so that the stage below can tell a cache made otherwise from its own.
"""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from cache.errors import MissingCache, StaleCache
from cache.files import new_log, remove, write_text, writing
from cache.ledger import MANIFEST, Ledger, read_manifest, write_manifest
from cache.places import Place, place
from pipeline.config import Config, ConfigError, config_fingerprint, load

console = Console(stderr=True, highlight=False, soft_wrap=True)


_log: list[tuple[Path, Console]] = []


def log_to(path: Path) -> None:
    """From here on, what is said goes to this file too (bars don't). Raises: CacheWriteFailed."""
    _log.append((path, Console(file=new_log(path), highlight=False, soft_wrap=True)))


def say(what: Any) -> None:
    """One line, or a rich table, to the terminal and to the log. Raises: CacheWriteFailed for the log."""
    console.print(what, markup=False)
    console.file.flush()
    for path, log in _log:
        with writing(path):
            log.print(what, markup=False)
            log.file.flush()


class RateColumn(ProgressColumn):
    """Units per second, measured by the bar itself."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} {task.fields.get('unit', 'it')}/s" if speed else "")


@contextmanager
def progress(what: str, total: int, *, done: int = 0, unit: str = "images") -> Iterator[Any]:
    """A bar with rate and remaining time; yields `advance(n, **fields)`. A log file gets its last state only."""
    columns = (TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn(), RateColumn())
    times = (
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, *times, console=console) as bar:
        task = bar.add_task(what, total=total, completed=done, unit=unit, note="")
        yield lambda count=1, note="": bar.update(task, advance=count, note=note)


_PSEUDO = {
    "views": int,
    "objects_per_view": float,
    "objects_histogram": {str: int},
    "coverage": float,
    "tokens_per_mask": float,
    "largest_mask_share": float,
    "purity": (float, None),
    "verdict?": [str],
}
_CAMS = {
    **dict.fromkeys(("images", "maps", "empty", "untagged"), int),
    "seeds": ({str: {str: float}}, None),
    "refined?": float,
}
# Of what a stage says of itself, see cache.records; a manifest of another shape says nothing.
SHAPES = {
    "extract": MANIFEST | {"teacher?": str},
    "cluster": MANIFEST | {"summary?": _PSEUDO},
    "cams": MANIFEST | {"summary?": _CAMS},
    "train": MANIFEST | {"iterations?": int, "student?": str},
}
# By the stage below.
NEEDED = dict.fromkeys(("extract", "cluster", "cams"), ("fingerprint", "content"))
NEEDED |= {"train": ("fingerprint", "student")}
MANIFESTS = {
    "extract": lambda config: place(config.cache_path) / "extract.manifest.json",
    "cluster": lambda config: place(config.cache_path) / "cluster.manifest.json",
    "cams": lambda config: place(config.cache_path) / "cams.manifest.json",
    "train": lambda config: config.run_path / "train" / "train.manifest.json",
}


def manifest_path(config: Config, stage: str) -> Place:
    return MANIFESTS[stage](config)


def found_manifest(config: Config, stage: str) -> dict[str, Any] | None:
    """The stage's manifest, or None when the stage never ended."""
    return read_manifest(manifest_path(config, stage), SHAPES[stage])


def reopen(config: Config, stage: str) -> None:
    """Takes back that a stage of the cache is complete."""
    for path in (manifest_path(config, stage), config.manifest_folder / f"{stage}.manifest.json"):
        remove(path)


def finish(config: Config, stage: str, manifest: dict[str, Any]) -> None:
    """Says that a stage of the cache is complete: the manifest, and its copy where Snakemake looks."""
    copy = config.manifest_folder / f"{stage}.manifest.json"
    if found_manifest(config, stage) != manifest:
        write_manifest(manifest_path(config, stage), manifest)
    if copy != manifest_path(config, stage) and read_manifest(copy) != manifest:
        write_manifest(copy, manifest)


def required_manifest(config: Config, stage: str) -> dict[str, Any]:
    """The manifest of an upstream stage that ended and did what this config asks.

    Raises: MissingCache when it never ended, StaleCache when another config made it.
    """
    path, manifest = manifest_path(config, stage), found_manifest(config, stage)
    if manifest is None or not all(key in manifest for key in NEEDED[stage]):
        raise MissingCache(f"{path}: `{stage}` has not been completed. Run `cli.py {stage}` first.")
    wanted = config_fingerprint(config, stage)
    if manifest.get("config") != wanted:
        raise StaleCache(
            f"{path}: {stage} was run with config {manifest.get('config')}{_difference(config, manifest)}, "
            f"this config asks for {wanted}. Run `cli.py {stage}` again, or point cache.path elsewhere."
        )
    return manifest


def _difference(config: Config, manifest: dict[str, Any]) -> str:
    """What differs, when it is the teacher: the usual case."""
    made, named = manifest.get("teacher"), config.teacher.model
    return f" (teacher {made!r}, the config names {named!r})" if made and made != named else ""


def save_config(config: Config) -> None:
    """Keeps the resolved config in the run folder, for people and for `inspect`."""
    dumped = yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False)
    write_text(config.run_path / "config.yaml", dumped)


def run_config(run: Path) -> Config:
    """The config that a run folder was made with. Raises ConfigError when it is no run folder."""
    if not (run / "config.yaml").is_file():
        near = sorted(p.parent.as_posix() for p in Path("runs").glob("*/config.yaml"))
        raise ConfigError(
            f"{run}: not a run folder (no config.yaml in it). There are: {', '.join(near) or 'none'}."
        )
    return load(run / "config.yaml")


def provenance() -> dict[str, str | None]:
    """When, on what and from which code: for results that people compare. Never part of a fingerprint.

    date (UTC day), machine (processor and its logical cores, and the GPU if there is one), torch, revision.
    """
    import torch

    cpu = next((line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")), "")
    machine = f"{cpu.partition(':')[2].strip() or platform.machine()}, {os.cpu_count()} logical cores"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine,
        "torch": torch.__version__,
        "revision": revision(),
    }


def revision() -> str | None:
    """The code's commit as git describes it, "-dirty" with changes; None outside a checkout."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def record_shard(config: Config, stage: str, shard: int, entry: dict[str, Any], began: float) -> None:
    """Writes a shard's ledger record, with when, where and how long beside what the stage says of it."""
    where = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    seconds = round(time.time() - began, 3)
    Ledger(config.cache_path, stage).record(shard, {"shard": shard, **entry, **where, "seconds": seconds})
