"""The tensors of a checkpoint file, whoever wrote it: safetensors, torch's own files, TorchScript archives.

Nothing that a file brings along is run. torch's safe loader takes tensors and plain containers alone. A TorchScript
archive is a zip of a pickle, of raw tensors and of code; torch.jit.load would run its code, so the pickle is read here
with an unpickler that makes inert records of everything but tensors, and the code is only searched for the names of
parameters and buffers.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.config import UserError

# Where training scripts put the state dict of what they save beside it.
WRAPPERS = ("state_dict", "model_state_dict", "model")
# What wrapping a model puts before each name: DistributedDataParallel, torch.compile, Lightning.
PREFIXES = ("module.", "_orig_mod.", "model.")
DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# An archive's pickle holds names and shapes alone: OpenAI's ViT-L/14 has 0.1 MB of it. Modules nest ten deep there.
MOST_PICKLED = 64 * 2**20
DEEPEST = 100
LISTED = 8  # keys that an error names
INDEX = ".index.json"  # of a checkpoint in several files: which of them holds which tensor
# What a folder of the hub is read from, the first that it has: open_clip's own files before transformers'.
PREFERRED = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    f"open_clip_model.safetensors{INDEX}",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "open_clip_pytorch_model.pt",
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
)
ENDINGS = (".safetensors", ".bin", ".pt", ".pth")


Stamps = tuple[tuple[str, int, int], ...]  # by which a file that was replaced is noticed


class WeightsError(UserError):
    """A file that holds no state dict that can be read without running what it brings."""


def weights_in(folder: Path) -> Path | None:
    """The checkpoint of a folder: PREFERRED, else the first by kind and name; None where there is none."""
    for name in PREFERRED:
        if (folder / name).is_file():
            return folder / name
    return next((path for ending in ENDINGS for path in sorted(folder.glob(f"*{ending}"))), None)


def files_of(path: Path) -> list[Path]:
    """The files that a checkpoint is read from: itself, or its index and the parts that this names.

    Raises: WeightsError for an index that can't be read, or names files outside of its folder.
    """
    return [path] if not path.name.endswith(INDEX) else [path, *dict.fromkeys(_parts(path).values())]


def stamps_of(files: Iterable[Path]) -> Stamps:
    """Path, size and time of those files that are there."""
    states = [(str(path), path.stat()) for path in files if path.is_file()]
    return tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file or in the parts that an index names, wrappers and their prefixes taken off.

    Raises: WeightsError with what was found there, without the file's name.
    """
    if not path.name.endswith(INDEX):
        return unprefixed(_tensors(path))
    where = _parts(path)
    state: dict[str, Tensor] = {}
    for part in dict.fromkeys(where.values()):
        if not part.is_file():
            raise WeightsError(f"lists {part.name}, which is missing beside it. Download it, too.")
        try:
            state |= _tensors(part)
        except WeightsError as error:
            raise WeightsError(f"its part {part.name}: {error}") from None
    if missing := [name for name in where if name not in state]:
        raise WeightsError(f"{missing[0]!r} is not in {where[missing[0]].name}, where its index has it.")
    return unprefixed(state)


