"""Multi-scale K-means: centres from windows, then Lloyd iterations, batched in torch.

Axes: B views, h x w tokens, L = h * w, C channels, K centres (9 + 49 = 58 on the paper's grid).
Tokens are L2-normalised; the spherical K-means' centres too, so an inner product is a cosine. Works on any device.

Three ways to the same clusters, and tests hold them together: `lloyd` on a GPU takes all views in
one product an iteration; on the CPU it takes a view at a time, whose tokens then stay in the processor's
cache, and only looks again at tokens that may have changed sides; `kmeans_faiss.lloyd_faiss` is the
latter with FAISS doing the search. They can only differ where two centres are nearly equally close and
the inner products are summed in another order.
"""

from collections.abc import Callable
from math import ceil
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.views import PADDING

WINDOWS = (3, 7)  # CLIPTeacher, implementation details: "the window size is set as 3 and 7"
ITERATIONS = 20  # method section 3.2

Distance = Literal["cosine", "euclidean"]
MARGIN = 1e-5  # of an inner product of unit vectors; some ten times what float32 sums of 512 terms are off by

# A search: points (n, C), centres (K, C) -> each point's nearest centre (n,), ties to the lower index; its
# score (n,); and what no other centre's score is above (n, K), -inf for the nearest one itself.
Search = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


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
    height, width = grid.shape[2:]
    # Zeros up to whole windows: only a mean's direction is kept.
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
        raise ValueError(f"tokens {tuple(tokens.shape)}, state {tuple(state.shape)}; (B, h, w, C), (B, h, w) wanted.")
    means = _WINDOW_MEANS[window]
    valid = (state != PADDING)[:, None].float()  # (B, 1, h, w)
    grid = tokens.float().permute(0, 3, 1, 2)  # (B, C, h, w), channels last in memory: pooling is fast there
    grid = grid if bool(valid.all()) else grid * valid
    # A mean over all positions points where the mean over the valid ones does: only the direction is kept.
    pooled = [means(grid, size).permute(0, 2, 3, 1).flatten(1, 2) for size in sizes]  # (B, s * s, C) each
    alive = torch.cat([means(valid, size).flatten(1) for size in sizes], dim=1) > 0  # (B, K)
    return F.normalize(torch.cat(pooled, dim=1), dim=2), alive


def lloyd(
    tokens: Tensor,
    active: Tensor,
    centres: Tensor,
    alive: Tensor,
    iterations: int = ITERATIONS,
    distance: Distance = "cosine",
) -> Clusters:
    """Lloyd's K-means of the active tokens, from given centres, each view on its own.

    One iteration: every active token goes to the nearest living centre; centres become the normalised
    means of their tokens; a centre without tokens is dropped at once and never re-seeded. A view
    stops when an assignment step changes nothing, or after `iterations` steps.

    With distance "euclidean" centres are plain means: spread-out clusters have short ones, which draw tokens less
    than a cosine would. They are returned with unit norm, as fusion's cosines want them.

    Shapes: tokens (B, L, C) unit norm, active (B, L) bool, centres (B, K, C), alive (B, K) bool.
    Any number of active tokens is legal, none included (then no centre survives).
    Source: method section 3.2.
    Raises: ValueError for shapes that differ, `iterations` below 1, or active tokens and no living centre.
    """
    if tokens.device.type == "cpu" and distance == "cosine":
        return lloyd_by_view(nearest, tokens, active, centres, alive, iterations)
    return lloyd_at_once(tokens, active, centres, alive, iterations, distance)


# --- all views in one product: the GPU's way, and the Euclidean one -------------------------------


