"""The student on the test images: one confusion matrix a gamma, and everything from it.

    python cli.py eval --config config/demo.yaml

Writes runs/<name>/eval/metrics.json (percent) and confusion.npy (rows truth, columns prediction).
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

import numpy as np
import torch
from torchmetrics.classification import MulticlassConfusionMatrix

from pipeline.batches import data_of
from pipeline.checkpoint import load_student
from pipeline.config import Config, config_fingerprint, fingerprint
from pipeline.data.base import DataError
from pipeline.inference import best_by_group, class_logits, predicted
from pipeline.ops import metrics
from pipeline.results import read_metrics, result_table
from pipeline.tracking import progress, provenance, required_manifest, say

IGNORE = 255


def evaluate(config: Config) -> dict[str, Any]:
    """Evaluates the finished training on every test image; returns and writes the metrics.

    Raises: MissingCache, StaleCache, DataError (a test image without a mask).
    """
    above = required_manifest(config, "train")
    data = data_of(config)
    samples = data.samples("test")
    identity = fingerprint(config, "eval", above["fingerprint"], {"test": data.identity("test")})
    path = config.run_path / "eval" / "metrics.json"
    found = read_metrics(path)
    if found is not None and found.get("fingerprint") == identity:
        say(f"eval: nothing to do, {path} is of this student, config and data")
        say(result_table({config.name: found}))
        return found
    student, checkpoint = load_student(config.run_path / "train" / above["student"])
    if torch.cuda.is_available():
        student = student.cuda()
    seen, unseen, section = list(data.seen_ids), list(data.unseen_ids), config.eval
    gammas = sorted({*section.gamma_sweep, section.gamma})
    matrices = {g: MulticlassConfusionMatrix(len(data.classes), ignore_index=IGNORE) for g in gammas}
    with progress("eval", len(samples)) as advance:
        for sample in samples:
            labels = data.labels(sample)
            if labels is None:
                raise DataError(
                    f"test image {sample.id}: no mask, and eval needs one. Give test masks in the data set."
                )
            logits = class_logits(
                student, checkpoint.text, data.image(sample), config.teacher.image_size, section
            )
            best, truth = best_by_group(logits, seen, unseen), torch.from_numpy(labels.astype(np.int64))
            for gamma, matrix in matrices.items():
                matrix.update(predicted(best, gamma), truth)
            advance(1)
    summaries = {g: metrics.summary(matrix.compute(), seen, unseen) for g, matrix in matrices.items()}
    result: dict[str, Any] = dict(_rounded(summaries[section.gamma]))
    result |= {
        "per_class": {data.classes[i]: _number(v) for i, v in summaries[section.gamma]["per_class"].items()},
        "gamma": section.gamma,
        "gamma_sweep": {str(g): _rounded(s) for g, s in summaries.items()},
        "unseen": list(data.unseen),
        "num_images": len(samples),
        "mode": section.mode,
        "fingerprint": identity,
        "config": config_fingerprint(config, "eval"),
        "made": provenance() | {"revision": checkpoint.revision},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path.parent / "confusion.npy", matrices[section.gamma].compute().numpy())
    partial = path.with_name(".metrics.json.partial")
    partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
    say(result_table({config.name: result}))
    return result


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 2)


def _rounded(summary: dict[str, Any]) -> dict[str, float | None]:
    return {key: _number(summary[key]) for key in ("pAcc", "mIoU_S", "mIoU_U", "hIoU")}
