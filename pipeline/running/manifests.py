"""What the next stage reads of a stage: manifests.

A manifest is the small file that a stage writes last. It names the stage's fingerprint and the
config's, so that the stage below can tell a cache made otherwise from its own.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cache.errors import MissingCache, StaleCache
from cache.files import remove, write_text
from cache.header import DATA, METADATA
from cache.ledger import MANIFEST, Ledger, read_manifest, write_manifest
from cache.places import Place, place
from pipeline.config import (
    LABELS_FROM,
    STAGES,
    Config,
    ConfigError,
    asked,
    config_fingerprint,
    difference,
    kept,
    load,
)
from pipeline.reading import yaml_text

_PSEUDO = {
    "views": int,
    "objects_per_view": float,
    "objects_histogram": {str: int},
    "coverage": float,
    "tokens_per_mask": float,
    "largest_mask_share": float,
    "purity": (float, None),
    "verdict?": [str],
}
_CAMS = {
    **dict.fromkeys(("images", "maps", "empty", "untagged"), int),
    "seeds": ({str: {str: float}}, None),
    "refined?": float,
}
_ASKED = {"asked?": dict, "arrays?": [str]}
# Of what a stage says of itself, see cache.records; a manifest of another shape says nothing.
SHAPES = {
    "extract": MANIFEST | _ASKED | {"text?": str, "text_asked?": dict, "facts?": dict, "classes?": [str]},
    "cluster": MANIFEST | _ASKED | {"summary?": _PSEUDO},
    "cams": MANIFEST | _ASKED | {"summary?": _CAMS},
    "train": MANIFEST | _ASKED | {"iterations?": int, "student?": str, "classes?": [str], "unseen?": [str]},
}
# By the stage below.
NEEDED: dict[str, tuple[str, ...]] = dict.fromkeys(("cluster", "cams"), ("fingerprint", "content"))
NEEDED |= {"extract": ("fingerprint", "content", "text")}
NEEDED |= {"train": ("fingerprint", "student")}
MANIFESTS = {
    "extract": lambda config: place(config.cache_path) / "extract.manifest.json",
    "cluster": lambda config: place(config.cache_path) / "cluster.manifest.json",
    "cams": lambda config: place(config.cache_path) / "cams.manifest.json",
    "train": lambda config: config.run_path / "train" / "train.manifest.json",
}


def manifest_path(config: Config, stage: str) -> Place:
    return MANIFESTS[stage](config)


def found_manifest(config: Config, stage: str) -> dict[str, Any] | None:
    """The stage's manifest, or None when the stage never ended, or what the manifest vouches for is gone."""
    manifest = read_manifest(manifest_path(config, stage), SHAPES[stage])
    if manifest is None or not all(file.is_file() for file in _vouched_for(config, stage, manifest)):
        return None
    return manifest


def _vouched_for(config: Config, stage: str, manifest: Mapping[str, Any]) -> list[Place]:
    """The files without which a manifest says nothing: metadata of its arrays, its student."""
    if stage == "train":
        return [config.run_path / "train" / str(manifest.get("student"))]
    data = place(config.cache_path) / DATA
    return [data / METADATA, *(data / name / METADATA for name in manifest.get("arrays") or ())]


def reopen(config: Config, stage: str) -> None:
    """Takes back that a stage of the cache is complete."""
    for path in (manifest_path(config, stage), config.manifest_folder / f"{stage}.manifest.json"):
        remove(path)


def finish(config: Config, stage: str, manifest: dict[str, Any]) -> None:
    """Says that a stage of the cache is complete: the manifest, and its copy where Snakemake looks."""
    copy = config.manifest_folder / f"{stage}.manifest.json"
    if found_manifest(config, stage) != manifest:
        write_manifest(manifest_path(config, stage), manifest)
    if copy != manifest_path(config, stage) and read_manifest(copy) != manifest:
        write_manifest(copy, manifest)


def asked_of(config: Config, stage: str) -> dict[str, Any]:
    """What a manifest says of the config that it was made with."""
    return {"config": config_fingerprint(config, stage), "asked": asked(config, stage)}


def required_manifest(config: Config, stage: str) -> dict[str, Any]:
    """The manifest of an upstream stage that ended and did what this config asks.

    Raises: MissingCache when it never ended, StaleCache when another config made it.
    """
    path, manifest = manifest_path(config, stage), found_manifest(config, stage)
    if manifest is None or not all(key in manifest for key in NEEDED[stage]):
        raise MissingCache(f"{path}: `{stage}` has not been completed. Run `cli.py {stage}` first.")
    _refuse_other_config(config, stage, manifest, "config", "asked", path)
    if stage == "extract":
        _refuse_other_config(config, "text", manifest, "text_config", "text_asked", path)
    return manifest


def _refuse_other_config(
    config: Config, stage: str, manifest: Mapping[str, Any], key: str, keys: str, path: Place
) -> None:
    """Raises: StaleCache naming the key that differs, where the manifest is of another config."""
    if manifest.get(key) == config_fingerprint(config, stage):
        return
    said = difference(dict(manifest.get(keys) or {}), asked(config, stage))
    command = "extract" if stage == "text" else stage
    above, said_above = ("", "") if said else _difference_above(config, stage)
    why = said or said_above or "another version of this program made it"
    first = above or command  # the stage to begin with: those below it would say the same
    alone = ": it renews the text features alone" if stage == "text" else ""
    elsewhere = "" if alone or stage == "train" else ", or point cache.path elsewhere"
    raise StaleCache(
        f"{path}: {command} was run with another config: {why}. Run `cli.py {first}` again{alone}{elsewhere}."
    )


def _difference_above(config: Config, stage: str) -> tuple[str, str]:
    """The nearest stage above that was asked for something else, and what; two empty texts without one."""
    above = LABELS_FROM[config.recipe] if stage == "train" else STAGES[stage][1]
    if above is None:
        return "", ""
    made = read_manifest(manifest_path(config, above), SHAPES[above]) or {}
    said = difference(made.get("asked") or {}, asked(config, above)) if made else ""
    return (above, said) if said else _difference_above(config, above)


def save_config(config: Config) -> None:
    """Keeps the resolved config in the run folder, for people and for `inspect`."""
    write_text(config.run_path / "config.yaml", yaml_text(kept(config)))


def run_config(run: Path) -> Config:
    """The config that a run folder was made with. Raises ConfigError when it is no run folder."""
    if not (run / "config.yaml").is_file():
        near = sorted(p.parent.as_posix() for p in Path("runs").glob("*/config.yaml"))
        raise ConfigError(
            f"{run}: not a run folder (no config.yaml in it). There are: {', '.join(near) or 'none'}."
        )
    return load(run / "config.yaml")


def record_shard(config: Config, stage: str, shard: int, entry: dict[str, Any], began: float) -> None:
    """Writes a shard's ledger record, with when, where and how long beside what the stage says of it."""
    where = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    seconds = round(time.time() - began, 3)
    Ledger(config.cache_path, stage).record(shard, {"shard": shard, **entry, **where, "seconds": seconds})
