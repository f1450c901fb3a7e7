"""The demo's world: procedural scenes with 20 named classes, deterministic by (seed, index).

A scene is one or two textures (stuff) with one to three things on them. A thing is a shaded blob
whose class is its colour *and* its pattern (4 x 4), never its shape: a tiny CLIP can't tell shapes
of a few patches apart, local patterns it can. Every name is one word that no other name contains,
so the text of the seen names says nothing about the unseen ones. Unseen: one texture, and one
thing of every colour and of every pattern.

Coordinates are pixels, y down; images are uint8 RGB, labels are class ids with no ignored pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline.data.base import DataError, DataSet, Sample, check_names
from pipeline.data.classes import BACKGROUND
from pipeline.ops.labels import IGNORE, LABEL

Colour = tuple[int, int, int]
Pattern = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Local pattern coordinates are in periods; the value says where the second colour shows (0..1).
PATTERNS: dict[str, Pattern] = {
    "plain": lambda u, v: np.zeros_like(u),
    "striped": lambda u, v: ((u % 1.0) < 0.5).astype(np.float32),
    "dotted": lambda u, v: (((u + 0.5 * (np.floor(v) % 2)) % 1.0 - 0.5) ** 2 + (v % 1.0 - 0.5) ** 2 < 0.1).astype(
        np.float32
    ),
    "checked": lambda u, v: (((u % 1.0) < 0.5) ^ ((v % 1.0) < 0.5)).astype(np.float32),
}


@dataclass(frozen=True)
class Thing:
    """A blob class: base colour, second colour of the pattern, and whether it has eyes."""

    name: str
    colour: str
    pattern: str
    base: Colour
    second: Colour
    eyes: bool = False


THINGS = (
    Thing("tomato", "red", "plain", (214, 45, 38), (214, 45, 38)),
    Thing("candy", "red", "striped", (220, 40, 60), (252, 240, 240)),
    Thing("ladybird", "red", "dotted", (208, 32, 32), (22, 16, 18), eyes=True),
    Thing("tablecloth", "red", "checked", (206, 40, 48), (250, 236, 232)),
    Thing("lemon", "yellow", "plain", (250, 222, 50), (250, 222, 50)),
    Thing("bee", "yellow", "striped", (250, 198, 26), (34, 26, 18), eyes=True),
    Thing("leopard", "yellow", "dotted", (232, 176, 74), (62, 38, 18), eyes=True),
    Thing("taxi", "yellow", "checked", (252, 206, 20), (30, 28, 26)),
    Thing("frog", "green", "plain", (70, 190, 60), (70, 190, 60), eyes=True),
    Thing("watermelon", "green", "striped", (128, 208, 84), (16, 92, 40)),
    Thing("cactus", "green", "dotted", (34, 142, 74), (226, 248, 190)),
    Thing("turtle", "green", "checked", (116, 186, 70), (30, 84, 44), eyes=True),
    Thing("snowman", "white", "plain", (242, 246, 250), (242, 246, 250), eyes=True),
    Thing("zebra", "white", "striped", (246, 246, 244), (24, 24, 28), eyes=True),
    Thing("dalmatian", "white", "dotted", (246, 244, 240), (30, 28, 30), eyes=True),
    Thing("chessboard", "white", "checked", (244, 240, 232), (28, 26, 26)),
)
TEXTURES = ("grass", "sand", "water", "brick")
CLASSES = (*TEXTURES, *(thing.name for thing in THINGS))
KEPT_SCENES = 4096  # rendered scenes in memory, 64 KiB each at 128 x 128; a training set may be larger
UNSEEN = ("brick", "ladybird", "bee", "turtle", "snowman")
PALETTE = np.array(
    [(86, 125, 70), (222, 200, 150), (64, 130, 200), (168, 92, 70)]
    + [(230, 60, 50), (255, 120, 150), (150, 10, 40), (255, 170, 160)]
    + [(255, 235, 60), (255, 170, 0), (190, 130, 40), (120, 100, 0)]
    + [(60, 220, 60), (0, 120, 60), (130, 220, 160), (30, 70, 30)]
    + [(235, 240, 255), (110, 110, 125), (180, 170, 190), (40, 40, 60)],
    dtype=np.uint8,
)
BACKGROUND_COLOUR = np.zeros(3, np.uint8)
SOME = (1, 3)  # things in a scene

SHADOW_REACH = 1.45  # in radii from a thing's centre: nothing of it is drawn beyond


@dataclass(frozen=True)
class Scene:
    """image (H, W, 3) uint8, labels (H, W) uint8: positions in CLASSES."""

    image: np.ndarray
    labels: np.ndarray


def render_scene(
    seed: int,
    index: int,
    size: int = 128,
    *,
    things: tuple[int, int] = SOME,
    radius: tuple[float, float] = (0.15, 0.26),
) -> Scene:
    """Draws scene `index` of the world `seed`: same arguments, same pixels.

    Shapes: image (size, size, 3), labels (size, size). `things` bounds the
    number of blobs, `radius` theirs as a share of the side.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, index]))
    yy, xx = np.mgrid[0:size, 0:size].astype(np.float32)
    image, labels = _ground(rng, xx, yy)
    places: list[np.ndarray] = []
    for which in rng.permutation(len(THINGS))[: int(rng.integers(things[0], things[1] + 1))]:
        places.append(_free_place(rng, places))
        _draw_thing(rng, image, labels, xx, yy, int(which), places[-1] * size, rng.uniform(*radius) * size)
    lit = image * rng.uniform(0.88, 1.1) + rng.normal(0, 3.0, image.shape)
    return Scene(np.clip(lit, 0, 255).astype(np.uint8), labels)


