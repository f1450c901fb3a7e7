"""Which files in a cache's folder are the cache's own: nothing else is ever removed, no other folder taken for one.

lock  ledger/<stage>/00012.json  <stage>.manifest.json  data.zarr/zarr.json  data.zarr/<array>/{zarr.json,c.0.0}
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from cache.errors import CacheError, MissingCache
from cache.files import is_held, writing
from cache.header import DATA, METADATA, read_attributes
from cache.records import misfit, parsed
from cache.schema import ARRAYS, SAMPLE

LOCK, LEDGER = "lock", "ledger"
HOLDER = {"pid": int, "host": str, "stage": str, "since": str}  # what a lock says
MANIFEST, RECORD, CHUNK = r"[a-z]+\.manifest\.json", r"\d+\.json", r"c(\.\d+)+"
OWN = re.compile(rf"{LOCK}|{LEDGER}|{re.escape(DATA)}|{MANIFEST}")
# As cache.files names them: <name>.<host>.<pid>.partial. Earlier versions left the host out.
LEFT = re.compile(rf"({MANIFEST}|{RECORD}|{CHUNK}|{re.escape(METADATA)})(\.[^/]+)?\.\d+\.partial")


def refuse_other_folder(root: Path) -> None:
    """Before anything is written: a folder that isn't empty holds a cache, or what a killed run left of one.

    Raises: CacheError naming what else there is; CacheWriteFailed.
    """
    with writing(root):
        if not root.is_dir() or _has_header(root):
            return
        strange = sorted(name for name in os.listdir(root) if not _is_own(root / name))
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise CacheError(
            f"{root}: is no cache, but holds {strange[0]!r}{more}. Nothing was changed. Point cache.path to a folder "
            "that is new or empty, such as one within it."
        )


def _has_header(root: Path) -> bool:
    try:
        read_attributes(root)
    except MissingCache:
        return False
    except CacheError:  # damaged, or of another version: whoever opens it says so
        return True
    return True


def _is_own(path: Path) -> bool:
    if path.name == DATA:  # without a header: a creation that was killed
        return path.is_dir() and all(
            name in ARRAYS or name == SAMPLE.name or LEFT.fullmatch(name) for name in os.listdir(path)
        )
    if path.name == LOCK:
        return path.is_symlink() or _is_lock(path)  # of a link `lock` speaks
    return bool(OWN.fullmatch(path.name) or LEFT.fullmatch(path.name))


def _is_lock(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size > 2**16:
        return False
    content = path.read_bytes()
    try:
        return not content or misfit(parsed(content), HOLDER) is None or is_held(path)
    except ValueError:
        return is_held(path)


def remove_partials(root: Path) -> None:
    """Removes what killed writers left. Only for the holder of the lock: nobody else is writing."""
    data, ledger = root / DATA, root / LEDGER
    with writing(root):
        folders = [folder for folder in (root, data, *data.glob("*"), *ledger.glob("*")) if folder.is_dir()]
    for folder in folders:
        with writing(folder):
            try:
                entries = list(os.scandir(folder))
            except PermissionError:  # who needs this folder says so
                continue
            for entry in entries:
                if LEFT.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    Path(entry.path).unlink(missing_ok=True)
