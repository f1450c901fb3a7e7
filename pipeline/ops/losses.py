"""The training losses: float32 scalars, 0 but still part of the graph when there is nothing to act on.

Axes: B images, C channels, H x W the loss grid, h x w tokens, S seen classes, P potential objects of
the batch, K = S + P label ids, M bank entries or generated features.
Label ids: 0..S-1 seen, S..S+P-1 potential objects, IGNORE for the rest.
Equations are those of CLIPTeacher; focal and dice are ZegCLIP's NEL.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.closed_form import Logits, SegmentSums, SigmoidSums, SoftmaxEntropy, has_channels_innermost

IGNORE = -100  # torch's own default ignore_index; 255 would collide with a 256th label id
TEMPERATURE = 0.07  # tau of eq. 3, CLIPTeacher, implementation details
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0  # ZegCLIP's sigmoid focal loss
PSEUDO_IDS = 254  # pseudo maps hold 1..253; 254 (never written) and 255 (padding) are no objects

Params = ParamSpec("Params")
Result = TypeVar("Result")


def in_float32(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Run a function in float32: floating tensor arguments are cast, autocast is off inside."""

    @wraps(function)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        cast_args = [_float32(value) for value in args]
        cast_kwargs = {name: _float32(value) for name, value in kwargs.items()}
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.autocast(next(tensors).device.type, enabled=False):
            return function(*cast_args, **cast_kwargs)  # type: ignore[arg-type]

    return run


def _float32(value: object) -> object:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _nothing(connected_to: Tensor) -> Tensor:
    """A zero whose backward reaches the tensor (and doesn't multiply an infinity by zero)."""
    return connected_to.flatten()[:0].sum()


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

    Shapes: labels (B, H, W) class ids, unseen classes already 255; pseudo (B, h, w) uint8, 0 annotated,
    1..253 objects; seen_ids (S,) class ids in the order of the text features.
    Source: method section 6; pseudo is read by nearest at pixel centres.
    Raises: ValueError if the batch sizes differ.
    """
    if labels.ndim != 3 or pseudo.ndim != 3 or len(labels) != len(pseudo):
        raise ValueError(f"labels {tuple(labels.shape)}, pseudo {tuple(pseudo.shape)}: not one batch.")
    device = labels.device
    seen = torch.as_tensor(seen_ids, dtype=torch.int64, device=device)  # (S,)
    table = torch.full((256,), IGNORE, dtype=torch.int64, device=device)
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


def _own(image_of_potential: Tensor, num_images: int, num_seen: int) -> Tensor:
    images = torch.arange(num_images, device=image_of_potential.device)[:, None]
    seen = torch.ones(num_images, num_seen, dtype=torch.bool, device=image_of_potential.device)
    return torch.cat([seen, image_of_potential == images], dim=1)  # (B, S + P)


def _batch(image_of_potential: Tensor, num_images: int, num_seen: int) -> None:
    return None  # eq. 9 as printed: all compete, no mask to build


_COMPETITORS: dict[str, Callable[[Tensor, int, int], Tensor | None]] = {"batch": _batch, "image": _own}


def competing(
    image_of_potential: Tensor, num_images: int, num_seen: int, potentials: str = "batch"
) -> Tensor | None:
    """Which label ids compete in which image, the `planes` of the losses below; None stands for all.

    "batch": every image's potential objects compete everywhere; "image": only an image's own.

    Shapes: image_of_potential (P,) -> (B, S + P) bool, or None.
    Source: method section 6. Raises: ValueError for another word.
    """
    if potentials not in _COMPETITORS:
        raise ValueError(f"potentials {potentials!r} is not one of {sorted(_COMPETITORS)}.")
    return _COMPETITORS[potentials](image_of_potential, num_images, num_seen)


# --- global learning module (section 5) ----------------------------------------------------------


@in_float32
def infonce(
    cls: Tensor,
    predicted: Tensor,
    bank: Tensor,
    bank_samples: Tensor,
    samples: Tensor,
    tau: float = TEMPERATURE,
) -> Tensor:
    """Each predicted CLS token must find its own image's among the batch's and the bank's.

    Keys of the same sample as i, other than i itself, are masked; so are bank entries of sample -1
    (slots not filled yet). CLS tokens of other processes are passed as part of the bank.

    Shapes: cls and predicted (B, C), any length: normalised inside; bank (M, C), bank_samples (M,),
    samples (B,) int64 -> scalar, mean over i.
    Source: eq. 3 with the -log that InfoNCE has; method section 5.
    """
    if len(cls) == 0:
        return _nothing(predicted)
    keys = F.normalize(torch.cat([cls, bank]), dim=1)  # (B + M, C)
    scores = F.normalize(predicted, dim=1) @ keys.T / tau  # (B, B + M)
    target = torch.arange(len(cls), device=scores.device)
    key_samples = torch.cat([samples, bank_samples])  # (B + M,)
    is_masked = (key_samples == samples[:, None]) | (key_samples < 0)
    is_masked[target, target] = False
    return F.cross_entropy(scores.masked_fill(is_masked, -torch.inf), target)


# --- pixel learning module (section 6) -----------------------------------------------------------


@in_float32
def centroids_and_features(features: Tensor, ids: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """`centroids`, and the features handed on in float32: the next term that takes them adds its slope in place.

    Shapes: features (B, C, H, W), ids (B, H, W) -> (num, C), present (num,) bool, (B, C, H, W).
    """
    counts = torch.zeros(num + 1, device=ids.device).index_put_(
        (ids.where(ids >= 0, num).flatten(),), torch.ones((), device=ids.device), accumulate=True
    )[:num]
    way = _segments if features.device.type == "cpu" and has_channels_innermost(features) else _one_hot
    sums, features = way(features, ids, num)
    return sums / counts.clamp(min=1)[:, None], counts > 0, features


def centroids(features: Tensor, ids: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The mean feature of each label id over the batch, zero for an id that isn't there.

    Shapes: features (B, C, H, W), ids (B, H, W) -> (num, C), present (num,) bool.
    Source: eq. 7.
    """
    return centroids_and_features(features, ids, num)[:2]


