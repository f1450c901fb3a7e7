"""Label Studio's brush labels as PNG, one file a label, and its export as JSON, which says of what image a task is.

    task-1-annotation-2-by-3-tag-sky-0.png    pixels are the label's opacity, 0 where it isn't
    export.json                               JSON or JSON-MIN: the tasks, their images, tags and labels

Where labels overlap, the smaller one (in pixels) is on top. What the files are called and what their values mean: Label
Studio's converter (label-studio-sdk, converter/brush.py).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from pipeline.data.base import DataError
from pipeline.data.coco import skip_mark
from pipeline.data.files import file_stamp, image_sizes, stored_mask
from pipeline.data.labelled import (
    Item,
    Labelled,
    Shape,
    by_stem,
    checked_classes,
    painted,
    pictures_below,
    smaller_on_top,
    stamp_of,
    with_background,
)

BRUSH = re.compile(r"task-(\d+)-annotation-(\d+)-by-([^-]*)-(.+)-(\d+)\.png", re.IGNORECASE)
NO_LABEL = "no_label"  # a region that nobody has given a label
UPLOADED = re.compile(r"^[0-9a-f]{8}-")  # before the name of a file that was uploaded
SLASHES = re.compile(r"[/\\]")  # in a label, which are - in its file's name
LABELS = ("brushlabels", "labels")


def label_studio(folder: Path, tasks: Path, images: Path, *, part: str = "train", background: bool = False) -> Labelled:
    """Brush PNGs in `folder`, whose tasks are of `images` as the JSON `tasks` says. Raises: DataError."""
    passed_over = Counter[str]()
    image_of, said_of = _tasks(tasks, images, passed_over)
    said = set[tuple[str, str]]().union(*said_of.values())
    brushes = _brushes(folder, tasks, set(image_of), said, passed_over)
    _refuse_lost(folder, tasks, said_of, brushes)
    names = sorted({label for _, label in said} | {label for each in brushes.values() for label, _ in each})
    classes, unlabelled = with_background(checked_classes(tasks, names), is_class=background)
    by_stem(image_of.values(), "images")
    if len(set(image_of.values())) < len(image_of):
        twice = next(path for path, num in Counter(image_of.values()).items() if num > 1)
        raise DataError(f"{tasks}: two tasks are of the image {twice}. Remove one of them, and its PNGs.")

    def item(task: str, image: Path) -> Item:
        drawn = brushes.get(task, [])

        def stamp() -> str:
            files = [(label, file_stamp(path, whole=True)) for label, path in drawn]
            return stamp_of("label studio", classes, unlabelled, files)

        def make() -> np.ndarray:
            width, height = image_sizes(image).upright
            shapes: list[Shape] = []
            size: tuple[int, ...] = (height, width)
            for label, path in drawn:
                pixels = stored_mask(path).pixels
                if pixels.ndim != 2:
                    raise DataError(
                        f"{path}: has colours; Label Studio's brush PNGs have one channel. Export it again."
                    )
                if shapes and pixels.shape != size:
                    raise DataError(
                        f"{path}: {pixels.shape[1]} x {pixels.shape[0]} pixels, others of its task {size[1]} "
                        f"x {size[0]}. Export them again."
                    )
                size = pixels.shape
                shapes.append(Shape.of(classes.index(label), pixels > 0))
            return painted((size[0], size[1]), smaller_on_top(shapes), unlabelled)

        return Item(image, stamp, make)

    items = [item(task, image_of[task]) for task in sorted(image_of, key=int)]
    return Labelled(classes, {part: items}, passed_over=passed_over)


def _tasks(
    path: Path, images: Path, passed_over: Counter[str]
) -> tuple[dict[str, Path], dict[str, set[tuple[str, str]]]]:
    """The image of each task, and what tags (`from_name`) and labels its brush regions have. Raises: DataError."""
    pictures = pictures_below(images, "--images")
    by_name: dict[str, list[Path]] = defaultdict(list)
    for picture in pictures:
        by_name[picture.name].append(picture)
    image_of: dict[str, Path] = {}
    said: dict[str, set[tuple[str, str]]] = {}
    for task in _listed(path):
        key = task.get("id")
        if type(key) is not int:
            raise DataError(f"{path}: a task's id is {key!r}; want Label Studio's JSON, with whole numbers.")
        if str(key) in image_of:
            raise DataError(f"{path}: task {key} stands there twice. Export it again.")
        image_of[str(key)] = _image_of(path, task, by_name, images)
        said[str(key)] = set()
        for tag, value in _regions(task):
            if "rle" not in value:
                if any(name.endswith("labels") for name in value):
                    passed_over["region that isn't of the brush"] += 1
                continue
            labels = _labels(value)
            if len(labels) > 1:
                several = ", ".join(map(repr, labels))
                raise DataError(
                    f"{path}: task {key}: a region has several labels, {several}; a pixel has one. Keep one."
                )
            said[str(key)] |= {(tag, label) for label in labels}
    if not image_of:
        raise DataError(f"{path}: holds no task. Export the project again, as JSON.")
    return image_of, said


def _listed(path: Path) -> Iterator[dict[str, Any]]:
    """The tasks, one at a time: a task's runs may be long. Raises: DataError."""
    try:
        import ijson
    except ImportError:
        raise DataError(f"{path}: JSON is read by ijson: pip install -e '.[prepare]'.") from None
    try:
        with path.open("rb") as file:
            skip_mark(file)
            for task in ijson.items(file, "item"):
                if not isinstance(task, dict):
                    raise DataError(f"{path}: want a list of tasks, which are mappings. Export the project as JSON.")
                yield task
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}. --tasks is the project's export as JSON.") from None
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is no whole JSON: {' '.join(str(error).split())[:200]}. Export it again.") from None


