"""The door to open_clip: what a model's name stands for, where its weights lie, how it is built and filled.

A name is one of open_clip's own, a folder (`local-dir:`, a snapshot of the hub by open_clip or by transformers) or a
repository of the hub (`hf-hub:`). open_clip's own factory isn't used: it downloads, and loads weights less strictly.
"""

from __future__ import annotations

import copy
import difflib
import functools
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import timm
import torch
from open_clip import timm_model
from open_clip.convert import convert_state_dict
from open_clip.factory import resize_pos_embed
from open_clip.model import _build_vision_tower, convert_to_custom_text_state_dict
from torch import Tensor

from pipeline.config import digest
from pipeline.models.layouts import HALVES, OPENAI_MEAN_STD, described, from_transformers, is_transformers
from pipeline.models.towers import TeacherError, cost_on, no_dense_path, tower_of
from pipeline.models.weights import Stamps, WeightsError, files_of, read_state, stamps_of, weights_in

# Extra entries of OpenAI's own archives; open_clip drops them from TorchScript archives only.
OPENAI_ENTRIES = ("input_resolution", "context_length", "vocab_size")
POOL_POSITIONS = "visual.attnpool.positional_embedding"  # of CLIP's ResNets; open_clip interpolates ViTs' alone
# Of a folder: what a model is, how images are normalised, its words.
DESCRIBING = ("open_clip_config.json", "config.json", "preprocessor_config.json", "bpe.txt.gz")
KINDS = "(.safetensors, .bin, .pt or .pth)"


@dataclass(frozen=True)
class Description:
    """A model before it is built: open_clip's model_cfg, more arguments of timm's trunk, how images are normalised."""

    name: str
    config: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    trunk: dict[str, Any] = field(default_factory=dict)

    @property
    def own_size(self) -> int:
        """Pixels of the side that the model was made for."""
        size = self.config["vision_cfg"].get("image_size", 224)  # open_clip's default
        return int(size if isinstance(size, int) else size[0])

    @property
    def is_timm(self) -> bool:
        return bool(self.config["vision_cfg"].get("timm_model_name"))

    @property
    def quick_gelu(self) -> bool:
        return bool(self.config.get("quick_gelu"))


@dataclass(frozen=True)
class Seen:
    """What an image tower makes of images of one size, found without its weights; flops are of one image."""

    patch: int
    channels: int
    can_explain: bool
    flops: float


# ---- what a name stands for ------------------------------------------------------------------------


def describe(name: str, pretrained: str | None, output_stride: int | None) -> Description:
    """The model that a config asks for. Of the hub, its description is downloaded. Raises: TeacherError."""
    schema, _, place = name.partition(":")
    trunk: dict[str, Any] = {}
    if schema in ("local-dir", "hf-hub"):
        folder = Path(place) if schema == "local-dir" else _hub_file(name, "open_clip_config.json").parent
        try:
            config, trunk, (mean, std) = _described_in(folder)
            _refuse_odd_colours(mean, std)
        except (ValueError, TypeError, AttributeError, KeyError, OSError, ZeroDivisionError) as error:
            if isinstance(error, TeacherError):
                raise
            raise TeacherError(
                f"teacher.model {name!r}: its description can't be understood ({_line(error, 200)})."
            ) from None
    else:
        config = open_clip.get_model_config(name.replace("/", "-"))
        if config is None:
            near = ", ".join(difflib.get_close_matches(name, open_clip.list_models(), 3, 0.0))
            raise TeacherError(f"teacher.model {name!r}: open_clip knows no such model; near it are {near}.")
        mean, std = _published_normalisation(name, pretrained)
    if output_stride is not None:
        if not config["vision_cfg"].get("timm_model_name"):
            raise TeacherError(
                f"teacher.output_stride is an option of timm's CNNs, and {name!r} is none: leave it out."
            )
        trunk = trunk | {"output_stride": output_stride}
    return Description(name, config, tuple(mean), tuple(std), trunk)


def _described_in(folder: Path) -> tuple[dict[str, Any], dict[str, Any], tuple[Any, Any]]:
    """open_clip's model_cfg, arguments of the trunk, mean and std of a folder. Raises: TeacherError, ValueError."""
    own, other = folder / "open_clip_config.json", folder / "config.json"
    if own.is_file():
        read = json.loads(own.read_text(encoding="utf-8"))
        config, preprocess = read.get("model_cfg", read), read.get("preprocess_cfg") or {}
        if (
            not all(isinstance(config.get(key), dict) for key in ("vision_cfg", "text_cfg"))
            or "embed_dim" not in config
        ):
            raise ValueError("open_clip_config.json lacks embed_dim, vision_cfg or text_cfg")
        mean, std = OPENAI_MEAN_STD
        return config, {}, (preprocess.get("mean") or mean, preprocess.get("std") or std)
    if not other.is_file():
        raise TeacherError(
            f"teacher.model 'local-dir:{folder}': {folder} holds no open_clip_config.json, and no config.json of "
            "transformers."
        )
    config, trunk = described(json.loads(other.read_text(encoding="utf-8")))
    processor = folder / "preprocessor_config.json"
    read = json.loads(processor.read_text(encoding="utf-8")) if processor.is_file() else {}
    mean, std = HALVES if trunk else OPENAI_MEAN_STD
    return config, trunk, (read.get("image_mean") or mean, read.get("image_std") or std)


