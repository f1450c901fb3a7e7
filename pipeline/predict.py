"""Any images, any class names: for each a coloured overlay with its legend, and the mask of ids.

    python cli.py predict photos/ --run runs/demo --names "zebra,grass|lawn,water"

Names that the student's file knows need nothing else; others need the teacher's text encoder. A mask carries what
it was made from and with, so the same command again makes what is missing or changed, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from cache.files import whole_file, writing
from pipeline.config import UserError
from pipeline.data.base import BadImage, DataError, read_image
from pipeline.data.files import file_stamp, image_sizes
from pipeline.data.inputs import Picture
from pipeline.learning.loading import made_ahead
from pipeline.learning.segmenter import Asked, Name, Segmenter, check, parsed_names
from pipeline.looking.overlay import file_of, painted, shares, with_legend
from pipeline.running.console import mention, progress, say

MASK, OVERLAY, PROBABILITIES = ".mask.png", ".overlay.png", ".probabilities.npy"
STAMP, RECIPE = "made from", "recipe"  # a mask's own words: its image's stamp, and how it was made
RESULTS = (MASK, OVERLAY)  # pictures that a folder of photographs may hold from an earlier run
BLOCK = 2**20  # bytes written at a time
MOST_PIXELS = 2**25  # of a batch's images together, 96 MiB decoded; one that is larger is a batch by itself


@dataclass(frozen=True)
class Wanted:
    """What to find, and how. `reject` as Segmenter.decide has it; gamma and mode None: the run's."""

    names: Sequence[Name] | str | None = None  # text as parsed_names reads it
    gamma: float | None = None
    reject: float | None = None
    mode: str | None = None
    probabilities: bool = False


@dataclass(frozen=True)
class Loaded:
    """An image, the stamp of its file, or the reason that there is none."""

    picture: Picture
    image: np.ndarray | None = None  # (H, W, 3) uint8
    stamp: str = ""
    reason: str = ""


def predict(run: Path, pictures: Sequence[Picture], out: Path, wanted: Wanted) -> Iterator[tuple[Path, Path]]:
    """Segments each picture and yields the paths of its overlay and its indexed mask, also of those already there.

    The mask's ids follow the names, 255 where all were rejected; with more than 255 names it has 16 bits, and 65535
    there. Gamma is for names that the run never had labels for. A picture that can't be read is named and passed over.
    Raises: CheckpointError, UserError; at the end a UserError that counts what was passed over.
    """
    check(wanted.reject, wanted.mode, wanted.gamma)
    segmenter = Segmenter(run)
    if wanted.names is None and (changed := segmenter.renamed()):
        say(f"predict: the student's own names are those it was trained with; its data set has others now: {changed}")
    names = wanted.names
    asked = segmenter.ask(parsed_names(names, segmenter.checkpoint.classes) if isinstance(names, str) else names)
    recipe = _recipe(segmenter, asked, wanted)
    at = {picture: out / picture.place for picture in pictures}
    missing = {each: None for each in pictures if not _is_done(each, at[each], recipe, wanted)}  # in order
    if len(missing) < len(pictures):
        mention(f"predict: {len(pictures) - len(missing)} of {len(pictures)} are in {out} already, made the same way")
    for picture in pictures:
        if picture not in missing:
            yield _named(at[picture], OVERLAY), _named(at[picture], MASK)
    failed: list[Loaded] = []
    num = segmenter.config.eval.batch if (wanted.mode or segmenter.config.eval.mode) == "whole" else 1
    bar = progress("predict", len(missing)) if len(missing) > num else nullcontext(lambda count: None)
    with bar as advance:
        for group in made_ahead(_groups(list(missing), num), lambda group: [_load(each) for each in group]):
            for item, scores in _scored(segmenter, asked, wanted, group):
                advance(1)
                if scores is None:
                    failed.append(item)
                    say(f"predict: passed over: {item.reason}")
                else:
                    yield _written(segmenter, asked, wanted, item, scores, at[item.picture], recipe)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(pictures)} images can't be segmented (named above; the first is "
            f"{failed[0].picture.path}). The results of the others are in {out}."
        )


def _recipe(segmenter: Segmenter, asked: Asked, wanted: Wanted) -> str:
    """What a result depends on beside its image, as JSON: the student, the names and what is done with them."""
    gamma = segmenter.config.eval.gamma if wanted.gamma is None else wanted.gamma
    text = hashlib.blake2b(asked.text.numpy().tobytes(), digest_size=8).hexdigest()
    mode = wanted.mode or segmenter.config.eval.mode
    with segmenter.file.open("rb") as file:  # whole: two students of one training begin and end alike
        student = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    facts = {"student": student, "names": asked.names, "text": text, "gamma": gamma}
    return json.dumps(facts | {"reject": wanted.reject, "mode": mode}, ensure_ascii=False)


