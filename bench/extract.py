"""extract, everything on, against the bare forward of the same teacher on tensors in memory.

    python bench/extract.py                              ViT-B/16 at 512 x 512 with random weights
    python bench/extract.py --precision bf16 --batch 8

Everything on: JPEG decoding, views, the forward, float16, the Zarr shards written, read back and verified, the ledger.
The photographs are rendered (640 x 480 JPEG); the weights' values don't matter to the clock. Also: the precision
against float32, and what it does to the features (cosine). The floor of the forward is printed in FLOPs.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import yaml
from interleaved import heading, medians, verdict
from PIL import Image

from cache.ledger import Ledger
from cache.schema import SHARD
from pipeline import extract as stage
from pipeline.config import Config, load
from pipeline.data.base import data_of
from pipeline.data.demo import render_scene
from pipeline.models.teacher import Teacher
from pipeline.ops.views import replay_image
from pipeline.running.table import fingerprint
from pipeline.teaching.encode import mean_colour, teacher_of

WIDTH, HEIGHT, SIDE = 640, 480, 512
TOKENS, WIDTH_OF_VIT, LAYERS = 1025, 768, 12  # ViT-B/16 at 512 x 512


def flops_of_a_forward() -> float:
    """Multiply-adds counted as two: a layer's 12 d^2 weights a token, and attention's 2 L d twice."""
    return LAYERS * 2 * (12 * WIDTH_OF_VIT**2 * TOKENS + 2 * TOKENS**2 * WIDTH_OF_VIT)


def photographs(folder: Path, num: int) -> None:
    for index in range(num):
        scene = render_scene(1, index, HEIGHT)
        Image.fromarray(scene.image).resize((WIDTH, HEIGHT)).save(folder / f"{index:04d}.jpg", quality=90)


def config_of(folder: Path, chosen: argparse.Namespace) -> Config:
    weights = folder / "ViT-B-16.pt"
    torch.manual_seed(0)
    state = open_clip.create_model("ViT-B-16-quickgelu", load_weights=False).state_dict()
    torch.save(state, weights)
    images = folder / "images"
    images.mkdir()
    photographs(images, SHARD)
    part = {"images": "images/*.jpg"}
    description = {"classes": ["a", "b"], "unseen": ["b"], "train": part, "test": part}
    (folder / "dataset.yaml").write_text(yaml.safe_dump(description))
    settings = {
        "name": "bench", "runs": folder / "runs", "data.kind": "folder", "data.root": folder,
        "teacher.model": "ViT-B-16-quickgelu", "teacher.pretrained": weights, "teacher.quick_gelu": "true",
        "teacher.image_size": SIDE, "teacher.batch": chosen.batch, "teacher.precision": chosen.precision,
        "views.num": 1,
    }  # fmt: skip
    base = folder / "base.yaml"
    base.write_text("{}")
    return load(base, [f"{key}={value}" for key, value in settings.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's choice")
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    folder = Path(tempfile.mkdtemp())
    try:
        config = config_of(folder, chosen)
        data = data_of(config.data)
        identity = fingerprint(config, "extract", None, {})
        stage._open_store(config, data, identity, data.samples("train"))
        teacher = teacher_of(config.teacher)
        mean = mean_colour(teacher.mean)
        views = torch.stack(
            [replay_image(data.image(s), np.array([0, 0, WIDTH, HEIGHT]), SIDE, mean) for s in data.samples("train")]
        )
        heading(
            f"extract: {SHARD} photographs, batch {chosen.batch}, {chosen.precision}, {torch.get_num_threads()} threads"
        )

        def bare() -> None:
            for batch in views.split(chosen.batch):
                teacher.encode(batch)

        def everything() -> None:
            Ledger(config.cache_path, "extract").path(0).unlink(missing_ok=True)  # a recorded shard is not made again
            stage.extract_shard(config, identity, 0)

        seconds = medians({"bare": bare, "extract": everything}, chosen.rounds, warm_up=0)
        for name, value in seconds.items():
            rate, speed = SHARD / value, SHARD * flops_of_a_forward() / value / 1e9
            print(f"  {name:<8} {value:6.1f} s, {rate:6.2f} images/s, {speed:5.0f} GFLOP/s of the forward")
        verdict("extract / bare forward, in images/s", seconds["bare"] / seconds["extract"], 0.95, at_most=False)
        if chosen.precision != "fp32":
            compare(teacher, config, views[: chosen.batch])
    finally:
        shutil.rmtree(folder)


def compare(teacher: Teacher, config: Config, views: torch.Tensor) -> None:
    exact = teacher_of(config.teacher.model_copy(update={"precision": "fp32"}))
    cosines = []
    for low, full in zip(teacher.encode(views), exact.encode(views), strict=True):
        cosines.append(torch.cosine_similarity(low.float(), full.float(), dim=-1).min().item())
    taken = []
    for one in (teacher, exact):
        began = time.perf_counter()
        one.encode(views)
        taken.append(time.perf_counter() - began)
    print(
        f"  against float32: lowest cosine CLS {cosines[0]:.5f}, dense tokens {cosines[1]:.5f}; "
        f"{taken[1] / taken[0]:.2f}x as fast"
    )


if __name__ == "__main__":
    main()