def _refuse_odd_colours(mean: Any, std: Any) -> None:
    """Raises: ValueError for what images of 0 to 1 can't be normalised with; some write it for 0 to 255."""
    for what, values, least in (("mean", mean, 0.0), ("std", std, 1e-6)):
        numbers = values if isinstance(values, list | tuple) else ()
        if len(numbers) != 3 or not all(isinstance(n, int | float) and least <= n <= 1 for n in numbers):
            raise ValueError(f"{what} is {values!r}, want three numbers from 0 to 1{', not 0' if least else ''}")


def _published_normalisation(name: str, pretrained: str | None) -> tuple[Any, Any]:
    """Mean and std of a tag; of a file those that all tags of the model share, since a file can't say."""
    tag = _tag(name, pretrained)
    cleaned = name.replace("/", "-")
    tags = [tag] if tag else [_tag(name, other) for other in open_clip.list_pretrained_tags_by_model(cleaned)]
    shared = {(tuple(each["mean"]), tuple(each["std"])) for each in tags}
    return shared.pop() if len(shared) == 1 else OPENAI_MEAN_STD


def unlike_openai(name: str, pretrained: str | None) -> list[list[float]] | None:
    """Mean and std of one of open_clip's names where they aren't OpenAI's: older caches took these for all of them."""
    if ":" in name:
        return None
    mean, std = _published_normalisation(name, pretrained)
    return None if (tuple(mean), tuple(std)) == OPENAI_MEAN_STD else [list(mean), list(std)]


def description_of(name: str) -> str | None:
    """Digest of what a folder says of its model beside the weights; None for a name, whose description is fixed.

    Raises: TeacherError.
    """
    if not name.startswith("local-dir:"):
        return None
    found = describe(name, None, None)
    return digest([found.config, repr(sorted(found.trunk.items())), list(found.mean), list(found.std)])


def _tag(name: str, pretrained: str | None) -> dict[str, Any]:
    """What open_clip knows of weights that it downloads by a tag; {} for a file."""
    return open_clip.get_pretrained_cfg(name.replace("/", "-"), pretrained) if pretrained else {}


def is_tag(name: str, pretrained: str) -> bool:
    """Whether open_clip downloads weights of a model under this tag."""
    return bool(_tag(name, pretrained))


# ---- building ------------------------------------------------------------------------------------------


def build(found: Description, image_size: int, weights: Path, quick_gelu: bool | None) -> Any:
    """The model with its weights, in float32 on the CPU, for images of one size. Raises: TeacherError."""
    config = _sized(found, image_size)
    is_custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    config["text_cfg"]["hf_model_pretrained"] = False
    kind: Any = open_clip.CLIP
    if is_custom:
        kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    try:
        with quiet(), _trunk_arguments(found.trunk):
            model = kind(**config)
    except Exception as error:  # open_clip raises whatever its parts raise
        raise TeacherError(f"teacher.model {found.name!r}: {_line(error)}") from None
    with quiet():
        load_weights(model, weights, quick_gelu)
        _resize(found, model.visual, image_size)
    return model


def seen_by(found: Description, image_size: int, dense: str) -> Seen:
    """Runs the image tower without weights or arithmetic (torch's meta device), to see what it makes of an image.

    Raises: TeacherError for a tower that can't be built, can't take images of this size, or has no dense tokens.
    """
    config = _sized(found, image_size)
    try:
        with quiet(), _trunk_arguments(found.trunk), torch.device("meta"):
            visual = _build_vision_tower(config["embed_dim"], config["vision_cfg"], found.quick_gelu)
    except Exception as error:
        stride = found.trunk.get("output_stride")
        why = f" with teacher.output_stride {stride}, which is not for every tower of timm" if stride else ""
        raise TeacherError(f"teacher.model {found.name!r}{why}: {_line(error)}") from None
    tower = tower_of(visual.eval().requires_grad_(False), dense)
    size = max(image_size - image_size % tower.patch, tower.patch)  # a side that fits no token is said elsewhere
    with quiet():
        try:
            _resize(found, visual, size)
        except Exception as error:  # of timm's own
            raise no_dense_path(visual, f"at {size} x {size}: {_line(error, 120)}") from None
        channels, flops = cost_on(tower, visual, size)
    if channels != found.config["embed_dim"]:
        raise TeacherError(
            f"teacher.model {found.name!r}: its image tower gives {channels} numbers and its text tower "
            f"{found.config['embed_dim']}, so text can't be compared with images."
        )
    return Seen(tower.patch, channels, tower.can_explain, flops)


