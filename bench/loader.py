"""How long a training step waits for its images: the share of the run's own clock that is `data`.

    python bench/loader.py                      SegFormer-B0, 512 x 512, batch 2, from 48 JPEGs of 640 x 480
    python bench/loader.py --case demo          the demo: 768 scenes of 128 x 128, batch 8, three epochs
    python bench/loader.py --case b0 --set train.views_in_memory_gb=0 --set train.workers=1

The run is the real one: extract, cluster, and the train stage's own steps on its own batches; the first step, which
warms up, doesn't count, the first epoch does, since then nothing is in memory yet. The teacher is the demo's, at the
student's size. JPEGs are noise of several sizes, about as large in bytes as photographs are (0.2 bytes a pixel).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import interleaved  # makes the project importable
import numpy as np
import torch
from PIL import Image

from pipeline.cluster import cluster
from pipeline.config import Config, load
from pipeline.extract import extract
from pipeline.learning.batches import training_batches
from pipeline.learning.journal import Clock
from pipeline.learning.training import new_run, open_accelerator, prepare
from pipeline.train import _step

ROOT = Path(__file__).resolve().parents[1]
SIDES, NUM_CLASSES, NUM_IMAGES = (640, 480), 20, 48  # COCO's usual image
GRAINS = (1, 4, 16, 64)  # sides of the noise's grains, pixels
PHOTOGRAPHS = (
    "data={kind: folder, root: FOLDER}",
    "teacher.image_size=512",
    "teacher.batch=4",
    "views.num=2",
    "cluster.debug=false",
    "student={arch: Segformer, encoder: mit_b0, encoder_weights: null}",
    "train.batch=2",
    "train.precision=fp32",
    "train.photometric=true",
    "train.nel=all",
)
CASES = {"b0": (PHOTOGRAPHS, 48), "demo": ((), 288)}  # settings, steps: two epochs, three


def photographs(
    folder: Path,
    num_train: int = NUM_IMAGES,
    num_test: int = 1,
    num_classes: int = NUM_CLASSES,
    grains: tuple[int, ...] = GRAINS,
) -> None:
    """Noise of several sizes as JPEGs, masks of blocks with a quarter of 255, and their dataset.yaml."""
    rng, (width, height) = np.random.default_rng(0), SIDES
    names = ", ".join(f"class{i}" for i in range(num_classes))
    parts = ("train", "test")
    (folder / "dataset.yaml").write_text(
        f"classes: [{names}]\nunseen: [class0]\n"
        + "".join(f'{part}: {{images: "{part}/*.jpg", masks: "{part}/*.png"}}\n' for part in parts)
    )
    for part, num in zip(parts, (num_train, num_test), strict=True):
        (folder / part).mkdir()
        for index in range(num):
            total = np.zeros((height, width, 3))
            for grain in grains:
                noise = rng.normal(0, 6 * grain**0.5, (height // grain + 1, width // grain + 1, 3))
                total += noise.repeat(grain, 0).repeat(grain, 1)[:height, :width]
            image = (128 + total).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / part / f"{index:04d}.jpg", quality=90)
            bands = rng.integers(0, num_classes, (height // 32, width // 32)).astype(np.uint8)
            bands[rng.random(bands.shape) < 0.25] = 255
            Image.fromarray(bands.repeat(32, 0).repeat(32, 1)).save(folder / part / f"{index:04d}.png")


def timed(config: Config, num: int) -> tuple[Clock, float]:
    """The clock of `num` steps after one that warms up, and seconds of a step."""
    run = new_run(config, open_accelerator(config, tracks=False), "", None)
    prepare(run)
    clock = Clock()
    for iteration, batch in enumerate(training_batches(run.views, start=0, stop=num + 1)):
        _step(run, batch, iteration, clock)
        if iteration == 0:
            clock = Clock()
    return clock, clock.elapsed_s() / num


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="b0")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    chosen = parser.parse_args()
    settings, num = CASES[chosen.case]
    with tempfile.TemporaryDirectory() as temporary:
        photographs(Path(temporary))
        settings = tuple(setting.replace("FOLDER", temporary) for setting in settings)
        config = load(ROOT / "config" / "demo.yaml", [f"runs={temporary}/runs", *settings, *chosen.settings])
        extract(config)
        cluster(config)
        if chosen.threads:
            torch.set_num_threads(chosen.threads)
        clock, step_s = timed(config, chosen.steps or num)
    interleaved.heading(f"loader: {chosen.case}, {torch.get_num_threads()} threads")
    print(f"  {1e3 * step_s:.1f} ms a step: {clock.line()}")
    interleaved.verdict("data / step", clock.shares()["time/data"], 0.02, at_most=True)


if __name__ == "__main__":
    main()
