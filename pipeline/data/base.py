"""What a data set is to the stages: classes, their split into seen and unseen, samples, images, labels.

In memory labels are int16, IGNORE (-1) without a class, whatever number a file has for that: see ops/labels.py.

Axes: H, W pixels of one image, K classes. Coordinates are those of the upright image: an EXIF
orientation is applied to the image, and a mask is read as it is stored, which must be upright (mmseg's
loaders do the same: the image is turned, the annotation is not). A mask with such a tag is an error.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import html
import importlib
import inspect
import unicodedata
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config import Data, UserError
from pipeline.data.classes import bitwise_palette
from pipeline.ops.labels import IGNORE, LABEL, MOST_CLASSES, counts

PARTS = ("train", "test")
STAMP_THREADS = 8  # waiting for the disk or the network, not computing
# PIL warns above this and reads on up to twice as much: over 1 GB a decoding thread. Here it is an error.
MAX_PIXELS = 89_478_485  # PIL's own MAX_IMAGE_PIXELS, a quarter of a GiB of 24-bit pixels
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# EXIF tag 274 -> what turns the stored pixels upright (CIPA DC-008, section 4.6.4); 5 to 8 swap the sides.
ORIENTATION = 274
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# The kinds of picture that are opened, and their endings. PIL knows more: EPS would start Ghostscript, and each further
# decoder is one more that a stranger's file can reach.
FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif", ".avifs"),
}


class DataError(UserError):
    """The data or its description can't be used; the message says what, where and what to do."""


class BadImage(DataError):
    """One image can't be decoded: a stage may quarantine it and go on."""


def unknown(what: str, found: object, known: Iterable[str]) -> DataError:
    """The error for a word that is not in a list: it names the nearest one that is."""
    names = [str(name) for name in known]
    near = difflib.get_close_matches(str(found), names, 1, 0.0)
    return DataError(f"{what} {str(found)!r}; the nearest valid one is {near[0]!r}." if near else f"{what} {found!r}.")


@dataclass(frozen=True)
class Sample:
    """One image: an id unique within its part, and where image and mask lie (files, for most data sets)."""

    id: str
    image: str
    mask: str | None = None


@dataclass(frozen=True)
class MaskFacts:
    """What one mask holds: pixels by label (K + 1,), those without one last; where it is a file its raw values,
    colours and doubts.

    `colours` are those of the indices that occur, if the mask has a palette and is read by index; `doubt` says in a
    sentence what about the pair of image and mask can't be decided.
    """

    pixels: np.ndarray
    raw: frozenset[int] | None = None
    colours: Mapping[int, tuple[int, int, int]] | None = None
    doubt: str = ""