def _sized(found: Description, image_size: int) -> dict[str, Any]:
    """A copy of the model_cfg for images of one size; timm's towers are resized when their weights are loaded."""
    config = copy.deepcopy(found.config)
    if found.is_timm:
        config["vision_cfg"]["timm_model_pretrained"] = False
    else:
        config["vision_cfg"]["image_size"] = image_size
    return config


def _resize(found: Description, visual: Any, image_size: int) -> None:
    """timm's towers interpolate their positions themselves; those that have none take any size."""
    if found.is_timm and hasattr(visual.trunk, "set_input_size"):
        visual.set_input_size(image_size)


@contextmanager
def _trunk_arguments(arguments: Mapping[str, Any]) -> Iterator[None]:
    """While it holds, open_clip builds timm's models with these too: it has no key for them."""
    if not arguments:
        yield
        return
    try:
        timm_model.timm = SimpleNamespace(create_model=functools.partial(timm.create_model, **arguments))
        yield
    finally:
        timm_model.timm = timm


# ---- weights -------------------------------------------------------------------------------------------


def weights_file(name: str, pretrained: str | None) -> Path:
    """The checkpoint: the folder's own, the hub's, the tag's (both downloaded once), or the one named."""
    if (local := local_weights(name, pretrained)) is not None:
        return local
    try:
        if name.startswith("hf-hub:"):
            return Path(open_clip.factory.download_pretrained_from_hf(name.partition(":")[2]))
        return Path(open_clip.download_pretrained(_tag(name, pretrained)))
    except Exception as error:  # whatever the hub's client raises without a network
        raise TeacherError(
            f"teacher.model {name!r}, pretrained {pretrained!r}: the weights could not be downloaded "
            f"({_line(error, 200)}). Offline, put a checkpoint file's path into teacher.pretrained."
        ) from None


def _hub_file(name: str, file: str) -> Path:
    try:
        return Path(open_clip.factory.download_pretrained_from_hf(name.partition(":")[2], filename=file))
    except Exception as error:
        raise TeacherError(
            f"teacher.model {name!r}: {file} could not be downloaded ({_line(error, 200)}). Offline, download the "
            "repository elsewhere and name its folder: local-dir:folder."
        ) from None


def local_weights(name: str, pretrained: str | None) -> Path | None:
    """The checkpoint on this machine, None for one that is to be downloaded. Raises: TeacherError if it is missing."""
    schema, _, place = name.partition(":")
    if schema == "local-dir":
        if (found := weights_in(Path(place))) is None:
            raise TeacherError(f"teacher.model {name!r}: {place} holds no weights {KINDS}.")
        return found
    if schema == "hf-hub" or _tag(name, pretrained):
        return None
    if pretrained is None:
        raise TeacherError(f"teacher.model {name!r} needs teacher.pretrained: a tag such as 'openai', or a file.")
    path = Path(pretrained)
    if path.is_dir():
        if (found := weights_in(path)) is None:
            raise TeacherError(f"teacher.pretrained {pretrained!r}: the folder holds no weights {KINDS}.")
        return found
    if not path.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise TeacherError(
            f"teacher.pretrained {pretrained!r}: no such file, and no tag of {name!r} (those are: {tags})."
        )
    return path


def weights_files(name: str, pretrained: str | None) -> list[Path]:
    """The files on this machine that a teacher's weights are read from, apart from downloaded ones."""
    try:
        path = local_weights(name, pretrained)
        return [] if path is None else [part for part in files_of(path) if part.is_file()]
    except (TeacherError, WeightsError):  # said when they are read
        return []


def stamps_of_files(name: str, pretrained: str | None) -> Stamps:
    """Path, size and time of all files on this machine that a model is built and filled from."""
    schema, _, place = name.partition(":")
    own = [Path(place) / file for file in DESCRIBING] if schema == "local-dir" else []
    return stamps_of([*own, *weights_files(name, pretrained)])