def _parts(index: Path) -> dict[str, Path]:
    """The file of each tensor, by its name."""
    try:
        where = json.loads(index.read_text())["weight_map"]
        parts = {str(name): str(part) for name, part in where.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise WeightsError("no index of a checkpoint in parts: want a JSON file with a weight_map.") from None
    if foreign := [part for part in parts.values() if Path(part).name != part or not part.endswith(ENDINGS)]:
        raise WeightsError(f"names {foreign[0]!r:.100}, and the parts of a checkpoint lie beside their index.")
    return {name: index.parent / part for name, part in parts.items()}


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if is_torchscript(path):
            return torchscript_state(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on a pickle's protocol: it works or it doesn't
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as error:  # torch, pickle, zip and safetensors each raise their own
        raise WeightsError(f"not a checkpoint that can be read: {_said(path, error)}") from None
    return unwrapped(loaded)


def _said(path: Path, error: Exception) -> str:
    """What is wrong with a file, in a line; torch answers with a page, and advises to load it unsafely."""
    text = " ".join(re.sub(r"\x1b\[[\d;]*m", "", str(error)).split())  # torch prints in bold
    with path.open("rb") as file:
        head = file.read(16)
    if not head:
        return "the file is empty. Download it again."
    if head.startswith(b"version https:"):
        return "it is a pointer of Git LFS. `git lfs pull` fetches the file itself."
    if foreign := re.search(r"GLOBAL ([\w.]+)", text):
        return (
            f"beside tensors it holds {foreign[1]}, and loading such objects can run code. Where you trust the file, "
            "save its tensors alone: torch.save(torch.load(file, weights_only=False)['state_dict'], 'tensors.pt')."
        )
    if isinstance(error, pickle.UnpicklingError) and head.startswith((b"PK", b"\x80")):
        what = re.search(r"WeightsUnpickler error: (.*?)(?: Check the documentation|$)", text)
        return (
            f"torch's safe loader can't read it ({what[1][:100] if what else type(error).__name__}). Where you trust "
            "the file, save its tensors anew: torch.save(torch.load(file, weights_only=False), 'tensors.pt')."
        )
    if isinstance(error, pickle.UnpicklingError):
        return f"it begins with {head!r}, as no checkpoint does. Download it again."
    return text[:200] or type(error).__name__


def unwrapped(loaded: Any) -> dict[str, Tensor]:
    """The state dict of a training checkpoint. Raises: WeightsError that names the keys found."""
    state = loaded
    for key in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            state = loaded[key]
            break
    where = "" if state is loaded else f" under {key!r}"
    if not isinstance(state, Mapping) or not state:
        raise WeightsError(f"holds {_kind(state)}{where}, want a state dict: names and their tensors.")
    odd = [name for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if odd:
        raise WeightsError(
            f"{odd[0]!r}{where} is {_kind(state[odd[0]])}, no tensor. Want a state dict, by itself or under "
            f"{', '.join(WRAPPERS)}; found {_listed(list(state))}."
        )
    return dict(state)


def unprefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what every one of them begins with because the model was wrapped when it was saved."""
    while True:
        common = [p for p in PREFIXES if state and all(name.startswith(p) for name in state)]
        if not common:
            return state
        state = {name.removeprefix(common[0]): value for name, value in state.items()}


def _kind(value: Any) -> str:
    return "an empty dict" if value == {} and isinstance(value, dict) else f"a {type(value).__name__}"


def _listed(keys: list[Any]) -> str:
    more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    return ", ".join(repr(key)[:60] for key in keys[:LISTED]) + more


# ---- TorchScript -------------------------------------------------------------------------------


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive: torch tells it by its constants, too."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def torchscript_state(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of the module in an archive, as its own state_dict() would name them.

    Raises: WeightsError for an archive that holds more than modules, tensors and plain values.
    """
    with zipfile.ZipFile(path) as archive:
        stored = sum(info.file_size for info in archive.infolist() if info.compress_type == zipfile.ZIP_STORED)
        if stored > path.stat().st_size:
            raise WeightsError("a TorchScript archive whose records overlap.")
        top = next(
            (n.removesuffix("data.pkl") for n in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", n)), None
        )
        if top is None:
            raise WeightsError("a TorchScript archive without data.pkl.")
        pickled = _record(archive, f"{top}data.pkl", MOST_PICKLED)
        order = _record(archive, f"{top}byteorder", 16) if f"{top}byteorder" in archive.namelist() else b"little"
        if order != b"little":
            raise WeightsError("a TorchScript archive of a big-endian machine.")
        reader = _Reader(io.BytesIO(pickled))
        try:
            module = reader.load()
        except WeightsError:
            raise
        except Exception as error:  # a pickle is a program: whatever its steps raise
            raise WeightsError(
                f"a TorchScript archive that can't be read: {' '.join(str(error).split())[:200]}"
            ) from None
        learned = _learned(archive, f"{top}code/")
        named = dict(_named(module, learned, "", 0))
        storages: dict[str, Tensor] = {}
        return {name: _tensor(archive, f"{top}data/", described, storages) for name, described in named.items()}


class _Module:
    """A module of an archive, or any other object of one: its class's name and its state, inert."""

    name = ""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise WeightsError(
                f"a TorchScript archive with {self.name}, which has a state of its own: "
                "loading it would run the file's code."
            )
        self.state = state


class _Described:
    """A tensor as the pickle describes it: (dtype, key, size of the storage), offset, size, stride."""

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride

    def __setstate__(self, state: Any) -> None:
        raise WeightsError("a TorchScript archive with a tensor that has a state of its own.")


class _Listed(list[Any]):
    """A typed list or dict, which torch wraps in a call that says its type; or the hooks of a tensor, always none."""

    def __init__(self, values: Any = (), *_: Any) -> None:
        super().__init__(values)


class _Reader(pickle.Unpickler):
    """Reads an archive's data.pkl; every name that the pickle can call stands in `find_class`."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return type("_Module", (_Module,), {"name": f"{module}.{name}"})
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Described
        if (module, name) == ("collections", "OrderedDict"):
            return _Listed
        if module == "torch.jit._pickle" and (name == "restore_type_tag" or re.fullmatch(r"build_\w+list", name)):
            return _Listed
        raise WeightsError(f"a TorchScript archive with {module}.{name}, which isn't a tensor, a module or a list.")

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", torch.dtype() as dtype, str(key), str(), int(size)):
                return dtype, key, size
        raise WeightsError(f"a TorchScript archive with a storage {pid!r:.100}.")


def _record(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """A record of the archive, which torch stores as it is: compressed ones could be bombs."""
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise WeightsError(f"a TorchScript archive without {name}.") from None
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > most:
        raise WeightsError(f"a TorchScript archive whose {name} is compressed, or of {info.file_size} bytes.")
    return archive.read(info)


def _learned(archive: zipfile.ZipFile, code: str) -> dict[str, frozenset[str]]:
    """By class, the attributes that its source calls parameters or buffers; other tensors are no part of a state."""
    found, budget = {}, MOST_PICKLED
    for name in archive.namelist():
        if not (name.startswith(code) and name.endswith(".py")):
            continue
        module = name.removeprefix(code).removesuffix(".py").replace("/", ".")
        source = _source(archive, name, budget)
        budget -= len(source)
        for kind, body in re.findall(r"^class (\w+)\(Module\):\n((?:  .*\n|\n)*)", source, re.MULTILINE):
            lists = re.findall(r"^  __(?:parameters|buffers)__ = \[(.*)\]$", body, re.MULTILINE)
            found[f"{module}.{kind}"] = frozenset(re.findall(r'"([^"]*)"', " ".join(lists)))
    return found


def _source(archive: zipfile.ZipFile, name: str, most: int) -> str:
    """A source file; torch compresses these. Read up to a bound, whatever size it claims."""
    with archive.open(name) as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise WeightsError(f"a TorchScript archive with more than {MOST_PICKLED} bytes of code.")
    return text.decode("latin-1")


def _named(module: Any, learned: Mapping[str, frozenset[str]], prefix: str, depth: int) -> Any:
    """Names and descriptions of a module's parameters and buffers, its children's after them."""
    if not isinstance(module, _Module) or depth > DEEPEST:
        raise WeightsError(f"a TorchScript archive of {'modules too deep' if depth else 'no module'}.")
    own = learned.get(module.name, frozenset())
    for name, value in getattr(module, "state", {}).items():
        if isinstance(value, _Described) and name in own:
            yield f"{prefix}{name}", value
        elif isinstance(value, _Module):
            yield from _named(value, learned, f"{prefix}{name}.", depth + 1)


def _tensor(archive: zipfile.ZipFile, folder: str, described: _Described, storages: dict[str, Tensor]) -> Tensor:
    """The tensor that a description means. Raises: WeightsError where it reaches beyond its storage."""
    match described:
        case _Described(
            storage=(torch.dtype() as dtype, str(key), int(length)),
            offset=int(offset),
            size=tuple(size),
            stride=tuple(stride),
        ) if all(isinstance(number, int) and number >= 0 for number in (offset, *size, *stride)):
            pass
        case _:
            raise WeightsError("a TorchScript archive with a tensor that isn't described as torch does.")
    if key not in storages:
        content = _record(archive, f"{folder}{key}", 2**40)
        if len(content) != length * dtype.itemsize:
            raise WeightsError(f"a TorchScript archive whose data/{key} has {len(content)} bytes.")
        storages[key] = torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)
    flat = storages[key]
    last = offset + sum((num - 1) * step for num, step in zip(size, stride, strict=True))
    if flat.dtype != dtype or math.prod(size) > len(flat) or (math.prod(size) and last >= len(flat)):
        raise WeightsError(f"a TorchScript archive with a tensor that reaches beyond data/{key}.")
    return flat.as_strided(size, stride, offset)