class DataSet(ABC):
    """Classes, split and samples; the four abstract methods say where images and labels come from.

    Raises: DataError for class names that are repeated, blank or read alike by CLIP, more than MOST_CLASSES, unknown or
    repeated unseen names, no seen class left, or a palette of another shape than (K, 3).
    """

    name = "data"
    background: int | None = None  # the id of "background", where it is a class
    has_files = False  # whose masks may be wrong

    def __init__(
        self,
        *,
        classes: Sequence[str],
        unseen: Sequence[str] = (),
        palette: np.ndarray | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name or type(self).name
        self._by_id: dict[str, dict[str, Sample]] = {}
        self.classes = tuple(classes)
        if not 1 <= len(self.classes) <= MOST_CLASSES:
            raise DataError(
                f"{self.name}: {len(self.classes)} classes; want 1 to {MOST_CLASSES}, ids being 16 bits with a sign."
            )
        check_names(f"{self.name}: classes", self.classes, self.classes)
        refuse_alike(f"{self.name}: classes", self.classes)
        self.unseen = check_names(f"{self.name}: unseen", unseen, self.classes)
        if len(self.unseen) == len(self.classes):
            raise DataError(f"{self.name}: all {len(self.classes)} classes are unseen; training needs a seen one.")
        self.palette = bitwise_palette(len(self.classes)) if palette is None else np.asarray(palette, np.uint8)
        if self.palette.shape != (len(self.classes), 3):
            raise DataError(f"{self.name}: palette of shape {self.palette.shape}; want {(len(self.classes), 3)}.")

    @property
    def unseen_ids(self) -> tuple[int, ...]:
        return tuple(i for i, name in enumerate(self.classes) if name in self.unseen)

    @property
    def seen_ids(self) -> tuple[int, ...]:
        return tuple(i for i, name in enumerate(self.classes) if name not in self.unseen)

    @abstractmethod
    def samples(self, part: str) -> list[Sample]:
        """The samples of "train" or "test", in a fixed order. Raises: DataError."""

    @abstractmethod
    def image(self, sample: Sample) -> np.ndarray:
        """(H, W, 3) uint8, RGB, upright. Raises: BadImage."""

    @abstractmethod
    def labels(self, sample: Sample) -> np.ndarray | None:
        """(H, W) int16, class ids 0..K-1 and IGNORE, or None without a mask. Raises: DataError."""

    @abstractmethod
    def stamp(self, sample: Sample) -> str:
        """Identity of the image's content: the same for a copy of the file, another after an edit."""

    def mask_stamp(self, sample: Sample) -> str:
        """The same of the mask; where image and labels are made together, one stamp stands for both."""
        return self.stamp(sample)

    def files(self, part: str) -> list[str]:
        """The files that a part is read from, sorted: images, masks, and what describes them. Raises: DataError."""
        return []

    def mask_facts(self, sample: Sample) -> MaskFacts | None:
        """What a mask holds, None without one. Raises: DataError as `labels`."""
        labels = self.labels(sample)
        return None if labels is None else MaskFacts(counts(labels, len(self.classes)))

    def seen_labels(self, sample: Sample) -> np.ndarray | None:
        """What training may see: `labels` with the ids of unseen classes set to IGNORE."""
        labels = self.labels(sample)
        if labels is None:
            return None
        table = np.arange(len(self.classes) + 1, dtype=LABEL)
        table[[*self.unseen_ids, IGNORE]] = IGNORE
        return table[labels]

    def tags(self, sample: Sample) -> tuple[int, ...]:
        """The classes that an image holds, background left out: all that CLIP-ES is told of it.

        Here they are read off the mask; a data set with lists of its own overrides this.
        Raises: DataError without a mask.
        """
        labels = self.labels(sample)
        if labels is None:
            raise DataError(f"{self.name}: image {sample.id} has no mask to read its image-level labels off.")
        return tuple(int(i) for i in np.unique(labels) if i not in (IGNORE, self.background))

    def stamps(self, samples: Sequence[Sample], what: str = "images") -> list[str]:
        """The stamp of each sample's image, or of its "labels"."""
        stamps = {"images": self.stamp, "labels": self.mask_stamp}
        if what not in stamps:
            raise unknown("stamps: unknown content", what, stamps)
        with ThreadPoolExecutor(STAMP_THREADS) as pool:
            return list(pool.map(stamps[what], samples))

    def identity(self, part: str, what: str = "images") -> str:
        """32 hex digits over the ids of a part and the stamps of its "images" or "labels"."""
        samples = self.samples(part)
        digest = hashlib.blake2b(digest_size=16)
        for sample, stamp in zip(samples, self.stamps(samples, what), strict=True):
            digest.update(f"{sample.id}\0{stamp}\n".encode())
        return digest.hexdigest()

    def by_id(self, part: str) -> dict[str, Sample]:
        """The samples of a part by their ids, in the listed order; made once."""
        if part not in self._by_id:
            self._by_id[part] = {sample.id: sample for sample in self.samples(part)}
        return self._by_id[part]


def key_of(word: str) -> str:
    """What CLIP's tokenizer reads of a word: no HTML escapes, composed characters, single spaces, lower case."""
    plain = unicodedata.normalize("NFC", html.unescape(html.unescape(word)))
    return " ".join(plain.split()).lower()


def refuse_alike(where: str, names: Sequence[str]) -> None:
    """Two names with one text feature can't be told apart by it."""
    first: dict[str, str] = {}
    for name in names:
        if (other := first.setdefault(key_of(name), name)) != name:
            raise DataError(
                f"{where}: CLIP reads {other!r} and {name!r} alike (case and spaces don't count). Rename one, or make "
                "them one class."
            )


def check_names(where: str, names: object, known: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple, if they are text, not blank, not repeated and all among the known ones."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise DataError(f"{where}: want a list of names, found {names!r}.")
    valid, listed = set(known), set[str]()
    for place, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{where}: name {place} is {name!r}; want text (in YAML, quote words such as 'no' or '7').")
        if name in listed:
            raise DataError(f"{where}: {name!r} is listed twice.")
        listed.add(name)
        if name not in valid:
            raise unknown(f"{where}: no class is called", name, known)
    return tuple(names)


def read_image(path: str | Path, *, as_stored: bool = False) -> np.ndarray:
    """A picture of one of FORMATS as (H, W, 3) uint8 RGB, upright or `as_stored`; the first frame of several.

    16-bit greys are scaled to 8 bits, transparency is laid on white.
    Raises: BadImage for what can't be decoded, DataError for a file that can't be read.
    """
    with opened(path, BadImage) as image:
        return as_array(image, as_stored=as_stored)


def as_array(image: Image.Image, *, as_stored: bool = False) -> np.ndarray:
    """An open picture as `read_image` has it. Raises: BadImage for a mode that can't be shown, and what PIL does."""
    turn = None if as_stored else UPRIGHT.get(orientation(image))
    rgb = _as_rgb(image)
    return np.array(rgb if turn is None else rgb.transpose(turn))


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greys; PIL's own conversion clips them at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage(f"grey values from {values.min()} to {values.max()}; want 8 or 16 bits")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImage("pixels are floating point numbers of unknown range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken EXIF is common and PIL raises nearly anything on it; the pixels are fine
        return 1
    return value if value in UPRIGHT else 1


def formats() -> list[str]:
    """Those of FORMATS that this PIL can read."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@contextmanager
def opened(path: str | Path, wrong: type[DataError]) -> Iterator[Image.Image]:
    """An open picture. Wrong content becomes the error `wrong`, what the file system says a DataError."""
    try:
        with Image.open(path, formats=formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise wrong(
                    f"{image.width} x {image.height} pixels, and more than {MAX_PIXELS} are not read: it may be a "
                    "decompression bomb. Make it smaller, or leave it out"
                )
            yield image
    except DataError as error:  # ours, about the content
        raise type(error)(f"{path}: {error}.") from None
    except OSError as error:
        if error.errno is not None:
            raise DataError(f"{path}: can't be read: {error.strerror}. Restore the file or correct the list.") from None
        raise wrong(f"{path}: {_reason(path, error)}. Replace the file.") from None
    except Exception as error:  # PIL's decoders raise nearly anything on damaged files
        raise wrong(f"{path}: {_reason(path, error)}. Replace the file.") from None


def _reason(path: str | Path, error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        with open(path, "rb") as file:
            head = file.read(16)
        return (
            f"not a picture of a kind that is read ({', '.join(FORMATS)}), it begins with {head!r}"
            if head
            else "the file is empty"
        )
    return f"can't be decoded: {' '.join(str(error).split()) or type(error).__name__}"


# kind -> module and class; a data set is imported when it is asked for.
KINDS = {
    "demo": ("pipeline.data.demo", "DemoDataSet"),
    "folder": ("pipeline.data.folder", "FolderDataSet"),
    "coco_stuff": ("pipeline.data.coco_stuff", "CocoStuff"),
    "voc": ("pipeline.data.voc", "Voc"),
    "coco14": ("pipeline.data.coco14", "Coco14"),
    "context": ("pipeline.data.context", "Context"),
    "cityscapes": ("pipeline.data.street", "Cityscapes"),
    "camvid": ("pipeline.data.street", "CamVid"),
    "ade20k": ("pipeline.data.ade20k", "Ade20k"),
}
OWN = ("pipeline.data.own", "own_data_set")  # of a kind that is none of these, but the place of a class


def open_data_set(kind: str, **options: Any) -> DataSet:
    """The data set of a kind, or of one's own class, `module:Class`; the options are its constructor's, `data.<option>`
    in a config.

    Raises: DataError for an unknown kind or option (naming the nearest), a missing option, or bad data.
    """
    if ":" in kind:
        own: DataSet = getattr(importlib.import_module(OWN[0]), OWN[1])(kind, options)
        return own
    if kind not in KINDS:
        raise unknown("data.kind: unknown kind", kind, KINDS)
    module, name = KINDS[kind]
    factory = getattr(importlib.import_module(module), name)
    parameters = options_of(factory)
    for option in options:
        if option not in parameters:
            raise unknown(f"data: kind {kind!r} has no option", option, parameters)
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and option not in options:
            raise DataError(f"data.{option} is missing, and kind {kind!r} needs it; it has {', '.join(parameters)}.")
    return factory(**options)


def options_of(factory: type) -> dict[str, inspect.Parameter]:
    """What a data set's constructor takes, and where it hands on the rest (`**`) what its base class's takes."""
    found: dict[str, inspect.Parameter] = {}
    for one in factory.__mro__:
        if "__init__" in vars(one):
            given = list(inspect.signature(one.__dict__["__init__"]).parameters.values())[1:]  # without self
            kept = [each for each in given if each.kind is not each.VAR_KEYWORD]
            found = {each.name: each for each in kept} | found
            if len(kept) == len(given):
                break
    return found


@functools.lru_cache(maxsize=1)
def _data(dumped: str) -> DataSet:
    section = Data.model_validate_json(dumped)
    return open_data_set(section.kind, **section.options())


def data_of(section: Data) -> DataSet:
    """The data set that a config's section `data` names, opened once a process. Raises: DataError."""
    return _data(section.model_dump_json())


def forget_data() -> None:
    """Has `data_of` open its data set anew: in a session that goes on, images may have come and gone."""
    _data.cache_clear()
