"""A trained student that can be asked for any names: which text features they have, which of them gamma is for.

A name is a tuple of synonyms, the first of which it is shown under; the best one's logit is its own. Axes: K names,
n synonyms, C channels, h x w the
student's grid (in mode `slide` that of the windows' pixels), H x W the image.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import UserError
from pipeline.data.base import DataError, data_of
from pipeline.data.words import key_of
from pipeline.learning.checkpoint import load_student, student_file
from pipeline.learning.inference import dense_logits, slid, squashed
from pipeline.learning.text import labelled_words, stacked, text_of_names, text_teacher
from pipeline.ops.enlarge import strips
from pipeline.ops.labels import IGNORE, LABEL, MOST_CLASSES
from pipeline.running.rows import different_classes

Name = tuple[str, ...]

QUOTED = r'"(?:[^"]|"")*"'  # as in CSV
MOST_SHOWN = 200  # characters of a list of names in an error

# What `reject` is compared with, from the scores that decide (logits, gamma added), (K, R, W) -> (R, W), 0 to 1.
# A text student's focal loss trains the sigmoid of each name's logit by itself, so it says the same whatever other
# names are asked for; a learned classifier knows cross-entropy alone, and that says nothing of a logit by itself.
SCORES = {"text": lambda scores: scores.amax(0).sigmoid(), "learned": lambda scores: scores.softmax(0).amax(0)}


def parsed_names(text: str, own: Sequence[str] = ()) -> tuple[Name, ...]:
    """Names separated by commas, synonyms by bars: "sofa|couch,cat" -> (("sofa", "couch"), ("cat",)).

    What holds a comma or a bar itself is one of `own`, the run's classes, as it stands there, or is put in double
    quotes, a double quote within them doubled.
    Raises: UserError when there is none, more than MOST_CLASSES, or one word twice (case doesn't count).
    """
    return _checked((name for name in _split(text, own) if name), f"--names {_short(text)}")


def listed_names(names: Iterable[str | Sequence[str]], own: Sequence[str] = ()) -> tuple[Name, ...]:
    """The same of names one by one: ["cat", "sofa|couch"], or ["cat", ("sofa", "couch")]. Commas separate nothing.

    Raises: as parsed_names.
    """
    if not isinstance(names, Iterable):
        raise _wrong_names(f"names {_short(names)}", "not a list of names")
    listed = list(names)
    where, found = f"names {_short(listed)}", []
    for name in listed:
        words = list(name) if isinstance(name, list | tuple) else [name]
        if not words or not all(isinstance(word, str) and word.strip() for word in words):
            raise _wrong_names(where, f"{_short(name)} is no name")
        several = (" ".join(str(word).split()) for word in words)
        found.append(_split(name, own, "|")[0] if isinstance(name, str) else tuple(several))
    return _checked(found, where)


def _checked(found: Iterable[Name], where: str) -> tuple[Name, ...]:
    names = tuple(found)
    repeated = [word for word, num in Counter(key_of(word) for name in names for word in name).items() if num > 1]
    if repeated or not 1 <= len(names) <= MOST_CLASSES or not all(names):
        what = f"{repeated[0]!r} stands there twice" if repeated else f"{len(names)} names"
        raise _wrong_names(where, what if all(names) else "one of them is empty")
    return names


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."


def _wrong_names(where: str, what: str) -> UserError:
    return UserError(
        f"{where}: {what}; want 1 to {MOST_CLASSES} different names, separated by commas, "
        "synonyms of one by |, a name that holds one of these in double quotes."
    )


def _split(text: str, own: Sequence[str], at: str = ",|") -> list[Name]:
    """The words of each name, blank ones left out, split `at` what is outside quotes and own names."""
    special = sorted((name for name in own if set(name) & set(',|"')), key=len, reverse=True)
    whole = [r"\s+".join(map(re.escape, name.split())) for name in special]
    word = re.compile(rf"\s*({'|'.join([*whole, QUOTED])}|[^{at}]*)\s*([{at}]|$)", re.IGNORECASE)
    names: list[list[str]] = [[]]
    place, ended = 0, False
    while not ended:
        found = word.match(text, place)
        assert found is not None  # the last alternative fits anything up to a comma, a bar or the end
        said = found[1]
        if re.fullmatch(QUOTED, said) and not any(re.fullmatch(name, said, re.IGNORECASE) for name in whole):
            said = said[1:-1].replace('""', '"')
        elif said.startswith('"') and not any(re.fullmatch(name, said, re.IGNORECASE) for name in whole):
            raise _wrong_names(f"--names {_short(text)}", "a double quote is not closed, or something follows it")
        if said := " ".join(said.split()):
            names[-1].append(said)
        if found[2] == ",":
            names.append([])
        place, ended = found.end(), not found[2]
    return [tuple(name) for name in names]


@dataclass(frozen=True)
class Asked:
    """Names with their text features, (K, C) or (K, n, C), and which of them the student was trained on with labels."""

    names: tuple[Name, ...]
    text: Tensor
    is_trained: tuple[bool, ...]

    @property
    def titles(self) -> tuple[str, ...]:
        return tuple(name[0] for name in self.names)


class Segmenter:
    """A run's student, loaded once, on the GPU where there is one. Raises: CheckpointError."""

    def __init__(self, run: Path) -> None:
        self.file = student_file(run)
        self.student, self.checkpoint = load_student(self.file)
        if torch.cuda.is_available():
            self.student = self.student.cuda()
        self.config = self.checkpoint.config
        self.is_closed = self.config.student.classifier == "learned"
        self._features: dict[str, Tensor] = {}  # of words that the run's own table lacks

    @cached_property
    def _teacher(self) -> Any:
        return text_teacher(self.checkpoint)

    def renamed(self) -> str:
        """How the class names of the student's data set differ now from its own, where that can be seen; else ""."""
        if ":" in self.config.data.kind:
            return ""  # a module that the run names: whose run this is, nobody knows, and nothing of it is imported
        try:
            data = data_of(self.config.data)
        except DataError:
            return ""  # it lies elsewhere
        own = self.checkpoint.classes
        return "" if data.classes == own else different_classes(own, data.classes)

    def ask(self, names: Sequence[Name] | None) -> Asked:
        """The names as the student takes them; None: the run's own classes.

        A class of the run has its row of the run's table, other words are encoded by the teacher.
        Raises: UserError for names that a learned classifier hasn't learned, or a teacher that can't be loaded.
        """
        checkpoint = self.checkpoint
        names = tuple((name,) for name in checkpoint.classes) if names is None else tuple(names)
        own = {key_of(name): row for name, row in zip(checkpoint.classes, checkpoint.text, strict=True)}
        known = self._features | own
        strange = [word for name in names for word in name if key_of(word) not in known]
        if strange and self.is_closed:
            raise UserError(
                f"--names {strange[0]!r}: this student has learned its {len(known)} classes and knows no "
                f"other name ({', '.join(checkpoint.classes)}). Train with student.classifier text for any names."
            )
        if strange:
            self._features |= dict(zip(map(key_of, strange), self._encoded(strange), strict=True))
            known |= self._features
        text = stacked([[known[key_of(word)] for word in name] for name in names])
        trained = labelled_words(checkpoint)
        return Asked(names, text, tuple(any(key_of(word) in trained for word in name) for name in names))

    def _encoded(self, words: Sequence[str]) -> Tensor:
        try:
            return text_of_names(self.checkpoint, [(word,) for word in words], lambda _: self._teacher)
        except UserError as error:
            raise UserError(
                f"--names {words[0]!r} is none of the run's classes, so the teacher's text encoder must read "
                f"it, and: {error}"
            ) from None

    @torch.inference_mode()
    def scores(
        self, images: Sequence[np.ndarray], asked: Asked, gamma: float | None = None, mode: str | None = None
    ) -> list[Tensor]:
        """What decides, before it is enlarged: logits with gamma (None: the run's) on names never labelled.

        Shapes: images (H, W, 3) uint8 of any sizes -> (K, h, w) float32 each.
        Raises: BadImage in mode `slide` for an image so long that its windows' logits don't fit.
        """
        gamma = self.config.eval.gamma if gamma is None else gamma
        added = torch.tensor([0.0 if trained else gamma for trained in asked.is_trained])
        found = MODES[mode or self.config.eval.mode](self, images, asked.text)
        return [logits + added.to(logits.device)[:, None, None] for logits in found]

    def _whole(self, images: Sequence[np.ndarray], text: Tensor) -> list[Tensor]:
        device = next(self.student.parameters()).device
        views = torch.stack([squashed(image, self.config.teacher.image_size) for image in images])
        dense = self.student(views.to(device)).float()  # (B, C, h, w)
        return list(dense_logits(dense, text.to(device)))

    def _slide(self, images: Sequence[np.ndarray], text: Tensor) -> list[Tensor]:
        """One look, whatever the evaluation's flips and scales; their averaged softmax has no logits."""
        size, section = self.config.teacher.image_size, self.config.eval
        return [slid(self.student, text, image, size, section) for image in images]

    def decide(
        self,
        scores: Tensor,
        size: tuple[int, int],
        reject: float | None = None,
        probabilities: np.ndarray | None = None,
        asked: Asked | None = None,
    ) -> np.ndarray:
        """The winning name of every pixel, IGNORE where its score (see SCORES) lies below `reject`.

        At a tie the earlier name wins; with `asked` one that was trained with labels before one that wasn't, as eval
        decides between seen and unseen.

        Shapes: scores (K, h, w), size (H, W) -> (H, W) int16. The softmax of the scores over the names is written
        into `probabilities` (K, H, W), where given.
        """
        ids, places = np.empty(size, LABEL), range(len(scores))
        order = sorted(places, key=lambda name: not asked.is_trained[name]) if asked else list(places)
        is_sorted = order == list(places)
        names = torch.tensor(order, dtype=torch.int16, device=scores.device)
        for rows, enlarged in strips(scores if is_sorted else scores[order], size):
            # (R, W), the first at a tie; argmax takes three times as long.
            best = names[enlarged.max(0).indices]
            if reject is not None:
                score = SCORES[self.config.student.classifier](enlarged)
                best[score < reject] = IGNORE
            ids[rows] = best.cpu().numpy()
            if probabilities is not None:
                found = enlarged.softmax(0).cpu().numpy()
                probabilities[:, rows] = found if is_sorted else found[np.argsort(order)]
        return ids


MODES = {"whole": Segmenter._whole, "slide": Segmenter._slide}


def check(reject: float | None, mode: str | None, gamma: float | None = None) -> None:
    """Raises: UserError for a threshold that isn't within 0 and 1, an unknown mode, or a gamma that is no number."""
    for key, value in (("gamma", gamma), ("reject", reject)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise UserError(f"{key} {value!r}: want a number.")
    if gamma is not None and not math.isfinite(gamma):
        raise UserError(f"--gamma {gamma}: want a finite number.")
    if reject is not None and not 0 <= reject <= 1:
        raise UserError(f"--reject {reject}: want a score from 0, which rejects nothing, to 1.")
    if mode is not None and mode not in MODES:
        raise UserError(f"--mode {mode!r}: want one of {', '.join(MODES)}.")
