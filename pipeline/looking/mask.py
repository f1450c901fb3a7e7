"""What a student found in one image, for Python: an array of ids that knows its names and its picture.

Axes: K names, H x W the image.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cache.files import whole_file
from pipeline.looking.overlay import file_of, painted, shares, with_legend


class Mask(np.lib.mixins.NDArrayOperatorsMixin):
    """Ids (H, W) int16 of an image's pixels, -1 where every name was rejected; numpy takes it for that array.

    ids: the array itself. names: what ids mean, (K,). image: what was looked at, (H, W, 3) uint8, upright.
    """

    def __init__(
        self,
        ids: np.ndarray,
        names: Sequence[str],
        image: np.ndarray,
        probabilities: Callable[[], np.ndarray] | None = None,
    ) -> None:
        self.ids, self.names, self.image = ids, tuple(names), image
        self._probabilities = probabilities

    @property
    def shape(self) -> tuple[int, int]:
        height, width = self.ids.shape
        return height, width

    @property
    def dtype(self) -> np.dtype:
        return self.ids.dtype

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Softmax over the names of the logits that decided, gamma included: (K, H, W) float32, made when asked for."""
        if self._probabilities is None:
            raise AttributeError("this mask was made without its scores")
        return self._probabilities()

    def shares(self) -> dict[str, float]:
        """The part of the pixels that each name has, 0 to 1, the largest first; "none of these" where rejected."""
        return {share.title: share.part for share in shares(self.ids, self.names)}

    def overlay(self, legend: bool = True) -> Image.Image:
        """The image under the colours of what was found, at most 2,048 pixels a side, and which colour is what."""
        picture = painted(self.image, self.ids, len(self.names))
        return with_legend(picture, shares(self.ids, self.names)) if legend else picture

    def picture(self) -> Image.Image:
        """The ids as `predict` writes them: indexed, in colours, 255 where rejected; above 255 names 16-bit greys."""
        return file_of(self.ids, len(self.names))

    def save(self, path: str | Path) -> None:
        """Writes `picture()` as a PNG, whole or not at all. Raises: CacheWriteFailed."""
        with whole_file(Path(path)) as file:
            self.picture().save(file, "PNG")

    def of(self, name: str) -> np.ndarray:
        """Where a name was found: (H, W) bool. Raises: KeyError naming those there are."""
        if name not in self.names:
            raise KeyError(f"{name!r} is none of {', '.join(map(repr, self.names))}")
        return self.ids == self.names.index(name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.ids, dtype, copy=True) if copy else self.ids.astype(dtype or self.ids.dtype, copy=False)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        if any(isinstance(value, Mask) for value in options.get("out") or ()):
            return NotImplemented  # nothing is written into a mask
        return getattr(ufunc, method)(*(v.ids if isinstance(v, Mask) else v for v in inputs), **options)

    def __getitem__(self, place: Any) -> Any:
        return self.ids[place.ids if isinstance(place, Mask) else place]

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        height, width = self.shape
        found = ", ".join(f"{share.title} {share.percent}" for share in shares(self.ids, self.names))
        return f"<Mask of {height} x {width} pixels: {found}>"

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        file = io.BytesIO()
        self.overlay().save(file, "PNG")
        return file.getvalue()
