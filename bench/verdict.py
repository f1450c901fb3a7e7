"""What `cluster`'s summary says under sane and under deliberately bad settings, of one run's cache.

    python bench/verdict.py runs/demo

Clusters the cached tokens in memory, once a line; writes nothing. The limits of pipeline/teaching/verdict.py lie
between the first lines and the bad ones.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from cache.store import Store
from pipeline.cluster import summarise
from pipeline.config import Config, from_mapping
from pipeline.data.base import data_of
from pipeline.running.manifests import run_config
from pipeline.running.rows import samples_of
from pipeline.teaching.pseudo import cluster_tokens, token_reader
from pipeline.teaching.verdict import signs, verdict

OTHERS = "tokens of another image"
SETTINGS = {
    "sane": ["", "cluster.threshold=0.7", "cluster.threshold=0.9", "cluster.sizes=[3]", "cluster.sizes=[7]",
             "cluster.sizes=[2,5]", "cluster.sizes=[15]", "cluster.window=tokens", "cluster.iterations=1"],
    "bad": ["cluster.threshold=0.99", "cluster.threshold=0.97", "cluster.threshold=0.95",
            "cluster.threshold=0.5", "cluster.threshold=0.3", "cluster.threshold=0.1", "cluster.sizes=[1]",
            "data.unseen=[]", "data.unseen=[zebra]", OTHERS],
}  # fmt: skip


def summary_of(config: Config, cache: str, *, shuffled: bool = False) -> dict:
    """As `cluster` sums up, without writing; shuffled gives each image the tokens of its neighbour."""
    data, store, parts = data_of(config.data), Store.open(cache), []
    shape, size = (store.sizes["h"], store.sizes["C"]), store.attributes["teacher"]["image_size"]
    for shard in range(store.num_shards):
        blocks = {name: store.read_shard(name, shard) for name in ("view", "status", "tokens")}
        kept = np.roll(blocks["tokens"], 1, axis=0) if shuffled else blocks["tokens"]
        tokens, usable = token_reader(kept, None), blocks["status"] == 0
        samples = samples_of(data, store, store.rows(shard))
        parts.append(cluster_tokens(config.cluster, data, samples, blocks["view"], usable, tokens, shape, size)[1])
    return summarise(parts)


def main() -> None:
    config = run_config(Path(sys.argv[1]))
    raw = config.model_dump(mode="json", by_alias=True)
    names = ["objects", "single", "tokens_per_mask", "largest_mask_share", "empty", "coverage", "purity"]
    print("| | setting | " + " | ".join(names) + " | says |")
    print("|---" * (len(names) + 3) + "|")
    for kind, settings in SETTINGS.items():
        for setting in settings:
            changed = from_mapping(raw, [setting] if "=" in setting else [])
            summary = summary_of(changed, config.cache_path, shuffled=setting == OTHERS)
            found = summary | signs(summary)
            cells = [f"{found[name]:.1f}" if found[name] is not None else "-" for name in names]
            says = ", ".join(complaint.kind for complaint in verdict(summary, changed.cluster)) or "-"
            print(f"| {kind} | {setting or 'as configured'} | {' | '.join(cells)} | {says} |", flush=True)


if __name__ == "__main__":
    main()
