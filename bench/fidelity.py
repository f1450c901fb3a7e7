"""What a cache of V views gives up against a teacher in every step, on the demo: quality, forwards, time.

    python bench/fidelity.py --set data.test_seed=2 --set train.threads=1     about 2 hours on two cores

Trains the demo's student with the first 1, 2, 4, 8 and 16 of 18 cached views of every image, three seeds each,
then with flips that had a teacher pass of their own, with int8 tokens, and as the paper does, with the teacher
in the step: the demo sees every image less than 18 times, so a cache of 18 views and their flips, each used at
most once, holds exactly what the teacher would have said. Writes evidence/fidelity.md, evidence/fidelity.png and each
metrics.json to evidence/results/.
Finished runs are kept, so the command resumes. Use development scenes, as above, when something is chosen by it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import interleaved
import matplotlib.pyplot as plt
import numpy as np
import torch

from pipeline import cluster, evaluate, extract, train
from pipeline.config import Config, load
from pipeline.data.base import KINDS, Sample, data_of
from pipeline.data.demo import DemoDataSet
from pipeline.learning import training
from pipeline.learning.batches import CachedViews, Place, training_batches
from pipeline.looking.results import read_metrics
from pipeline.ops.views import view_of
from pipeline.running.console import say
from pipeline.running.provenance import provenance
from pipeline.teaching.encode import shard_blocks, teacher_of

CONFIG = Path("config/demo.yaml")
SEEDS = (0, 1, 2)
EPOCHS = 18  # the demo's 1,700 x 8 / 768 = 17.7, rounded up
TRIALS = 64  # training steps and views that are timed; whole batches of the teacher, which are padded


@dataclass(frozen=True)
class Way:
    """One row of the table: the cache it reads, how many of its views, and whether flips have their own."""

    label: str
    cache: str
    views: int
    own_flips: bool = False
    is_online: bool = False


WAYS = {
    "v1": Way("1 view", "views", 1),
    "v4": Way("4 views", "views", 4),
    "online": Way("teacher in the step", "views", EPOCHS, own_flips=True, is_online=True),
    "int8": Way("1 view, int8 tokens", "int8", 1),
    "v1-flips": Way("1 view, flips with a pass of their own", "views", 1, own_flips=True),
    "v2": Way("2 views", "views", 2),
    "v16": Way("16 views", "views", 16),
    "v8": Way("8 views", "views", 8),
}
CACHES = {
    "views": (f"views.num={EPOCHS}", "cache.tokens=stream"),
    "flipped": (f"views.num={EPOCHS}", "cache.tokens=stream", "data.kind=flipped_demo"),
    "int8": ("views.num=1", "cache.tokens=int8"),
}


class FlippedDemo(DemoDataSet):
    """The demo's scenes, mirrored: what the teacher sees of a flipped image."""

    def image(self, sample: Sample) -> np.ndarray:
        return np.ascontiguousarray(super().image(sample)[:, ::-1])

    def labels(self, sample: Sample) -> np.ndarray | None:
        labels = super().labels(sample)
        return None if labels is None else np.ascontiguousarray(labels[:, ::-1])


KINDS["flipped_demo"] = ("fidelity", "FlippedDemo")