def _free_place(rng: np.random.Generator, taken: list[np.ndarray]) -> np.ndarray:
    """A centre (x, y) in 0..1, the farthest of four tries from the things already there."""
    tries = rng.uniform(0.15, 0.85, (4, 2))
    if not taken:
        return tries[0]
    distance = np.linalg.norm(tries[:, None] - np.stack(taken), axis=2).min(axis=1)
    return tries[int(distance.argmax())]


def _waves(rng: np.random.Generator, x: np.ndarray, waves: int = 3, period: float = 60.0) -> np.ndarray:
    """A smooth random curve over x, about -1..1."""
    total = np.zeros_like(x)
    for k in range(1, waves + 1):
        total += np.sin(2 * np.pi * k * x / period + rng.uniform(0, 2 * np.pi)) / k
    return total / 1.8


def _ground(rng: np.random.Generator, xx: np.ndarray, yy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    size = xx.shape[0]
    count = int(rng.integers(1, 3))
    chosen = rng.permutation(len(TEXTURES))[:count]
    image = _texture(rng, TEXTURES[chosen[0]], xx, yy)
    labels = np.full(xx.shape, chosen[0], dtype=np.uint8)
    if count == 2:
        angle = rng.uniform(-0.5, 0.5) + (np.pi / 2 if rng.random() < 0.3 else 0.0)
        along = xx * np.cos(angle) + yy * np.sin(angle)
        across = -xx * np.sin(angle) + yy * np.cos(angle)
        edge = np.median(across) + rng.uniform(-0.2, 0.2) * size
        below = across + 6.0 * _waves(rng, along, period=float(size)) > edge
        image = np.where(below[..., None], _texture(rng, TEXTURES[chosen[1]], xx, yy), image)
        labels[below] = chosen[1]
    return image, labels


def _speckle(rng: np.random.Generator, size: int, step_y: int, step_x: int) -> np.ndarray:
    """Blocky noise, about -1..1, with grains of step_y x step_x pixels."""
    coarse = rng.normal(0, 0.6, (size // step_y + 2, size // step_x + 2)).astype(np.float32)
    return np.repeat(np.repeat(coarse, step_y, 0), step_x, 1)[:size, :size]


def _texture(rng: np.random.Generator, name: str, xx: np.ndarray, yy: np.ndarray) -> np.ndarray:
    size = xx.shape[0]
    if name == "grass":
        blades = _speckle(rng, size, 5, 1) + 0.5 * _speckle(rng, size, 2, 2)
        return np.array([74, 112, 58], np.float32) + blades[..., None] * np.array([16, 26, 12], np.float32)
    if name == "sand":
        ripples = np.sin(2 * np.pi * yy / rng.uniform(14, 20) + 0.8 * _waves(rng, xx))
        shade = 0.5 * ripples + _speckle(rng, size, 1, 1)
        return np.array([212, 190, 146], np.float32) + shade[..., None] * np.array([11, 11, 10], np.float32)
    if name == "water":
        swell = np.sin(2 * np.pi * yy / rng.uniform(7, 9) + 1.6 * _waves(rng, xx, period=44.0) + 0.05 * xx)
        crest = np.maximum(swell - 0.6, 0)[..., None] * np.array([150, 130, 90], np.float32)
        return np.array([44, 104, 178], np.float32) + swell[..., None] * np.array([8, 16, 20], np.float32) + crest
    course, length = 8, 16  # a brick's height and width in pixels, mortar included
    dy, dx = rng.integers(0, course), rng.integers(0, length)
    row = np.floor((yy + dy) / course)
    column = (xx + dx + (row % 2) * length / 2) % length
    mortar = (((yy + dy) % course) < 1.5) | (column < 1.5)
    tint = (
        _speckle(rng, 2 * size, 1, 1)[
            row.astype(int) % size, ((xx + dx + (row % 2) * length / 2) // length).astype(int) % size
        ]
        * 16
    )
    body = np.array([160, 84, 60], np.float32) + tint[..., None] + 5 * _speckle(rng, size, 1, 1)[..., None]
    return np.where(mortar[..., None], np.array([196, 184, 170], np.float32), body)


def _draw_thing(
    rng: np.random.Generator,
    image: np.ndarray,
    labels: np.ndarray,
    xx: np.ndarray,
    yy: np.ndarray,
    which: int,
    centre: np.ndarray,
    radius: float,
) -> None:
    thing, (cx, cy) = THINGS[which], centre
    reach = SHADOW_REACH * radius + 1
    window = tuple(slice(max(0, int(c - reach)), int(c + reach) + 2) for c in (cy, cx))
    image, labels, xx, yy = image[window], labels[window], xx[window], yy[window]
    turn, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.78, 1.0)
    dx, dy = xx - cx, yy - cy
    u = np.cos(turn) * dx + np.sin(turn) * dy
    v = (-np.sin(turn) * dx + np.cos(turn) * dy) / stretch
    angle = np.arctan2(v, u)
    rim = 1.0 + sum(rng.uniform(0.0, 0.09) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) / (k - 1) for k in (2, 3, 4))
    depth = np.hypot(u, v) / (radius * rim)  # 0 at the centre, 1 on the rim
    shadow = np.hypot((dx - 0.12 * radius), (dy - 0.2 * radius) / 0.95) / (1.04 * radius)
    image *= (1 - 0.35 * np.clip((1.12 - shadow) / 0.2, 0, 1) * (labels < len(TEXTURES)))[..., None]

    period = rng.uniform(8.0, 11.0)
    show = PATTERNS[thing.pattern](u / period + rng.uniform(), v / period + rng.uniform())[..., None]
    tint = rng.uniform(-10, 10, 3).astype(np.float32)
    body = (1 - show) * (np.array(thing.base, np.float32) + tint) + show * np.array(thing.second, np.float32)
    light = 1.06 - 0.3 * np.clip(depth, 0, 1) ** 3 - 0.10 * (dx + dy) / (2 * radius)
    body = body * np.clip(light, 0.5, 1.2)[..., None]
    body = np.where(((depth > 0.93) & (depth <= 1.0))[..., None], body * 0.45, body)
    if thing.eyes:
        for side in (-1, 1):
            eye = np.hypot(dx - side * 0.2 * radius, dy + 0.52 * radius)
            body = np.where((eye < 0.15 * radius)[..., None], np.float32(250), body)
            body = np.where((eye < 0.075 * radius)[..., None], np.float32(15), body)
    softness = np.clip((1.0 - depth) * radius + 0.5, 0, 1)[..., None]  # one pixel of anti-aliasing
    image[:] = (1 - softness) * image + softness * body
    labels[depth <= 1.0] = len(TEXTURES) + which


@lru_cache(maxsize=KEPT_SCENES)
def _rendered(image: str, size: int, radius: tuple[float, float], things: tuple[int, int]) -> Scene:
    seed, index = image.split("/")
    return render_scene(int(seed), int(index), size, radius=radius, things=things)


def _is_range(found: object, most: int) -> bool:
    """Two whole numbers in order, 0 to `most`."""
    if not isinstance(found, Sequence) or len(found) != 2 or not all(isinstance(n, int) for n in found):
        return False
    return 0 <= found[0] <= found[1] <= most


def _is_share(found: object) -> bool:
    """Two numbers in order, above 0 and at most a half."""
    if not isinstance(found, Sequence) or len(found) != 2 or not all(isinstance(n, (int, float)) for n in found):
        return False
    return 0 < found[0] <= found[1] <= 0.5


def _table(members: Mapping[str, Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """From the world's ids to those of a data set whose classes stand for the world's: (W,) ids, (K, 3) colours."""
    table, colours = np.full(len(CLASSES), IGNORE, LABEL), []
    for place, (name, parts) in enumerate(members.items()):
        ids = [CLASSES.index(part) for part in check_names(f"demo: classes: {name}", parts, CLASSES)]
        if not ids or (table[ids] != IGNORE).any():
            raise DataError(f"demo: classes: {name} stands for {list(parts)}; want names that no other has.")
        table[ids] = place
        colours.append(BACKGROUND_COLOUR if name == BACKGROUND else PALETTE[ids[0]])
    return table, np.stack(colours)


class DemoDataSet(DataSet):
    """The procedural world as a data set: `train` scenes of `seed`, `test` scenes of `test_seed`.

    Nothing is on disk: a sample's image is its index. Rendered scenes stay in memory (64 KiB each).
    `background` names classes that are one class "background", id 0, of a world in which all others are seen.
    `classes` makes another data set of the world: each new name stands for one or more of the world's, and what
    none stands for has no label. `things` bounds the number of blobs in a scene.
    Raises: DataError when a number is out of range, the two seeds coincide, a name is no class of the world or
    stands in two places.
    """

    name = "demo"

    def __init__(
        self,
        *,
        seed: int = 1,
        test_seed: int = 2,
        train: int = 512,
        test: int = 128,
        size: int = 128,
        unseen: Sequence[str] | None = None,
        radius: tuple[float, float] = (0.15, 0.26),
        background: Sequence[str] = (),
        classes: Mapping[str, Sequence[str]] | None = None,
        things: tuple[int, int] = SOME,
    ) -> None:
        if seed == test_seed:
            raise DataError(f"data.seed and data.test_seed are both {seed}: the test scenes would be training scenes.")
        whole = (seed, test_seed, train, test, size)
        if not all(isinstance(number, int) for number in whole) or min(train, test) < 1 or size < 32:
            raise DataError(
                f"demo data: seed={seed}, test_seed={test_seed}, train={train}, test={test}, size={size}; want whole "
                "numbers, at least 1, 1 and 32 pixels."
            )
        if not _is_share(radius):
            raise DataError(f"demo: radius {radius}; want two shares of the side, least and most, 0 to 0.5.")
        if not _is_range(things, len(THINGS)):
            raise DataError(f"demo: things {things}; want two numbers, least and most, 0 to {len(THINGS)}.")
        if classes is not None and not isinstance(classes, Mapping):
            raise DataError(f"demo: classes {classes!r}; want a name and its names in the world, a class a line.")
        background = check_names("demo: background", background, CLASSES)
        members: dict[str, Sequence[str]] = {BACKGROUND: background} if background else {}
        members |= classes or {name: (name,) for name in CLASSES if name not in background}
        self.table, colours = _table(members)
        has_own_split = not background and classes is None
        super().__init__(
            classes=list(members),
            unseen=unseen if unseen is not None else UNSEEN if has_own_split else (),
            palette=colours,
        )
        self.background = 0 if background else None
        self.seeds, self.counts, self.size = ({"train": seed, "test": test_seed}, {"train": train, "test": test}, size)
        self.radius, self.things = (float(radius[0]), float(radius[1])), (int(things[0]), int(things[1]))

    def render(self, image: str) -> Scene:
        """The scene of a sample's `image`, "seed/index"."""
        return _rendered(image, self.size, self.radius, self.things)

    def samples(self, part: str) -> list[Sample]:
        seed = self.seeds[part]
        return [
            Sample(id=f"{part}-{index:05d}", image=f"{seed}/{index}", mask=f"{seed}/{index}")
            for index in range(self.counts[part])
        ]

    def image(self, sample: Sample) -> np.ndarray:
        return self.render(sample.image).image

    def labels(self, sample: Sample) -> np.ndarray:
        return self.table[self.render(sample.image).labels]

    def stamp(self, sample: Sample) -> str:
        return f"{sample.image}@{self.size}:{self.radius}" + (f":{self.things}" if self.things != SOME else "")
