"""Where a stage computes: what the config's `device` keys mean on this machine."""

from __future__ import annotations

import torch

from pipeline.config import ConfigError


def device_of(key: str, wanted: str) -> torch.device:
    """`auto` is a GPU where torch sees one. Raises: ConfigError for a device that torch can't compute on here."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        device = None
    # torch counts no processors, but takes cpu:7.
    if device is None or (device.type == "cpu" and device.index):
        raise ConfigError(f"{key} is {wanted!r}: want auto, cpu, cuda or cuda:1.")
    num = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= num:
        raise ConfigError(f"{key} is {wanted!r}, and torch sees {num or 'no'} GPUs here. Set it to auto or cpu.")
    try:
        torch.ones(1, device=device).add(1).cpu()  # a name that torch knows may be of another kind of machine
    except Exception:  # whatever the backend raises that isn't there
        raise ConfigError(
            f"{key} is {wanted!r}, and torch {torch.__version__} can't compute on that here. Set it to auto or cpu."
        ) from None
    return device
