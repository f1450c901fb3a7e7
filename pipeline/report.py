"""Looking into a run: the cache as a tree, and labels, pseudo labels and predictions as one HTML page.

    python cli.py report --config config/demo.yaml          runs/demo/report/index.html
    python cli.py report runs/demo runs/demo-glm_off-0      both side by side: runs/demo/report/side-by-side.html
    python cli.py inspect runs/demo                          a page of a run that is half done
    python cli.py inspect runs/demo --image train-00007 --png panels.png
    python cli.py inspect runs/demo --export pseudo/         pseudo labels, or CLIP-ES's masks, as indexed PNGs
    python cli.py inspect runs/demo --shard 3                one shard: samples, sizes, checksums, when and where

`inspect` writes its page to runs/<name>/inspect/, never over the finished run's report.
"""

from __future__ import annotations

import io
import os
import string
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from cache.errors import MissingCache, StaleCache
from cache.ledger import read_manifest
from cache.store import Store
from pipeline.config import LABELS_FROM, Config, UserError, config_fingerprint
from pipeline.data.base import DataError, DataSet
from pipeline.learning.batches import data_of
from pipeline.learning.checkpoint import CheckpointError, load_student, student_file
from pipeline.looking import charts, facts
from pipeline.looking.clustered import Clustered
from pipeline.looking.facts import Run
from pipeline.looking.gallery import (
    MAX_CARDS,
    Card,
    Pupil,
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
from pipeline.looking.tree import cache_tree
from pipeline.tracking import run_config, say

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
    path, metrics = facts.metrics_path(config), _evaluated(config)
    wanted = config_fingerprint(config, "eval")
    if metrics.get("config") != wanted:
        raise StaleCache(
            f"{path}: eval was run with config {metrics.get('config')}, this config asks for {wanted}. "
            "Run `cli.py eval` again."
        )
    student_file(config.run_path)
    page = config.run_path / "report" / "index.html"
    _write_page(page, [Run(config, metrics)], Selection(limit=config.report.images))
    say(f"report: {page}")
    return page


def report_runs(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Writes one page of several evaluated runs side by side, or of one, into the first one's folder or to `out`.

    Raises: UserError for runs that can't stand side by side (other classes, other test images) or are too many,
    MissingCache (not evaluated), CheckpointError.
    """
    configs = [_config_of(folder) for folder in folders]
    first, names = configs[0], [config.name for config in configs]
    if len(configs) > charts.STYLES:
        raise UserError(
            f"{len(configs)} runs: at most {charts.STYLES} lines can be told apart on a page. Give fewer."
        )
    if len({config.run_path.resolve() for config in configs}) < len(configs):
        raise UserError(f"{', '.join(names)}: one of these runs is named twice. Name each once.")
    runs, about = list[Run](), list[str]()
    for config, letter in zip(configs, string.ascii_uppercase, strict=False):
        _refuse_other_data(first, config)
        metrics = _evaluated(config)
        student_file(config.run_path)
        if metrics.get("config") != config_fingerprint(config, "eval"):
            about.append(f"{config.name} was evaluated with other settings than those in its config.yaml.")
        letter = letter if len(configs) > 1 else ""
        runs.append(Run(config, metrics, letter, facts.differences(first, config)))
    page = out or first.run_path / "report" / ("index.html" if len(runs) == 1 else "side-by-side.html")
    _write_page(page, runs, Selection(limit=first.report.images), about)
    say(f"report: {page}")
    return page


def _evaluated(config: Config) -> dict[str, Any]:
    """The run's metrics. Raises: MissingCache when there are none."""
    path = facts.metrics_path(config)
    metrics = read_manifest(path)
    if metrics is None:
        raise MissingCache(f"{path}: `eval` has not been completed. Run `cli.py eval` first.")
    return metrics


def _refuse_other_data(first: Config, other: Config) -> None:
    one, two = data_of(first), data_of(other)
    for what, a, b in (
        ("classes", one.classes, two.classes),
        ("unseen classes", one.unseen, two.unseen),
        ("test images", one.identity("test"), two.identity("test")),
    ):
        if a != b:
            raise UserError(
                f"{other.name} was made with other {what} than {first.name}: they can't stand side by side. "
                "Write a report of each, or compare their scores with `cli.py results`."
            )


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
        cards, _ = _cards(store, data, chosen, [Run(config, metrics)])
        shown = [card.strip(data) for card in cards if card.panels]
        if not shown:
            raise UserError(f"{run}: no picture to show yet. Run `cli.py extract` first.")
        content = io.BytesIO()
        sheet(shown).save(content, "PNG", optimize=True)
        _write(png, content.getvalue())
        out.print(f"panels: {png}", markup=False, soft_wrap=True)
    if png is None and export is None:
        page = config.run_path / "inspect" / "index.html"
        _write_page(page, [Run(config, metrics)], chosen)
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
    store: Store, data: DataSet, chosen: Selection, runs: Sequence[Run]
) -> tuple[list[Card], list[str]]:
    """The cards of both galleries, and lines on what is shown and why something isn't."""
    config = runs[0].config
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
        pupils = [_pupil(run) for run in runs]
    except CheckpointError:
        about.append("No student yet: test images come with training.")
        return cards, about
    about += [
        f"Not evaluated yet; predictions are of {student_file(run.config.run_path).relative_to(run.config.run_path)}."
        for run in runs
        if run.metrics is None
    ]
    return [*cards, *eval_cards(data, chosen, pupils)], about


def _pupil(run: Run) -> Pupil:
    """The run's student, at the gamma of its evaluation. Raises: CheckpointError."""
    student, checkpoint = load_student(student_file(run.config.run_path))
    if torch.cuda.is_available():
        student = student.cuda()
    gamma = run.metrics["gamma"] if run.metrics else run.config.eval.gamma
    return Pupil(run.config, student, checkpoint, gamma, run.letter)


def _write_page(path: Path, runs: Sequence[Run], chosen: Selection, about: Sequence[str] = ()) -> None:
    """The page of one run, or of several side by side; training images are the first one's."""
    config = runs[0].config
    store, data = Store.open(config.cache_path), data_of(config)
    cards, more = _cards(store, data, chosen, runs)
    _write(path, render(runs, store, data, cards, about=[*about, *more]).encode())


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
