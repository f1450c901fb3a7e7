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

import string
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cache.errors import MissingCache, StaleCache
from cache.files import write_atomic
from cache.store import Store
from pipeline.config import Config, UserError
from pipeline.data.base import DataError, DataSet, data_of
from pipeline.learning.checkpoint import CheckpointError, load_student, student_file
from pipeline.looking import charts, facts, panels
from pipeline.looking.clustered import Clustered
from pipeline.looking.exported import export_labels
from pipeline.looking.facts import Run
from pipeline.looking.figures import figures
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
from pipeline.looking.panels import sheet
from pipeline.looking.results import stale
from pipeline.looking.shard import shard_tree
from pipeline.looking.tagged import Tagged
from pipeline.looking.tree import cache_tree
from pipeline.running.console import say
from pipeline.running.manifests import located, run_config
from pipeline.running.rows import check_classes
from pipeline.running.table import config_fingerprint, labels_stage
from pipeline.terminal import Terminal

LABELS = {"clip_teacher": "Pseudo labels", "clip_es": "CAMs"}
LABEL_MAPS = {"clip_teacher": "pseudo label maps", "clip_es": "masks"}
TAUGHT: dict[str, Callable[[Config, Store, DataSet, set[int]], Taught]] = {"clip_teacher": Clustered, "clip_es": Tagged}
PIPE_WIDTH = 160  # columns of the tree where there is no terminal to ask


def report(config: Config) -> Path:
    """Writes the page of an evaluated run, atomically, and returns its path.

    Raises: MissingCache (not evaluated), StaleCache (evaluated by another config), CheckpointError.
    """
    path, metrics = facts.metrics_path(config), _evaluated(config)
    if metrics.get("config") != config_fingerprint(config, "eval"):
        raise StaleCache(
            f"{path}: eval was run with another config than this one (data, student, train or eval differ). Run "
            "`cli.py eval` again."
        )
    if mark := stale(config.run_path, metrics):
        raise StaleCache(f"{path}:{mark}. Run `cli.py eval` again.")
    if Store.is_at(config.cache_path):
        check_classes(data_of(config.data), Store.open(config.cache_path))
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
    configs = [config_of(folder) for folder in folders]
    first, names = configs[0], [config.name for config in configs]
    if len(configs) > charts.STYLES:
        raise UserError(f"{len(configs)} runs: at most {charts.STYLES} lines can be told apart on a page. Give fewer.")
    if len({config.run_path.resolve() for config in configs}) < len(configs):
        raise UserError(f"{', '.join(names)}: one of these runs is named twice. Name each once.")
    runs = []
    for config, letter in zip(configs, string.ascii_uppercase, strict=False):
        _refuse_other_data(first, config)
        metrics = _evaluated(config)
        student_file(config.run_path)
        letter = letter if len(configs) > 1 else ""
        runs.append(Run(config, metrics, letter, facts.differences(first, config)))
    page = out or first.run_path / "report" / ("index.html" if len(runs) == 1 else "side-by-side.html")
    _write_page(page, runs, Selection(limit=first.report.images))
    say(f"report: {page}")
    return page


def _evaluated(config: Config) -> dict[str, Any]:
    """The run's metrics. Raises: MissingCache when there are none."""
    path = facts.metrics_path(config)
    metrics = facts.found_metrics(path, facts.REPORTED)
    if metrics is None:
        raise MissingCache(f"{path}: `eval` has not been completed. Run `cli.py eval` first.")
    return metrics


def _refuse_other_data(first: Config, other: Config) -> None:
    one, two = data_of(first.data), data_of(other.data)
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


def draw_figures(config: Config, out: Path | None = None) -> list[Path]:
    """Writes Figures 5, 6 and 7 of a trained run and what clustering found, into its folder or `out`; the paths.

    Raises: MissingCache (no pseudo labels), CheckpointError (no student), UserError (clip_es has no clusters).
    """
    if config.recipe != "clip_teacher":
        raise UserError(f"figures are of recipe clip_teacher, {config.name} is {config.recipe}: use `cli.py report`.")
    store, data, labelled = Store.open(config.cache_path), data_of(config.data), _labelled(config)
    check_classes(data, store)
    if not labelled:
        raise MissingCache(f"{config.cache_path}: no pseudo labels yet. Run `cli.py cluster` first.")
    pupil = _pupil(Run(config, facts.found_metrics(facts.metrics_path(config), facts.REPORTED)))
    folder, written = out or config.run_path / "figures", []
    for figure in figures(store, data, labelled, pupil):
        written.append(folder / f"{figure.name}.png")
        write_atomic(written[-1], figure.png)
        say(f"{written[-1]}: {figure.caption}")
    if not store.has("pseudo_raw"):
        say("figures: single centres are not kept; set cluster.debug: true and run `cli.py cluster` again.")
    return written


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
    if shard is not None and any((image, class_name, png, export)):
        raise UserError("--shard prints a shard and draws nothing: leave --image, --class, --png and --export out.")
    config = config_of(run)
    store = Store.open(config.cache_path)
    metrics = facts.found_metrics(facts.metrics_path(config), facts.REPORTED)
    out = Terminal() if sys.stdout.isatty() else Terminal(width=PIPE_WIDTH)
    if shard is not None:
        out.print(shard_tree(store, shard))
        return
    tree = cache_tree(config, store, metrics)
    try:
        data = data_of(config.data)
    except DataError:
        out.print(tree)  # a cache can be looked into where its images are not
        raise
    chosen = _selection(config, store, data, image, class_name)
    out.print(tree)
    check_classes(data, store)  # names beside other classes' pictures would be worse than none
    if export is not None:
        taught = TAUGHT[config.recipe](config, store, data, _labelled(config))
        count = export_labels(export, store, data, chosen, taught, labels_stage(config))
        out.print(f"{count} {LABEL_MAPS[config.recipe]}: {export}", soft_wrap=True)
    if png is not None:
        run_shown = [Run(config, metrics)]
        cards, _ = _cards(store, data, chosen, run_shown, _pupils(run_shown))
        shown = [card.strip(data) for card in cards if card.panels]
        if not shown:
            raise UserError(f"{run}: no picture to show yet. Run `cli.py extract` first.")
        write_atomic(png, panels.png(sheet(shown)))
        out.print(f"panels: {png}", soft_wrap=True)
    if png is None and export is None:
        page = config.run_path / "inspect" / "index.html"
        _write_page(page, [Run(config, metrics)], chosen)
        out.print(f"page: {page}", soft_wrap=True)


