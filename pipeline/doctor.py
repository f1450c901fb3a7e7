"""Before an hour is spent: what a run will cost, whether this machine can do it, whether the data is sound.

    python cli.py doctor --config config/coco_stuff.yaml --dry    # no data set needed; published counts
    python cli.py doctor --config config/coco_stuff.yaml          # --all: every image and mask

Prints the costs, then one line for each thing that would stop the run or spoil its result.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.table import Table

from pipeline.config import Config, ConfigError, Data
from pipeline.data.base import PARTS, DataError, DataSet, data_of
from pipeline.data.classes import PUBLISHED_COUNTS
from pipeline.data.description import read_description
from pipeline.data.survey import Complaint, Seen, complaints, count_complaint, look, no_labels
from pipeline.looking.facts import human_bytes
from pipeline.looking.forecast import FORWARDS_A_STEP, Forecast, flops_of_training, forecast, num_forwards, side_of
from pipeline.models.second import SecondShape, second_shape
from pipeline.models.student import cost_of, licence_of
from pipeline.models.teacher import CAN_EXPLAIN, TeacherShape, flops_of_a_view, flops_of_cams, shape_asked
from pipeline.ops.masks import fitted_size
from pipeline.running.checked import wrong_tags
from pipeline.running.console import say
from pipeline.running.devices import device_of
from pipeline.running.provenance import provenance
from pipeline.running.table import labels_stage
from pipeline.teaching.encode import STORAGE

SAMPLE = 64  # images and masks of each part that are opened
SPARE = 1.02  # of the forecast: estimates and file system blocks
EXACT = ("view", "cls", "status", "tokens", "token_scale", "cluster_tokens", "cluster_token_scale")  # not compressed
CLASSES = 3  # in an image, for the cost of CAMs: above the mean of VOC and COCO
# FLOP/s that are assumed: 35 % of an A100's dense peak (its data sheet), float32 without TF32.
SUSTAINED = {"fp32": 0.35 * 19.5e12, "bf16": 0.35 * 312e12, "fp16": 0.35 * 312e12}
PACKAGES = ("torch", "open_clip_torch", "zarr", "numpy", "dask", "timm", "segmentation_models_pytorch")


def doctor(config: Config, *, dry: bool = False, most: int = SAMPLE) -> list[Complaint]:
    """Says what the run will cost and what was looked at; returns what is wrong, in the order of repair.

    `dry` opens no data set: counts are the config's or the published ones. Otherwise up to `most` images and masks
    of each part are opened. Raises: TeacherError, StudentError, ConfigError.
    """
    shape = shape_asked(config.teacher)
    say(_versions())
    found = _machine(config, shape)
    found += _student_weights(config, dry)
    data, parts = (None, []) if dry else _looked_at(config, found, most)
    num_images = _num_images(config, parts)
    num_classes = len(data.classes) if data else 0
    side = side_of(config, shape)
    found += [*_image_size(config, shape), *_explained(config, shape)]
    say(
        f"teacher: {config.teacher.model} at {side * shape.patch} x {side * shape.patch}, {side} x {side} tokens of "
        f"{shape.channels}, {flops_of_a_view(shape, side) / 1e9:.1f} GFLOP a view"
    )
    second = _second(config, side)
    if num_images is None:
        say("images: not known without the data set; costs are of 1,000")
    costs = {name: forecast(config, shape, num_images or 1000, num_classes, name, second) for name in STORAGE}
    _say_costs(config, costs, flops_of_a_view(shape, side) + (second.flops if second else 0))
    if config.recipe == "clip_es" and shape.can_explain:
        _say_cams(config, shape, num_images or 1000, parts)
    _say_training(config, shape, side, num_classes)
    if num_images is not None:
        found += _disk(config, costs)
    if data:
        if not config.reads_tags:
            found += filter(None, [no_labels(data, seen) for seen in parts])
        found += complaints(data, parts, config.cache.max_bad)
    return found


def examine_folder(path: Path, most: int = SAMPLE) -> list[Complaint]:
    """What a dataset.yaml's parts hold is said, what is wrong with them is returned; no machine, no costs.

    A part that isn't described is no fault: it may come later.
    """
    config = Config(data=Data.model_validate({"kind": "folder", "root": str(path)}))
    found: list[Complaint] = []
    described = read_description(path)
    data, parts = _looked_at(config, found, most, [part for part in PARTS if described.get(part)])
    if data:
        found += filter(None, [no_labels(data, seen) for seen in parts])
        found += complaints(data, parts, config.cache.max_bad)
    return found


def _versions() -> str:
    def of(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"{name} missing"

    from pipeline.ops import kmeans_faiss

    made = provenance()
    return (
        f"{made['machine']}; Python {platform.python_version()}, {', '.join(map(of, PACKAGES))}; "
        f"faiss {kmeans_faiss.build_name()}"
    )


def _machine(config: Config, shape: TeacherShape) -> list[Complaint]:
    """What the config asks of this machine and it hasn't."""
    found = []
    has_gpu = torch.cuda.is_available()
    say(f"device: {torch.cuda.get_device_name() if has_gpu else 'cpu'}")
    for name in ("teacher", labels_stage(config)):
        key, device = f"{name}.device", getattr(config, name).device
        try:
            device_of(key, device)
        except ConfigError:
            what = f"{key} is {device!r}, on which torch can't compute here."
            found.append(Complaint("no device", what, f"Set {key} to auto."))
    later = "downloaded when extract first runs (offline, point teacher.pretrained to a file)"
    say(f"weights: {shape.weights or later}")
    return found


