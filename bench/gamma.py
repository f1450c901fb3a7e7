"""gamma without an unseen label: some seen classes are held out as if unseen, and gamma is what suits them best.

    python bench/gamma.py --hold-out sand,tomato,taxi,cactus,zebra --set data.test_seed=2

Trains once with the held-out classes unlabelled (their names stay out of training as unseen names do), then scores
seen against held-out classes on the test images over a range of gammas. Pixels of the truly unseen classes
are not scored, and their names are no candidates. Use development images (the demo's data.test_seed), never the
test split's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import interleaved  # noqa: F401  (makes the project importable)
import numpy as np
import torch
from torchmetrics.classification import MulticlassConfusionMatrix

from pipeline import cluster, extract, train
from pipeline.config import load
from pipeline.data.base import data_of, open_data_set
from pipeline.learning.checkpoint import load_student
from pipeline.learning.inference import best_by_group, class_logits, predicted
from pipeline.ops import metrics
from pipeline.ops.labels import IGNORE
from pipeline.running.console import progress

NO_CANDIDATE = -1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("config/demo.yaml"))
    parser.add_argument("--hold-out", required=True, help="seen classes, separated by commas")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    chosen = parser.parse_args()
    base = load(chosen.config, chosen.settings)
    truly_unseen = open_data_set(base.data.kind, **base.data.options()).unseen
    held_out = chosen.hold_out.split(",")
    hidden = [*truly_unseen, *held_out]
    own = [f"name={base.name}-held-out", f"data.unseen=[{','.join(hidden)}]"]
    config = load(chosen.config, [*chosen.settings, *own])
    extract.extract(config)
    cluster.cluster(config)
    manifest = train.train(config)
    data = data_of(config.data)
    student, checkpoint = load_student(config.run_path / "train" / manifest["student"])
    ids = {name: index for index, name in enumerate(data.classes)}
    seen, held = list(data.seen_ids), [ids[name] for name in held_out]
    unscored = [ids[name] for name in truly_unseen]
    gammas = sorted({*config.eval.gamma_sweep, config.eval.gamma})
    matrices = {g: MulticlassConfusionMatrix(len(data.classes), ignore_index=IGNORE) for g in gammas}
    samples = data.samples("test")
    with progress("gamma", len(samples)) as advance:
        for sample in samples:
            truth = torch.from_numpy(data.labels(sample).astype(np.int64))
            truth[torch.isin(truth, torch.tensor(unscored))] = IGNORE
            image, size = data.image(sample), config.teacher.image_size
            logits = class_logits(student, checkpoint.text, image, size, config.eval)
            logits = logits.clone()  # made in inference mode
            logits[unscored] = NO_CANDIDATE
            best = best_by_group(logits, seen, held)
            for gamma, matrix in matrices.items():
                matrix.update(predicted(best, gamma), truth)
            advance(1)
    scores = {g: metrics.summary(matrix.compute(), seen, held) for g, matrix in matrices.items()}
    for g, score in scores.items():
        print(f"gamma {g:g}: seen {score['mIoU_S']:.1f}, held out {score['mIoU_U']:.1f}, hIoU {score['hIoU']:.1f}")
    print(f"best: gamma {max(scores, key=lambda g: scores[g]['hIoU']):g}")


if __name__ == "__main__":
    main()
