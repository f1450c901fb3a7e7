"""The model that clustering alone may have: any of timm's that makes a square grid, with its own normalisation.

It sees the same boxes of an image as the teacher, at a size at which its tokens lie where the teacher's do: h tokens a
side of p pixels are a view of h p pixels (32 x 32 tokens of DINOv2's 14 pixels: 448, beside CLIP's 512). So no token is
ever interpolated.

Axes: h = w the teacher's token grid, C_c channels of this model.
"""

from __future__ import annotations

import difflib
import io
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor

from pipeline.config import Cluster
from pipeline.config.places import looked_in, where_is
from pipeline.models.clip import quiet
from pipeline.models.teacher import PRECISIONS, Encoder, weights_sha256
from pipeline.models.towers import FeatureTower, TeacherError, cost_on
from pipeline.models.weights import (
    ENDINGS,
    Stamps,
    WeightsError,
    file_digest,
    files_of,
    read_state,
    stamps_of,
    weights_in,
)


@dataclass(frozen=True)
class SecondShape:
    """What it makes of the teacher's grid, weights unread; flops: of a view, multiply-adds as two."""

    channels: int
    patch: int
    image_size: int
    weights: Path | None  # None: timm downloads them
    flops: float


def second_shape(section: Cluster, side: int) -> SecondShape:
    """The numbers that its cost follows from, for side x side tokens. Downloads nothing. Raises: TeacherError."""
    weights = second_weights(section)
    with quiet(), torch.device("meta"):
        model = _built(section)
        try:
            tower = FeatureTower(model)
            size = side * tower.patch
            _resize(model, size)
            channels, flops = cost_on(tower, model, size)
        except TeacherError as error:
            raise TeacherError(f"cluster.teacher {section.teacher!r}: {error}") from None
    return SecondShape(channels, tower.patch, size, weights, flops)


def second_encoder(section: Cluster, side: int, *, precision: str, device: str) -> Encoder:
    """The model of `cluster.teacher` for side x side tokens, with its weights. Raises: TeacherError."""
    shape = second_shape(section, side)
    with quiet():
        model = _built(section, is_downloaded=shape.weights is None)
        if shape.weights is not None:
            _load(section, model, shape.weights)
        _resize(model, shape.image_size)
    found, dtype = resolve_model_data_config(model), PRECISIONS[precision]
    wrong = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if wrong:
        raise TeacherError(f"{_named(section)}: {wrong[0]} holds numbers that are not finite; the file is damaged.")
    model = model.to(device=device, dtype=dtype)
    return Encoder(
        tower=FeatureTower(model),
        image_size=shape.image_size,
        channels=shape.channels,
        mean=tuple(map(float, found["mean"])),
        std=tuple(map(float, found["std"])),
        device=torch.device(device),
        dtype=dtype,
        provenance={
            "model": section.teacher,
            "weights": section.teacher_weights,
            "weights_sha256": weights_sha256(model),
            "image_size": shape.image_size,
            "patch": shape.patch,
            "channels": shape.channels,
            "mean": [float(value) for value in found["mean"]],
            "std": [float(value) for value in found["std"]],
            "dense": FeatureTower.described,
            "precision": precision,
            "timm": version("timm"),
        },
    )


def second_weights(section: Cluster) -> Path | None:
    """Its checkpoint on this machine; None for one that timm downloads. Raises: TeacherError if it is missing."""
    if section.teacher_weights is None:
        return None
    path = where_is(section.teacher_weights, section.near)
    found = weights_in(path) if path.is_dir() else path
    if found is None or not found.is_file():
        missing = f"no such file in {looked_in(section.near)}"
        what = f"the folder holds no weights ({', '.join(ENDINGS)})" if path.is_dir() else missing
        raise TeacherError(f"cluster.teacher_weights {section.teacher_weights!r}: {what}.")
    return found


def second_stamps(section: Cluster) -> Stamps:
    """Path, size and time of the files that it is loaded from. Raises: TeacherError for a missing one."""
    path = second_weights(section)
    try:
        return () if path is None else stamps_of(files_of(path))
    except WeightsError:  # said when it is read
        return ()


def second_digests(section: Cluster) -> list[str]:
    """SHA-256 of each file on this machine that it is read from, sorted. Raises: TeacherError for a missing one."""
    path = second_weights(section)
    try:
        return [] if path is None else sorted(file_digest(part) for part in files_of(path) if part.is_file())
    except WeightsError as error:
        raise TeacherError(f"cluster.teacher_weights {str(path)!r}: {error}") from None


def _named(section: Cluster) -> str:
    weights = "" if section.teacher_weights is None else f", cluster.teacher_weights {section.teacher_weights!r}"
    return f"cluster.teacher {section.teacher!r}{weights}"


@contextmanager
def _in_a_line(section: Cluster, todo: str = "") -> Iterator[None]:
    """Whatever timm raises, as an error of the config."""
    try:
        yield
    except TeacherError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise TeacherError(f"{_named(section)}: {said}{todo}") from None


def _built(section: Cluster, *, is_downloaded: bool = False) -> Any:
    """The model without a classifier, in eval mode."""
    name = str(section.teacher).partition(":")[2]
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), 3, 0.0))
        raise TeacherError(f"cluster.teacher {section.teacher!r}: timm knows no such model; near it are {near}.")
    offline = ". Offline, download its weights elsewhere and name their file by cluster.teacher_weights."
    with _in_a_line(section, offline if is_downloaded else ""):
        return timm.create_model(name, pretrained=is_downloaded, num_classes=0).eval().requires_grad_(False)


def _resize(model: Any, size: int) -> None:
    """ViTs interpolate their positions; what has none takes any size."""
    if hasattr(model, "set_input_size"):
        try:
            model.set_input_size(img_size=(size, size))
        except Exception as error:  # of timm's own
            raise TeacherError(f"it can't be made for {size} x {size}: {' '.join(str(error).split())[:200]}") from None


def _load(section: Cluster, model: Any, path: Path) -> None:
    """Fills a model from a checkpoint as timm or its authors publish it: every tensor of it, a classifier left out."""
    try:
        state = read_state(path)
    except WeightsError as error:
        raise TeacherError(f"cluster.teacher_weights {str(path)!r}: {error}") from None
    renamed = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    with _in_a_line(section), redirect_stdout(io.StringIO()):  # timm prints what it tries
        state = renamed(state, model) if renamed else state
        _refuse_misfits(section, model, state)
        model.load_state_dict(state, strict=False)


def _refuse_misfits(section: Cluster, model: Any, state: Mapping[str, Tensor]) -> None:
    """Raises: TeacherError where a tensor is missing, of another shape, or of a model that is larger than this one."""
    own = model.state_dict()
    classifier = model.pretrained_cfg.get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    # `head.fc` has siblings too: a norm, say, that only what is left out needs.
    left_out = tuple(f"{name.partition('.')[0]}." for name in names)
    faults = {
        "lacks": [name for name in own if name not in state],
        "has another shape of": [name for name in own if name in state and own[name].shape != state[name].shape],
        "also holds": [name for name in state if name not in own and not name.startswith(left_out)],
    }
    said = [f"{what} {names[0]} ({len(names)} tensors)" for what, names in faults.items() if names]
    if said:
        raise TeacherError(f"{_named(section)}: the checkpoint doesn't fit the model: it {', '.join(said)}.")
