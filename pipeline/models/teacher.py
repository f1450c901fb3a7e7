"""The frozen CLIP: the only door to open_clip.

Axes: B images, S image side, h = w = S / patch token grid, C joint space, K classes.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.factory import resize_pos_embed
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.config import UserError
from pipeline.config.places import looked_in, where_is
from pipeline.models.weights import WeightsError, read_state

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Extra entries of OpenAI's own archives; open_clip drops them from TorchScript archives only.
OPENAI_ENTRIES = ("input_resolution", "context_length", "vocab_size")
TEXT_BATCH = 256
BRING_IT = "Put it there, or work in the folder that holds it."


class TeacherError(UserError):
    """The teacher can't be built as the config asks."""


@dataclass(eq=False)
class Teacher:
    """A CLIP in eval mode on one device, with what is needed to tell where its outputs came from."""

    model: Any
    tokenizer: Any
    image_size: int
    patch: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    dtype: torch.dtype
    provenance: dict[str, Any]

    @classmethod
    def load(
        cls,
        name: str,
        pretrained: str | None = None,
        *,
        image_size: int | None,
        quick_gelu: bool | None = None,
        precision: str = "fp32",
        device: str = "cpu",
        near: Path | None = None,
    ) -> Teacher:
        """Builds the model at `image_size` (None: its own), positions interpolated as open_clip does, weights checked.

        name: an open_clip model, `local-dir:folder` or `hf-hub:repo`; pretrained: a tag, a
        checkpoint file (safetensors, a state dict, or OpenAI's TorchScript archive) or None; near: where relative
        paths are looked for first, see pipeline/config/places.py.
        Raises: TeacherError for unknown names, missing or foreign weights, a QuickGELU mismatch, a
        side that is no multiple of the patch.
        """
        written = {"model": name, "pretrained": pretrained}
        name, pretrained = _located(name, pretrained, near)
        with _quiet():
            config, tag = _published(name, pretrained)
            _check_quick_gelu(name, pretrained, tag, bool(config.get("quick_gelu")), quick_gelu)
            path = _weights_file(name, pretrained, tag)
            try:
                model = open_clip.create_model(name, load_weights=False, force_image_size=image_size)
            except Exception as error:  # open_clip raises whatever its parts raise
                raise TeacherError(f"teacher.model {name!r}: {' '.join(str(error).split())[:300]}") from None
            _load_weights(model, path, quick_gelu)
        visual = model.visual
        if not hasattr(visual, "conv1") or getattr(visual, "proj", None) is None:
            raise TeacherError(
                f"teacher.model {name!r}: dense tokens need one of open_clip's own ViTs with a projection, "
                f"found {type(visual).__name__}."
            )
        visual.output_tokens = True
        patch = int(visual.patch_size[0])
        image_size = image_size or int(visual.image_size[0])
        if image_size % patch:
            raise TeacherError(f"teacher.image_size {image_size} is no multiple of the patch of {name!r}, {patch}.")
        preprocess = open_clip.get_model_preprocess_cfg(model)
        dtype = PRECISIONS[precision]
        model = model.eval().requires_grad_(False).to(device=device, dtype=dtype)
        return cls(
            model=model,
            tokenizer=_tokenizer(name, config),
            image_size=image_size,
            patch=patch,
            channels=int(visual.proj.shape[1]),
            mean=tuple(preprocess["mean"]),
            std=tuple(preprocess["std"]),
            device=torch.device(device),
            dtype=dtype,
            provenance={
                **written,
                "weights_sha256": weights_sha256(model),
                "quick_gelu": bool(config.get("quick_gelu")),
                "image_size": image_size,
                "patch": patch,
                "channels": int(visual.proj.shape[1]),
                "mean": [float(value) for value in preprocess["mean"]],
                "std": [float(value) for value in preprocess["std"]],
                "dense": "last block, ln_post, projection",
                "precision": precision,
                "open_clip": version("open_clip_torch"),
                "torch": version("torch"),
            },
        )

    @torch.inference_mode()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """CLS and dense tokens of a batch of views, neither normalised.

        Shapes: images (B, 3, S, S) uint8 RGB -> cls (B, C), tokens (B, h, w, C), in the teacher's dtype.
        Source: method section 2; the dense tokens take the CLS token's ln_post and projection.
        """
        mean = torch.tensor(self.mean, device=self.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=self.device).view(1, 3, 1, 1)
        pixels = (images.to(self.device).float() / 255 - mean) / std
        pooled, tokens = self.model.visual(pixels.to(self.dtype))  # (B, C), (B, h*w, width)
        side = self.image_size // self.patch
        dense = tokens @ self.model.visual.proj  # (B, h*w, C)
        return pooled, dense.reshape(len(images), side, side, -1)

    @torch.inference_mode()
    def encode_text(self, prompts: Sequence[Sequence[str]]) -> Tensor:
        """Class features: each prompt encoded, normalised, averaged over the class, normalised.

        Shapes: K lists of prompts -> (K, C) float32, unit norm, on the CPU.
        """
        flat = [prompt for group in prompts for prompt in group]
        parts = (self.tokenizer(flat[i : i + TEXT_BATCH]) for i in range(0, len(flat), TEXT_BATCH))
        encoded = [self.model.encode_text(part.to(self.device)).float() for part in parts]
        features = normalize(torch.cat(encoded), dim=1).cpu()
        means = torch.stack([part.mean(0) for part in features.split([len(group) for group in prompts])])
        return normalize(means, dim=1)


