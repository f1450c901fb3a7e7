"""Whose a run's folder is: one training at a time, and none that is overwritten.

A training with another config or other labels than the one that is there doesn't replace it: what that one made
(student, checkpoints, evaluation, report) moves to kept/<its fingerprint>/ in the run's folder, and comes back
when it is asked for again. `cli.py predict --run runs/demo/kept/<fingerprint>` works as with any run folder.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cache.files import held, write_atomic, writing
from cache.ledger import read_manifest
from pipeline.config import UserError
from pipeline.learning.checkpoint import LAST, OWNER, student_metadata
from pipeline.running.console import say

TRAIN, KEPT, LOCK = "train", "kept", "train.lock"
# What belongs to one training; the folder `train` itself goes last, so that a kill in between can go on.
OF_A_TRAINING = ("eval", "eval-on-*", "report", "figures", TRAIN)


class RunBusy(UserError):
    """Another process is training in this run's folder."""


@contextmanager
def training_in(run: Path) -> Iterator[None]:
    """Holds a run's folder for one training.

    Raises: RunBusy at once while another holds it, CacheWriteFailed.
    """
    path = run / LOCK

    def busy() -> RunBusy:
        holder = path.read_text(encoding="utf-8", errors="replace")[:1000] or "another process"
        return RunBusy(
            f"{run}: {holder} is training there. Wait for it to end or stop it, or train under another name (--set "
            "name=...)."
        )

    since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    with held(path, f"process {os.getpid()} on {socket.gethostname()}, since {since},".encode(), busy):
        yield


def claim(run: Path, identity: str) -> None:
    """Makes the folder `train` this training's: another's goes to kept/, its own comes back from there.

    Hold the lock. Raises: CacheWriteFailed.
    """
    owner = _owner(run / TRAIN)
    with writing(run / TRAIN):
        if owner not in (None, identity):
            _move(run, run / KEPT / str(owner))
            say(f"train: the training that was here is kept in {run / KEPT / str(owner)}")
        if (run / KEPT / identity).is_dir():
            _move(run / KEPT / identity, run)
            say("train: this training was here before; it is back")
        (run / TRAIN).mkdir(parents=True, exist_ok=True)
    write_atomic(run / TRAIN / OWNER, identity.encode())


def _owner(folder: Path) -> str | None:
    """The fingerprint of the training whose a folder is; None of an empty one."""
    owner = folder / OWNER
    if owner.is_file() and (text := owner.read_text(encoding="utf-8", errors="replace").strip()):
        return "".join(c for c in text if c.isalnum())[:64] or None
    made = read_manifest(folder / "train.manifest.json") or student_metadata(folder / LAST)
    return str(made["fingerprint"]) if made.get("fingerprint") else None


def _move(source: Path, target: Path) -> None:
    """Moves what belongs to a training from one folder into another, which has none of it."""
    target.mkdir(parents=True, exist_ok=True)
    for pattern in OF_A_TRAINING:
        for path in sorted(source.glob(pattern)):
            place, number = target / path.name, 1
            while place.exists():  # left by somebody else: nothing is overwritten
                number += 1
                place = target / f"{path.name}.{number}"
            path.rename(place)
    if source.parent.name == KEPT:
        (source / "config.yaml").unlink(missing_ok=True)
        source.rmdir()
    else:
        _describe(target)


def _describe(folder: Path) -> None:
    """Gives a kept training the config.yaml of a run folder, from its student, where it has one."""
    raw = student_metadata(folder / TRAIN / LAST).get("config")
    if raw:
        write_atomic(folder / "config.yaml", json.dumps(json.loads(raw), indent=1).encode())  # JSON is YAML
