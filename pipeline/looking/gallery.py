"""Which images of a run are worth looking at, and their panels: from cache rows and the student to cards.

Training cards show what the student is taught from (by recipe, in clustered.py and tagged.py), test cards
what it learnt. Axes: H x W an image's own size.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from os.path import commonprefix
from typing import Literal, Protocol

import numpy as np

from cache.errors import StaleCache
from cache.store import Store
from pipeline.config import Config, UserError
from pipeline.data.base import BadImage, DataError, DataSet, Sample
from pipeline.learning.checkpoint import Checkpoint
from pipeline.learning.inference import best_by_group, class_logits, predicted
from pipeline.looking.panels import Panel, Strip, class_panel, error_panel, photo
from pipeline.models.dense import DenseStudent
from pipeline.ops import metrics
from pipeline.ops.labels import IGNORE, LABEL

PARTS = {"train": "training image", "test": "test image"}
CLOSEST = 2000  # names that difflib compares; it is too slow for 100,000
TRIES = 4  # training images looked at for each one that is shown
MAX_CARDS = 200  # of each gallery: a page is for looking at, and stays below 15 MB


@dataclass(frozen=True)
class Selection:
    """What to look at: one image, the images that hold one class, or some spread over all."""

    limit: int
    image: str | None = None
    class_id: int | None = None

    @property
    def most(self) -> int:
        return min(self.limit, MAX_CARDS)


@dataclass(frozen=True)
class Card:
    """One image with its panels. accuracy and iou are percent of this image alone, None without truth.

    `rivals` are the IoUs of the other runs' students by their letters. num_objects counts potential objects of a
    training image, classes in the truth of a test image. `truth` are these classes, where only predictions hold more.
    """

    id: str
    part: Literal["train", "test"]
    panels: tuple[Panel, ...] = ()
    classes: tuple[int, ...] = ()
    accuracy: float | None = None
    iou: float | None = None
    num_objects: int | None = None
    notes: tuple[str, ...] = ()
    rivals: tuple[tuple[str, float], ...] = ()
    truth: tuple[int, ...] | None = None

    def strip(self, data: DataSet) -> Strip:
        """The card as a row of a contact sheet; unseen names carry a star."""
        score = f"accuracy {self.accuracy:.1f} %, IoU {self.iou:.1f} %" if self.accuracy is not None else ""
        caption = "   ".join(part for part in (f"{PARTS[self.part]} {self.id}", score, *self.notes) if part)
        colour = {i: tuple(int(v) for v in data.palette[i]) for i in self.classes}
        names = [(data.classes[i] + " *" * (i in data.unseen_ids), colour[i]) for i in self.classes]
        return Strip(caption, self.panels, names)  # type: ignore[arg-type]


def not_found(what: str, name: str, names: Sequence[str]) -> UserError:
    """The error for a name that doesn't exist, with the valid ones nearest to it."""
    # By characters, which suits names.
    likely = sorted(names, key=lambda other: -len(commonprefix([other, name])))[:CLOSEST]  # noqa: RUF071
    near = difflib.get_close_matches(name, likely, 3, 0.0)
    return UserError(f"{what} {name!r}: there is none of that name; the nearest are {', '.join(map(repr, near))}.")


# ---- training images ---------------------------------------------------------------------------


