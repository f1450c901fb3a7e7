"""Looking into a run: the cache as a tree, and labels, pseudo labels and predictions as one HTML page.

    python cli.py report --config config/demo.yaml          runs/demo/report/index.html
    python cli.py inspect runs/demo                          the same of a run that is half done
    python cli.py inspect runs/demo --image train-00007 --png panels.png
    python cli.py inspect runs/demo --export pseudo/         pseudo labels, or CLIP-ES's masks, as indexed PNGs
    python cli.py inspect runs/demo --shard 3                one shard: samples, sizes, checksums, when and where

`inspect` writes its page to runs/<name>/inspect/, never over the finished run's report.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from cache.errors import MissingCache, StaleCache
from cache.ledger import read_manifest
from cache.store import Store
from pipeline.config import LABELS_FROM, Config, UserError, config_fingerprint
from pipeline.data.base import DataError, DataSet
from pipeline.learning.batches import data_of
from pipeline.learning.checkpoint import CheckpointError, load_student, student_file
from pipeline.looking import facts
from pipeline.looking.clustered import Clustered
from pipeline.looking.facts import human_bytes, human_seconds
from pipeline.looking.gallery import (
    MAX_CARDS,
    Card,
    Selection,
    Taught,
    eval_cards,
    eval_samples,
    not_found,
    training_cards,
)
from pipeline.looking.page import render
from pipeline.looking.panels import indexed, sheet
from pipeline.looking.shard import shard_tree
from pipeline.looking.tagged import Tagged
from pipeline.tracking import run_config, say

MANY = 8  # quarantined images listed in the tree
LABELS = {"clip_teacher": "Pseudo labels", "clip_es": "CAMs"}
LABEL_MAPS = {"clip_teacher": "pseudo label maps", "clip_es": "masks"}
TAUGHT: dict[str, Callable[[Config, Store, DataSet, set[int]], Taught]] = {
    "clip_teacher": Clustered,
    "clip_es": Tagged,
}
PIPE_WIDTH = 160  # columns of the tree where there is no terminal to ask


def report(config: Config) -> Path:
    """Writes the page of an evaluated run, atomically, and returns its path.

    Raises: MissingCache (not evaluated), StaleCache (evaluated by another config), CheckpointError.
    """
    path = facts.metrics_path(config)
    metrics = read_manifest(path)
    if metrics is None:
        raise MissingCache(f"{path}: `eval` has not been completed. Run `cli.py eval` first.")
    wanted = config_fingerprint(config, "eval")
    if metrics.get("config") != wanted:
        raise StaleCache(
            f"{path}: eval was run with config {metrics.get('config')}, this config asks for {wanted}. "
            "Run `cli.py eval` again."
        )
    student_file(config.run_path)
    page = config.run_path / "report" / "index.html"
    _write_page(page, config, Selection(limit=config.report.images), metrics)
    say(f"report: {page}")
    return page


def inspect(
    run: Path,
    *,
    image: str | None = None,
    class_name: str | None = None,
    png: Path | None = None,
    export: Path | None = None,
    shard: int | None = None,
) -> None:
    """Prints the cache's tree, then writes what was asked for: a PNG, pseudo labels, or else the page.

    With `shard` it prints that shard instead. Raises: UserError for a run, image, class or shard that
    doesn't exist, naming the nearest that do.
    """
    config = _config_of(run)
    store, metrics = Store.open(config.cache_path), read_manifest(facts.metrics_path(config))
    out = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=PIPE_WIDTH)
    if shard is not None:
        out.print(shard_tree(store, shard))
        return
    tree = cache_tree(config, store, metrics)
    try:
        data = data_of(config)
    except DataError:
        out.print(tree)  # a cache can be looked into where its images are not
        raise
    chosen = _selection(config, store, data, image, class_name)
    out.print(tree)
    if export is not None:
        count = export_labels(export, config, store, data, chosen)
        out.print(f"{count} {LABEL_MAPS[config.recipe]}: {export}", markup=False, soft_wrap=True)
    if png is not None:
        cards, _ = _cards(config, store, data, chosen, metrics)
        shown = [card.strip(data) for card in cards if card.panels]
        if not shown:
            raise UserError(f"{run}: no picture to show yet. Run `cli.py extract` first.")
        content = io.BytesIO()
        sheet(shown).save(content, "PNG", optimize=True)
        _write(png, content.getvalue())
        out.print(f"panels: {png}", markup=False, soft_wrap=True)
    if png is None and export is None:
        page = config.run_path / "inspect" / "index.html"
        _write_page(page, config, chosen, metrics)
        out.print(f"page: {page}", markup=False, soft_wrap=True)


def _config_of(run: Path) -> Config:
    """The run folder's config, wherever the folder lies now."""
    try:
        config = run_config(run)
    except UserError as error:
        if (run / "config.yaml").is_file():
            raise
        known = sorted(path.parent.name for path in run.absolute().parent.glob("*/config.yaml"))
        raise (not_found("run", run.name, known) if known else error) from None
    if config.run_path.resolve() == run.resolve():
        return config
    return config.model_copy(update={"runs": run.absolute().parent.as_posix(), "name": run.absolute().name})


