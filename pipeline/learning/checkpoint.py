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
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cache.files import remove, sync_folder, whole_file, write_atomic, write_text, writing
from cache.ledger import read_manifest
from cache.records import misfit, parsed
from pipeline.config import Config, UserError, from_mapping, kept
from pipeline.models.dense import DenseStudent
from pipeline.models.student import build_student
from pipeline.running.console import say
from pipeline.running.manifests import made_in

ORIGIN = "origin"  # key of a student's metadata: what its net is built from beside the config, if anything
TEXT = "text"  # name of the text table among the student's tensors
LAST, BEST = "student.safetensors", "student.best.safetensors"  # of a train folder
OWNER = ".training"  # in a train folder: the fingerprint of the training whose its students and curve are
CONTENT = "content"  # key of a student's metadata: the hash of all the rest
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
    manifest: dict[str, Any] | None = None  # of the training, when it has ended
    revision: str | None = None  # of the code that trained it, see pipeline/running/provenance.py

    @property
    def unseen_ids(self) -> list[int]:
        return [i for i, name in enumerate(self.classes) if name in self.unseen]

    @property
    def seen_ids(self) -> list[int]:
        return [i for i, name in enumerate(self.classes) if name not in self.unseen]


def save_student(path: Path, student: nn.Module, checkpoint: Checkpoint) -> None:
    """Writes weights and metadata to one safetensors file, atomically. Raises: CacheWriteFailed."""
    tensors = {f"student.{name}": value.detach().cpu().contiguous() for name, value in student.state_dict().items()}
    metadata = {
        "config": json.dumps(kept(checkpoint.config)),
        "fingerprint": checkpoint.identity,
        "classes": json.dumps(checkpoint.classes),
        "unseen": json.dumps(checkpoint.unseen),
        "cache": json.dumps(checkpoint.cache),
        "revision": json.dumps(checkpoint.revision),
        "manifest": json.dumps(checkpoint.manifest),
    }
    if isinstance(student, DenseStudent) and student.origin:
        metadata[ORIGIN] = json.dumps(student.origin)
    tensors[TEXT] = checkpoint.text.contiguous()
    metadata[CONTENT] = content_digest(metadata, tensors)
    # Not save_file: that writes 0600 whatever the umask, and a full disk ends it in an error without a path.
    write_atomic(path, save(tensors, metadata))


def content_digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Hash of all that a student file holds, its own hash apart; 32 hex digits.

    xxh3 of 128 bits: it finds damage, at memory's speed; it isn't meant to withstand forgery.
    """
    found = xxhash.xxh3_128(json.dumps({k: v for k, v in metadata.items() if k != CONTENT}, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def student_metadata(path: Path) -> dict[str, Any]:
    """What a student file says of itself; nothing when there is none that can be read."""
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def ended(path: Path, identity: str) -> dict[str, Any] | None:
    """The manifest that a finished training left in its last student, if it is this training's and still whole."""
    metadata = student_metadata(path)
    if metadata.get("fingerprint") != identity:
        return None
    try:
        found = json.loads(metadata.get("manifest", "null"))
        if isinstance(found, dict) and (path.parent / str(found.get("student"))).is_file():
            read_student(path)
            return found
    except (ValueError, CheckpointError):
        pass
    return None


