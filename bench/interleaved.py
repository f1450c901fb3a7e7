"""Two or more sides of a comparison, timed in turns in one run: medians, ratios, and the machine's name.

Taking turns is the point: a machine that slows down slows all sides, and the ratio stays.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere: python bench/x.py

from pipeline.running.provenance import provenance

Sides = dict[str, Callable[[], object]]


def medians(sides: Sides, rounds: int, warm_up: int = 1) -> dict[str, float]:
    """Seconds of each side, the median over `rounds` turns after `warm_up` turns that don't count."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warm_up + rounds):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            if turn >= warm_up:
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def heading(what: str) -> None:
    """Says what is measured, on what, and from which code."""
    made = provenance()
    print(f"{what}\n{made['date']}, {made['machine']}, torch {made['torch']}, revision {made['revision']}")


def verdict(what: str, found: float, limit: float, *, at_most: bool) -> bool:
    """Prints a ratio beside the required one; returns whether it is met."""
    is_met = found <= limit if at_most else found >= limit
    word = "at most" if at_most else "at least"
    print(f"  {what}: {found:.3f} ({word} {limit:g} required): {'met' if is_met else 'MISSED'}")
    return is_met
