"""Lloyd's K-means with Euclidean distance and plain means: what the spherical one of kmeans.py is compared with.

Axes: B views, L tokens, C channels, K centres.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.kmeans import ITERATIONS, Clusters


def lloyd_euclidean(
    tokens: Tensor, active: Tensor, centres: Tensor, alive: Tensor, iterations: int = ITERATIONS
) -> Clusters:
    """As `kmeans.lloyd`, but a token goes to the centre at the least distance, and centres are plain means.

    Of unit tokens' means the spread ones are short, which draws tokens near them less than a cosine would. The
    centres are returned with unit norm, as fusion's cosines want them. Ties go to the lower index.

    Shapes: tokens (B, L, C), active (B, L) bool, centres (B, K, C), alive (B, K) bool.
    Raises: ValueError for iterations below 1, or active tokens and no living centre.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; at least 1 wanted.")
    if bool((active.any(1) & ~alive.any(1)).any()):
        raise ValueError("a view has active tokens but no living centre to go to.")
    tokens, centres, alive = tokens.float(), centres.float().clone(), alive & active.any(1)[:, None]
    assign = torch.full(active.shape, -1, dtype=torch.int64, device=tokens.device)
    num_iterations = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
    index = torch.arange(centres.shape[1], device=tokens.device)[:, None]
    for _ in range(iterations):
        # |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2), and |x| is the same for all centres.
        nearness = (
            torch.bmm(tokens, centres.transpose(1, 2)) - centres.square().sum(2)[:, None] / 2
        )  # (B, L, K)
        step = nearness.masked_fill(~alive[:, None], -torch.inf).argmax(2).masked_fill(~active, -1)
        has_changed = (step != assign).any(1)
        if not bool(has_changed.any()):
            num_iterations += 1
            break
        member = (step[:, None] == index).float()  # (B, K, L)
        counts = member.sum(2)
        assign, alive = step, counts > 0
        centres = torch.bmm(member, tokens) / counts.clamp(min=1)[..., None]
        num_iterations += has_changed
    return Clusters(assign, F.normalize(centres, dim=2), alive, num_iterations)
