"""What a cache says of itself: the attributes of its Zarr group, read and written as the JSON they are.

    {"cache": {"version": 2, "shard": 64, "sizes": {"N": 1464, ...}, "dtypes": {"tokens": "int8"},
               "identity": ["data", "teacher", ...]},
     "data": ..., "teacher": ..., "cluster": ...}

`cache` is ours; `dtypes` names the arrays that aren't of their usual dtype; `identity` names the sections
that say what the cache was made from, which never change; the others were added by later stages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cache.errors import CorruptShard, MissingCache, StaleCache, unreadable
from cache.files import write_atomic
from cache.places import Place
from cache.records import misfit, parsed
from cache.schema import ARRAYS, LONGEST, MOST_SAMPLES, SHARD, VERSION, spec_of

DATA = "data.zarr"
METADATA = "zarr.json"
HEADER = "cache"
SHAPE = {"sizes": {str: range(1, MOST_SAMPLES + 1)}, "dtypes": {str: str}, "identity": [str]}


def new_attributes(
    sizes: Mapping[str, int], samples: Sequence[str], sections: Mapping[str, Any], dtypes: Mapping[str, str]
) -> dict[str, Any]:
    """The attributes of a cache made from `sections`. Raises: ValueError for arguments that don't fit."""
    if not samples or len(samples) != sizes.get("N") or len(set(samples)) != len(samples):
        raise ValueError(f"want N = {sizes.get('N')} samples, all distinct, got {len(samples)}.")
    if HEADER in sections:
        raise ValueError(f"the attribute {HEADER!r} is the cache's own.")
    lengths = {axis: int(size) for axis, size in sizes.items()}
    for name, dtype in dtypes.items():
        spec_of(name, dtype)
    header = {"version": VERSION, "shard": SHARD, "sizes": lengths, "dtypes": dict(dtypes)}
    header["identity"] = sorted(sections)
    return json.loads(json.dumps({HEADER: header, **sections}))  # tuples become lists, as when read back


def read_attributes(path: Place) -> dict[str, Any]:
    """The attributes of the cache at `path`. Raises: MissingCache, StaleCache, CorruptShard, CacheError."""
    file = path / DATA / METADATA
    todo = "Run `cli.py extract --config CONFIG` to make one, or point cache.path elsewhere."
    try:
        found = parsed(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise MissingCache(f"{path}: no cache here, {DATA} is missing. {todo}") from None
    except OSError as error:
        raise unreadable(file, error) from error
    except ValueError as error:
        raise CorruptShard(f"{file}: isn't JSON ({error}). Delete {path} and run extract again.") from error
    attributes = found.get("attributes") if isinstance(found, dict) else None
    header = attributes.get(HEADER) if isinstance(attributes, dict) else None
    if not isinstance(attributes, dict) or not isinstance(header, dict):
        raise MissingCache(f"{path}: {DATA} is no cache of this program. {todo}")
    made, wanted = (header.get("version"), header.get("shard")), (VERSION, SHARD)
    if made != wanted:
        raise StaleCache(
            f"{path}: has schema version {made[0]} with shards of {made[1]}, this program reads version "
            f"{wanted[0]} with shards of {wanted[1]}. Delete the folder and run `cli.py extract --config "
            "CONFIG` again, or use the version of the program that made it."
        )
    if (what := _misfit(header)) is not None:
        raise CorruptShard(f"{file}: isn't the header of a cache: {what}. Delete {path} and run extract again.")
    return attributes


def _misfit(header: Mapping[str, Any]) -> str | None:
    """What of a header can't be as it is, in words."""
    if (what := misfit(header, SHAPE)) is not None:
        return what
    if "N" not in header["sizes"]:
        return "it says no size of axis N"
    for axis, size in header["sizes"].items():
        if axis != "N" and size > LONGEST:
            return f"size {axis} is {size}, at most {LONGEST} is possible"
    for name, dtype in header["dtypes"].items():
        try:
            if name not in ARRAYS:
                return f"it speaks of an array {name!r}"
            spec_of(name, dtype)
        except ValueError as error:
            return str(error).rstrip(".")
    return None


def write_attributes(path: Place, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the attributes, and returns them as read back. Raises: CacheWriteFailed."""
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    write_atomic(path / DATA / METADATA, json.dumps(group, indent=1).encode())
    return read_attributes(path)


def check_same(
    path: Place,
    found: Mapping[str, Any],
    found_samples: Sequence[str],
    wanted: Mapping[str, Any],
    wanted_samples: Sequence[str],
) -> None:
    """Compares the cache at `path` with what it would be made from now.

    Sections of later stages don't count, nor do samples that come after those that are there.
    Raises: StaleCache naming the first difference with both values.
    """
    for what, there, asked in _pairs(found, found_samples, wanted, wanted_samples):
        if there != asked:
            raise StaleCache(
                f"{path}: {what} is {_short(there)} in the cache, wanted {_short(asked)}. "
                "Point cache.path elsewhere, or delete the folder to have it made again."
            )


def _pairs(
    found: Mapping[str, Any], found_samples: Sequence[str], wanted: Mapping[str, Any], wanted_samples: Sequence[str]
) -> Iterable[tuple[str, Any, Any]]:
    """(what, in the cache, wanted) of all that must be equal."""
    for section in sorted({*found[HEADER]["identity"], *wanted[HEADER]["identity"]}):
        there, asked = found.get(section), wanted.get(section)
        # Of two long ones the first difference is said.
        if isinstance(there, dict) and isinstance(asked, dict):
            for key in dict.fromkeys([*asked, *there]):
                yield f"{section}.{key}", there.get(key), asked.get(key)
        else:
            yield f"attribute {section!r}", there, asked
    later = {name: dtype for name, dtype in found[HEADER]["dtypes"].items() if ARRAYS[name].stage != "extract"}
    yield "what is of an unusual dtype", found[HEADER]["dtypes"], later | wanted[HEADER]["dtypes"]
    for axis, size in wanted[HEADER]["sizes"].items():
        if axis != "N" or len(found_samples) > size:
            yield f"size {axis}", found[HEADER]["sizes"].get(axis, size), size
    for row, (there, asked) in enumerate(zip(found_samples, wanted_samples, strict=False)):
        yield f"sample {row}", there, asked


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