def _is_done(picture: Picture, base: Path, recipe: str, wanted: Wanted) -> bool:
    needed = [OVERLAY, *([PROBABILITIES] if wanted.probabilities else [])]
    if not all(_named(base, ending).is_file() for ending in needed):
        return False
    try:
        with Image.open(_named(base, MASK), formats=["PNG"]) as mask:
            return mask.info.get(STAMP) == file_stamp(picture.path) and mask.info.get(RECIPE) == recipe
    except (OSError, DataError, SyntaxError, ValueError):  # no mask that can be read; or the image's own fault
        return False


def _groups(pictures: Sequence[Picture], num: int) -> Iterator[list[Picture]]:
    """Batches of at most `num` pictures and MOST_PIXELS, by their headers alone."""
    group: list[Picture] = []
    pixels = 0
    for picture in pictures:
        try:
            width, height = image_sizes(picture.path).stored
        except DataError:  # whoever loads it says why
            width = height = 0
        if group and (len(group) == num or pixels + width * height > MOST_PIXELS):
            yield group
            group, pixels = [], 0
        group.append(picture)
        pixels += width * height
    if group:
        yield group


def _load(picture: Picture) -> Loaded:
    try:
        return Loaded(picture, read_image(picture.path), file_stamp(picture.path))
    except DataError as error:
        return Loaded(picture, reason=str(error))


def _scored(
    segmenter: Segmenter, asked: Asked, wanted: Wanted, group: list[Loaded]
) -> Iterator[tuple[Loaded, Tensor | None]]:
    """Each item of a batch with its scores (K, h, w), or with None and the reason that it has none."""
    good = [item for item in group if item.image is not None]
    yield from ((item, None) for item in group if item.image is None)
    try:
        images = [item.image for item in good if item.image is not None]
        scores = segmenter.scores(images, asked, wanted.gamma, wanted.mode) if images else []
    except BadImage as error:  # of mode slide, whose batches hold one image
        yield replace(good[0], reason=f"{good[0].picture.path}: {error}"), None
    else:
        yield from zip(good, scores, strict=True)


def _written(
    segmenter: Segmenter, asked: Asked, wanted: Wanted, item: Loaded, scores: Tensor, base: Path, recipe: str
) -> tuple[Path, Path]:
    """Writes an image's results, the mask last: where it is whole, all are."""
    assert item.image is not None
    size = (item.image.shape[0], item.image.shape[1])
    if wanted.probabilities:
        with whole_file(_named(base, PROBABILITIES)) as file:
            kept = mapped_array(file, np.float16, (len(asked.names), *size))
            ids = segmenter.decide(scores, size, wanted.reject, kept, asked)
            kept.flush()
            del kept
    else:
        with writing(_named(base, PROBABILITIES)):
            _named(base, PROBABILITIES).unlink(missing_ok=True)  # were of what is replaced here
        ids = segmenter.decide(scores, size, wanted.reject, asked=asked)
    overlay, mask = _named(base, OVERLAY), _named(base, MASK)
    picture = with_legend(painted(item.image, ids, len(asked.names)), shares(ids, asked.titles))
    with whole_file(overlay) as file:
        picture.save(file, "PNG")
    facts = PngInfo()
    for key, value in ((STAMP, item.stamp), (RECIPE, recipe)):
        facts.add_text(key, value)
    with whole_file(mask) as file:
        file_of(ids, len(asked.names)).save(file, "PNG", pnginfo=facts)
    return overlay, mask


def _named(base: Path, ending: str) -> Path:
    return base.with_name(base.name + ending)


def mapped_array(file: IO[bytes], dtype: type[np.generic], shape: tuple[int, ...]) -> np.memmap:
    """An array in a new .npy file, mapped, with all its room on disk: a map over a hole ends by a signal there.

    Raises: OSError when there is no room.
    """
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    file.flush()
    begin, size = file.tell(), math.prod(shape) * np.dtype(dtype).itemsize
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), begin, size)
    else:  # macOS
        for at in range(0, size, BLOCK):
            file.write(bytes(min(BLOCK, size - at)))
        file.flush()
    return np.memmap(file, dtype, "r+", begin, shape)
