"""Stage one, second half: pseudo labels for the ignored area, by multi-scale K-means and mask fusion.

    python cli.py cluster --config config/demo.yaml

A shard of the cache's dense tokens in (with cluster.teacher, those that `encode` has made), a shard of pseudo
labels out (`pipeline/teaching/pseudo.py`). With `cache.tokens: stream` extraction has clustered already, having
had the tokens; then this stage reads what was written, compares it with the record of it, and sums up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cache.errors import damaged
from cache.ledger import Ledger
from cache.store import SIDES, Store
from cache.verify import NOT_NAMED, OK
from pipeline.config import Config
from pipeline.data.survey import Seen, never_seen
from pipeline.ops.labels import to_file
from pipeline.ops.views import IGNORED
from pipeline.running.checked import check_labels
from pipeline.running.console import say
from pipeline.running.manifests import required_manifest
from pipeline.running.rows import is_listed
from pipeline.running.shards import Made, Part, Run, ShardStage, run_stage
from pipeline.running.table import STREAM, has_second_model
from pipeline.teaching.maps import refuse_cams
from pipeline.teaching.names import object_names
from pipeline.teaching.pseudo import backend_of, cluster_tokens, num_centres, sum_of, token_reader, written_arrays
from pipeline.teaching.verdict import verdict


def cluster(config: Config, *, workers: int = 0, scheduler: str | None = None) -> dict[str, Any]:
    """Runs the stage to its end, or finds it there; returns the manifest with its summary. Raises: see run_stage."""
    return run_stage("cluster", config, workers=workers, scheduler=scheduler)


class Clustering(ShardStage):
    """Dense tokens in, pseudo labels out."""

    name, makes = "cluster", "pseudo labels"

    def facts(self, run: Run) -> dict[str, Any]:
        facts: dict[str, Any] = {"unseen": run.data.unseen_ids}
        if run.config.cluster.named_above is None:
            return facts
        return facts | {"text": required_manifest(run.config, "extract")["text"]}

    def look(self, run: Run) -> Seen | None:
        refuse_cams(run.config)
        listed = [sample for sample in run.samples if is_listed(sample)]
        return check_labels(run.data, listed, are_tags=run.config.reads_tags, is_needed=True)

    def arrays(self, config: Config) -> tuple[str, ...]:
        return tuple(written_arrays(config.cluster))

    def sizes(self, run: Run, store: Store) -> dict[str, int] | None:
        if run.config.cache.tokens == STREAM:
            return None
        return {"K_c": num_centres(run.config.cluster, store.sizes["h"])}

    def announced(self, config: Config) -> str:
        backend = backend_of(config.cluster)
        return f"cluster: {backend.name} on {backend.device}"

    def make(self, part: Part) -> Made:
        if part.config.cache.tokens == STREAM:
            return _confirmed(part)
        section, store, is_second = part.config.cluster, part.store, has_second_model(part.config)
        made = part.read("extract", ("view", "status") if is_second else None)
        prefix, seen = ("cluster_", part.read("encode")) if is_second else ("", made)
        blocks, stats = cluster_tokens(
            section,
            part.data,
            part.samples,
            made["view"],
            made["status"] == OK,
            token_reader(seen[f"{prefix}tokens"], seen.get(f"{prefix}token_scale")),
            (store.sizes["h"], store.sizes["C_c" if is_second else "C"]),
            store.fact(SIDES, "teacher", "image_size"),
            part.tick,
        )
        if section.named_above is not None:
            text, most = torch.from_numpy(part.whole("text")), store.sizes["K_c"]
            is_ok = made["status"] == OK
            names = object_names(
                part.config, part.data, part.samples, made["view"], blocks["pseudo"], is_ok, text, most
            )
            spec = store.spec("named")
            blocks["named"] = to_file(names, spec.dtype)
            blocks["named"][~is_ok] = spec.fill
        return Made(blocks, stats)

    def summary(self, run: Run, stats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        found = summarise(stats)
        found["never_seen"] = never_seen(run.data, run.looked) if run.looked else []
        found["verdict"] = [str(complaint) for complaint in verdict(found, run.config.cluster)]
        return found

    def says(self, run: Run) -> dict[str, Any]:
        backend = backend_of(run.config.cluster)
        return {"backend": backend.name, "device": backend.device}

    attributes = says


def _confirmed(part: Part) -> Made:
    """A shard that extraction has clustered, read and compared. Raises: CorruptShard when it isn't what it wrote."""
    store, ledger = part.store, Ledger(part.store.path, "extract")
    made = ledger.entry(part.shard) or {}
    digests = {name: made.get("digests", {}).get(name) for name in written_arrays(part.config.cluster)}
    for name, wanted in digests.items():
        if store.digest(name, part.shard) != wanted:
            raise damaged(store.data / name, name, part.shard, "it is not what extract has recorded")
    if "stats" not in made:
        raise damaged(ledger.path(part.shard), "pseudo", part.shard, NOT_NAMED)
    if part.tick:
        part.tick(len(part.samples))
    return Made({}, made["stats"], digests)


def summarise(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `cluster` prints at its end; shares in percent, purity None where labels aren't known."""
    total = {name: np.array(value) for name, value in sum_of(parts).items()}
    objects, tokens = total["objects"], total["tokens"]
    num_views, ignored = int(objects.sum()), int(tokens[IGNORED])
    return {
        "views": num_views,
        "objects_per_view": round(float((objects * np.arange(len(objects))).sum() / max(num_views, 1)), 2),
        "objects_histogram": {str(p): int(n) for p, n in enumerate(objects) if n},
        "coverage": round(100 * ignored / max(int(tokens[:2].sum()), 1), 2),
        "tokens_per_mask": round(ignored / max(int(total["masks"][0]), 1), 2),
        "largest_mask_share": round(100 * int(total["largest"][0]) / max(ignored, 1), 2),
        "purity": round(100 * int(total["majority"][0]) / int(total["known"][0]), 2) if total["known"][0] else None,
        "purity_tokens": int(total["known"][0]),
    }


def print_summary(summary: dict[str, Any]) -> None:
    """The numbers, then what they predict for training; caches from before there were verdicts have none."""
    purity = f"{summary['purity']:.1f} %" if summary["purity"] is not None else "unknown (no full labels)"
    if summary.get("purity_tokens"):
        purity += f" (of {summary['purity_tokens']:,} tokens with a label)"
    say(
        f"pseudo labels: {summary['views']} views, {summary['objects_per_view']} potential objects a view, "
        f"{summary['tokens_per_mask']} tokens each; ignored area {summary['coverage']:.1f} % of the image; "
        f"purity {purity}"
    )
    for complaint in summary.get("verdict", ()):
        say(f"trouble ahead: {complaint}")
    if summary.get("verdict") == []:
        say("pseudo labels: nothing here predicts trouble in training")
