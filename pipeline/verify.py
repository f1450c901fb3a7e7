"""What `cli.py verify` checks: the cache itself, and that it is the one this config asks for."""

from __future__ import annotations

from cache.ledger import Ledger
from cache.verify import Finding
from cache.verify import verify as verify_cache
from pipeline.config import LABELS_FROM, Config, config_fingerprint
from pipeline.tracking import found_manifest, progress


def verify(config: Config) -> list[Finding]:
    """Every finding, most basic first; an empty list is a sound cache.

    Raises: MissingCache when there is none.
    """
    stages = ("extract", LABELS_FROM[config.recipe])
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
        wanted = config_fingerprint(config, stage)
        if manifest.get("config") != wanted:
            what = f"made with config {manifest.get('config')}, this config asks for {wanted}"
            findings.append(
                Finding("stale", f"{config.cache_path}: {stage}", what, f"Run `cli.py {stage}` again.")
            )
    return findings
