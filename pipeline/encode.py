"""A second model's eyes for clustering alone: its dense tokens of the views that `extract` has drawn.

    python cli.py encode --config config/voc.yaml --set cluster.teacher=timm:vit_base_patch14_dinov2

Between `extract` and `cluster` where cluster.teacher names a model (pipeline/models/second.py). The teacher's arrays
stay as they are, and a change of clustering finds these tokens again. Streamed tokens are extraction's work, and
never kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cache.store import Store
from cache.verify import OK
from pipeline.config import Config, ConfigError
from pipeline.models.second import second_digests
from pipeline.running.shards import Made, Part, Run, ShardStage
from pipeline.running.table import has_second_model
from pipeline.teaching.encode import STORAGE, said_of, second_blocks, second_of

PREFIX = "cluster_"  # of these arrays' names, to the teacher's own


class Encoding(ShardStage):
    """Boxes of views in, a second model's tokens out."""

    name, makes = "encode", "tokens of cluster.teacher"

    def facts(self, run: Run) -> dict[str, Any]:
        """The weights' bytes. Raises: ConfigError where the config has no such stage, TeacherError without weights."""
        section = run.config.cluster
        if not has_second_model(run.config):
            why = "cluster.teacher is null" if section.teacher is None else "cache.tokens is stream: extract clusters"
            why = why if run.config.recipe == "clip_teacher" else "the recipe is clip_es, which clusters nothing"
            raise ConfigError(f"there is nothing to encode: {why}. Leave this stage out.")
        return {"weights": second_digests(section)}

    def arrays(self, config: Config) -> tuple[str, ...]:
        return tuple(PREFIX + name for name in STORAGE[config.cache.tokens].arrays)

    def dtypes(self, config: Config) -> dict[str, str]:
        dtypes = STORAGE[config.cache.tokens].dtypes
        return {f"{PREFIX}tokens": dtypes.get("tokens", "float16")}

    def sizes(self, run: Run, store: Store) -> dict[str, int]:
        return {"C_c": second_of(run.config, store.sizes["h"]).channels}

    def announced(self, config: Config) -> str:
        return f"encode: {config.cluster.teacher}"

    def make(self, part: Part) -> Made:
        model, section = second_of(part.config, part.store.sizes["h"]), part.config.teacher
        made = part.read("extract", ("view", "status"))
        blocks = second_blocks(
            part.data,
            model,
            part.samples,
            made["view"],
            made["status"] == OK,
            batch=section.batch,
            tokens=part.config.cache.tokens,
            tick=part.tick,
        )
        num_views = int((made["status"] == OK).sum()) * made["view"].shape[1]
        return Made({PREFIX + name: block for name, block in blocks.items()}, {"views": [num_views]})

    def summary(self, run: Run, stats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"views": sum(part["views"][0] for part in stats)}

    def attributes(self, run: Run) -> dict[str, Any]:
        return said_of(second_of(run.config, Store.open(run.config.cache_path).sizes["h"]))
