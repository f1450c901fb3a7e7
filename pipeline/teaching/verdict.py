"""What a clustering's summary says about the training to come, before it is paid for: trouble, and the knob to turn.

The limits lie between sane and deliberately bad settings on the demo's training images (`bench/verdict.py`, table in
bench/README.md). Photographs are another world: there a complaint is a reason to look (`cli.py inspect`), not a proof.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config import Cluster
from pipeline.data.survey import Complaint

FEW = 2.0  # objects in a view that has an ignored area: sane 2.5 to 7.7, lambda 0.5 gives 1.6, one window 1.0
MANY = 9.0  # the same: lambda 0.95 gives 11.7, with a single view 10.3
MOST_LARGEST = 88.0  # percent of the ignored area in each view's largest object: sane 52 to 84, lambda 0.5 gives 90
THIN = 5.0  # percent of the image that is ignored: the demo's split 24, one rare class unseen 2.1
PURE = 95.0  # percent: sane 96.4 to 99.2, lambda 0.5 gives 93.2, tokens of another image 90.9
MOST_NAMED = 3  # of a list of classes
ENOUGH_WINDOWS = 3  # a side, on the finest scale: 3 alone is sane (2.5 objects), 1 is not


def signs(summary: Mapping[str, Any]) -> dict[str, float]:
    """Objects in a view with an ignored area, percent of these with a single one; percent of all views without any."""
    views = {int(num): int(count) for num, count in summary["objects_histogram"].items()}
    total, empty = sum(views.values()), views.get(0, 0)
    with_area = max(total - empty, 1)
    return {
        "objects": sum(num * count for num, count in views.items()) / with_area,
        "single": 100 * views.get(1, 0) / with_area,
        "empty": 100 * empty / max(total, 1),
    }


def verdict(summary: Mapping[str, Any], section: Cluster) -> list[Complaint]:
    """What is likely to go wrong in training, most basic first; nothing when all is as on a healthy cache."""
    return list(_doubts(summary, section)) if summary["views"] else []


def _doubts(summary: Mapping[str, Any], section: Cluster) -> Iterator[Complaint]:
    views, coverage, largest = (summary[key] for key in ("views", "coverage", "largest_mask_share"))
    found = signs(summary)
    if coverage <= 0:
        yield Complaint(
            "no ignored area",
            f"every pixel of {views} views has a seen label, so there is nothing to find.",
            "Are data.unseen (or data.split) and the ignored id what you meant?",
        )
    if names := summary.get("never_seen"):
        yield Complaint(
            "seen classes without a training pixel",
            f"{', '.join(map(repr, names[:MOST_NAMED]))}{', ...' if len(names) > MOST_NAMED else ''} ({len(names)}).",
            "They can't be learned: list them as unseen, or take them out of the classes.",
        )
    if coverage <= 0:
        return  # nothing was clustered: what the objects are like can't be asked
    if coverage < THIN:
        yield Complaint(
            "little ignored area",
            f"{coverage:.1f} % of the image, none at all in {found['empty']:.0f} % of the views.",
            "Potential objects will hardly take part: hold more classes back (data.unseen, data.split), or cut more "
            "crops (views.num).",
        )
    if coverage >= 100:
        yield Complaint(
            "no seen label",
            f"the whole of {views} views is ignored area: training has no class to learn a name from.",
            "Are these the right masks, and is data.unseen not all of the classes?",
        )
    # A view's largest object has swallowed the others, crumbs apart; with few objects that has been said.
    is_giant = largest > MOST_LARGEST and found["objects"] >= FEW
    if found["objects"] < FEW:
        yield Complaint(
            "few objects",
            f"{found['objects']:.1f} in a view with an ignored area, in {found['single']:.0f} % of them a single one: "
            "different things are one object.",
            _finer(section),
        )
    if is_giant:
        what = f"a view's largest object holds {largest:.0f} % of its ignored area, the rest is crumbs."
        yield Complaint("one giant object", what, _finer(section))
    if found["objects"] > MANY:
        yield Complaint(
            "splinters",
            f"{found['objects']:.1f} objects in a view with an ignored area, {summary['tokens_per_mask']:.0f} tokens "
            f"each, the largest {largest:.0f} % of the area: one thing is many objects.",
            f"Merge more: lower cluster.threshold, now {section.threshold:g}, the paper's 0.8; or begin from fewer "
            f"windows, cluster.sizes, now {list(section.sizes)}.",
        )
    if summary["purity"] is not None and summary["purity"] < PURE:
        known = f" of {summary['purity_tokens']:,} tokens" if "purity_tokens" in summary else ""
        todo = "Do the teacher's tokens follow the image at all (`cli.py inspect`)? Then raise cluster.threshold or "
        yield Complaint(
            "mixed objects",
            f"purity {summary['purity']:.1f} %{known}: objects mix classes (known from full labels, which training "
            "never reads).",
            "What merges them is said above." if found["objects"] < FEW or is_giant else f"{todo}cluster.iterations.",
        )


def _finer(section: Cluster) -> str:
    """Windows first: without enough of them no lambda can help."""
    if section.window == "grid" and max(section.sizes) < ENOUGH_WINDOWS:
        return f"Begin from more windows: cluster.sizes is {list(section.sizes)}, the paper's [3, 7]."
    return f"Merge less: raise cluster.threshold, now {section.threshold:g}, the paper's 0.8."
