"""Multi-scale K-means: centres from windows, then spherical Lloyd iterations, batched in torch.

Axes: B views, h x w tokens, L = h * w, C channels, K centres (9 + 49 = 58 on the paper's grid).
Tokens are L2-normalised; centres too, so an inner product is a cosine. Works on any device.

`kmeans_faiss.lloyd_faiss` is the same algorithm with another assignment step; both share `lloyd_with`,
so they can only differ where two centres are nearly equally close and the inner products are
summed in another order.
"""

from collections.abc import Callable
from math import ceil
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.views import PADDING

WINDOWS = (3, 7)  # CLIPTeacher, implementation details: "the window size is set as 3 and 7"
ITERATIONS = 20  # method section 3.2

# An assignment step: tokens (B, L, C), centres (B, K, C), alive (B, K) -> (B, L)
Assign = Callable[[Tensor, Tensor, Tensor], Tensor]


class Clusters(NamedTuple):
    """The state after the last assignment step: the centres are the means of exactly this assignment."""

    assign: Tensor  # (B, L) int64, index into K; -1 for tokens that are not clustered
    centres: Tensor  # (B, K, C) float32 unit norm, zero where not alive
    alive: Tensor  # (B, K) bool: has at least one token
    num_iterations: Tensor  # (B,) int64 assignment steps, the confirming one included


def _grid_means(grid: Tensor, size: int) -> Tensor:
    """Means over size x size windows that cover the grid: (B, C, h, w) -> (B, C, size, size)."""
    return F.adaptive_avg_pool2d(grid, size)


def _token_means(grid: Tensor, size: int) -> Tensor:
    """Means over windows of size x size tokens: (B, C, h, w) -> (B, C, ceil(h / size), ceil(w / size))."""
    height, width = grid.shape[-2:]
    # Zeros up to whole windows: window_centres divides by the share of real tokens, as for padding.
    right, bottom = ceil(width / size) * size - width, ceil(height / size) * size - height
    return F.avg_pool2d(F.pad(grid, (0, right, 0, bottom)), size)


_WINDOW_MEANS = {"grid": _grid_means, "tokens": _token_means}


def window_centres(
    tokens: Tensor, state: Tensor, sizes: tuple[int, ...] = WINDOWS, window: str = "grid"
) -> tuple[Tensor, Tensor]:
    """Initial centres: mean direction of the tokens in each window, scale by scale, row-major.

    Annotated tokens count, padding does not; a window of nothing but padding is not alive.
    `window` "grid": s x s windows per scale, those of adaptive_avg_pool2d; "tokens": windows of
    s x s tokens at stride s, the last ones cut off at the edge.

    Shapes: tokens (B, h, w, C) unit norm, state (B, h, w) as in views.token_state
    -> centres (B, K, C) float32 unit norm, alive (B, K) bool.
    Source: CLIPTeacher eq. 4-5; method section 3.1.
    Raises: ValueError for an unknown `window` or shapes that differ.
    """
    if window not in _WINDOW_MEANS:
        raise ValueError(f"window {window!r} is not one of {sorted(_WINDOW_MEANS)}.")
    if tokens.ndim != 4 or tokens.shape[:3] != state.shape:
        raise ValueError(
            f"tokens {tuple(tokens.shape)}, state {tuple(state.shape)}; (B, h, w, C), (B, h, w) wanted."
        )
    means = _WINDOW_MEANS[window]
    valid = (state != PADDING)[:, None].float()  # (B, 1, h, w)
    grid = tokens.float().permute(0, 3, 1, 2) * valid  # (B, C, h, w)
    # A mean over all positions points where the mean over the valid ones does: only the direction is kept.
    pooled = torch.cat([means(grid, size).flatten(2) for size in sizes], dim=2)  # (B, C, K)
    alive = torch.cat([means(valid, size).flatten(2) for size in sizes], dim=2)[:, 0] > 0  # (B, K)
    return F.normalize(pooled.transpose(1, 2), dim=2), alive


def mean_directions(tokens: Tensor, assign: Tensor, num_centres: int) -> tuple[Tensor, Tensor]:
    """The normalised mean of each centre's tokens, zero for a centre without any.

    Shapes: tokens (B, L, C), assign (B, L) with -1 for none -> (B, K, C) float32, counts (B, K).
    """
    sums = _SUMS.get(tokens.device.type, _sums_by_product)
    totals, counts = sums(tokens, assign, num_centres)
    return F.normalize(totals, dim=2), counts


def _sums_by_product(tokens: Tensor, assign: Tensor, num_centres: int) -> tuple[Tensor, Tensor]:
    """One-hot rows times tokens: deterministic on the GPU, where index_add is not."""
    index = torch.arange(num_centres, device=assign.device)
    member = assign[:, None] == index[:, None]  # (B, K, L)
    return torch.bmm(member.float(), tokens), member.sum(2)


