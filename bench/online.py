"""Our training step against the paper's online one: teacher, K-means and mask fusion inside the step.

    python bench/online.py                              SegFormer-B0, 512 x 512, batch 2, float32
    python bench/online.py --teacher-precision bf16     the online side's teacher as fast as this machine runs it

The online step is written as fairly as we can: the frozen teacher without gradients, in one batch; our own K-means and
fusion by the backend that is faster (bench/cluster.py); then the same losses on what they found. Both sides get the
same images in memory. The teacher has random weights, whose values don't matter to the clock.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import interleaved  # makes the project importable
import open_clip
import torch
import torch.nn.functional as F
from step import FULL, Bench

from pipeline.config import Cluster
from pipeline.models.teacher import Teacher
from pipeline.ops.views import token_state
from pipeline.teaching.pseudo import pseudo_labels

SIDE, PATCH = 512, 16


def random_teacher(precision: str, device: str) -> Teacher:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ViT-B-16.pt"
        torch.manual_seed(0)
        torch.save(open_clip.create_model("ViT-B-16-quickgelu", load_weights=False).state_dict(), path)
        return Teacher.load(
            "ViT-B-16-quickgelu", str(path), image_size=SIDE, quick_gelu=True, precision=precision, device=device
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="the student's")
    parser.add_argument("--teacher-precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    chosen = parser.parse_args()
    bench = Bench("b0", chosen.batch, chosen.device, chosen.precision)
    teacher = random_teacher(chosen.teacher_precision, chosen.device)
    section = Cluster(backend="torch", device=chosen.device)  # the faster one on one thread too
    images = bench.batch["image"].to(torch.uint8)
    inside = torch.ones(SIDE, SIDE, dtype=torch.bool)
    cached = dict(bench.batch)

    def online() -> None:
        cls, tokens = teacher.encode(images)
        grid = F.normalize(tokens.float(), dim=-1)
        state = torch.stack([token_state(labels.cpu(), inside, PATCH) for labels in cached["labels"]])
        pseudo, _, _ = pseudo_labels(grid, state, section)
        bench.batch = {**cached, "cls": cls.float().clone(), "pseudo": pseudo.to(cached["pseudo"].device)}
        bench.ours(FULL)
        bench.wait()

    def ours() -> None:
        bench.batch = cached
        bench.ours(FULL)
        bench.wait()

    interleaved.heading(
        f"online: SegFormer-B0 at 512 x 512, batch {chosen.batch}, {chosen.precision}, teacher "
        f"{chosen.teacher_precision}, {torch.get_num_threads()} threads of {os.cpu_count()} processors"
    )
    seconds = interleaved.medians({"ours": ours, "online": online}, chosen.rounds)
    for name, value in seconds.items():
        print(f"  {name:<8} {1e3 * value:8.0f} ms a step")
    interleaved.verdict("online / ours", seconds["online"] / seconds["ours"], 3.0, at_most=False)


if __name__ == "__main__":
    main()