def _segments(features: Tensor, ids: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Sums by id, each feature read once."""
    found: tuple[Tensor, Tensor] = SegmentSums.apply(features, ids.where(ids >= 0, num), num)
    return found


def _one_hot(features: Tensor, ids: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Sums by id as one-hot rows times pixels: unlike index_add deterministic on the GPU, and a product
    is what it is good at; needs no copy of features whose positions are innermost."""
    member = (ids.flatten(1)[:, None] == torch.arange(num, device=ids.device)[:, None]).float()  # (B, num, L)
    return torch.bmm(member, features.flatten(2).transpose(1, 2)).sum(0), features


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
    kind = features.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else features.dtype
    product: Tensor = Logits.apply(features.to(dtype), text_seen.to(dtype), potential.to(dtype))
    return product


def cross_entropy(logits: Tensor, ids: Tensor, planes: Tensor | None = None) -> Tensor:
    """Softmax cross entropy, mean over the pixels that have an id, in float32.

    Shapes: logits (B, K, H, W), ids (B, H, W), planes (B, K) bool or None (`competing`) -> scalar.
    Source: eq. 10.
    """
    total: Tensor = SoftmaxEntropy.apply(logits, ids, planes)
    return total / (ids != IGNORE).sum().clamp(min=1)


# --- NEL: focal and dice (section 7) -------------------------------------------------------------


def seen_only(logits: Tensor, ids: Tensor, num_seen: int) -> tuple[Tensor, Tensor]:
    """Logits and ids of the seen classes alone, for NEL without potential objects (`nel: seen`).

    A potential object's pixels become ignored, that is negatives of every seen class. Every image's
    seen planes compete, so the losses then need no `planes`.
    """
    return logits[:, :num_seen], ids.where(ids < num_seen, IGNORE)


def _present(ids: Tensor, num: int) -> Tensor:
    """Which ids occur in which image: (B, H, W) -> (B, num) bool."""
    pixels = ids.flatten(1).where(ids.flatten(1) >= 0, num)  # ignored ones in a column that is cut off
    occurs = torch.zeros(len(ids), num + 1, dtype=torch.bool, device=ids.device)
    return occurs.scatter_(1, pixels, True)[:, :num]


def count_masks(ids: Tensor, num: int) -> Tensor:
    """num_masks: over the images, the number of ids present. float32 scalar, may be 0.

    Average it over the processes before handing it to focal and dice, which use at least 1.
    """
    return _present(ids, num).sum().float()


def focal_and_dice(
    logits: Tensor,
    ids: Tensor,
    num_masks: Tensor | None = None,
    planes: Tensor | None = None,
    alpha: float = FOCAL_ALPHA,
    gamma: float = FOCAL_GAMMA,
) -> tuple[Tensor, Tensor]:
    """NEL's two losses from one pass over the logits, in float32, unweighted.

    Focal: mean over pixels, summed over all image x id planes, over num_masks. An ignored pixel is a
    negative of every class. A batch without any id has nothing to act on: 0.
    Dice: 1 - (2 sum(p g) + 1) / (sum p + sum g + 1) of the planes whose id is present in the image, summed,
    over num_masks; p is the sigmoid, sums go over all pixels. Planes of other images' potential objects are
    never present, so `planes` has no say in it.

    Shapes: logits (B, K, H, W), ids (B, H, W), num_masks scalar (default: counted here),
    planes (B, K) bool or None: planes left out of focal -> two scalars.
    Source: method section 7, ZegCLIP's NEL.
    """
    if logits.numel() == 0:
        return _nothing(logits), _nothing(logits)
    focal_sum, p, p_g = SigmoidSums.apply(logits, ids, planes, alpha, gamma)
    present = _present(ids, logits.shape[1])  # (B, K)
    num_masks = present.sum() if num_masks is None else num_masks
    num_masks = num_masks.clamp(min=1)
    pixels = ids.flatten(1).where(ids.flatten(1) >= 0, logits.shape[1])
    g = torch.zeros(len(ids), logits.shape[1] + 1, device=ids.device)
    g = g.scatter_add_(1, pixels, torch.ones((), device=ids.device).expand(pixels.shape))[:, :-1]
    scores = torch.where(present, 1 - (2 * p_g + 1) / (p + g + 1), 0)
    return focal_sum * (ids != IGNORE).any() / ids[0].numel() / num_masks, scores.sum() / num_masks


def focal(
    logits: Tensor, ids: Tensor, num_masks: Tensor | None = None, planes: Tensor | None = None
) -> Tensor:
    """The first of `focal_and_dice`."""
    return focal_and_dice(logits, ids, num_masks, planes)[0]


def dice(logits: Tensor, ids: Tensor, num_masks: Tensor | None = None) -> Tensor:
    """The second of `focal_and_dice`."""
    return focal_and_dice(logits, ids, num_masks)[1]