def _selection(
    config: Config, store: Store, data: DataSet, image: str | None, class_name: str | None
) -> Selection:
    if image is not None:
        known = {*store.samples, *(sample.id for sample in eval_samples(data))}
        if image not in known:
            raise not_found("image", image, sorted(known))
    if class_name is not None and class_name not in data.classes:
        raise not_found("class", class_name, data.classes)
    class_id = data.classes.index(class_name) if class_name is not None else None
    return Selection(limit=config.report.images, image=image, class_id=class_id)


# ---- pictures ----------------------------------------------------------------------------------


def _cards(
    config: Config, store: Store, data: DataSet, chosen: Selection, metrics: Mapping[str, Any] | None
) -> tuple[list[Card], list[str]]:
    """The cards of both galleries, and lines on what is shown and why something isn't."""
    extracted, labelled = facts.done_shards(config, "extract"), _labelled(config)
    about = []
    if chosen.limit > MAX_CARDS:
        about.append(
            f"report.images is {chosen.limit}; a page shows at most {MAX_CARDS} training and test images."
        )
    if chosen.image is not None:
        about.append(f"Only image {chosen.image}.")
    if chosen.class_id is not None:
        about.append(f"Only images that hold {data.classes[chosen.class_id]}.")
    if len(labelled) < store.num_shards:
        about.append(f"{LABELS[config.recipe]}: {len(labelled)} of {store.num_shards} shards are done.")
    taught = TAUGHT[config.recipe](config, store, data, labelled)
    cards = list(training_cards(store, data, chosen, extracted, taught))
    try:
        path = student_file(config.run_path)
    except CheckpointError:
        about.append("No student yet: test images come with training.")
        return cards, about
    if metrics is None:
        about.append(f"Not evaluated yet; predictions are of {path.relative_to(config.run_path)}.")
    student, checkpoint = load_student(path)
    if torch.cuda.is_available():
        student = student.cuda()
    gamma = metrics["gamma"] if metrics else config.eval.gamma
    return [*cards, *eval_cards(config, data, chosen, student, checkpoint, gamma)], about


def _write_page(path: Path, config: Config, chosen: Selection, metrics: Mapping[str, Any] | None) -> None:
    store, data = Store.open(config.cache_path), data_of(config)
    cards, about = _cards(config, store, data, chosen, metrics)
    _write(path, render(config, store, data, cards, metrics=metrics, about=about).encode())


def _labelled(config: Config) -> set[int]:
    """Shards that have the labels which the recipe trains on."""
    return facts.done_shards(config, LABELS_FROM[config.recipe])


