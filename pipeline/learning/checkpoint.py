"""Checkpoints: weights in safetensors with the config inside, training state beside them.

`checkpoint-000400/` holds student.safetensors, state.pt and seal.json with their digests; it appears
whole or not at all (written beside, then renamed), and one that was damaged since is passed over.
student.safetensors alone is what eval, predict and export need: config, class names, unseen names and
the text table of all classes travel in it.

No random state is kept: whatever iteration t draws is a function of (seed, t).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cache.ledger import read_manifest
from pipeline.config import Config, UserError, from_mapping
from pipeline.models.student import DenseStudent, build_student
from pipeline.tracking import say

TEXT = "text"  # name of the text table among the student's tensors
LAST, BEST = "student.safetensors", "student.best.safetensors"  # of a train folder
OWNER = ".training"  # in a train folder: the fingerprint of the training whose its students and curve are
SEAL = "seal.json"
SEALED = ("student.safetensors", "state.pt")


class CheckpointError(UserError):
    """No such checkpoint, or one that can't be read."""


@dataclass(frozen=True)
class Checkpoint:
    """What a student file carries beside its weights."""

    config: Config
    identity: str
    classes: tuple[str, ...]
    unseen: tuple[str, ...]
    text: Tensor  # (K, C) unit norm, all classes
    cache: str | None = None  # fingerprint of the cache it was trained from
    revision: str | None = None  # of the code that trained it, see tracking.revision

    @property
    def unseen_ids(self) -> list[int]:
        return [i for i, name in enumerate(self.classes) if name in self.unseen]

    @property
    def seen_ids(self) -> list[int]:
        return [i for i, name in enumerate(self.classes) if name not in self.unseen]


def save_student(path: Path, student: nn.Module, checkpoint: Checkpoint) -> None:
    """Writes weights and metadata to one safetensors file, atomically."""
    tensors = {
        f"student.{name}": value.detach().cpu().contiguous() for name, value in student.state_dict().items()
    }
    metadata = {
        "config": json.dumps(checkpoint.config.model_dump(mode="json", by_alias=True)),
        "fingerprint": checkpoint.identity,
        "classes": json.dumps(checkpoint.classes),
        "unseen": json.dumps(checkpoint.unseen),
        "cache": json.dumps(checkpoint.cache),
        "revision": json.dumps(checkpoint.revision),
    }
    partial = path.with_name(f".{path.name}.partial")
    save_file({**tensors, TEXT: checkpoint.text.contiguous()}, partial, metadata=metadata)
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


def save_checkpoint(
    folder: Path,
    iteration: int,
    checkpoint: Checkpoint,
    student: nn.Module,
    state: dict[str, Any],
    *,
    keep: int,
) -> None:
    """Everything that resuming needs, as checkpoint-<iteration>/.

    `state` is what torch.save takes and weights_only loading gives back. Of this training's checkpoints the
    last `keep` stay; those of another config are left alone.
    """
    final = folder / f"checkpoint-{iteration:06d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_student(partial / "student.safetensors", student, checkpoint)
    torch.save({"iteration": iteration, **state}, partial / "state.pt")
    seal = {"fingerprint": checkpoint.identity, "files": {n: _digest(partial / n) for n in SEALED}}
    (partial / SEAL).write_text(json.dumps(seal, indent=2) + "\n", encoding="utf-8")
    for name in ("state.pt", SEAL, "."):
        _sync(partial / name)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync(folder)
    own = [path for path in _checkpoints(folder) if _seal(path).get("fingerprint") == checkpoint.identity]
    for old in own[:-keep]:
        shutil.rmtree(old)


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders, oldest iteration first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.partition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def _seal(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; nothing when that can't be read."""
    try:
        return dict(json.loads((path / SEAL).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def latest_checkpoint(folder: Path, identity: str) -> Path | None:
    """The newest whole checkpoint of this very training; those of another config are left alone."""
    for path in reversed(_checkpoints(folder)):
        seal = _seal(path)
        if seal.get("fingerprint") != identity:
            continue
        damaged = [n for n in SEALED if not (path / n).is_file() or _digest(path / n) != seal["files"].get(n)]
        if not damaged:
            return path
        say(f"train: {path}: {', '.join(damaged)} is not what was written; the checkpoint before it is taken")
    return None


def load_checkpoint(path: Path, student: nn.Module) -> dict[str, Any]:
    """Restores the student in place; returns the state that was saved, with its iteration."""
    with safe_open(path / "student.safetensors", "pt") as file:
        student.load_state_dict(
            {k.removeprefix("student."): file.get_tensor(k) for k in file.keys() if k.startswith("student.")}  # noqa: SIM118
        )
    return dict(torch.load(path / "state.pt", map_location="cpu", weights_only=True))


def student_file(run: Path) -> Path:
    """The student of a run folder, a train folder, a checkpoint folder or a file.

    Of a finished training it is the one that eval takes, which with held-out images is the best and not the last.
    """
    for folder in (run / "train", run):
        if chosen := (read_manifest(folder / "train.manifest.json") or {}).get("student"):
            if not (folder / chosen).is_file():
                raise CheckpointError(f"{folder / chosen}: is gone. Run `cli.py train` again.")
            return folder / str(chosen)
    owner = run / "train" / OWNER
    own = owner.read_text(encoding="utf-8") if owner.is_file() else None
    checkpoints = [p for p in _checkpoints(run / "train") if own in (None, _seal(p).get("fingerprint"))]
    choices = [run / "train" / LAST, run / LAST, *(path / LAST for path in reversed(checkpoints))]
    for path in [run, *choices]:
        if path.is_file():
            return path
    raise CheckpointError(
        f"{run}: no trained student in it. Run `cli.py train` first, or name another run folder."
    )


def load_student(path: Path) -> tuple[DenseStudent, Checkpoint]:
    """A student in eval mode with its class names and text features, from the file alone."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        raw, classes, unseen = (json.loads(metadata[key]) for key in ("config", "classes", "unseen"))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a student of this project: {' '.join(str(error).split())}"
        ) from None
    config, text = from_mapping(raw, where=str(path)), tensors.pop(TEXT)
    side = config.teacher.image_size
    student = build_student(config.student, text.shape[1], side=side, pretrained=False)
    student.load_state_dict({name.removeprefix("student."): value for name, value in tensors.items()})
    checkpoint = Checkpoint(
        config,
        metadata.get("fingerprint", ""),
        tuple(classes),
        tuple(unseen),
        text,
        cache=json.loads(metadata.get("cache", "null")),
        revision=json.loads(metadata.get("revision", "null")),
    )
    return student.eval(), checkpoint


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
