"""What it costs to refine a mask at pixels: PAMR on one thread, the dense CRF by one process and by several.

    python bench/masks.py                       20 synthetic images of VOC's usual size, two classes and background
    python bench/masks.py --processes 1 4 8

Smooth colour fields with noise, and unsure scores; both take the same time whatever they show, but for the
CRF's lattice, which grows with the number of colours.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from interleaved import heading

from pipeline.teaching import crf

HEIGHT, WIDTH, CLASSES = 375, 500, 3  # VOC 2012's most frequent size


def drawn(number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of an image (3, H, W) uint8 and scores (CLASSES, H, W) float32."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH] / 100
    pairs = []
    for _ in range(number):
        a, b, phase = (rng.uniform(0.5, 3, (3, 1, 1)) for _ in range(3))
        image = 128 + 60 * np.sin(a * x + phase) * np.cos(b * y) + rng.normal(0, 8, (3, HEIGHT, WIDTH))
        scores = rng.uniform(0.2, 0.4, (CLASSES, HEIGHT, WIDTH)) + 0.3 * (np.sin(b * x + a * y) > 0)
        pairs.append((image.clip(0, 255).astype(np.uint8), (scores / scores.sum(0)).astype(np.float32)))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    chosen = parser.parse_args()
    pairs = drawn(chosen.images)
    heading(f"{chosen.images} images of {HEIGHT} x {WIDTH}, {CLASSES} scores")

    def shown(name: str, began: float) -> None:
        taken = time.perf_counter() - began
        print(f"{name:24} {1000 * taken / len(pairs):7.0f} ms an image  {len(pairs) / taken:6.2f} images/s", flush=True)

    for number in chosen.processes:  # before torch is loaded here; each start of the processes is counted
        began = time.perf_counter()
        for _ in crf.refine_all(pairs, number):
            pass
        shown(f"CRF, processes: {number}", began)

    import torch

    from pipeline.ops import pamr

    torch.set_num_threads(1)
    tensors = [(torch.from_numpy(image), torch.from_numpy(scores)) for image, scores in pairs]
    pamr.refine(*tensors[0])
    began = time.perf_counter()
    for pair in tensors:
        pamr.refine(*pair)
    shown("PAMR, one thread", began)


if __name__ == "__main__":
    main()
