"""Hugging Face's nets for semantic segmentation as students: the only door to transformers, which is an extra.

`hf:<folder>` is read offline, a config.json and safetensors beside it; any other `hf:<name>` is asked of the hub. Code
that comes with a model is never run. A saved student carries the config, and needs neither folder nor hub again.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import Student, UserError
from pipeline.models.dense import DenseStudent, StudentError, parts_of, said, start_head
from pipeline.models.published import Match, check_share, line, read_state

GIVEN = ("num_labels", "id2label", "label2id", "model_type", "architectures")  # no options: they follow from the rest
LABELS = ("id2label", "label2id")  # of a config, two names a channel: left out of what is saved


class HuggingFaceNet(nn.Module):
    """A model of transformers, up to its classifier where the model itself enlarges what that gives.

    Shapes: images (B, 3, S, S) -> (B, C, S/s, S/s).
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.is_upernet = model.config.model_type == "upernet"
        if model.config.model_type == "dpt":
            model.head.head[-1] = nn.Identity()  # twice as large, without a parameter

    def forward(self, images: Tensor) -> Tensor:
        if self.is_upernet:  # its own forward enlarges to the image
            return self.model.decode_head(self.model.backbone(images).feature_maps)
        return self.model(pixel_values=images).logits


def huggingface_student(section: Student, channels: int, pretrained: bool, origin: dict[str, Any]) -> DenseStudent:
    """Builds the model with a classifier of C channels. `origin`: what a saved student carries of it.

    With weights of the folder, of student.weights, or with encoder_weights null none.
    Raises: StudentError when transformers, the config, its model or the weights can't be had, or for an option that
    the config doesn't know.
    """
    transformers = _transformers()
    name = os.path.expanduser(section.arch.partition(":")[2])
    config = _config(transformers, section, name, channels, origin)
    cls = _class(transformers, section, config)
    notes: list[str] = []
    try:
        last = _channel_tensors(cls, config)
        if pretrained and section.weights is not None:
            what = f"student.weights {section.weights} into {section.arch}"
            found = _from(cls, config, None, state_dict=read_state(section.weights))
        elif pretrained and section.encoder_weights is not None:
            _check_weights(section, name)
            what = section.arch
            found = _from(cls, config, name, use_safetensors=True, local_files_only=Path(name).is_dir())
        else:
            what, found = "", (cls(config).float(), None)
    except UserError:
        raise
    except Exception as error:  # transformers, the hub and torch each raise their own
        raise StudentError(f"student.arch {section.arch}: {said(error)}.") from None
    model, told = found
    net = HuggingFaceNet(model)
    parts = parts_of(net, section, ("backbone", model.base_model_prefix), "model.")
    if told is not None:
        notes.append(_checked(model, told, [part.removeprefix("model.") for part in parts], what))
        notes += _normalised(section, name)
    for tensor in last:
        if tensor.endswith(".weight"):
            start_head(model.get_submodule(tensor.removesuffix(".weight")))
    student = DenseStudent(
        net,
        section.mean,
        section.std,
        encoder_parts=parts,
        origin={"transformers": transformers.__version__, "config": _saved(config)},
        is_foreign=True,
    )
    student.notes += notes
    return student


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError(
            "student.arch hf: needs the package transformers, an extra: pip install -e '.[hf]' in the checkout."
        ) from None
    transformers.utils.logging.set_verbosity_error()  # what was loaded is said by us
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each of five tries; the last one's error is ours
    return transformers


def _config(transformers: Any, section: Student, name: str, channels: int, origin: dict[str, Any]) -> Any:
    """The model's config with C labels, without an auxiliary head, and with student.options in it."""
    what = f"student.arch {section.arch}"
    try:
        if "config" in origin:
            found = dict(origin["config"])
            config = transformers.AutoConfig.for_model(found.pop("model_type"), **found)
        else:
            _check_folder(what, name)
            is_local = Path(name).is_dir()
            config = transformers.AutoConfig.from_pretrained(name, local_files_only=is_local, trust_remote_code=False)
            _check_options(section, config)
            config = type(config).from_dict(config.to_dict() | section.options)
        config.num_labels = channels
        config.dtype = torch.float32
        for key in ("use_auxiliary_head", "use_pretrained_backbone"):
            if getattr(config, key, False):
                setattr(config, key, False)
    except UserError:
        raise
    except Exception as error:
        where = (
            "" if Path(name).is_dir() or "config" in origin else "is no folder here, and can't be had from the hub: "
        )
        raise StudentError(f"{what}: {where}{said(error)}.") from None
    return config


