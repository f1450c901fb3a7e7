"""Evaluation against the bare student forward on the same images.

    python bench/evaluation.py                  SegFormer-B0, 512 x 512, 171 classes, JPEGs of 640 x 480
    python bench/evaluation.py --case demo      the demo's student, 128 x 128, 20 classes, scenes rendered before

Ours, with eval.pictures 0: images and masks read and squashed by the stage's own thread, the student, logits, the best
classes at the image's own size, the confusion matrices of nine gammas. Bare: the student on the same squashed images in
memory, in the same batches; and the same with the logits, its product with the text features, which every segmenter's
head contains.
Weights are random. Images of noise are the worst case: nearly every class is in contention everywhere. Images of
large flat blocks lie nearer to what a trained student makes of photographs.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import interleaved  # makes the project importable
import loader
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import Eval, load
from pipeline.data.base import DataSet, open_data_set
from pipeline.learning.loading import made_ahead
from pipeline.learning.scoring import batched, loaded, predictions
from pipeline.models.student import build_student
from pipeline.ops.labels import IGNORE
from pipeline.ops.metrics import SweptConfusion

CASES = {  # side, channels, seen and unseen classes, images
    "b0": (512, 512, 156, 15, 8),
    "demo": (128, 128, 15, 5, 64),
}
IMAGES = {"noise": loader.GRAINS, "flat": (64, 160)}  # grains of the noise that a JPEG shows, pixels


def data_set(case: str, folder: Path, num: int, grains: tuple[int, ...]) -> DataSet:
    if case == "demo":
        data = open_data_set("demo", train=1, test=num)
        for sample in data.samples("test"):
            data.image(sample)  # rendered here, and kept
        return data
    folder.mkdir()
    loader.photographs(folder, num_train=1, num_test=num, num_classes=171, grains=grains)
    return open_data_set("folder", root=str(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="b0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--batch", type=int, help="default: the schema's")
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    size, channels, num_seen, num_unseen, num = CASES[chosen.case]
    section = Eval(batch=chosen.batch or Eval().batch)
    torch.manual_seed(0)
    config = load(loader.ROOT / "config" / "demo.yaml", loader.CASES[chosen.case][0])
    student = build_student(config.student, channels).eval()
    text = F.normalize(torch.randn(num_seen + num_unseen, channels), dim=1)
    seen, unseen = list(range(num_seen)), list(range(num_seen, len(text)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    interleaved.heading(
        f"evaluation: {chosen.case}, batch {section.batch}, {torch.get_num_threads()} threads, {device}"
    )
    student = student.to(device)
    images = {"scenes": ()} if chosen.case == "demo" else IMAGES
    with tempfile.TemporaryDirectory() as temporary:
        for name, grains in images.items():
            data = data_set(chosen.case, Path(temporary, name), num, grains)
            samples = data.samples("test")
            kept = [
                torch.stack([item.view for item in loaded(data, group, size)]).to(device)
                for group in batched(samples, section.batch)
            ]

            def ours(data: DataSet = data) -> None:
                swept = SweptConfusion(len(text), section.gamma_sweep, IGNORE)
                groups = batched(data.samples("test"), section.batch)
                for group in made_ahead(groups, lambda group: loaded(data, group, size)):
                    for best, truth in predictions(student, text, group, size, section, seen, unseen):
                        swept.update(truth, *best)

            @torch.inference_mode()
            def bare(kept: list[Tensor] = kept, classifier: Tensor | None = None) -> None:
                for views in kept:
                    dense = student(views)
                    if classifier is not None:
                        for features in dense:
                            torch.mm(features.flatten(1).T, classifier)
                if device == "cuda":
                    torch.cuda.synchronize()

            def with_logits(kept: list[Tensor] = kept) -> None:
                bare(kept, text.T.to(device))

            sides = {"ours": ours, "bare": bare, "with logits": with_logits}
            seconds = interleaved.medians(sides, chosen.rounds)
            speeds = ", ".join(f"{side} {num / taken:.2f}" for side, taken in seconds.items())
            print(f"  {name}: images/s {speeds}")
            interleaved.verdict("ours / bare", seconds["bare"] / seconds["ours"], 0.9, at_most=False)
            ratio = seconds["with logits"] / seconds["ours"]
            interleaved.verdict("ours / bare with logits", ratio, 0.9, at_most=False)


if __name__ == "__main__":
    main()