def config_of(run: Path) -> Config:
    """The run folder's config, wherever the folder lies now."""
    try:
        config = run_config(run)
    except UserError as error:
        if (run / "config.yaml").is_file():
            raise
        known = sorted(path.parent.name for path in run.absolute().parent.glob("*/config.yaml"))
        raise (not_found("run", run.name, known) if known else error) from None
    return located(config, run)


def _selection(config: Config, store: Store, data: DataSet, image: str | None, class_name: str | None) -> Selection:
    if image is not None and class_name is not None:
        raise UserError("--image and --class are two choices: give one of them.")
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
    store: Store, data: DataSet, chosen: Selection, runs: Sequence[Run], pupils: Sequence[Pupil]
) -> tuple[list[Card], list[str]]:
    """The cards of both galleries, and lines on what is shown and why something isn't."""
    config = runs[0].config
    extracted, labelled = facts.done_shards(config, "extract"), _labelled(config)
    about = [
        f"{run.config.name} was evaluated with other settings than those in its config.yaml."
        for run in runs
        if run.metrics is not None and run.metrics.get("config") != config_fingerprint(run.config, "eval")
    ]
    if chosen.limit > MAX_CARDS:
        about.append(f"report.images is {chosen.limit}; a page shows at most {MAX_CARDS} training and test images.")
    if chosen.image is not None:
        about.append(f"Only image {chosen.image}.")
    if chosen.class_id is not None:
        about.append(f"Only images that hold {data.classes[chosen.class_id]}.")
    if len(labelled) < store.num_shards:
        about.append(f"{LABELS[config.recipe]}: {len(labelled)} of {store.num_shards} shards are done.")
    taught = TAUGHT[config.recipe](config, store, data, labelled)
    cards = list(training_cards(store, data, chosen, extracted, taught))
    if not pupils:
        about.append("No student yet: test images come with training.")
        return cards, about
    if runs[0].metrics is None:
        path = student_file(config.run_path).relative_to(config.run_path)
        about.append(f"Not evaluated yet; predictions are of {path}.")
    return [*cards, *eval_cards(data, chosen, pupils)], about


def _pupil(run: Run) -> Pupil:
    """The run's student, at the gamma of its evaluation. Raises: CheckpointError."""
    student, checkpoint = load_student(student_file(run.config.run_path))
    if torch.cuda.is_available():
        student = student.cuda()
    gamma = run.metrics["gamma"] if run.metrics else run.config.eval.gamma
    return Pupil(run.config, student, checkpoint, gamma, run.letter)


def _pupils(runs: Sequence[Run]) -> list[Pupil]:
    """The students of all runs; none when one has none yet. Raises: CheckpointError for one that can't be read."""
    try:
        for run in runs:
            student_file(run.config.run_path)
    except CheckpointError:
        return []
    return [_pupil(run) for run in runs]


def _write_page(path: Path, runs: Sequence[Run], chosen: Selection) -> None:
    """The page of one run, or of several side by side; training images and figures are the first one's."""
    config, pupils = runs[0].config, _pupils(runs)
    store, data = Store.open(config.cache_path), data_of(config.data)
    cards, about = _cards(store, data, chosen, runs, pupils)
    drawn, is_spread = [], chosen.image is None and chosen.class_id is None
    if config.recipe == "clip_teacher" and is_spread:
        drawn = figures(store, data, _labelled(config), pupils[0] if pupils else None, predictions=False)
    write_atomic(path, render(runs, store, data, cards, figures=drawn, about=about, is_spread=is_spread).encode())


def _labelled(config: Config) -> set[int]:
    """Shards that have the labels which the recipe trains on."""
    return facts.done_shards(config, labels_stage(config))