def export_labels(folder: Path, config: Config, store: Store, data: DataSet, chosen: Selection) -> int:
    """Writes the whole image's pseudo labels or CLIP-ES's mask as <sample id>.png, and returns how many.

    At the image's own size. Pseudo labels: 0 annotated, 1..P potential objects, 255 padding, the token grid by
    nearest. Masks: class ids. Quarantined images have none. Raises: MissingCache (no labels yet).
    """
    stage = LABELS_FROM[config.recipe]
    done = sorted(_labelled(config))
    if not done:
        raise MissingCache(f"{config.cache_path}: no labels yet. Run `cli.py {stage}` first.")
    holds = _holders(data, chosen)
    ids, count = store.samples, 0
    taught = TAUGHT[config.recipe](config, store, data, set(done))
    for shard in done:
        status = store.read_shard("status", shard)
        for place, row in enumerate(store.rows(shard)):
            is_wanted = chosen.image in (None, ids[row]) and (holds is None or ids[row] in holds)
            if is_wanted and status[place] == 0:
                _write(_png_path(folder, ids[row]), indexed(*taught.exported(row)))
                count += 1
    return count


def _holders(data: DataSet, chosen: Selection) -> set[str] | None:
    """Ids of the training images that hold the selected class; None when no class is selected."""
    if chosen.class_id is None:
        return None
    labelled = ((sample.id, data.labels(sample)) for sample in data.samples("train"))
    return {name for name, labels in labelled if labels is not None and np.any(labels == chosen.class_id)}


def _png_path(folder: Path, name: str) -> Path:
    path = folder / f"{name}.png"
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"image {name!r}: its id leads out of {folder}, so it can't name a file there.")
    return path


def _write(path: Path, content: bytes) -> None:
    """Atomically: readers and Snakemake see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# ---- the tree ----------------------------------------------------------------------------------


def cache_tree(config: Config, store: Store, metrics: Mapping[str, Any] | None) -> Tree:
    """The cache at a glance: provenance, arrays with their sizes, how far each stage is, bad images."""
    tree = Tree(Text(str(config.cache_path), "bold"))
    origin = tree.add("made from")
    for name, group in facts.provenance(store).items():
        branch = origin.add(Text(name, "bold"))
        for key, value in group.items():
            branch.add(Text(f"{key}  {value}"))
    arrays = facts.array_facts(config, store)
    total = sum(fact.size_bytes for fact in arrays)
    branch = tree.add(Text(f"arrays, {human_bytes(total)} ({total} bytes)"))
    branch.add("axes  " + ", ".join(f"{axis} {length}" for axis, length in store.sizes.items()))
    branch.add(_array_table(arrays))
    per_view = facts.bytes_per_view(arrays)
    if per_view is not None:
        branch.add(f"a view of an image: {per_view:.0f} bytes, arrays of cluster.debug apart")
    stages = tree.add("stages")
    for fact in facts.stage_facts(config, store, metrics):
        word = "complete" if fact.is_complete else "not run" if not fact.done else "not complete"
        took = f", {human_seconds(fact.seconds)} of work" if fact.seconds else ""
        so_far = f"{fact.done} of {fact.total} {fact.unit}, " if fact.total else ""
        stages.add(Text(f"{fact.name}  {so_far}{word}{took}"))
    bad = facts.quarantined(config)
    branch = tree.add(f"quarantined images: {len(bad) or 'none'}")
    for name, why in list(bad.items())[:MANY]:
        branch.add(Text(f"{name}  {why}"))
    if len(bad) > MANY:
        branch.add(f"and {len(bad) - MANY} more")
    return tree


def _array_table(arrays: list[facts.ArrayFact]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("array", "shape", "dtype"):
        table.add_column(name, overflow="fold", no_wrap=name != "shape")
    for name in ("shards", "bytes", "size", "a view"):
        table.add_column(name, justify="right", no_wrap=True)
    for fact in arrays:
        a_view = "" if fact.bytes_per_view is None else human_bytes(fact.bytes_per_view)
        shape = " x ".join(map(str, fact.shape))
        numbers = (str(fact.num_shards), str(fact.size_bytes), human_bytes(fact.size_bytes), a_view)
        table.add_row(fact.name, shape, fact.dtype, *numbers)
    return table
