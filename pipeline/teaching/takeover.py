"""A cache that begins as another one: its tokens by hard links, where both were extracted the same way."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cache.files import dead_partials, partial_of, remove, sync_folder, whole_file, writing
from cache.ledger import read_manifest
from cache.schema import ARRAYS
from pipeline.config import Config, UserError
from pipeline.running.console import mention, say
from pipeline.running.table import config_fingerprint, has_second_model

SMALL = 4096  # bytes: what is this small is copied, such as zarr.json, of which each cache keeps its own


def take_over(like: Path, config: Config) -> bool:
    """Gives a cache that isn't there yet the extraction of `like`; whether it did.

    Shards are written anew and renamed, never changed in place, so two caches can share a file. Nothing is
    taken over where extraction differs or there is a cache already: `extract` does what is to be done.
    Raises: UserError when `like` holds no finished extraction.
    """
    made, target = read_manifest(like / "extract.manifest.json"), config.cache_path
    if made is None:
        raise UserError(f"--like {like}: no finished extraction there. Run `cli.py extract` for it first.")
    if not (like / "data.zarr").is_dir():
        raise UserError(
            f"--like {like}: its arrays are not there, and a cache at a URL can't be taken over. Run `cli.py extract` "
            "without --like."
        )
    is_same = made.get("config") == config_fingerprint(config, "extract")
    if not is_same or not isinstance(target, Path) or _holds_something(target):
        why = "extraction differs there" if not is_same else f"{target} is not a new folder"
        say(f"extract: nothing is taken over from {like}: {why}")
        return False
    partial = partial_of(target)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in dead_partials(target.parent, target.name):  # of a take-over that was killed
            remove(left)
        try:
            partial.mkdir()
            for source in (file for stage in _same_stages(like, config) for file in _files(like, stage)):
                place = partial / source.relative_to(like)
                place.parent.mkdir(parents=True, exist_ok=True)
                _link(source, place)
            partial.rename(target)
            sync_folder(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    mention(f"extract: {target} takes over the extraction of {like}")
    return True


def _holds_something(target: Path) -> bool:
    """Whether anything is there but an empty folder, such as Snakemake makes before a job writes into it."""
    is_folder = target.is_dir() and not target.is_symlink()
    return any(target.iterdir()) if is_folder else os.path.lexists(target)


def _same_stages(like: Path, config: Config) -> list[str]:
    """The stages that made tokens there as this config asks for them: extract, and a second model's beside it."""
    made = read_manifest(like / "encode.manifest.json") or {}
    is_same = has_second_model(config) and made.get("config") == config_fingerprint(config, "encode")
    return ["extract", "encode"] if is_same else ["extract"]


def _files(cache: Path, stage: str) -> list[Path]:
    """What a stage has written: arrays, ledger and manifest; of extract also ids and the group's metadata."""
    group = cache / "data.zarr"
    found = {path: path.relative_to(group).parts[0] for path in group.rglob("*") if path.is_file()}
    data = [path for path, top in found.items() if (ARRAYS[top].stage if top in ARRAYS else "extract") == stage]
    return [*data, *(cache / "ledger" / stage).glob("*.json"), cache / f"{stage}.manifest.json"]


def _link(source: Path, place: Path) -> None:
    if source.stat().st_size > SMALL:
        try:
            os.link(source.resolve(), place)
            return
        except OSError:  # another file system, or one without hard links
            pass
    with source.open("rb") as original, whole_file(place) as copy:
        shutil.copyfileobj(original, copy)
