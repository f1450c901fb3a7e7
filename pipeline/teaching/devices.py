"""Where a stage computes: what the config's `device` keys mean on this machine."""

from __future__ import annotations

import torch

from pipeline.config import ConfigError


def device_of(key: str, wanted: str) -> torch.device:
    """`auto` is a GPU where torch sees one. Raises: ConfigError for a name that is none, or a GPU that isn't there."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ConfigError(f"{key} is {wanted!r}: want auto, cpu, cuda or cuda:1.") from None
    num = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= num:
        raise ConfigError(
            f"{key} is {wanted!r}, and torch sees {num or 'no'} GPUs here. Set it to auto or cpu."
        )
    return device
