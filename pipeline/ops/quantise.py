"""Dense tokens as int8 with one scale a token: half the bytes of float16 for a cosine error of about 3e-5.

Axes: any leading ones, C channels last. Works on any device; the extraction quantises where the teacher runs.
"""

import torch
from torch import Tensor

LARGEST = 127  # -128 is the cache's "never written"


def quantised(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens as whole numbers -127..127 and the scale that takes them back.

    The scale is float32: float16 would cost half as much, 0.2 % of the tokens' bytes, but would have to be
    rounded upwards to keep the range, and short tokens would lose it (below 6e-5 float16 has fewer digits).
    A token of zeros has scale 1. What isn't finite stays so in the scale.

    Shapes: tokens (..., C) -> (..., C) int8, (...) float32.
    """
    values = tokens.float()
    scale = values.abs().amax(-1) / LARGEST  # (...)
    scale = torch.where(scale == 0, 1.0, scale)
    return (values / scale[..., None]).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale


def dequantised(numbers: Tensor, scale: Tensor) -> Tensor:
    """What `quantised` was given, but for rounding: (..., C) int8, (...) float32 -> (..., C) float32."""
    return numbers.float() * scale[..., None]