def _image_of(path: Path, task: Mapping[str, Any], by_name: Mapping[str, list[Path]], images: Path) -> Path:
    """The picture among `by_name` that one of a task's values names: a path, an address or an uploaded file."""
    data = task.get("data")
    values = data if isinstance(data, Mapping) else task
    named: list[str] = []
    for several in ([values.get("image")], [*values.values(), task.get("file_upload")]):
        its = [[name for name in _names(value) if name in by_name] for value in several if isinstance(value, str)]
        found = list(dict.fromkeys(path for names in its if names for path in by_name[names[0]]))
        if len(found) > 1:
            raise DataError(
                f"{found[0]} and {found[1]}: either may be the image of task {task['id']} in {path}. Rename one, or "
                "leave the other out of --images."
            )
        if found:
            return found[0]
        named += [name for value in several if isinstance(value, str) for name in _names(value)]
    shown = named[0] if named else "none that it names"
    raise DataError(f"{path}: task {task['id']}: its image, {shown!r}, is not in {images}. Complete the images.")


def _names(value: str) -> list[str]:
    """File names that a value may mean: `/data/upload/1/0a1b2c3d-x.jpg`, `/data/local-files/?d=a/x.jpg`, `s3://a/x.jpg`."""
    address = urlsplit(value)
    paths = [*parse_qs(address.query).get("d", []), unquote(address.path), value]
    names = [PurePosixPath(path.replace("\\", "/")).name for path in paths]
    names += [UPLOADED.sub("", name) for name in names]
    return [name for name in dict.fromkeys(names) if name]


def _regions(task: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Tag and value of a task's regions, in JSON or JSON-MIN; those of the brush have `rle`."""
    for annotation in task.get("annotations") or task.get("completions") or ():
        if isinstance(annotation, Mapping) and annotation.get("was_cancelled"):
            continue
        for result in annotation.get("result", ()) if isinstance(annotation, Mapping) else ():
            value = result.get("value") if isinstance(result, Mapping) else None
            if isinstance(value, Mapping):
                yield str(result.get("from_name")), value
    for tag, results in task.items():
        for value in results if isinstance(results, list) else ():
            if isinstance(value, Mapping):
                yield tag, value


def _labels(value: Mapping[str, Any]) -> list[str]:
    return [str(label) for label in next((value[key] for key in LABELS if isinstance(value.get(key), list)), [])]


def _brushes(
    folder: Path, tasks: Path, known: set[str], said: set[tuple[str, str]], passed_over: Counter[str]
) -> dict[str, list[tuple[str, Path]]]:
    """Label and file of each brush, by task; what has none is counted. Raises: DataError."""
    label_of: dict[str, str] = {}
    for tag, label in sorted(said):
        name = SLASHES.sub("-", f"{tag}-{label}")
        if label_of.setdefault(name, label) != label:
            raise DataError(f"{tasks}: files of {name!r} may be of two labels. Rename one of them, or its tag.")
    found: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    annotation_of: dict[str, tuple[str, Path]] = {}
    for path in pictures_below(folder, "--label-studio", (".png",)):
        match = BRUSH.fullmatch(path.name)
        if match is None:
            raise DataError(
                f"{path}: not called as Label Studio calls brush labels, task-1-annotation-2-by-3-tag-sky-0.png."
            )
        task, annotation, _, rest, _ = match.groups()
        if task not in known:
            raise DataError(f"{path}: {tasks} has no task {task}. Export both at the same time.")
        other, first = annotation_of.setdefault(task, (annotation, path))
        if other != annotation:
            raise DataError(f"{first} and {path}: task {task} has two annotations. Keep the PNGs of one.")
        if rest == NO_LABEL or rest.endswith(f"-{NO_LABEL}"):
            passed_over["brush without a label"] += 1
            continue
        if rest not in label_of:
            have = ", ".join(sorted(label_of)[:5]) or "no brush"
            raise DataError(f"{path}: {tasks} has no region {rest!r} (it has {have}). Export both at the same time.")
        found[task].append((label_of[rest], path))
    return found


def _refuse_lost(
    folder: Path,
    tasks: Path,
    said_of: Mapping[str, set[tuple[str, str]]],
    brushes: Mapping[str, list[tuple[str, Path]]],
) -> None:
    """Raises: DataError for a brush region of which there is no PNG."""
    for task, said in said_of.items():
        have = {label for label, _ in brushes.get(task, ())}
        if lost := sorted({label for _, label in said} - have):
            raise DataError(
                f"{tasks}: task {task} has a brush region {lost[0]!r}, of which no PNG is in {folder}. Export both at "
                "the same time."
            )