def check_quick_gelu(found: Description, pretrained: str | None, stated: bool | None) -> None:
    """Weights trained with QuickGELU in a model with GELU run and are wrong: an error, not a warning."""
    name = found.name
    tag = _tag(name, pretrained)
    has_both = name.endswith("-quickgelu") or f"{name}-quickgelu" in open_clip.list_models()
    if pretrained is not None and not tag and Path(pretrained).exists() and stated is None and has_both:
        raise TeacherError(
            f"teacher.pretrained {pretrained!r} holds weights, which can't say their activation: set "
            "teacher.quick_gelu to true (OpenAI's weights and those trained as '-quickgelu') or false."
        )
    wanted = stated if stated is not None else bool(tag.get("quick_gelu")) if tag else None
    if wanted is not None and wanted != found.quick_gelu:
        has = f"teacher.model {name!r} has {'QuickGELU' if found.quick_gelu else 'GELU'}"
        if ":" in name:
            raise TeacherError(f"{has}, and teacher.quick_gelu is {str(wanted).lower()}: leave that key out.")
        twin = f"{name}-quickgelu" if wanted else name.replace("-quickgelu", "")
        raise TeacherError(
            f"{has}, the weights {pretrained!r} want {'QuickGELU' if wanted else 'GELU'}: name the model {twin!r}."
        )


def load_weights(model: Any, path: Path, quick_gelu: bool | None) -> None:
    """Loads a checkpoint, told apart by its content: safetensors, TorchScript archive, state dict; open_clip's names,
    OpenAI's, Apple's or transformers'.

    Nothing in the file is run, see pipeline/models/weights.py. Raises: TeacherError.
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
    state = {key: state[key].float() for key in state}
    try:
        state = _fitted(model, from_transformers(state) if is_transformers(state) else state)
        model.load_state_dict(state, strict=True)
    except Exception as error:  # converters look into whatever a name reminds them of
        raise TeacherError(f"teacher.pretrained {str(path)!r} does not fit the model: {_line(error)}") from None
    own = model.state_dict()
    wrong = [name for name in own if not own[name].isfinite().all()]
    if wrong:
        raise TeacherError(
            f"teacher.pretrained {str(path)!r}: {wrong[0]} holds numbers that are not finite "
            f"({len(wrong)} tensors do). The file is damaged, or its training diverged: take another."
        )


def _fitted(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As open_clip's loader has it: this model's names, positions at its size, scalars in its shape."""
    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        own = getattr(model, name, None)
        if own is not None and name in state:
            state[name] = state[name].reshape(own.shape)
    state.pop("text.transformer.embeddings.position_ids", None)
    resize_pos_embed(state, model)
    if POOL_POSITIONS in state and hasattr(model.visual, "attnpool"):
        grid = round((len(model.visual.attnpool.positional_embedding) - 1) ** 0.5)
        positions = {"visual.positional_embedding": state[POOL_POSITIONS]}
        resize_pos_embed(positions, SimpleNamespace(visual=SimpleNamespace(grid_size=(grid, grid))))
        state[POOL_POSITIONS] = positions["visual.positional_embedding"]
    return state


# ---- text ----------------------------------------------------------------------------------------------


def tokenizer_of(found: Description) -> Any:
    """open_clip's tokenizer; a folder may bring its own merges as bpe.txt.gz. Raises: TeacherError."""
    schema, _, folder = found.name.partition(":")
    text = found.config["text_cfg"]
    length, merges = text.get("context_length", 77), Path(folder) / "bpe.txt.gz"
    if schema == "local-dir" and merges.is_file():
        return open_clip.SimpleTokenizer(bpe_path=str(merges), context_length=length)
    try:
        with quiet():
            if schema == "local-dir" and not (Path(folder) / "open_clip_config.json").is_file():
                return _tokenizer_of_transformers(folder, text, length)
            return open_clip.get_tokenizer(found.name)
    except Exception as error:  # an import, a download, or whatever a tokenizer's files hold
        todo = "pip install transformers" if isinstance(error, ImportError) else "see docs/teachers.md"
        raise TeacherError(
            f"teacher.model {found.name!r}: its tokenizer can't be had ({_line(error, 200)}): {todo}, or give text "
            "features as a file by text.features."
        ) from None


def _tokenizer_of_transformers(folder: str, text: Mapping[str, Any], length: int) -> Any:
    """Of a snapshot by transformers: CLIP's words are open_clip's own, others lie in the folder."""
    is_siglip = bool(text.get("no_causal_mask"))
    if not is_siglip and text["vocab_size"] == 49408:
        return open_clip.SimpleTokenizer(context_length=length)
    clean = "canonicalize" if is_siglip else "whitespace"
    return open_clip.tokenizer.HFTokenizer(folder, context_length=length, clean=clean)


# ---- manners -------------------------------------------------------------------------------------------


def _line(error: Exception, most: int = 300) -> str:
    return " ".join(str(error).split())[:most] or type(error).__name__


class quiet(warnings.catch_warnings):
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