@dataclass(frozen=True)
class TeacherShape:
    """What a model's description says of it, weights unread; `weights` is their file, None if not on this machine."""

    channels: int
    patch: int
    width: int
    layers: int
    image_size: int
    weights: Path | None


def shape_of(name: str, pretrained: str | None, near: Path | None = None) -> TeacherShape:
    """The numbers that a run's cost follows from. Downloads nothing. Raises: TeacherError."""
    name, pretrained = _located(name, pretrained, near)
    with _quiet():
        config, tag = _published(name, pretrained)
        is_remote = bool(tag) or name.startswith("hf-hub:")
        weights = None if is_remote else _weights_file(name, pretrained, tag)
    vision = config["vision_cfg"]
    if not isinstance(vision.get("layers"), int) or "patch_size" not in vision:
        raise TeacherError(f"teacher.model {name!r}: dense tokens need one of open_clip's own ViTs.")
    numbers = {"channels": config["embed_dim"], "patch": vision["patch_size"]}
    numbers |= {"width": vision["width"], "layers": vision["layers"]}
    numbers["image_size"] = vision.get("image_size", 224)  # open_clip's default
    return TeacherShape(**{name: int(number) for name, number in numbers.items()}, weights=weights)


def weights_sha256(model: torch.nn.Module) -> str:
    """Hash of names, shapes and float32 values of all weights: independent of file format and device."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(f"{name}{tuple(value.shape)}".encode())
        total.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def _located(name: str, pretrained: str | None, near: Path | None) -> tuple[str, str | None]:
    """Both with the paths that they name where these are; a folder that is nowhere is an error, a tag stays a tag."""
    schema, _, folder = name.partition(":")
    if schema == "local-dir":
        if not (place := where_is(folder, near)).is_dir():
            raise TeacherError(f"teacher.model {name!r}: no such folder in {looked_in(near)}. {BRING_IT}")
        name = f"{schema}:{place}"
    if pretrained is not None and (place := where_is(pretrained, near)).is_file():
        pretrained = str(place)
    elif pretrained is not None and near is not None and Path(pretrained).suffix:  # a tag has no ending
        raise TeacherError(f"teacher.pretrained {pretrained!r}: no such file in {looked_in(near)}. {BRING_IT}")
    return name, pretrained


def _published(name: str, pretrained: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What open_clip knows of a model and of a tag of its weights. Raises: TeacherError for an unknown model."""
    schema, _, folder = name.partition(":")
    if schema == "local-dir" and not (Path(folder) / "open_clip_config.json").is_file():
        raise TeacherError(f"teacher.model {name!r}: {folder} holds no open_clip_config.json.")
    config = open_clip.factory.get_model_config(name.replace("/", "-") if ":" not in name else name)
    if config is None:
        near = ", ".join(difflib.get_close_matches(name, open_clip.list_models(), 3, 0.0))
        raise TeacherError(f"teacher.model {name!r}: open_clip knows no such model; near it are {near}.")
    return config, open_clip.get_pretrained_cfg(name.replace("/", "-"), pretrained) if pretrained else {}


