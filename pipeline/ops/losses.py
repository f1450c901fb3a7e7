"""The training losses as the paper writes them, in plain torch; autograd differentiates. Read and change these.

`closed_form.py` has faster ones of the same names and signatures; `train.losses` chooses, tests hold them equal.
All are scalars, 0 but still part of the graph when there is nothing to act on. Halves are computed in float32.

Axes: B images, C channels, H x W the loss grid, L = H * W, h x w tokens, S seen classes, P potential objects
of the batch, K = S + P label ids, M bank entries or generated features.
Label ids: 0..S-1 seen, S..S+P-1 potential objects, IGNORE for the rest.
Equations are those of CLIPTeacher; focal and dice are ZegCLIP's NEL.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from math import sqrt
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.labels import MOST_CLASSES

IGNORE = -100  # torch's own default ignore_index; of label ids, where a label map's -1 is no id
TEMPERATURE = 0.07  # tau of eq. 3, CLIPTeacher, implementation details
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0  # ZegCLIP's sigmoid focal loss
PSEUDO_IDS = 254  # pseudo maps hold 1..253; 254 (never written) and 255 (padding) are no objects
LABEL_VALUES = MOST_CLASSES + 2  # ids of a label map, and at the end its -1

Params = ParamSpec("Params")
Result = TypeVar("Result")


def in_float32(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Run a function at least in float32: half-precision tensors are cast, autocast is off inside."""

    @wraps(function)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        cast_args = [_widened(value) for value in args]
        cast_kwargs = {name: _widened(value) for name, value in kwargs.items()}
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.autocast(next(tensors).device.type, enabled=False):
            return function(*cast_args, **cast_kwargs)  # type: ignore[arg-type]

    return run


def _widened(value: object) -> object:
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value


# --- labels (section 6) --------------------------------------------------------------------------


class CombinedLabels(NamedTuple):
    """Seen labels and potential objects in one map."""

    ids: Tensor  # (B, H, W) int64: 0..S-1, S..S+P-1, IGNORE
    image_of_potential: Tensor  # (P,) int64: the image each potential object lies in
    num_potential: int  # P


def combined_labels(
    labels: Tensor, pseudo: Tensor, seen_ids: Tensor | Sequence[int], potential: bool = True
) -> CombinedLabels:
    """L_a: a seen label where there is one, else the pseudo id of the pixel's token, else IGNORE.

    Potential objects are numbered densely over the whole batch, image by image, in the order of their
    pseudo ids; only those that keep at least one pixel of the grid get a number. With `potential`
    False the ignored area stays ignored (training on seen labels only).

    Shapes: labels (B, H, W) class ids or -1, unseen classes already -1; pseudo (B, h, w) uint8, 0 annotated,
    1..253 objects; seen_ids (S,) class ids in the order of the text features.
    Source: method section 6; pseudo is read by nearest at pixel centres.
    Raises: ValueError if the batch sizes differ.
    """
    if labels.ndim != 3 or pseudo.ndim != 3 or len(labels) != len(pseudo):
        raise ValueError(f"labels {tuple(labels.shape)}, pseudo {tuple(pseudo.shape)}: not one batch.")
    device = labels.device
    seen = torch.as_tensor(seen_ids, dtype=torch.int64, device=device)  # (S,)
    table = torch.full((LABEL_VALUES,), IGNORE, dtype=torch.int64, device=device)
    table[seen] = torch.arange(len(seen), device=device)
    ids = table[labels.long()]  # (B, H, W)
    if not potential:
        return CombinedLabels(ids, seen[:0], 0)

    num_images, height, width = labels.shape
    rows = (2 * torch.arange(height, device=device) + 1) * pseudo.shape[1] // (2 * height)
    columns = (2 * torch.arange(width, device=device) + 1) * pseudo.shape[2] // (2 * width)
    object_id = pseudo.long()[:, rows[:, None], columns]  # (B, H, W)
    takes = (ids == IGNORE) & (object_id > 0) & (object_id < PSEUDO_IDS)
    # One key per image and object; keys in use, in order, become the dense ids.
    key = object_id + PSEUDO_IDS * torch.arange(num_images, device=device)[:, None, None]  # (B, H, W)
    is_used = torch.zeros(num_images * PSEUDO_IDS, dtype=torch.bool, device=device)
    is_used[key[takes]] = True
    rank = is_used.cumsum(0) - 1
    ids = torch.where(takes, len(seen) + rank[key.clamp(max=len(rank) - 1)], ids)
    image_of_potential = is_used.nonzero()[:, 0] // PSEUDO_IDS  # (P,)
    return CombinedLabels(ids, image_of_potential, len(image_of_potential))