def _second(config: Config, side: int) -> SecondShape | None:
    """What clustering's own model costs, said. Raises: TeacherError."""
    if config.recipe != "clip_teacher" or config.cluster.teacher is None:
        return None
    second = second_shape(config.cluster, side)
    later = "downloaded when it first runs (offline, name a file by cluster.teacher_weights)"
    say(
        f"cluster.teacher: {config.cluster.teacher} at {second.image_size} x {second.image_size}, {side} x {side} "
        f"tokens of {second.channels}, {second.flops / 1e9:.1f} GFLOP a view; weights: {second.weights or later}"
    )
    return second


def _image_size(config: Config, shape: TeacherShape) -> list[Complaint]:
    """A view's side that the teacher would refuse."""
    size = config.teacher.image_size or shape.image_size
    if size % shape.patch == 0:
        return []
    below = max(size // shape.patch, 1) * shape.patch
    what = f"teacher.image_size {size} is no multiple of the patch of {config.teacher.model!r}, {shape.patch}."
    return [Complaint("image size", what, f"Set it to {below} or {below + shape.patch}.")]


def _explained(config: Config, shape: TeacherShape) -> list[Complaint]:
    """CAMs are asked for of a teacher that can't be asked why."""
    if shape.can_explain or (config.recipe != "clip_es" and config.cluster.named_above is None):
        return []
    key = "recipe clip_es" if config.recipe == "clip_es" else "cluster.named_above"
    what = f"{key} makes CAMs, which {config.teacher.model!r} gives no attention and gradients for."
    return [Complaint("no CAMs", what, f"These do: {CAN_EXPLAIN}.")]


def _student_weights(config: Config, dry: bool) -> list[Complaint]:
    """The student's own file of weights; where a config is only read (`dry`), said and no fault."""
    path = config.student.weights
    if path is None:
        return []
    if (is_there := Path(path).is_file()) or dry:
        say(f"student's weights: {path}{'' if is_there else ', not there yet'}")
        return []
    todo = "Download the file (the config's head comment says from where), or set student.weights to null."
    return [Complaint("no weights", f"student.weights {path}: no such file.", todo)]


def _looked_at(
    config: Config, found: list[Complaint], most: int, names: Sequence[str] = PARTS
) -> tuple[DataSet | None, list[Seen]]:
    """The data set, and what a sample of each part holds; what can't be opened or listed goes into `found`."""
    try:
        data = data_of(config.data)
    except DataError as error:
        found.append(Complaint("no data set", str(error), "Without it: --dry."))
        return None, []
    parts: list[Seen] = []
    for part in names:
        try:
            seen = look(data, part, most)
        except DataError as error:
            found.append(Complaint(f"no {part} part", str(error), ""))
            continue
        parts.append(seen)
        found += filter(None, [count_complaint(config.data.kind, config.data.options(), seen)])
        say(_described(data, seen))
    if config.reads_tags and any(seen.part == "train" for seen in parts):
        found += filter(None, [_tags(data)])
    return data, parts


def _tags(data: DataSet) -> Complaint | None:
    """Says how many images have labels; what is wrong with them."""
    samples = data.by_id("train")
    wrong = [*filter(None, (wrong_tags(data, sample) for sample in samples.values()))]
    listed: Mapping[str, object] | None = getattr(data, "listed_tags", None)
    strange = [name for name in listed or () if name not in samples]
    more = f"; listed and no training image: {len(strange)}, the first {strange[0]!r}" if strange else ""
    say(f"tags: {len(samples) - len(wrong)} of {len(samples)} training images have them{more}")
    if not wrong:
        return None
    return Complaint("tags that can't be used", f"{len(wrong)} images, the first: {wrong[0]}", "")


def _described(data: DataSet, seen: Seen) -> str:
    """One line on a part: counts, sizes, label ids from the most frequent on."""
    line = f"{data.name} {seen.part}: {seen.num_samples} images, {seen.num_images} looked at"
    if seen.num_unlabelled:
        line += f", {seen.num_unlabelled} without a mask"
    if seen.sides:
        widths, heights = zip(*seen.sides, strict=True)
        line += f", {min(widths)} x {min(heights)} to {max(widths)} x {max(heights)} pixels"
    if seen.bad:
        line += f", {len(seen.bad)} can't be decoded (first: {seen.bad[0]})"
    total = int(seen.pixels.sum())
    if not total:
        return line + ", no labels"
    shares = [(count / total, label) for label, count in enumerate(seen.pixels) if count]
    names = [*(f"{i} {name}" for i, name in enumerate(data.classes)), "ignored"]
    said = [f"{names[label]} {100 * share:.1f} %" for share, label in sorted(shares, reverse=True)]
    return f"{line}; labels {', '.join(said[:8])}{f' and {len(said) - 8} more' if len(said) > 8 else ''}"


def _num_images(config: Config, parts: list[Seen]) -> int | None:
    """Training images: as listed, or as the config or the publication has it."""
    for seen in parts:
        if seen.part == "train":
            return seen.num_samples
    options = config.data.options()
    published = PUBLISHED_COUNTS.get(config.data.kind, {}).get("train", (None,))[0]
    counts = [options.get("train") if config.data.kind == "demo" else published]
    counts.append(options.get("limit"))
    known = [count for count in counts if isinstance(count, int)]
    return min(known) if known else None


def _say_costs(config: Config, costs: dict[str, Forecast], flops: float) -> None:
    any_ = next(iter(costs.values()))
    views = any_.num_images * any_.num_views
    forwards = num_forwards(any_.num_images, any_.num_views, config.teacher.batch)
    say(
        f"{any_.num_images:,} images x {any_.num_views} views = {views:,} views, {forwards:,} forwards of "
        f"{config.teacher.batch}, {_peta(views * flops)} PFLOP; "
        f"{_time(views * flops, config.teacher.precision)}, decoding apart"
    )
    table = Table("cache.tokens", "bytes a view", "in all", "estimated or at most")
    for name, cost in costs.items():
        mark = " (chosen)" if name == config.cache.tokens else ""
        estimated = sum(size for array, size in cost.arrays.items() if array not in EXACT) + cost.other
        table.add_row(name + mark, f"{cost.per_view:,.0f}", human_bytes(cost.total), f"{human_bytes(estimated)}")
    say(table)


def _say_cams(config: Config, shape: TeacherShape, num_images: int, parts: list[Seen]) -> None:
    """The arithmetic of CLIP-ES's maps, images at the mean size of those looked at, else square at cams.max_side."""
    sides = [side for seen in parts if seen.part == "train" for side in seen.sides]
    sides = sides or [(config.cams.max_side, config.cams.max_side)]
    width, height = (round(sum(values) / len(sides)) for values in zip(*sides, strict=True))
    rows, columns = fitted_size(height, width, config.cams.max_side, shape.patch)
    flops = flops_of_cams(shape, rows * columns // shape.patch**2, CLASSES)
    say(
        f"cams: {num_images:,} images of {rows} x {columns} with {CLASSES} classes each, {flops / 1e9:.0f} GFLOP an "
        f"image; {_time(num_images * flops, config.cams.precision)}, decoding and cams.refine apart"
    )


def _say_training(config: Config, shape: TeacherShape, side: int, num_classes: int) -> None:
    """The student's size, and the arithmetic of training it."""
    is_text = config.student.classifier == "text"
    channels = shape.channels if is_text else max(num_classes, 1)
    pixels = side * shape.patch
    cost = cost_of(config.student, channels, pixels, config.train.batch // (config.train.processes or 1))
    say(
        f"student: {config.student.title}, {cost.parameters / 1e6:.1f} M parameters, "
        f"{2 * cost.multiply_adds / 1e9:.3g} GFLOP an image of {pixels} x {pixels} (a multiply-add is two)"
    )
    if known := licence_of(config.student):
        say(f"student's encoder: weights of {config.student.encoder} are under {known} (docs/students.md)")
    flops = flops_of_training(cost, config.train)
    say(
        f"training: {config.train.iterations:,} x {config.train.batch} images x {FORWARDS_A_STEP} forwards' worth = "
        f"{_peta(flops)} PFLOP; {_time(flops, config.train.precision)}, losses and reading apart"
    )


def _peta(flops: float) -> str:
    return f"{flops / 1e15:,.0f}" if flops >= 1e17 else f"{flops / 1e15:.3g}"


def _time(flops: float, precision: str) -> str:
    """What a GPU would take at least, and the rate that this assumes."""
    chosen = "bf16" if precision == "auto" else precision
    hours = flops / SUSTAINED[chosen] / 3600
    said = f"{hours:.3g} hours" if hours >= 1 else f"{60 * hours:.3g} minutes"
    return f"{said} at the least on a GPU that sustains {SUSTAINED[chosen] / 1e12:.3g} TFLOP/s in {chosen}"


def _disk(config: Config, costs: dict[str, Forecast]) -> list[Complaint]:
    """Too little room for what is still to be written."""
    where = config.cache_path
    if not isinstance(where, Path):
        say(f"disk: {where} is not a folder here, its room is not known")
        return []
    there = next(path for path in (where.absolute(), *where.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    has = sum(file.stat().st_size for file in where.rglob("*") if file.is_file()) if where.is_dir() else 0
    missing = SPARE * costs[config.cache.tokens].total - has
    say(f"disk: {human_bytes(free)} free at {there}, {human_bytes(max(missing, 0))} to be written")
    if missing <= free:
        return []
    fits = [name for name, cost in costs.items() if SPARE * cost.total - has <= free]
    todo = f"cache.tokens: {' or '.join(fits)} would fit; or" if fits else "Make room,"
    what = f"{where}: needs {human_bytes(missing)}, {human_bytes(free)} are free."
    return [Complaint("too little disk", what, f"{todo} point cache.path elsewhere.")]
