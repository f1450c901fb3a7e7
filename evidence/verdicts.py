"""A difference between two sets of seeds: how large, how sure, and whether it has the paper's sign."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# How to read a table of contrasts. The share is simulated: normal seeds, three a side, no difference (200,000 draws).
RULE = (
    "A difference counts as resolved when it is larger than the larger of the two spreads; with three seeds a side "
    "chance alone does that in 21 % of contrasts that hold no difference."
)
AS_PAPER, OPPOSITE, UNRESOLVED, RESOLVED = "as in the paper", "opposite", "not resolved", "resolved"


@dataclass(frozen=True)
class Contrast:
    """Of means over seeds; `spread` is the larger sample standard deviation of the two sides, None with one seed."""

    difference: float
    spread: float | None
    verdict: str


def contrast(ours: Sequence[float], against: Sequence[float], paper: float | None = None) -> Contrast:
    """`ours` minus `against`, a value a seed, beside the paper's difference, if it has one.

    A difference is resolved when it is larger than the larger of the two spreads.
    """
    difference = statistics.mean(ours) - statistics.mean(against)
    if min(len(ours), len(against)) < 2:
        return Contrast(difference, None, f"{UNRESOLVED} (one seed)")
    spread = max(statistics.stdev(ours), statistics.stdev(against))
    if abs(difference) <= spread:
        return Contrast(difference, spread, UNRESOLVED)
    if paper is None:
        return Contrast(difference, spread, RESOLVED)
    return Contrast(difference, spread, AS_PAPER if (difference > 0) == (paper > 0) else OPPOSITE)