def competing(image_of_potential: Tensor, num_images: int, num_seen: int, potentials: str = "batch") -> Tensor | None:
    """Which label ids compete in which image, `competes` of the losses below; None stands for all.

    "batch": every image's potential objects compete everywhere; "image": only an image's own.

    Shapes: image_of_potential (P,) -> (B, S + P) bool, or None.
    Source: method section 6. Raises: ValueError for another word.
    """
    if potentials == "batch":
        return None  # eq. 9 as printed
    if potentials != "image":
        raise ValueError(f"potentials {potentials!r} is neither 'batch' nor 'image'.")
    images = torch.arange(num_images, device=image_of_potential.device)[:, None]
    seen = torch.ones(num_images, num_seen, dtype=torch.bool, device=image_of_potential.device)
    return torch.cat([seen, image_of_potential == images], dim=1)


def _one_hot(ids: Tensor, num: int) -> Tensor:
    """(B, H, W) -> (B, num, H, W) bool; an ignored pixel has no label id."""
    return ids[:, None] == torch.arange(num, device=ids.device)[:, None, None]


# --- global learning module (section 5) ----------------------------------------------------------


def _attention(cls: Tensor, dense: Tensor) -> Tensor:
    weight = (torch.einsum("bc,bcl->bl", cls, dense) / sqrt(dense.shape[1])).softmax(1)  # (B, L), eq. 1
    return torch.einsum("bl,bcl->bc", weight, dense)  # eq. 2


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "attention": _attention,
    "max": lambda cls, dense: dense.amax(2),
    "mean": lambda cls, dense: dense.mean(2),
}


@in_float32
def pooled(cls: Tensor, dense: Tensor, how: str = "attention") -> Tensor:
    """Predicted CLS token of each image, from the student's dense features. Not normalised.

    "attention" weighs positions by their agreement with the true CLS token; "max" and "mean" don't
    look at it (Table 4). The CLS token enters with its own length, as eq. 1 has it.

    Shapes: cls (B, C), dense (B, C, H, W) or (B, C, L) -> (B, C).
    Source: CLIPTeacher eq. 1-2.
    Raises: ValueError if batch or channels differ, or for another word.
    """
    if how not in POOLINGS:
        raise ValueError(f"pooling {how!r} is not one of {sorted(POOLINGS)}.")
    if cls.shape != dense.shape[:2]:
        raise ValueError(f"cls {tuple(cls.shape)} and dense {tuple(dense.shape)} differ in batch or channels.")
    return POOLINGS[how](cls, dense.flatten(2))


@in_float32
def infonce(
    cls: Tensor, predicted: Tensor, bank: Tensor, bank_samples: Tensor, samples: Tensor, tau: float = TEMPERATURE
) -> Tensor:
    """Each predicted CLS token must find its own image's among the batch's and the bank's.

    Keys of the same sample as i, other than i itself, are masked; so are bank entries of sample -1
    (slots not filled yet). CLS tokens of other processes are passed as part of the bank.

    Shapes: cls and predicted (B, C), any length: normalised inside; bank (M, C), bank_samples (M,),
    samples (B,) int64 -> scalar, mean over i.
    Source: eq. 3 with the -log that InfoNCE has; method section 5.
    """
    if len(cls) == 0:
        return predicted.sum()  # 0
    keys = F.normalize(torch.cat([cls, bank]), dim=1)  # (B + M, C)
    scores = F.normalize(predicted, dim=1) @ keys.T / tau  # (B, B + M)
    target = torch.arange(len(cls), device=scores.device)
    key_samples = torch.cat([samples, bank_samples])  # (B + M,)
    is_masked = (key_samples == samples[:, None]) | (key_samples < 0)
    is_masked[target, target] = False
    return F.cross_entropy(scores.masked_fill(is_masked, -torch.inf), target)


# --- pixel learning module (section 6) -----------------------------------------------------------


