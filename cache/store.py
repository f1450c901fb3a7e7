"""The only door to zarr: the arrays of one cache, written by whole shards and read by rows.

    store = Store.create(root, sizes=..., arrays=["view", "cls"], samples=ids, attributes=...)
    digest = store.write_shard("cls", 3, block)      # (64, V, C); then record it in the ledger
    store.read_rows("cls", [200])                    # (1, V, C)

`root/data.zarr` is a plain Zarr v3 group, and zarr reads it. Shards are written by `shards.py`: zarr would merge a
shard into the one on disk (so that a corrupt one could never be mended), copies it several times, and
doesn't force files to disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from cache.errors import CacheError, CorruptShard, MissingCache, StaleCache, damaged, unreadable
from cache.files import remove, write_atomic
from cache.header import DATA, HEADER, METADATA, check_same, new_attributes, read_attributes, write_attributes
from cache.metadata import misfit_of_array
from cache.places import Place, place, size_of
from cache.records import Shape, misfit, parsed, said
from cache.schema import ARRAYS, LONGEST, SAMPLE, SHARD, ArraySpec, spec_of
from cache.shards import ZSTD_LEVEL, block_digest, holds, shard_bytes

SIDES = range(1, LONGEST + 1)  # pixels of an image, patches and views: shapes of `fact`
# What zarr and its codecs raise on bytes, and on array metadata, that aren't what was written.
BAD_BYTES = (ValueError, RuntimeError)
BAD_METADATA = (ValueError, KeyError, TypeError)


class Store:
    """The arrays under one cache folder. Picklable: holds paths and numbers, opens zarr when first read."""

    def __init__(self, path: str | Place) -> None:
        """Use `Store.open` or `Store.create`."""
        self.path = place(path)
        self.data = self.path / DATA
        self._found = read_attributes(self.path)
        self._samples: list[str] | None = None
        self._opened: dict[str, Any] = {}

    @classmethod
    def open(cls, path: str | Place) -> Store:
        """An existing cache. Raises: MissingCache, StaleCache (schema version), CorruptShard (metadata)."""
        return cls(path)

    @staticmethod
    def is_at(path: str | Place) -> bool:
        """Whether there is a cache of any kind."""
        return (place(path) / DATA / METADATA).is_file()

    @classmethod
    def create(
        cls,
        path: str | Place,
        *,
        sizes: Mapping[str, int],
        arrays: Sequence[str],
        samples: Sequence[str],
        attributes: Mapping[str, Any],
        dtypes: Mapping[str, str] | None = None,
    ) -> Store:
        """Makes the cache, or opens it when it is there and was made from the same.

        Then missing arrays are added, and samples after those that are there get rows, still unwritten.

        `sizes` maps axis letters to lengths, `attributes` (JSON) is the provenance, `dtypes` names
        those arrays that aren't to be of their usual dtype. Hold the lock.
        Raises: StaleCache naming what differs, CacheWriteFailed, ValueError.
        """
        wanted = new_attributes(sizes, samples, attributes, dtypes or {})
        if not cls.is_at(path):
            _write_ids(place(path) / DATA, samples, 0)
            write_attributes(place(path), wanted)  # last: there is never half a cache
        store = cls(path)
        check_same(store.path, store._found, store.samples, wanted, samples)
        if len(samples) > store.num_samples:
            _write_ids(store.data, samples, store.num_samples)
            store._samples = None
        store.add_arrays(arrays, sizes)
        return store

    def add_arrays(
        self,
        names: Iterable[str],
        sizes: Mapping[str, int],
        *,
        replace: bool = False,
        dtypes: Mapping[str, str] | None = None,
    ) -> None:
        """Adds arrays that aren't there yet; `sizes` needs only the axes that are new. Hold the lock.

        An array of another shape is an error, or with `replace` is dropped first if it is of the same stage as
        `names`, asked for or not; one that only lacks rows gets them. `dtypes` are those of `names` that may have
        several; one that is there in another is dropped.
        Raises: StaleCache naming both shapes, CacheWriteFailed.
        """
        names, merged = list(names), self.sizes | {axis: int(size) for axis, size in sizes.items()}
        unknown = [name for name in names if name not in ARRAYS]
        if unknown:
            raise ValueError(f"{self.path}: no such arrays as {unknown}; the schema has {list(ARRAYS)}.")
        header = {**self._found[HEADER], "sizes": merged}
        for name, dtype in (dtypes or {}).items():
            if dtype != self.spec(name).dtype:
                remove(self.data / name)
                others = {other: of for other, of in header["dtypes"].items() if other != name}
                header["dtypes"] = others | ({} if dtype == ARRAYS[name].dtype else {name: dtype})
        longer = []
        for name in self.arrays:
            found, wanted = self._zarr(name).shape, self.spec(name).shape(merged)
            if found[1:] == wanted[1:] and self.spec(name).is_sharded:
                longer += [name] * (found != wanted)
            elif found != wanted:
                if not (replace and ARRAYS[name].stage in {ARRAYS[asked].stage for asked in names}):
                    raise StaleCache(
                        f"{self.path}: array {name!r} has shape {found}, wanted {wanted}. Delete "
                        f"{self.data / name} to have it made again, or point cache.path elsewhere."
                    )
                remove(self.data / name)
        if header != self._found[HEADER]:
            self._found = write_attributes(self.path, {**self._found, HEADER: header})
        for name in [*longer, *(name for name in names if not self.has(name))]:
            made = _encoded(self.spec(name), self.spec(name).shape(merged))
            write_atomic(self.data / name / METADATA, made[f"{name}/{METADATA}"])
        self._opened.clear()

    @property
    def attributes(self) -> dict[str, Any]:
        """Provenance, and the sections that stages added."""
        return {key: value for key, value in self._found.items() if key != HEADER}

    def fact(self, shape: Shape, *keys: str) -> Any:
        """What the attributes say under these keys. Raises: CorruptShard for what is missing or of another shape."""
        value: Any = self.attributes
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if (what := misfit(value, shape, ".".join(keys))) is not None:
            raise CorruptShard(
                f"{self.data / METADATA}: attribute {what}, which says nothing. Delete {self.path} and run extract "
                "again."
            )
        return value

    @property
    def mean_colour(self) -> np.ndarray:
        """What fills a view beyond the image, (3,) uint8. Raises: CorruptShard."""
        colour = self.fact([range(256)], "mean_colour")
        if len(colour) != 3:
            raise CorruptShard(f"{self.data / METADATA}: attribute {said('mean_colour', colour)}, want three numbers.")
        return np.array(colour, np.uint8)

    def update_attributes(self, section: str, values: Mapping[str, Any]) -> None:
        """Merges `values` into a section of the attributes. Hold the lock.

        Raises: ValueError for what `create` was given (it says what the cache is), CacheWriteFailed.
        """
        there = read_attributes(self.path).get(section)
        self.replace_attributes({section: {**(there if isinstance(there, dict) else {}), **values}})

    def replace_attributes(self, values: Mapping[str, Any]) -> None:
        """Sets sections of the attributes as a whole. Hold the lock. Raises: as update_attributes."""
        found = read_attributes(self.path)  # another process may have added to them
        if own := {HEADER, *found[HEADER]["identity"]} & values.keys():
            raise ValueError(f"{self.path}: the attributes {sorted(own)} say what this cache was made from.")
        self._found = write_attributes(self.path, {**found, **values})

    @property
    def sizes(self) -> dict[str, int]:
        """Lengths by axis letter."""
        return dict(self._found[HEADER]["sizes"])

    @property
    def samples(self) -> list[str]:
        """The ids, by row. Raises: CorruptShard."""
        if self._samples is None:
            self._samples = self.ids(range(self.num_samples))
        return list(self._samples)

    def ids(self, rows: range) -> list[str]:
        """The ids of some rows that follow one another. Raises: CorruptShard."""
        found: list[str] = []
        for file in range(rows.start // SAMPLE.chunk, -(-rows.stop // SAMPLE.chunk)):
            first, stop = file * SAMPLE.chunk, (file + 1) * SAMPLE.chunk
            part = slice(max(rows.start, first), min(rows.stop, stop))
            found += [str(sample) for sample in self._decode(SAMPLE.name, file, part)]
        if len(found) != len(rows):
            where = self.data / SAMPLE.name / METADATA
            raise damaged(where, SAMPLE.name, 0, f"it has {len(found)} ids for {len(rows)} samples")
        return found

    @property
    def num_samples(self) -> int:
        return int(self._found[HEADER]["sizes"]["N"])

    @property
    def num_shards(self) -> int:
        return -(-self.num_samples // SHARD)

    def rows(self, shard: int) -> range:
        """Rows of a shard; the last one may be short."""
        if not 0 <= shard < self.num_shards:
            raise IndexError(f"{self.path}: no shard {shard}, there are {self.num_shards}.")
        return range(shard * SHARD, min((shard + 1) * SHARD, self.num_samples))

    @property
    def arrays(self) -> list[str]:
        """Names of the arrays that are there, in the schema's order (`sample` is not listed)."""
        return [name for name in ARRAYS if self.has(name)]

    def spec(self, array: str) -> ArraySpec:
        """The schema's words on an array, in the dtype that this cache has it."""
        return spec_of(array, self._found[HEADER]["dtypes"].get(array))

    def has(self, array: str) -> bool:
        return array in ARRAYS and (self.data / array / METADATA).is_file()

    def size_bytes(self, array: str, shard: int | None = None) -> int:
        """Bytes on disk, of one shard or of the whole array; 0 for what isn't there."""
        pattern = "*" if shard is None else self._file(array, shard).name
        return sum(size_of(file) or 0 for file in (self.data / array).glob(pattern))

    def write_shard(self, array: str, shard: int, block: np.ndarray) -> str:
        """Writes one whole shard, forces it to disk, reads it back and compares; returns its digest.

        block: (rows of the shard, ...) of the array's dtype. Whatever was there is replaced.
        Raises: ValueError for a wrong shape or dtype, CacheWriteFailed (the old shard stays),
        CorruptShard when the disk gives back something else.
        """
        spec, opened = self._spec(array), self._zarr(array)
        wanted = (len(self._rows_of(array, shard)), *opened.shape[1:])
        if block.shape != wanted or block.dtype != np.dtype(spec.dtype):
            raise ValueError(
                f"{self.path}: shard {shard} of {array!r} is {wanted} {spec.dtype}, "
                f"got {block.shape} {block.dtype}; only whole shards are written."
            )
        if spec.is_sharded:
            pieces = shard_bytes(spec, np.ascontiguousarray(block))
        else:
            made = _encoded(spec, wanted, block)
            pieces = [memoryview(value) for key, value in made.items() if not key.endswith(METADATA)]
        write_atomic(self._file(array, shard), *pieces)
        if not holds(self._bytes(array, shard), pieces):
            raise CorruptShard(
                f"{self._file(array, shard)}: what was read back differs from what was written. "
                "Check the disk and the memory of this machine, or point cache.path elsewhere."
            )
        return block_digest(array, shard, block)

    def _bytes(self, array: str, shard: int) -> np.ndarray:
        """What the disk holds, (size,) uint8."""
        file = self._file(array, shard)
        try:
            if isinstance(file, Path):
                return np.memmap(file, np.uint8, "r")
            return np.frombuffer(file.read_bytes(), np.uint8)
        except OSError as error:
            raise unreadable(file, error) from error

    def write_whole(self, array: str, values: np.ndarray) -> str:
        """Writes an array that has no sample axis, such as `text`; otherwise as write_shard."""
        if self._spec(array).is_sharded:
            raise ValueError(f"{self.path}: {array!r} is written by shards.")
        return self.write_shard(array, 0, values)

    def read_shard(self, array: str, shard: int) -> np.ndarray:
        """All rows of one shard. Raises: MissingCache (no such array), CorruptShard, IndexError."""
        rows = self._rows_of(array, shard)
        return self._decode(array, shard, slice(rows.start, rows.stop))

    def read_rows(self, array: str, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The rows asked for, in that order: (len(rows), ...). Touches only the chunks it needs.

        Raises: MissingCache (no such array), CorruptShard, IndexError for a row beyond the array.
        """
        wanted, spec, opened = np.asarray(rows, dtype=np.int64), self._spec(array), self._zarr(array)
        if len(wanted) and opened.shape[0] <= wanted.max() < self.num_samples and spec.is_sharded:
            what = f"it has {opened.shape[0]} rows, the cache {self.num_samples}"
            raise damaged(self.data / array / METADATA, array, int(wanted.max()) // SHARD, what)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < opened.shape[0]:
            raise IndexError(f"{self.path}: {array!r} has rows 0 to {opened.shape[0] - 1}, asked for {rows}.")
        out = np.empty((len(wanted), *opened.shape[1:]), opened.dtype)
        shards = wanted // SHARD if spec.is_sharded else wanted * 0
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            unique, inverse = np.unique(wanted[places], return_inverse=True)
            together = unique[-1] - unique[0] < len(unique)  # zarr reads a slice faster than a list
            picked = slice(int(unique[0]), int(unique[-1]) + 1) if together else unique
            out[places] = self._decode(array, int(shard), picked)[inverse]
        return out

    def read_whole(self, array: str) -> np.ndarray:
        """All of an array; meant for those without a sample axis. Raises: as read_rows."""
        self._spec(array)
        return self.read_rows(array, np.arange(self._zarr(array).shape[0]))

    def digest(self, array: str, shard: int) -> str:
        """Digest of what the disk holds, to compare with the ledger's. Raises: as read_shard."""
        return block_digest(array, shard, self.read_shard(array, shard))

    def __reduce__(self) -> Any:
        # Open arrays stay behind: a worker opens its own (zarr's event loop doesn't survive a fork).
        return Store.open, (self.path,)

    def _rows_of(self, array: str, shard: int) -> range:
        if self._spec(array).is_sharded:
            return self.rows(shard)
        if shard != 0:
            raise IndexError(f"{self.path}: {array!r} has one shard, 0, asked for {shard}.")
        return range(self._zarr(array).shape[0])

    def _file(self, array: str, shard: int) -> Place:
        num_axes = len(ARRAYS.get(array, SAMPLE).axes)
        return self.data / array / ".".join(["c", str(shard), *["0"] * (num_axes - 1)])

    def _spec(self, array: str) -> ArraySpec:
        if not self.has(array):
            known = f"the schema has only {list(ARRAYS)}"
            todo = f"run `cli.py {ARRAYS[array].stage} --config CONFIG` first" if array in ARRAYS else known
            raise MissingCache(f"{self.path}: has no array {array!r}, only {self.arrays}; {todo}.")
        return self.spec(array)

    def _zarr(self, name: str) -> Any:
        if name not in self._opened:
            file = self.data / name / METADATA
            try:
                found, spec = parsed(file.read_bytes()), SAMPLE if name == SAMPLE.name else self.spec(name)
                sizes = read_attributes(self.path)[HEADER]["sizes"]  # it may have grown since this was opened
                if (what := misfit_of_array(spec, sizes, found, _metadata)) is not None:
                    raise damaged(file, name, 0, f"{what}, which isn't what the schema has")
                self._opened[name] = zarr.open_array(str(self.data / name), mode="r")
            except CacheError:
                raise
            except FileNotFoundError:
                raise damaged(file, name, 0, "the file is missing") from None
            except OSError as error:
                raise unreadable(file, error) from error
            except BAD_METADATA as error:
                raise damaged(file, name, 0, error) from error
        return self._opened[name]

    def _decode(self, array: str, shard: int, rows: slice | np.ndarray) -> np.ndarray:
        opened, file = self._zarr(array), self._file(array, shard)
        # Of a file that is missing or empty zarr would hand out fill values.
        try:
            if not size_of(file):
                raise damaged(file, array, shard, "the file is missing or empty")
            return opened[rows] if isinstance(rows, slice) else opened.oindex[rows]
        except CacheError:
            raise  # some of them are ValueErrors too
        except BAD_BYTES as error:
            raise damaged(file, array, shard, error) from error
        except OSError as error:
            raise unreadable(file, error) from error


def _write_ids(data: Place, samples: Sequence[str], first: int) -> None:
    """Writes the ids from row `first` on, whole files, and then the array's new length."""
    start = first // SAMPLE.chunk * SAMPLE.chunk
    ids = np.array(samples, dtype=np.dtypes.StringDType())
    for number, row in enumerate(range(start, len(ids), SAMPLE.chunk), start=start // SAMPLE.chunk):
        part = ids[row : row + SAMPLE.chunk]
        filled = np.concatenate([part, np.full(SAMPLE.chunk - len(part), SAMPLE.fill, ids.dtype)])  # as zarr does
        made = _encoded(SAMPLE, (SAMPLE.chunk,), filled)
        write_atomic(data / SAMPLE.name / f"c.{number}", made[f"{SAMPLE.name}/c.0"])
    write_atomic(data / SAMPLE.name / METADATA, _encoded(SAMPLE, ids.shape)[f"{SAMPLE.name}/{METADATA}"])


def _encoded(spec: ArraySpec, shape: tuple[int, ...], block: np.ndarray | None = None) -> dict[str, Any]:
    """An array's files as zarr would write them, by path: its metadata, and its bytes when there is a block."""
    made: dict[str, Any] = {}
    array = _new_array(MemoryStore(made), spec, shape)
    if block is not None:
        array[:] = block
    return {key: value.as_numpy_array() for key, value in made.items()}


def _metadata(spec: ArraySpec, shape: tuple[int, ...]) -> dict[str, Any]:
    return parsed(_encoded(spec, shape)[f"{spec.name}/{METADATA}"].tobytes())


def _new_array(store: Any, spec: ArraySpec, shape: tuple[int, ...]) -> Any:
    """An empty array of `spec`. One file a shard, in one folder an array (key separator ".")."""
    rows = spec.chunk or shape[0]
    return zarr.create_array(
        store,
        name=spec.name,
        shape=shape,
        dtype=spec.dtype,
        chunks=(rows, *shape[1:]),
        shards=(SHARD, *shape[1:]) if spec.is_sharded else None,
        # crc32c last: without it a flipped bit is read in silence.
        compressors=[*([ZstdCodec(level=ZSTD_LEVEL)] if spec.compressed else []), Crc32cCodec()],
        fill_value=spec.fill,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=spec.axes,
        attributes={"note": spec.note},
        config={"write_empty_chunks": True},
    )