class Taught(Protocol):
    """What a recipe teaches from: its cards, and which images to see first. `done` are the shards with labels."""

    @property
    def done(self) -> set[int]: ...

    def telling(self, rows: Sequence[int]) -> Sequence[bool]:
        """Whether there is something to see in rows that have labels."""

    def cards(self, sample: Sample, row: int, has_labels: bool, views: int) -> Iterator[Card]:
        """The cards of one image, one a view where the recipe has several. Raises: BadImage."""

    def exported(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """The whole image's labels at its own size, (H, W) as files hold them, and their palette. Raises: BadImage."""


def training_cards(
    store: Store, data: DataSet, chosen: Selection, extracted: set[int], taught: Taught
) -> Iterator[Card]:
    """Cards of cached training images; `extracted` are the shards that are done.

    One selected image shows all its views, others the whole image (view 0).
    Raises: StaleCache when the data set no longer lists a cached image, CorruptShard.
    """
    samples = {sample.id: sample for sample in data.samples("train")}
    ids = store.samples
    rows = [row for shard in sorted(extracted) for row in store.rows(shard)]
    labelled = {row for shard in taught.done for row in store.rows(shard)}
    if chosen.image is None and chosen.class_id is None:
        picked: Iterable[int] = _worth_seeing(rows, chosen.most, labelled, taught)
    else:
        picked = _chosen(rows, chosen, ids.__getitem__, lambda row: _labels(data, samples.get(ids[row])))
    for row in picked:
        sample = samples.get(ids[row])
        if sample is None:
            raise StaleCache(
                f"{store.path}: caches {ids[row]!r}, which {data.name} no longer lists. "
                "Mend the list, or run `cli.py extract` again."
            )
        if int(store.read_rows("status", [row])[0]) != 0:
            yield Card(sample.id, "train", notes=("quarantined: this image could not be read",))
            continue
        try:
            yield from taught.cards(sample, row, row in labelled, store.sizes["V"] if chosen.image else 1)
        except BadImage as error:  # it was good when it was extracted
            yield Card(sample.id, "train", notes=(str(error),))


# ---- test images -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pupil:
    """A trained student and how it is evaluated; its run's letter where a page shows several, else ""."""

    config: Config
    student: DenseStudent
    checkpoint: Checkpoint
    gamma: float
    letter: str = ""

    def guess(self, data: DataSet, image: np.ndarray) -> np.ndarray:
        """Class ids of an image, as `eval` predicts them: (H, W, 3) uint8 -> (H, W) int16."""
        size = self.checkpoint.config.teacher.image_size
        logits = class_logits(self.student, self.checkpoint.text, image, size, self.config.eval)
        best = best_by_group(logits, list(data.seen_ids), list(data.unseen_ids))
        return predicted(best, self.gamma).numpy().astype(LABEL)


def eval_cards(data: DataSet, chosen: Selection, pupils: Sequence[Pupil]) -> Iterator[Card]:
    """Cards of test images, segmented by one student or by several."""
    samples = eval_samples(data)
    picked = _chosen(range(len(samples)), chosen, lambda i: samples[i].id, lambda i: _labels(data, samples[i]))
    for index in picked:
        yield eval_card(data, samples[index], pupils)


def eval_samples(data: DataSet) -> list[Sample]:
    """The test images; none where a data set has no test part."""
    try:
        return data.samples("test")
    except DataError:
        return []


def eval_card(data: DataSet, sample: Sample, pupils: Sequence[Pupil]) -> Card:
    """Image, truth, and prediction and errors of each student; without a mask image and predictions alone."""
    try:
        image = data.image(sample)
    except BadImage as error:
        return Card(sample.id, "test", notes=(str(error),))
    guesses = [(f" {pupil.letter}".rstrip(), pupil.guess(data, image)) for pupil in pupils]
    truth = data.labels(sample)
    if truth is None:
        shown = [class_panel(f"prediction{which}", guess, data.palette) for which, guess in guesses]
        classes = present(*(guess for _, guess in guesses))
        return Card(sample.id, "test", (photo(image), *shown), classes, notes=("no mask",))
    panels = [photo(image), class_panel("truth", truth, data.palette)]
    for which, guess in guesses:
        panels.append(class_panel(f"prediction{which}", guess, data.palette))
        panels.append(error_panel(f"errors{which}", truth, guess, list(data.unseen_ids)))
    classes, true = present(truth, *(guess for _, guess in guesses)), present(truth)
    scores = [scores_of(guess, truth, len(data.classes)) for _, guess in guesses]
    if scores[0] is None:
        return Card(sample.id, "test", tuple(panels), classes, notes=("no labelled pixel",))
    others = tuple((p.letter, s[1]) for p, s in zip(pupils[1:], scores[1:], strict=True) if s is not None)
    return Card(sample.id, "test", tuple(panels), classes, *scores[0], len(true), rivals=others, truth=true)


def scores_of(guess: np.ndarray, truth: np.ndarray, num_classes: int) -> tuple[float, float] | None:
    """Accuracy and mean IoU of one image in percent, of (H, W) class ids; None without a labelled pixel."""
    known = truth != IGNORE
    if not known.any():
        return None
    accuracy = float((guess == truth)[known].mean())
    return 100 * accuracy, 100 * metrics.image_iou(truth, guess, num_classes, IGNORE)


# ---- choosing ----------------------------------------------------------------------------------


def _worth_seeing(rows: Sequence[int], most: int, labelled: set[int], taught: Taught) -> list[int]:
    """Rows spread over the cache, those with something to see before those without."""
    probed = [rows[i] for i in spread(len(rows), TRIES * most)]
    known = [row for row in probed if row in labelled]
    telling = taught.telling(known) if known else []
    good = [row for row, is_telling in zip(known, telling, strict=True) if is_telling]
    rest = [row for row in probed if row not in set(good)]
    picked = [good[i] for i in spread(len(good), most)]
    return sorted(picked + [rest[i] for i in spread(len(rest), most - len(picked))])


def _chosen(
    places: Sequence[int], chosen: Selection, id_of: Callable[[int], str], labels_of: Callable[[int], np.ndarray | None]
) -> Iterable[int]:
    """The places to show: the named image, or those that hold the class, or some spread evenly."""
    if chosen.image is not None:
        return [place for place in places if id_of(place) == chosen.image][:1]
    if chosen.class_id is not None:
        maps = ((place, labels_of(place)) for place in places)
        holding = (place for place, labels in maps if labels is not None and chosen.class_id in labels)
        return islice(holding, chosen.most)
    return [places[i] for i in spread(len(places), chosen.most)]


def _labels(data: DataSet, sample: Sample | None) -> np.ndarray | None:
    return None if sample is None else data.labels(sample)


def spread(num: int, most: int) -> list[int]:
    """At most `most` of 0..num-1, evenly apart: a choice that no result can sway."""
    if num == 0 or most <= 0:
        return []
    return sorted({int(i) for i in np.linspace(0, num - 1, min(num, most)).round()})


def present(*maps: np.ndarray) -> tuple[int, ...]:
    ids = np.unique(np.concatenate([np.unique(m) for m in maps]))
    return tuple(int(i) for i in ids if i != IGNORE)