def _sums_by_row(tokens: Tensor, assign: Tensor, num_centres: int) -> tuple[Tensor, Tensor]:
    """Row by row, in order: a fourteenth of the product's time on one CPU core, and always the same sum."""
    num_views, channels = len(tokens), tokens.shape[2]
    place = assign + 1 + (num_centres + 1) * torch.arange(num_views)[:, None]  # each view's first slot: none
    totals = torch.zeros(num_views * (num_centres + 1), channels)
    totals.index_add_(0, place.flatten(), tokens.flatten(0, 1))
    counts = torch.bincount(place.flatten(), minlength=len(totals)).view(num_views, -1)
    return totals.view(num_views, -1, channels)[:, 1:], counts[:, 1:]


_SUMS = {"cpu": _sums_by_row}


def nearest(tokens: Tensor, centres: Tensor, alive: Tensor) -> Tensor:
    """The living centre of largest inner product, ties to the lower index (argmax takes the first)."""
    scores = torch.bmm(tokens, centres.transpose(1, 2))  # (B, L, K)
    return scores.masked_fill(~alive[:, None], -torch.inf).argmax(2)


def lloyd(
    tokens: Tensor, active: Tensor, centres: Tensor, alive: Tensor, iterations: int = ITERATIONS
) -> Clusters:
    """Spherical Lloyd's K-means of the active tokens, from given centres, each view on its own.

    One iteration: every active token goes to the nearest living centre; centres become the normalised
    means of their tokens; a centre without tokens is dropped at once and never re-seeded. A view
    stops when an assignment step changes nothing, or after `iterations` steps.

    Shapes: tokens (B, L, C) unit norm, active (B, L) bool, centres (B, K, C), alive (B, K) bool.
    Any number of active tokens is legal, none included (then no centre survives).
    Source: method section 3.2.
    Raises: ValueError for shapes that differ, `iterations` below 1, or active tokens and no living centre.
    """
    return lloyd_with(nearest, tokens, active, centres, alive, iterations)


def lloyd_with(
    assign_step: Assign, tokens: Tensor, active: Tensor, centres: Tensor, alive: Tensor, iterations: int
) -> Clusters:
    """`lloyd` with a given assignment step; see there."""
    _check(tokens, active, centres, alive, iterations)
    tokens, centres = tokens.float(), centres.float().clone()
    alive = alive & ~_repeats(centres, alive)
    num_views, num_centres = alive.shape
    assign = torch.full(active.shape, -1, dtype=torch.int64, device=tokens.device)
    num_iterations = torch.zeros(num_views, dtype=torch.int64, device=tokens.device)
    running = torch.arange(num_views, device=tokens.device)  # views that still change
    for _ in range(iterations):
        if running.numel() == 0:
            break
        step = assign_step(tokens, centres[running], alive[running]).masked_fill(~active[running], -1)
        has_changed = (step != assign[running]).any(1)
        directions, counts = mean_directions(tokens, step, num_centres)
        assign[running], centres[running], alive[running] = step, directions, counts > 0
        num_iterations[running] += 1
        if not bool(has_changed.all()):
            running, tokens = running[has_changed], tokens[has_changed]
    return Clusters(assign, centres, alive, num_iterations)


def _repeats(centres: Tensor, alive: Tensor) -> Tensor:
    """Which centres equal an earlier living one to the bit: (B, K) bool.

    They lose every tie, so they would be empty. Dropping them first makes that sure: a matrix product may
    round two equal columns differently (FAISS's does), and small grids give the same window more than once.
    Compared by a 64-bit hash of their bits: integer sums wrap around alike in any order.
    """
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (centres.shape[2],), generator=generator).to(centres.device)
    key = (centres.view(torch.int32).long() * factors).sum(2)  # (B, K)
    return ((key[:, :, None] == key[:, None]) & alive[:, None]).tril(-1).any(2)


def _check(tokens: Tensor, active: Tensor, centres: Tensor, alive: Tensor, iterations: int) -> None:
    if (
        tokens.ndim != 3
        or centres.ndim != 3
        or active.shape != tokens.shape[:2]
        or alive.shape != centres.shape[:2]
        or (tokens.shape[0], tokens.shape[2]) != (centres.shape[0], centres.shape[2])
    ):
        raise ValueError(
            f"tokens {tuple(tokens.shape)}, active {tuple(active.shape)}, centres {tuple(centres.shape)}, "
            f"alive {tuple(alive.shape)}; (B, L, C), (B, L), (B, K, C), (B, K) wanted."
        )
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; at least 1 wanted.")
    orphans = (active.any(1) & ~alive.any(1)).nonzero()[:, 0].tolist()
    if orphans:
        raise ValueError(f"views {orphans} of the batch have active tokens but no living centre to go to.")
