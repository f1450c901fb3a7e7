"""Checkpoints: weights in safetensors with the config inside, training state beside them.

`checkpoint-000400/` holds student.safetensors and state.pt; it appears whole or not at all (written
beside, then renamed). student.safetensors alone is what eval, predict and export need: config, class
names, unseen names and the text table of all classes travel in it.
"""

from __future__ import annotations

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

from pipeline.config import Config, UserError, from_mapping
from pipeline.models.student import DenseStudent, build_student

TEXT = "text"  # name of the text table among the student's tensors


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
    vla: nn.Module,
    bank: nn.Module,
    optimiser: Any,
    *,
    keep: int,
) -> None:
    """Everything that resuming needs, as checkpoint-<iteration>/; older ones beyond `keep` are removed."""
    final = folder / f"checkpoint-{iteration:06d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_student(partial / "student.safetensors", student, checkpoint)
    state = {"iteration": iteration, "vla": vla.state_dict(), "bank": bank.state_dict()}
    state |= {"optimiser": optimiser.state_dict(), "torch_rng": torch.get_rng_state()}
    torch.save(state, partial / "state.pt")
    _sync(partial / "state.pt")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync(folder)
    for old in sorted(folder.glob("checkpoint-*"))[:-keep]:
        shutil.rmtree(old)


def latest_checkpoint(folder: Path, identity: str) -> Path | None:
    """The newest checkpoint of this very training; those of another config are left alone."""
    for path in sorted(folder.glob("checkpoint-*"), reverse=True):
        try:
            with safe_open(path / "student.safetensors", "pt") as file:
                if (file.metadata() or {}).get("fingerprint") == identity and (path / "state.pt").is_file():
                    return path
        except (OSError, SafetensorError):
            continue
    return None


def load_state(path: Path, student: nn.Module, vla: nn.Module, bank: nn.Module, optimiser: Any) -> int:
    """Restores a checkpoint in place; returns the iteration to go on from."""
    with safe_open(path / "student.safetensors", "pt") as file:
        student.load_state_dict(
            {k.removeprefix("student."): file.get_tensor(k) for k in file.keys() if k.startswith("student.")}  # noqa: SIM118
        )
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    vla.load_state_dict(state["vla"])
    bank.load_state_dict(state["bank"])
    optimiser.load_state_dict(state["optimiser"])
    torch.set_rng_state(state["torch_rng"])
    return int(state["iteration"])


def student_file(run: Path) -> Path:
    """The student of a run folder, a train folder, a checkpoint folder or a file."""
    choices = [run / "train" / "student.safetensors", run / "student.safetensors"]
    choices += sorted((run / "train").glob("checkpoint-*/student.safetensors"), reverse=True)
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
    student = build_student(config.student, text.shape[1], pretrained=False)
    student.load_state_dict({name.removeprefix("student."): value for name, value in tensors.items()})
    checkpoint = Checkpoint(config, metadata.get("fingerprint", ""), tuple(classes), tuple(unseen), text)
    return student.eval(), checkpoint


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
