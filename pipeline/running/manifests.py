"""What the next stage reads of a stage: manifests.

A manifest is the small file that a stage writes last. It names the stage's fingerprint and the
config's, so that the stage below can tell a cache made otherwise from its own.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cache.errors import MissingCache, StaleCache
from cache.files import remove, write_text
from cache.header import DATA, METADATA
from cache.ledger import Ledger, read_manifest, write_manifest
from cache.places import Place, place
from pipeline.config import Config, ConfigError, Data, kept, load
from pipeline.config.files import WRITTEN_BY
from pipeline.config.places import where_is
from pipeline.config.reading import Unreadable, read_yaml, yaml_text
from pipeline.running.table import STAGES, above, asked, config_fingerprint, difference, parts_of

CONFIG = "config.yaml"  # of a run folder


def manifest_path(config: Config, stage: str) -> Place:
    return STAGES[stage].manifest(config)


def found_manifest(config: Config, stage: str) -> dict[str, Any] | None:
    """The stage's manifest, or None when the stage never ended, or what the manifest vouches for is gone."""
    manifest = read_manifest(manifest_path(config, stage), STAGES[stage].shape)
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
    if manifest is None or not all(key in manifest for key in STAGES[stage].needed):
        raise MissingCache(f"{path}: `{stage}` has not been completed. Run `cli.py {stage}` first.")
    _refuse_other_config(config, stage, manifest, "config", "asked", path)
    for part in parts_of(stage):
        _refuse_other_config(config, part, manifest, f"{part}_config", f"{part}_asked", path)
    return manifest


def _refuse_other_config(
    config: Config, stage: str, manifest: Mapping[str, Any], key: str, keys: str, path: Place
) -> None:
    """Raises: StaleCache naming the key that differs, where the manifest is of another config."""
    if manifest.get(key) == config_fingerprint(config, stage):
        return
    said = difference(dict(manifest.get(keys) or {}), asked(config, stage))
    command = STAGES[stage].part_of or stage
    over, said_above = ("", "") if said else _difference_above(config, stage)
    why = said or said_above or "another version of this program made it"
    first = over or command  # the stage to begin with: those below it would say the same
    alone = ": it renews the text features alone" if STAGES[stage].part_of else ""
    elsewhere = "" if alone or stage == "train" else ", or point cache.path elsewhere"
    raise StaleCache(
        f"{path}: {command} was run with another config: {why}. Run `cli.py {first}` again{alone}{elsewhere}."
    )


def _difference_above(config: Config, stage: str) -> tuple[str, str]:
    """The nearest stage above that was asked for something else, and what; two empty texts without one."""
    over = above(config, stage)
    if over is None:
        return "", ""
    made = read_manifest(manifest_path(config, over), STAGES[over].shape) or {}
    said = difference(made.get("asked") or {}, asked(config, over)) if made else ""
    return (over, said) if said else _difference_above(config, over)


MADE_IN = "made_in"  # of a kept config: the folder that its relative paths are below, seen from the run folder


def save_config(config: Config) -> None:
    """Keeps the resolved config in the run folder, for people, for `inspect`, and with where its paths begin."""
    values, folder = kept(config), config.teacher.near or Path.cwd()
    with suppress(ValueError):  # another drive of Windows: nothing leads from one to the other
        values[WRITTEN_BY][MADE_IN] = Path(os.path.relpath(folder, config.run_path)).as_posix()
    write_text(config.run_path / CONFIG, yaml_text(values))


def made_in(run: Path) -> Path | None:
    """The folder that a run's relative paths are below, absolute; None where that isn't known.

    It is recorded seen from the run folder, so a project may move as a whole. Before it was recorded, a relative
    `runs` says as much.
    """
    try:
        raw = read_yaml(run / CONFIG, where=str(run / CONFIG), keys_are_text=True)
    except Unreadable:
        return None
    raw = raw if isinstance(raw, dict) else {}
    written = raw.get(WRITTEN_BY)
    recorded = written.get(MADE_IN) if isinstance(written, dict) else None
    here = Path(os.path.abspath(run))
    if isinstance(recorded, str):
        return Path(os.path.normpath(here / recorded))
    below = Path(str(raw.get("runs"))) / str(raw.get("name"))
    is_below = not below.is_absolute() and here.parts[-len(below.parts) :] == below.parts
    return here.parents[len(below.parts) - 1] if is_below else None


def run_config(run: Path) -> Config:
    """The config that a run folder was made with. Raises ConfigError when it is no run folder."""
    if not (run / CONFIG).is_file():
        near = sorted(p.parent.as_posix() for p in Path("runs").glob(f"*/{CONFIG}"))
        raise ConfigError(f"{run}: not a run folder (no config.yaml in it). There are: {', '.join(near) or 'none'}.")
    return load(run / CONFIG).made_in(made_in(run))


def located(config: Config, run: Path) -> Config:
    """A run folder's config with the places as they are seen from here, wherever the folder lies now.

    What enters a fingerprint stays as it is.
    """
    near, changed = config.teacher.near, dict[str, Any]()
    if config.run_path.resolve() != run.resolve():
        changed |= {"runs": run.absolute().parent.as_posix(), "name": run.absolute().name}
    if near is not None and near != Path.cwd():
        if (root := config.data.options().get("root")) is not None:
            changed["data"] = Data(**{**config.data.model_dump(), "root": str(where_is(str(root), near))})
        if isinstance(where := config.cache_path, Path) and config.cache.path is not None:
            changed["cache"] = config.cache.model_copy(update={"path": str(where_is(where, near))})
    return config.model_copy(update=changed) if changed else config


def record_shard(config: Config, stage: str, shard: int, entry: dict[str, Any], began: float) -> None:
    """Writes a shard's ledger record, with when, where and how long beside what the stage says of it."""
    where = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    seconds = round(time.time() - began, 3)
    Ledger(config.cache_path, stage).record(shard, {"shard": shard, **entry, **where, "seconds": seconds})