def _check_folder(what: str, name: str) -> None:
    """Raises: StudentError for a folder without a config, or a path where no folder is."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise StudentError(
            f"{what}: {name} has no config.json. Name a folder that save_pretrained, or the hub, has made."
        )
    if not path.is_dir() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1 or path.exists()):
        raise StudentError(f"{what}: there is no folder {name}.")


def _check_options(section: Student, config: Any) -> None:
    for option in section.options:
        if option in GIVEN:
            raise StudentError(f"student.options {option}: follows from the rest. Leave it out.")
        if not hasattr(config, option):
            near = difflib.get_close_matches(option, config.to_dict(), 1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise StudentError(
                f"student.options {option}: {type(config).__name__} of {section.arch} has no such key{hint}."
            )


def _class(transformers: Any, section: Student, config: Any) -> Any:
    known = transformers.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING
    if type(config) not in known:
        kinds = sorted(each.model_type for each in known)
        raise StudentError(
            f"student.arch {section.arch}: transformers has no semantic segmentation of model_type "
            f"{config.model_type!r}; want one of {', '.join(kinds)}."
        )
    return known[type(config)]


def _channel_tensors(cls: Any, config: Any) -> list[str]:
    """The tensors whose shape follows the number of labels: what the classifier is."""
    shapes = []
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        for more in (0, 1):
            other = type(config).from_dict(config.to_dict())
            other.num_labels = config.num_labels + more
            shapes.append({name: value.shape for name, value in cls(other).state_dict().items()})
    return [name for name, shape in shapes[0].items() if shapes[1][name] != shape]


def _from(cls: Any, config: Any, name: str | None, **where: Any) -> tuple[Any, Any]:
    """A model with weights, and what transformers tells of them: names missing, unexpected and of another shape."""
    return cls.from_pretrained(
        name, config=config, output_loading_info=True, ignore_mismatched_sizes=True, dtype=torch.float32, **where
    )


def _check_weights(section: Student, name: str) -> None:
    """Raises: StudentError for a folder without weights in safetensors; pickles aren't loaded."""
    path = Path(name)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        has = "; its pytorch_model.bin is a pickle" if (path / "pytorch_model.bin").is_file() else ""
        raise StudentError(
            f"student.arch {section.arch}: no *.safetensors in {name}{has}. Set student.encoder_weights to null, which "
            "trains from scratch, or student.weights to a file."
        )


def _checked(model: Any, told: Any, parts: list[str], what: str) -> str:
    """What was loaded, on one line. Raises: StudentError when it is less than half of the encoder."""
    own = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    misshapen = [each[0] if isinstance(each, tuple) else each for each in told["mismatched_keys"]]
    missing = [name for name in own if name in told["missing_keys"] and name not in misshapen]
    pairs = {name: name for name in own if name not in {*missing, *misshapen}}
    wanted = [name for name in own if any(name.startswith(f"{part}.") for part in parts)] or list(own)
    left_out = sorted(told["unexpected_keys"])
    check_share(own, wanted, Match(pairs, misshapen, left_out), left_out, what)
    inside = sum(name in pairs for name in wanted)
    return line(what, inside, len(wanted), len(pairs) - inside, left_out, missing, misshapen)


def _normalised(section: Student, name: str) -> list[str]:
    """A line where the folder says that its images were normalised otherwise."""
    path = Path(name) / "preprocessor_config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        mean, std = (tuple(map(float, found[key])) for key in ("image_mean", "image_std"))
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if (mean, std) == (section.mean, section.std):
        return []
    return [f"{path}: images were normalised with mean {list(mean)}, std {list(std)}; student.mean and std differ"]


def _saved(config: Any) -> dict[str, Any]:
    """The config as plain values."""
    found = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in found.items() if key not in LABELS}