def save_checkpoint(
    folder: Path, iteration: int, checkpoint: Checkpoint, student: nn.Module, state: dict[str, Any], *, keep: int
) -> None:
    """Everything that resuming needs, as checkpoint-<iteration>/.

    `state` is what torch.save takes and weights_only loading gives back. Of this training's checkpoints the
    last `keep` stay; those of another config are left alone. Raises: CacheWriteFailed.
    """
    final = folder / f"checkpoint-{iteration:06d}"
    partial = folder / f".{final.name}.partial"
    for left in {partial, *folder.glob(".checkpoint-*.partial")}:  # of a training that was killed here
        remove(left)
    try:
        save_student(partial / "student.safetensors", student, checkpoint)
        with whole_file(partial / "state.pt") as file:
            torch.save({"iteration": iteration, **state}, file)
        seal = {"fingerprint": checkpoint.identity, "files": {n: _digest(partial / n) for n in SEALED}}
        write_text(partial / SEAL, json.dumps(seal, indent=2) + "\n")
        remove(final)
        with writing(final):
            partial.rename(final)
            sync_folder(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk gets its room back
        raise
    own = [path for path in _checkpoints(folder) if _seal(path).get("fingerprint") == checkpoint.identity]
    for old in own[:-keep]:
        remove(old)


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders, oldest iteration first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.partition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def _seal(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; nothing when that can't be read."""
    try:
        found = parsed((path / SEAL).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if misfit(found, {"fingerprint": str, "files": {str: str}}) is None else {}


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
    """Restores the student in place; returns the state that was saved, with its iteration.

    Raises: CheckpointError when the weights don't fit, since the net has changed.
    """
    with safe_open(path / "student.safetensors", "pt") as file:
        origin = json.loads((file.metadata() or {}).get(ORIGIN, "{}"))
        tensors = {k.removeprefix("student."): file.get_tensor(k) for k in file.keys() if k.startswith("student.")}  # noqa: SIM118
    if isinstance(student, DenseStudent) and origin != student.origin:
        say(f"train: {path}: the code, the package or the config that its net is built from has changed since")
    try:
        student.load_state_dict(tensors)
    except RuntimeError as error:  # torch lists names and shapes that are missing, or too many
        raise CheckpointError(f"{path}: its weights don't fit the student: {_line(error)}") from None
    return dict(torch.load(path / "state.pt", map_location="cpu", weights_only=True))


def student_file(run: Path) -> Path:
    """The student of a run folder, a train folder, a checkpoint folder or a file.

    Of a finished training it is the one that eval takes, which with held-out images is the best and not the last.
    """
    for folder in (run / "train", run):
        manifest = read_manifest(folder / "train.manifest.json", {"student": str}) or {}
        if (chosen := manifest.get("student")) in (LAST, BEST):
            if not (folder / chosen).is_file():
                raise CheckpointError(
                    f"{folder / chosen}: is gone. Run `cli.py train` again: it goes on from the last checkpoint."
                )
            return folder / chosen
    owner = run / "train" / OWNER
    own = owner.read_text(encoding="utf-8", errors="replace") if owner.is_file() else None
    checkpoints = [p for p in _checkpoints(run / "train") if own in (None, _seal(p).get("fingerprint"))]
    choices = [run / "train" / LAST, run / LAST, *(path / LAST for path in reversed(checkpoints))]
    for path in [run, *choices]:
        if path.is_file():
            return path
    raise CheckpointError(f"{run}: no trained student in it. Run `cli.py train` first, or name another run folder.")


def manifest_of(file: Path) -> dict[str, Any] | None:
    """The manifest of the training that a student file of a `train` folder ended; None for any other file."""
    found = read_manifest(file.parent / "train.manifest.json")
    return found if found and found.get("student") == file.name else None


def load_student(path: Path) -> tuple[DenseStudent, Checkpoint]:
    """A student in eval mode with its class names and text features, from the file alone.

    Raises: CheckpointError for a file that isn't what was written, isn't what its training's manifest says, or holds
    numbers that aren't finite.
    """
    metadata, tensors = read_student(path)
    expected = manifest_of(path)
    if expected is not None and metadata.get("fingerprint") != expected.get("fingerprint"):
        raise CheckpointError(
            f"{path}: is of training {metadata.get('fingerprint')}, its manifest speaks of "
            f"{expected.get('fingerprint')}. Put the right file back, or delete this one and run `cli.py train` again."
        )
    try:
        raw, classes, unseen = (json.loads(metadata[key]) for key in ("config", "classes", "unseen"))
        origin = dict(json.loads(metadata.get(ORIGIN, "{}")))
        cache, revision = (json.loads(metadata.get(key, "null")) for key in ("cache", "revision"))
        config, text = from_mapping(raw, where=str(path)).made_in(_made_in(path)), tensors.pop(TEXT)
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise CheckpointError(f"{path}: not a student of this project: {_line(error)}") from None
    is_named = all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in (classes, unseen)
    )
    if not is_named or text.ndim != 2 or len(text) != len(classes) or not {*unseen} <= {*classes}:
        raise CheckpointError(f"{path}: its class names and its table of text features don't belong together.")
    side = config.teacher.image_size
    student = build_student(config.student, text.shape[1], side=side, pretrained=False, origin=origin)
    for note in student.notes:
        say(f"{path}: {note}")
    try:
        student.load_state_dict({name.removeprefix("student."): value for name, value in tensors.items()})
    except RuntimeError as error:  # torch lists names and shapes that are missing, or too many
        made = f" (saved with transformers {origin['transformers']})" if "transformers" in origin else ""
        raise CheckpointError(f"{path}: its weights don't fit {config.student.arch}{made}: {_line(error)}") from None
    identity = str(metadata.get("fingerprint", ""))
    checkpoint = Checkpoint(config, identity, tuple(classes), tuple(unseen), text, cache=cache, revision=revision)
    return student.eval(), checkpoint


def _made_in(path: Path) -> Path | None:
    """Where the run that a student file lies in was made; None for a file by itself."""
    folders = path.absolute().parents[:3]  # train/, a checkpoint in it, or the run folder
    return next((made_in(folder) for folder in folders if (folder / "config.yaml").is_file()), None)


def read_student(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a student file. Raises: CheckpointError for damage, and numbers that aren't finite."""
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a student of this project: {_line(error)}") from None
    if CONTENT in metadata and metadata[CONTENT] != content_digest(metadata, tensors):
        raise CheckpointError(
            f"{path}: is not what was written: its bytes have changed since. Put a sound copy back, or delete it and "
            "run `cli.py train` again: it goes on from the last checkpoint."
        )
    bad = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"{path}: {bad[0]} holds values that aren't finite ({len(bad)} of {len(tensors)} tensors). Train again, "
            "with a lower train.lr or train.precision fp32."
        )
    return metadata, tensors


def _line(error: Exception, most: int = 300) -> str:
    return " ".join(str(error).split())[:most]
