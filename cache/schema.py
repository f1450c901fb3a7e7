"""The arrays of a cache, as data: what a stage may write and what any reader may rely on.

Axes: N samples, V views, C channels, C_c those of a second model for clustering alone, h and w tokens of a view,
g_h and g_w tokens of an image at its own size, H and W its pixels, K classes, K_max classes of one image, K_c centres,
box x0, y0, x1, y1 in source pixels.
An array over N is cut into shards of 64 samples, the unit of writing and of resume; the others are a
single file. No datum ever equals a fill value, so that a row that nobody wrote can't pass for data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

VERSION = 2  # raised when an older reader would misread a newer cache
SHARD = 64  # samples: at 1 MiB of tokens a view, 64 to 256 MiB a file
FIXED = {"box": 4, "hw": 2}
# What no cache reaches; a header that names more is damaged or was made to exhaust this machine's memory.
MOST_SAMPLES = 10**8
LONGEST = 2**17  # of any other axis
MOST_BYTES = 2**31  # of an array's values for one sample, or of a whole array without a sample axis


@dataclass(frozen=True)
class ArraySpec:
    """One array. `stage` writes it; `chunk` is the number of samples that are read at once, 0 for all."""

    name: str
    axes: tuple[str, ...]
    dtype: str
    fill: float | str
    stage: str
    note: str
    chunk: int = 1
    compressed: bool = False
    padded: bool = False  # vectors past the last valid one are NaN
    blank: bool = False  # rows of quarantined images keep the fill value
    is_sharded: bool = True
    is_debug: bool = False  # made with cluster.debug only

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The array's shape for these axis sizes. Raises: ValueError naming an axis without a size."""
        known = {**sizes, **FIXED}
        missing = [axis for axis in self.axes if axis not in known]
        if missing:
            raise ValueError(f"array {self.name!r} has axes {self.axes}, but no size is given for {missing}.")
        return tuple(int(known[axis]) for axis in self.axes)


NAN = float("nan")
_SPECS = (
    ArraySpec("view", ("N", "V", "box"), "float32", NAN, "extract", "box in source pixels", blank=True),
    ArraySpec("cls", ("N", "V", "C"), "float16", NAN, "extract", "the teacher's CLS token", blank=True),
    # No entropy coding: it gains 8 % on float16 features and doubles the time to read.
    ArraySpec("tokens", ("N", "V", "h", "w", "C"), "float16", NAN, "extract", "the teacher's dense tokens", blank=True),
    ArraySpec(
        "token_scale",
        ("N", "V", "h", "w"),
        "float32",
        NAN,
        "extract",
        "int8 tokens times this are the teacher's",
        blank=True,
    ),
    ArraySpec("pooled", ("N", "V", "C"), "float16", NAN, "extract", "the mean of the dense tokens", blank=True),
    # One byte a sample and always read as a whole, hence not one chunk a sample.
    ArraySpec("status", ("N",), "uint8", 255, "extract", "0 ok, else why it is quarantined", chunk=SHARD),
    ArraySpec("text", ("K", "C"), "float32", NAN, "extract", "unit-norm text features", 0, is_sharded=False),
    ArraySpec(
        "cluster_tokens",
        ("N", "V", "h", "w", "C_c"),
        "float16",
        NAN,
        "encode",
        "dense tokens of cluster.teacher, on the teacher's grid",
        blank=True,
    ),
    ArraySpec(
        "cluster_token_scale",
        ("N", "V", "h", "w"),
        "float32",
        NAN,
        "encode",
        "int8 cluster_tokens times this are the model's",
        blank=True,
    ),
    ArraySpec(
        "pseudo",
        ("N", "V", "h", "w"),
        "uint8",
        254,
        "cluster",
        "0 annotated, 1..P potential objects, 255 padding",
        compressed=True,
    ),
    ArraySpec(
        "pseudo_raw",
        ("N", "V", "h", "w"),
        "uint8",
        254,
        "cluster",
        "the K-means map before fusion, coded as pseudo (cluster.debug)",
        compressed=True,
        is_debug=True,
    ),
    ArraySpec(
        "centroids",
        ("N", "V", "K_c", "C"),
        "float16",
        NAN,
        "cluster",
        "mean token of each fused mask: row p - 1 for mask p, NaN from P on (cluster.debug)",
        padded=True,
        blank=True,
        compressed=True,  # nearly all of it is NaN
        is_debug=True,
    ),
    ArraySpec(
        "named",
        ("N", "V", "K_c"),
        "uint8",
        254,
        "cluster",
        "class id of each potential object, row p - 1 for mask p; the largest: no name (cluster.named_above)",
        blank=True,
        compressed=True,
    ),
    ArraySpec(
        "cam",
        ("N", "K_max", "g_h", "g_w"),
        "float16",
        NAN,
        "cams",
        "refined CAMs 0..1 of an image's classes, on its own token grid; 0 beyond cam_shape and cam_class",
        blank=True,
        compressed=True,
    ),
    ArraySpec(
        "cam_raw",
        ("N", "K_max", "g_h", "g_w"),
        "float16",
        NAN,
        "cams",
        "the same before the attention-based refinement (cams.debug)",
        blank=True,
        compressed=True,
        is_debug=True,
    ),
    ArraySpec(
        "cam_class", ("N", "K_max"), "uint8", 254, "cams", "class id of each CAM, the largest: no more", blank=True
    ),
    ArraySpec("cam_shape", ("N", "hw"), "uint16", 65535, "cams", "tokens down and across", blank=True),
    ArraySpec(
        "mask",
        ("N", "H", "W"),
        "uint8",
        254,
        "cams",
        "class id of each pixel after cams.refine, the largest value beyond the image",
        blank=True,
        compressed=True,
    ),
    ArraySpec(
        "confidence",
        ("N", "H", "W"),
        "uint8",
        255,
        "cams",
        "200 times the largest class score of each pixel after cams.refine",
        blank=True,
        compressed=True,
    ),
)
ARRAYS = {spec.name: spec for spec in _SPECS}
OF_CLASSES = ("named", "cam_class", "mask")  # class ids: 16 bits where 254 or 255 is one
# The other dtypes that an array may have; a cache's header says which one it has.
VARIANTS = {(name, "int8"): replace(ARRAYS[name], dtype="int8", fill=-128) for name in ("tokens", "cluster_tokens")} | {
    (name, "uint16"): replace(ARRAYS[name], dtype="uint16", fill=65534) for name in OF_CLASSES
}
# The ids, by row. An array and not an attribute, because attributes are read at every opening by every
# worker, and 100,000 ids are megabytes of them. 4096 a file: few files, and appending rewrites the last alone.
SAMPLE = ArraySpec("sample", ("N",), "string", "", "extract", "ids", chunk=4096, compressed=True, is_sharded=False)


def spec_of(name: str, dtype: str | None = None) -> ArraySpec:
    """An array's spec in its usual dtype or another. Raises: ValueError for one that it can't have."""
    spec = ARRAYS[name]
    if dtype in (None, spec.dtype):
        return spec
    if (name, dtype) not in VARIANTS:
        raise ValueError(f"array {name!r} can't be {dtype}, only {spec.dtype} or one of {sorted(VARIANTS)}.")
    return VARIANTS[name, str(dtype)]