def _weights_file(name: str, pretrained: str | None, tag: dict[str, Any]) -> Path:
    """The checkpoint file: the folder's own, the hub's, the tag's (both downloaded once), or the one named."""
    schema, _, place = name.partition(":")
    try:
        if schema == "local-dir":
            found = sorted(p for kind in ("*.safetensors", "*.bin", "*.pt", "*.pth") for p in Path(place).glob(kind))
            if not found:
                raise TeacherError(
                    f"teacher.model {name!r}: {place} holds no weights (.safetensors, .bin, .pt or .pth)."
                )
            return found[0]
        if schema == "hf-hub":
            return Path(open_clip.download_pretrained_from_hf(place))
        if tag:
            return Path(open_clip.download_pretrained(tag))
    except TeacherError:
        raise
    except Exception as error:  # whatever the hub's client raises without a network
        what = " ".join(str(error).split())[:200]
        raise TeacherError(
            f"teacher.model {name!r}, pretrained {pretrained!r}: the weights could not be downloaded ({what}). "
            "Offline, put a checkpoint file's path into teacher.pretrained."
        ) from None
    if pretrained is None:
        raise TeacherError(f"teacher.model {name!r} needs teacher.pretrained: a tag such as 'openai', or a file.")
    if not Path(pretrained).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise TeacherError(
            f"teacher.pretrained {pretrained!r}: no such file, and no tag of {name!r} (those are: {tags})."
        )
    return Path(pretrained)


def _check_quick_gelu(name: str, pretrained: str | None, tag: dict[str, Any], built: bool, stated: bool | None) -> None:
    """Weights trained with QuickGELU in a model with GELU run and are wrong: an error, not a warning."""
    is_file = pretrained is not None and not tag and Path(pretrained).is_file()
    if is_file and stated is None:
        raise TeacherError(
            f"teacher.pretrained {pretrained!r} is a file, which can't say its activation: set teacher.quick_gelu to "
            "true (OpenAI's weights and those trained as '-quickgelu') or false."
        )
    wanted = stated if stated is not None else bool(tag.get("quick_gelu")) if tag else None
    if wanted is not None and wanted != built:
        twin = f"{name}-quickgelu" if wanted else name.replace("-quickgelu", "")
        raise TeacherError(
            f"teacher.model {name!r} has {'QuickGELU' if built else 'GELU'}, the weights {pretrained!r} want "
            f"{'QuickGELU' if wanted else 'GELU'}: name the model {twin!r}."
        )


def _load_weights(model: torch.nn.Module, path: Path, quick_gelu: bool | None) -> None:
    """Loads a checkpoint file, told apart by its content: safetensors, TorchScript archive, state dict.

    Nothing in the file is run, see pipeline/models/weights.py.
    """
    try:
        state = read_state(path)
    except WeightsError as error:
        raise TeacherError(f"teacher.pretrained {str(path)!r}: {error}") from None
    is_openai = any(entry in state for entry in OPENAI_ENTRIES)
    if is_openai and quick_gelu is False:
        raise TeacherError(f"teacher.pretrained {str(path)!r} is in OpenAI's layout: its weights want QuickGELU.")
    for entry in OPENAI_ENTRIES:
        state.pop(entry, None)
    # Positions are interpolated in float32: torch can't in half precision, in which OpenAI's weights come.
    state = {key: value.float() for key, value in state.items()}
    try:
        state = convert_state_dict(model, state)
        resize_pos_embed(state, model)
        model.load_state_dict(state, strict=True)
    except Exception as error:  # open_clip's converters look into whatever a name reminds them of
        what = " ".join(str(error).split())[:300]
        raise TeacherError(f"teacher.pretrained {str(path)!r} does not fit the model: {what}") from None
    wrong = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if wrong:
        raise TeacherError(
            f"teacher.pretrained {str(path)!r}: {wrong[0]} holds numbers that are not finite "
            f"({len(wrong)} tensors do). The file is damaged, or its training diverged: take another."
        )


def _tokenizer(name: str, config: dict[str, Any]) -> Any:
    """open_clip's tokenizer; a local-dir: model may bring its own byte-pair merges as bpe.txt.gz."""
    schema, _, folder = name.partition(":")
    merges = Path(folder) / "bpe.txt.gz"
    if schema == "local-dir" and merges.is_file():
        context = config.get("text_cfg", {}).get("context_length", 77)
        return open_clip.SimpleTokenizer(bpe_path=str(merges), context_length=context)
    return open_clip.get_tokenizer(name)


class _quiet(warnings.catch_warnings):
    """open_clip logs each step of building to the root logger; errors still reach the user."""

    def __enter__(self) -> Any:
        self._level = logging.getLogger().level
        logging.getLogger().setLevel(logging.ERROR)
        entered = super().__enter__()
        warnings.simplefilter("ignore")
        return entered

    def __exit__(self, *details: Any) -> None:
        logging.getLogger().setLevel(self._level)
        super().__exit__(*details)
