"""Dense CRF over class scores: every pixel with every other, closer in place and colour counting more.

The package pydensecrf2 (the extra `crf`; it is compiled when it is installed) is reached through this file
alone. It computes on one thread and holds the interpreter's lock, so several images take several processes.

The image goes in as it is. CLIP-ES's published scripts subtract the mean colour first and cast what is left to
bytes, so that every channel darker than its mean wraps round to bright; we don't reproduce that.

Axes: H x W pixels, n + 1 scores (background first).
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import UserError
from pipeline.running.processes import Watched, cores

# Those of CLIP-ES (method section 11), as they are in the DeepLab family.
ROUNDS = 10  # of mean field
NEAR_PIXELS, NEAR_WEIGHT = 1, 3  # the kernel of places alone: its deviation and weight
# Of places and colours: deviations in pixels and of 255, weight.
LIKE_PIXELS, LIKE_LEVELS, LIKE_WEIGHT = (67, 3, 4)
LEAST = 1e-5  # a score of zero would be infinite energy (pydensecrf's own bound)


def refine(image: NDArray, scores: NDArray) -> NDArray:
    """Probabilities of the classes after mean-field inference; they sum to 1 at every pixel.

    Scores are what the CRF takes for its unary probabilities. A single one needs no inference: it is 1.
    Shapes: image (3, H, W) uint8 RGB, scores (n + 1, H, W) from 0 to 1 -> (n + 1, H, W) float32.
    Raises: UserError without the package; ValueError for other shapes or types, or scores out of range.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image is {image.shape} {image.dtype}; (3, H, W) uint8 wanted.")
    if scores.shape[1:] != image.shape[1:] or not len(scores):
        raise ValueError(f"scores {scores.shape} and image {image.shape}: want one size and at least one class.")
    if not (scores.min() >= 0 and scores.max() <= 1):  # so that NaN is out of range too
        raise ValueError(f"scores from {scores.min()} to {scores.max()}; 0 to 1 wanted.")
    package = required()
    num, height, width = scores.shape
    if num == 1:
        return np.ones(scores.shape, np.float32)
    field = package.DenseCRF2D(width, height, num)
    energy = -np.log(np.clip(scores, LEAST, 1)).reshape(num, -1)
    field.setUnaryEnergy(np.ascontiguousarray(energy, np.float32))
    field.addPairwiseGaussian(sxy=NEAR_PIXELS, compat=NEAR_WEIGHT)
    pixels = np.array(image.transpose(1, 2, 0), order="C")  # (H, W, 3), a copy: it must be writable
    field.addPairwiseBilateral(sxy=LIKE_PIXELS, srgb=LIKE_LEVELS, rgbim=pixels, compat=LIKE_WEIGHT)
    return np.array(field.inference(ROUNDS), np.float32).reshape(scores.shape)


def refine_all(pairs: Iterable[tuple[NDArray, NDArray]], processes: int | None = None) -> Iterator[NDArray]:
    """`refine` of every pair (image, scores), in order, by as many processes; null: one a core.

    One process is this one, and so it is where none may be started (a dask worker: its siblings are the
    other processes). At most two pairs a process are waiting, so `pairs` may be made as they are taken.
    Raises: as `refine`, and UserError when a process is killed.
    """
    required()
    count = processes or cores()
    if count == 1 or multiprocessing.current_process().daemon:
        yield from (refine(image, scores) for image, scores in pairs)
        return
    waiting: deque[Future[NDArray]] = deque()
    # Not forked: this process has threads, of torch's and of decoding.
    with ProcessPoolExecutor(count, mp_context=Watched()) as pool:
        try:
            for image, scores in pairs:
                waiting.append(pool.submit(refine, image, scores))
                if len(waiting) == 2 * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                f"the CRF: one of {count} processes was ended from outside, most often for want of memory. "
                "Run the same command again with a smaller cams.max_side, or on fewer cores (`taskset -c 0`)."
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def required() -> Any:
    """The package's module, so that a stage can ask for it before its work. Raises: UserError without it."""
    try:
        import pydensecrf.densecrf as package
    except ImportError as error:
        is_missing = isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("pydensecrf")
        found = "is not installed" if is_missing else f"can't be loaded ({error})"
        raise UserError(
            f"cams.refine is crf, and its package pydensecrf2 {found}. Run `pip install 'pydensecrf2>=1.1'` (it is "
            "compiled, so it wants a C++ compiler), or set cams.refine to pamr or none."
        ) from None
    return package
