"""What `cli.py verify` checks: the cache itself, and that it is the one this config asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cache.errors import CacheError, StaleCache
from cache.ledger import Ledger
from cache.store import Store
from cache.verify import Finding
from cache.verify import verify as verify_cache
from pipeline.config import Config
from pipeline.data.base import DataError, data_of
from pipeline.running.console import progress, say
from pipeline.running.manifests import found_manifest
from pipeline.running.rows import check_current, current_samples
from pipeline.running.table import asked, config_fingerprint, difference, in_cache, labels_stage, parts_of


def verify(config: Config) -> list[Finding]:
    """Every finding, most basic first; an empty list is a sound cache.

    Raises: MissingCache when there is none.
    """
    stages = in_cache(config)
    manifests = {stage: m for stage in stages if (m := found_manifest(config, stage)) is not None}
    recorded = sum(len(Ledger(config.cache_path, stage).entries()) for stage in stages)
    with progress("verify", recorded, unit="shards") as advance:
        findings = verify_cache(
            config.cache_path,
            fingerprints={
                stage: made for stage, manifest in manifests.items() if (made := manifest.get("fingerprint"))
            },
            progress=lambda done, total: advance(1),
        )
    for stage, manifest in manifests.items():
        for key, of in (("config", stage), *((f"{part}_config", part) for part in parts_of(stage))):
            if manifest.get(key) != config_fingerprint(config, of):
                said = difference(dict(manifest.get(key.replace("config", "asked")) or {}), asked(config, of))
                what = f"made with another config: {said or 'a stage above it, or the version, is another one'}"
                todo = f"Run `cli.py {stage}` again."
                findings.append(Finding("stale", f"{config.cache_path}: {stage}", what, todo))
    return findings + _changes(config, manifests)


def _changes(config: Config, manifests: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """What of the data set is no longer what the cache was made from; said where the data set can't be opened."""
    stage = labels_stage(config)
    try:
        data = data_of(config.data)
        store = Store.open(config.cache_path)
        current_samples(data, store)
        if stage in manifests:
            check_current(config.cache_path, stage, data, str(manifests[stage]["fingerprint"]))
    except DataError as error:
        say(f"verify: the data set can't be compared with the cache: {error}")
    except StaleCache as error:
        where, _, what = str(error).partition(": ")
        what, _, todo = what.rpartition(". ")
        return [Finding("stale", where, what, todo)]
    except CacheError:
        pass  # damage, which is among the findings
    return []