@in_float32
def centroids(features: Tensor, ids: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The mean feature of each label id over the batch, zero for an id that isn't there.

    Shapes: features (B, C, H, W), ids (B, H, W) -> (num, C), present (num,) bool.
    Source: eq. 7.
    """
    member = _one_hot(ids, num).flatten(2).to(features.dtype)  # (B, num, L)
    sums = (member @ features.flatten(2).transpose(1, 2)).sum(0)  # (num, C)
    counts = member.sum((0, 2))
    return sums / counts.clamp(min=1)[:, None], counts > 0


@in_float32
def generate_loss(generated: Tensor, text_seen: Tensor, present: Tensor) -> Tensor:
    """Squared distance of the generated seen features to their text features, mean over those present.

    Shapes: generated (M, C), one row per id present, in order; text_seen (S, C); present (S + P,) bool
    with M set -> scalar; the square sums over C.
    Source: eq. 8; method section 6.
    """
    present_seen = present[: len(text_seen)]
    target = text_seen[present_seen]
    squares = (generated[: len(target)] - target).square().sum(1)
    return squares.sum() / max(len(target), 1)


def logits(features: Tensor, text_seen: Tensor, potential: Tensor) -> Tensor:
    """Inner products with the seen classes' text features, then the potential objects' generated ones.

    The one large product of the step: it follows autocast; the losses on it cast up.

    Shapes: features (B, C, H, W), text_seen (S, C), potential (P, C) -> (B, S + P, H, W).
    Source: eq. 9; nothing is normalised and there is no temperature (method section 4).
    """
    classifier = torch.cat([text_seen, potential]).to(features.dtype)  # (K, C)
    return torch.einsum("bchw,kc->bkhw", features, classifier)


@in_float32
def cross_entropy(logits: Tensor, ids: Tensor, competes: Tensor | None = None) -> Tensor:
    """Softmax cross-entropy, mean over the pixels that have an id.

    Shapes: logits (B, K, H, W), ids (B, H, W), competes (B, K) bool or None (`competing`) -> scalar.
    Source: eq. 10.
    """
    if competes is not None:
        logits = logits.masked_fill(~competes[:, :, None, None], -torch.inf)
    total = F.cross_entropy(logits, ids, ignore_index=IGNORE, reduction="sum")
    return total / (ids != IGNORE).sum().clamp(min=1)


# --- NEL: focal and dice (section 7) -------------------------------------------------------------


def seen_only(logits: Tensor, ids: Tensor, num_seen: int) -> tuple[Tensor, Tensor]:
    """Logits and ids of the seen classes alone, for NEL without potential objects (`nel: seen`).

    A potential object's pixels become ignored, that is negatives of every seen class. Every image's
    seen classes compete, so the losses then need no `competes`.
    """
    return logits[:, :num_seen], ids.where(ids < num_seen, IGNORE)


def count_masks(ids: Tensor, num: int) -> Tensor:
    """num_masks: over the images, the number of ids present. float32 scalar, may be 0.

    Average it over the processes before handing it to focal and dice, which use at least 1.
    """
    return _one_hot(ids, num).flatten(2).any(2).sum().float()


@in_float32
def focal(logits: Tensor, ids: Tensor, num_masks: Tensor | None = None, competes: Tensor | None = None) -> Tensor:
    """Sigmoid focal loss: mean over pixels, summed over images and label ids, over num_masks.

    An ignored pixel is a negative of every class. A batch without any id has nothing to act on: 0.

    Shapes: logits (B, K, H, W), ids (B, H, W), num_masks scalar (default: counted here),
    competes (B, K) bool or None: what counts -> scalar, unweighted.
    Source: method section 7, ZegCLIP's NEL.
    """
    is_own = _one_hot(ids, logits.shape[1])  # (B, K, H, W)
    wrong = torch.where(is_own, -logits, logits)  # its sigmoid is 1 - p_t, without cancellation
    terms = wrong.sigmoid() ** FOCAL_GAMMA * -F.logsigmoid(-wrong)
    terms = torch.where(is_own, FOCAL_ALPHA, 1 - FOCAL_ALPHA) * terms
    if competes is not None:
        terms = terms * competes[:, :, None, None]
    num_masks = count_masks(ids, logits.shape[1]) if num_masks is None else num_masks
    return terms.mean((2, 3)).sum() * (ids != IGNORE).any() / num_masks.clamp(min=1)


@in_float32
def dice(logits: Tensor, ids: Tensor, num_masks: Tensor | None = None) -> Tensor:
    """1 - (2 sum(p g) + 1) / (sum p + sum g + 1) of each id present in an image, summed, over num_masks.

    p is the sigmoid, g one where the pixel has the id; sums go over all pixels of the image. Other images'
    potential objects are never present, so it makes no difference whether they compete.

    Shapes: logits (B, K, H, W), ids (B, H, W), num_masks scalar (default: counted here) -> scalar, unweighted.
    Source: method section 7, ZegCLIP's NEL.
    """
    p = logits.sigmoid().flatten(2)  # (B, K, L)
    g = _one_hot(ids, logits.shape[1]).flatten(2).to(p.dtype)
    scores = 1 - (2 * (p * g).sum(2) + 1) / (p.sum(2) + g.sum(2) + 1)  # (B, K)
    num_masks = count_masks(ids, logits.shape[1]) if num_masks is None else num_masks
    return (scores * g.amax(2)).sum() / num_masks.clamp(min=1)


def focal_and_dice(
    logits: Tensor, ids: Tensor, num_masks: Tensor | None = None, competes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """NEL's two losses: `focal` and `dice`."""
    return focal(logits, ids, num_masks, competes), dice(logits, ids, num_masks)
