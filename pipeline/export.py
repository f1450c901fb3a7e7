"""The student as an ONNX model: any number of images of any size, any classes, no CLIP and no torch to run it.

    python cli.py export runs/demo --out demo.onnx

Inputs: `images` (B, 3, H, W) float32 in 0..255, RGB, H and W multiples of 32; `text` (K, C) float32, a row a
class. Output: `logits` (B, K, H/4, W/4), gamma not added. The run's own class names, unseen names and gamma
travel in the file's metadata, their text features in a `.npy` beside it. What is written is run in
onnxruntime at another size and compared with torch before it gets its name.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cache.files import whole_file, write_atomic
from pipeline.config import UserError
from pipeline.learning.checkpoint import Checkpoint, load_student, student_file
from pipeline.models.dense import DenseStudent
from pipeline.running.console import say

STRIDE = 32  # of the deepest encoder stage: sides are multiples of it
# Batch, height, width that the exporter sees, and that it is tried on.
SHOWN, OTHER = ((2, 64, 96), (1, 128, 64))
LARGEST = 128 * STRIDE  # pixels a side
TOLERANCE = 1e-3  # of a logit, in float32
OPSET = 18  # torch's exporter translates to it
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # in the exporter's errors


class Classified(nn.Module):
    """Images and text features in, logits out: eq. 9 at test time."""

    def __init__(self, student: DenseStudent) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        return torch.einsum("bchw,kc->bkhw", self.student(images), text)


def export(run: Path, out: Path, size: int | None = None) -> tuple[Path, Path]:
    """Writes the ONNX file and, beside it, the text features (K, C); returns both paths.

    `size` fixes the sides, for students whose layers count on one (Swin's windows, UPerNet's pooling).
    Raises: CheckpointError, UserError (the packages of the extra `export` are missing, or the student can't be
    written, or computes something else there than here).
    """
    try:
        import onnx  # noqa: F401  (torch's exporter needs both and says so less clearly)
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"export needs the package {error.name}: pip install -e '.[export]'.") from None
    student, checkpoint = load_student(student_file(run))
    if size is not None and (size % STRIDE or size <= 0):
        raise UserError(f"--size {size}: want a multiple of {STRIDE}.")
    model = Classified(student).eval()
    for part in student.modules():
        switch: Any = getattr(part, "set_attn_implementation", None)
        if switch is not None:  # a model of transformers, whose fused attention has no ONNX
            switch("eager")
    try:
        written = _written(model, checkpoint.text, size)
        for key, value in _described(checkpoint, size).items():
            written.metadata_props.add(key=key, value=value)
        content = written.SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        difference = _difference(session, model, checkpoint.text, size)
    except Exception as error:  # exporter and runtime raise whatever the student's layers make them raise
        what = " ".join(COLOURS.sub("", str(error)).split())[:200]
        todo = "Fix the sides with --size." if size is None else "Export another student."
        title = checkpoint.config.student.title
        raise UserError(f"{title} can't be written as ONNX: {what}. {todo}") from None
    write_atomic(out, content)
    table = out.with_suffix(".text.npy")
    with whole_file(table) as file:
        np.save(file, checkpoint.text.numpy())
    say(
        f"export: {out} ({out.stat().st_size / 1e6:.1f} MB), {table} ({len(checkpoint.text)} classes); largest "
        f"difference from torch {difference:.1e}"
    )
    return out, table


def _written(model: nn.Module, text: Tensor, size: int | None) -> Any:
    """The model as an ONNX protocol buffer; sides are free, or fixed to `size`."""
    batch, height, width = SHOWN if size is None else (SHOWN[0], size, size)
    sides: dict[int, Any] = {0: torch.export.Dim("batch", max=1024)}
    if size is None:
        limit = LARGEST // STRIDE
        rows, columns = (torch.export.Dim(name, min=2, max=limit) for name in ("rows", "columns"))
        sides |= {2: STRIDE * rows, 3: STRIDE * columns}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own parts
        program = torch.onnx.export(
            model,
            (255 * torch.rand(batch, 3, height, width), text),
            input_names=["images", "text"],
            output_names=["logits"],
            dynamic_shapes={"images": sides, "text": {0: torch.export.Dim("classes", max=65535)}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # it is with dynamo
    return program.model_proto


def _difference(session: Any, model: nn.Module, text: Tensor, size: int | None) -> float:
    """The largest difference of a logit between onnxruntime and torch, on another size and other classes."""
    batch, height, width = OTHER if size is None else (OTHER[0], size, size)
    images, other = 255 * torch.rand(batch, 3, height, width), text[: max(len(text) // 2, 2)]
    (found,) = session.run(None, {"images": images.numpy(), "text": other.numpy()})
    with torch.inference_mode():
        wanted = model(images, other).numpy()
    difference = float(np.abs(found - wanted).max())
    if not difference < TOLERANCE:
        raise ValueError(f"onnxruntime's logits differ from torch's by {difference:.3g}")
    return difference


def _described(checkpoint: Checkpoint, size: int | None) -> dict[str, str]:
    config = checkpoint.config
    return {
        "classes": json.dumps(checkpoint.classes),
        "unseen": json.dumps(checkpoint.unseen),
        "gamma": json.dumps(config.eval.gamma),
        "image_size": json.dumps(size or -(-config.teacher.image_size // STRIDE) * STRIDE),
        "fingerprint": checkpoint.identity,
        "revision": json.dumps(checkpoint.revision),
    }