class OwnFlips(CachedViews):
    """Training items whose flips are rows of a second cache, made of the mirrored images."""

    flipped: CachedViews

    def __getitem__(self, place: Place) -> dict[str, Any]:
        seed = self.config.train.seed
        rng = np.random.Generator(np.random.Philox(key=[seed, (place.iteration << 20) + place.position]))
        if rng.random() >= self.config.train.flip:
            return self._item(self, place)
        return self._item(self.flipped, place)

    def _item(self, views: CachedViews, place: Place) -> dict[str, Any]:
        """An item of either cache, never flipped again."""
        sample = views.samples[place.row]
        view = view_of(sample.id, place.epoch, self.num_views)
        image, labels = views.replay(sample, views._row("view", place.row)[view])
        pseudo, cls = (torch.from_numpy(views._row(name, place.row)[view]) for name in ("pseudo", "cls"))
        return {"image": image, "labels": labels, "pseudo": pseudo, "cls": cls.float(), "sample": place.row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of {', '.join(WAYS)}")
    parser.add_argument("--runs", default="runs/fidelity", help="folder of the runs")
    parser.add_argument("--table", action="store_true", help="write the table of what has been run, only")
    parser.add_argument("--out", type=Path, default=Path("evidence"))
    parser.add_argument("--set", action="append", default=[], dest="settings")
    chosen = parser.parse_args()
    if not chosen.table:
        for name in chosen.ways.split(","):
            for seed in SEEDS:
                run_one(name, seed, chosen)
    write(chosen)


def config_of(name: str, cache: str, chosen: argparse.Namespace, *more: str) -> Config:
    where = (f"name={name}", f"runs={chosen.runs}", f"cache.path={chosen.runs}/cache-{cache}")
    return load(CONFIG, [*chosen.settings, "cluster.debug=false", *CACHES[cache], *where, *more])


def cached(cache: str, chosen: argparse.Namespace) -> Config:
    config = config_of(f"cache-{cache}", cache, chosen)
    extract.extract(config)
    cluster.cluster(config)
    return config


def run_one(name: str, seed: int, chosen: argparse.Namespace) -> None:
    """One training and its evaluation, unless they are there."""
    way = WAYS[name]
    config = config_of(f"{name}-{seed}", way.cache, chosen, f"train.views={way.views}", f"train.seed={seed}")
    if read_metrics(config.run_path / "eval" / "metrics.json") is not None:
        return
    say(f"fidelity: {way.label}, seed {seed}")
    cached(way.cache, chosen)
    training.CachedViews = CachedViews
    if way.own_flips:
        other = cached("flipped", chosen)
        flipped = CachedViews(other, data_of(other.data))
        training.CachedViews = type("_OwnFlips", (OwnFlips,), {"flipped": flipped})
    train.train(config)
    evaluate.evaluate(config)


def seconds(chosen: argparse.Namespace) -> tuple[float, float]:
    """Seconds of a view in stage one (teacher, clustering, writing left out) and of a training step."""
    config = config_of("timing", "views", chosen, "train.views=1", "train.tracker=none")
    one_view = config_of("timing", "views", chosen, "views.num=1")
    data, teacher = data_of(config.data), teacher_of(config.teacher)
    samples = data.samples("train")[:TRIALS]

    def stage_one() -> None:
        blocks, _ = shard_blocks(
            data, teacher, samples, num_views=1, batch=one_view.teacher.batch, tokens=one_view.cache.tokens
        )
        extract._cluster(one_view, data, teacher, samples, blocks)

    run = training.new_run(config, training.open_accelerator(config, tracks=False), "", None)
    training.prepare(run)
    clock = train.Clock()
    batches = training_batches(run.views, start=0, stop=TRIALS * 5)

    def steps() -> None:
        for iteration in range(TRIALS):
            train._step(run, next(batches), iteration, clock)

    took = interleaved.medians({"stage one": stage_one, "training": steps}, rounds=3)
    return took["stage one"] / TRIALS, took["training"] / TRIALS


def forwards(way: Way, config: Config, images: int) -> int:
    if way.is_online:
        return config.train.iterations * config.train.batch
    return images * way.views * (2 if way.own_flips else 1)


def write(chosen: argparse.Namespace) -> None:
    """The table and the plot of what has been run."""
    config = config_of("cache-views", "views", chosen)
    images = len(data_of(config.data).samples("train"))
    view_s, step_s = seconds(chosen)
    rows, points = [], []
    order = ("v1", "v2", "v4", "v8", "v16", "online", "v1-flips", "int8")
    for name in order:
        found = [read_metrics(Path(chosen.runs) / f"{name}-{seed}" / "eval" / "metrics.json") for seed in SEEDS]
        results = [metrics for metrics in found if metrics is not None]
        if not results:
            continue
        (chosen.out / "results").mkdir(parents=True, exist_ok=True)
        for seed, metrics in zip(SEEDS, found, strict=True):
            if metrics is not None:
                kept = chosen.out / "results" / f"fidelity-{name}-{seed}.json"
                kept.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        way = WAYS[name]
        num = forwards(way, config, images)
        values = {key: [result[key] for result in results] for key in ("mIoU_S", "mIoU_U", "hIoU")}
        wall = num * view_s + config.train.iterations * step_s
        cells = [way.label, len(results), *(_spread(v) for v in values.values()), f"{num:,}", f"{wall:.0f}"]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
        points.append((way, num, values))
    made = provenance()
    head = [
        "# What the cache gives up against the teacher in the step",
        "",
        f"`python bench/fidelity.py {' '.join(f'--set {s}' for s in chosen.settings)}`, {made['date']}, "
        f"{made['machine']}, revision {made['revision']}.",
        "",
        f"The demo, {config.train.iterations} iterations, gamma {config.eval.gamma:g}, percent, mean and sample "
        f"standard deviation over training seeds. Seconds: {1000 * view_s:.1f} ms a view in stage one, "
        f"{1000 * step_s:.0f} ms a training step, measured in turns in one run.",
        "",
        "| training sees | seeds | mIoU(S) | mIoU(U) | hIoU | teacher forwards | seconds |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        "![mIoU(U) and hIoU over the number of teacher forwards](fidelity.png)",
    ]
    chosen.out.mkdir(exist_ok=True)
    page = chosen.out / "fidelity.md"
    said = page.read_text().partition("\n## ")[2] if page.exists() else ""  # what people wrote below stays
    page.write_text("\n".join(head) + ("\n\n## " + said if said else "\n"))
    _plot(points, chosen.out / "fidelity.png")
    say(f"fidelity: {page}")


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def _plot(points: list[tuple[Way, int, dict[str, list[float]]]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), dpi=130, layout="constrained")
    for key, colour in (("hIoU", "#0072B2"), ("mIoU_U", "#D55E00")):  # Okabe and Ito's
        cached_ways = [(n, v[key]) for way, n, v in points if way.cache == "views" and not way.own_flips]
        for marker, chosen, label in (
            ("o-", cached_ways, key.replace("_U", "(U)")),
            (
                "*",
                [(n, v[key]) for way, n, v in points if way.is_online],
                key.replace("_U", "(U)") + ", teacher in the step",
            ),
        ):
            if chosen:
                spread = [statistics.stdev(v) if len(v) > 1 else 0 for _, v in chosen]
                mean = [statistics.mean(v) for _, v in chosen]
                axes.errorbar([n for n, _ in chosen], mean, spread, fmt=marker, color=colour, label=label, capsize=3)
    axes.set(xscale="log", xlabel="teacher forwards", ylabel="percent, development scenes", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
