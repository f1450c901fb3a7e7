"""The cache in a terminal: what it was made from, its arrays, how far its stages are, bad images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from cache.store import Store
from pipeline.config import Config
from pipeline.looking import facts
from pipeline.looking.facts import human_bytes, human_seconds

MANY = 8  # quarantined images listed in the tree


def cache_tree(config: Config, store: Store, metrics: Mapping[str, Any] | None) -> Tree:
    """The cache at a glance: provenance, arrays with their sizes, how far each stage is, bad images."""
    tree = Tree(Text(str(config.cache_path), "bold"))
    origin = tree.add("made from")
    for name, group in facts.provenance(store).items():
        branch = origin.add(Text(name, "bold"))
        for key, value in group.items():
            branch.add(Text(f"{key}  {value}"))
    arrays = facts.array_facts(config, store)
    total = sum(fact.size_bytes for fact in arrays)
    branch = tree.add(Text(f"arrays, {human_bytes(total)} ({total} bytes)"))
    branch.add("axes  " + ", ".join(f"{axis} {length}" for axis, length in store.sizes.items()))
    branch.add(_array_table(arrays))
    per_view = facts.bytes_per_view(arrays)
    if per_view is not None:
        branch.add(f"a view of an image: {per_view:.0f} bytes, arrays of cluster.debug apart")
    stages = tree.add("stages")
    for fact in facts.stage_facts(config, store, metrics):
        word = "complete" if fact.is_complete else "not run" if not fact.done else "not complete"
        took = f", {human_seconds(fact.seconds)} of work" if fact.seconds else ""
        so_far = f"{fact.done} of {fact.total} {fact.unit}, " if fact.total else ""
        stages.add(Text(f"{fact.name}  {so_far}{word}{took}"))
    bad = facts.quarantined(config)
    branch = tree.add(f"quarantined images: {len(bad) or 'none'}")
    for name, why in list(bad.items())[:MANY]:
        branch.add(Text(f"{name}  {why}"))
    if len(bad) > MANY:
        branch.add(f"and {len(bad) - MANY} more")
    return tree


def _array_table(arrays: list[facts.ArrayFact]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("array", "shape", "dtype"):
        table.add_column(name, overflow="fold", no_wrap=name != "shape")
    for name in ("shards", "bytes", "size", "a view"):
        table.add_column(name, justify="right", no_wrap=True)
    for fact in arrays:
        a_view = "" if fact.bytes_per_view is None else human_bytes(fact.bytes_per_view)
        shape = " x ".join(map(str, fact.shape))
        numbers = (str(fact.num_shards), str(fact.size_bytes), human_bytes(fact.size_bytes), a_view)
        table.add_row(fact.name, shape, fact.dtype, *numbers)
    return table