def lloyd_at_once(
    tokens: Tensor, active: Tensor, centres: Tensor, alive: Tensor, iterations: int, distance: Distance = "cosine"
) -> Clusters:
    """`lloyd` in batched products; see there."""
    tokens, centres, alive = _checked(tokens, active, centres, alive, iterations)
    num_views, num_centres = alive.shape
    index = torch.arange(num_centres, device=tokens.device)[:, None]
    assign = torch.full(active.shape, -1, dtype=torch.int64, device=tokens.device)
    num_iterations = torch.zeros(num_views, dtype=torch.int64, device=tokens.device)
    running = torch.arange(num_views, device=tokens.device)  # views that still change
    for _ in range(iterations):
        if running.numel() == 0:
            break
        scores = torch.bmm(tokens, centres[running].transpose(1, 2))  # (B, L, K)
        # |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2), and |x| is the same for all centres.
        if distance == "euclidean":
            scores = scores - centres[running].square().sum(2)[:, None] / 2
        # Ties: argmax takes the first.
        step = scores.masked_fill(~alive[running][:, None], -torch.inf).argmax(2)
        step = step.masked_fill(~active[running], -1)
        has_changed = (step != assign[running]).any(1)
        # One-hot rows times tokens: deterministic on the GPU, where index_add is not.
        member = step[:, None] == index  # (B, K, L)
        assign[running], alive[running] = step, member.any(2)
        sums = torch.bmm(member.float(), tokens)
        if distance == "euclidean":
            centres[running] = sums / member.sum(2).clamp(min=1)[..., None]
        else:
            centres[running] = F.normalize(sums, dim=2)
        num_iterations[running] += 1
        if not bool(has_changed.all()):
            running, tokens = running[has_changed], tokens[has_changed]
    centres = F.normalize(centres, dim=2) if distance == "euclidean" else centres
    return Clusters(assign, centres, alive, num_iterations)


# --- view by view: the CPU's way, and FAISS's -----------------------------------------------------


def lloyd_by_view(
    search: Search, tokens: Tensor, active: Tensor, centres: Tensor, alive: Tensor, iterations: int
) -> Clusters:
    """`lloyd` with a given search, a view at a time on the CPU; see there."""
    tokens, centres, alive = _checked(tokens, active, centres, alive, iterations)
    assign = torch.full(active.shape, -1, dtype=torch.int64)
    num_iterations = torch.zeros(len(tokens), dtype=torch.int64)
    for view in range(len(tokens)):
        points = tokens[view] if bool(active[view].all()) else tokens[view, active[view]]
        own, means, is_alive, steps = _one_view(search, points, centres[view], alive[view], iterations)
        assign[view, active[view]] = own
        centres[view], alive[view], num_iterations[view] = means, is_alive, steps
    return Clusters(assign, centres, alive, num_iterations)


def _one_view(
    search: Search, points: Tensor, centres: Tensor, alive: Tensor, iterations: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Lloyd's iterations of points (n, C): assign (n,), centres (K, C), alive (K,), steps.

    When a centre moves, no unit vector's score with it changes by more than it moved: |x.c' - x.c| <= |c' - c|.
    So a point whose centre still leads all others' bounds by more than MARGIN needs no search; from the third
    iteration on that is most of them (Elkan 2003's bounds, for inner products).
    """
    num_points = len(points)
    ids = alive.nonzero()[:, 0]  # of the living centres; those that die leave all that follows
    means = centres[ids]
    own = torch.full((num_points,), -1, dtype=torch.int64)
    score, rivals = torch.full((num_points,), -torch.inf), torch.full((num_points, len(ids)), -torch.inf)
    step = 0
    while step < iterations:
        step += 1
        unsure = (score <= rivals.amax(1) + MARGIN).nonzero()[:, 0] if len(ids) else own[:0]
        has_changed = False
        if len(unsure) == num_points > 0:
            found, score, rivals = search(points, means)
            has_changed, own = not torch.equal(own, found), found
        elif len(unsure):
            found, score[unsure], rivals[unsure] = search(points.index_select(0, unsure), means)
            has_changed, own[unsure] = not torch.equal(own[unsure], found), found
        before = means
        means = F.normalize(torch.zeros_like(before).index_add_(0, own, points), dim=1)
        moved = (means - before).norm(dim=1)
        lives = torch.bincount(own, minlength=len(ids)) > 0
        if not bool(lives.all()):
            own = (lives.cumsum(0) - 1)[own]
            ids, means, moved, rivals = ids[lives], means[lives], moved[lives], rivals[:, lives]
        if not has_changed:
            break
        score -= moved[own]
        rivals += moved
    centres, alive = torch.zeros_like(centres), torch.zeros_like(alive)
    centres[ids], alive[ids] = means, True
    return ids[own], centres, alive, step


def nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The search in torch."""
    return ranked(points @ centres.T)


def ranked(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a search returns, of all scores (n, K), which are overwritten; max takes the first of equal ones."""
    best, found = scores.max(1)
    return found, best, scores.scatter_(1, found[:, None], -torch.inf)


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


def _checked(
    tokens: Tensor, active: Tensor, centres: Tensor, alive: Tensor, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments in float32, the caller's centres left alone, repeated centres not alive."""
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
    centres = centres.float().clone()
    return tokens.float(), centres, alive & ~_repeats(centres, alive)
