"""Which image is which row of the cache: rows are only ever appended, whatever order the data set lists.

A data set may grow between two runs, and a new name may sort before an old one. So the order of a cache is
its own: images keep their rows, new ones come after them, and readers go by the sample ids that the
cache holds. What an image was like when its row was made is in the ledger, as its stamp.
"""

from __future__ import annotations

from collections.abc import Sequence

from cache.errors import StaleCache
from cache.ledger import Ledger
from cache.store import Store
from pipeline.config import Config
from pipeline.data.base import DataSet, Sample

STREAM = "stream"  # of cache.tokens: extraction clusters, and keeps no tokens


def in_row_order(data: DataSet, cached: Sequence[str], where: object) -> list[Sample]:
    """The training samples: those that are cached in the order of their rows, then the others as listed.

    Raises: StaleCache naming the first cached image that the data set no longer lists.
    """
    listed = data.by_id("train")
    gone = [name for name in cached if name not in listed]
    if gone:
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        raise StaleCache(
            f"{where}: caches image {gone[0]!r}{more}, which {data.name} no longer lists. Put it back, or delete "
            f"{where} to extract the {len(listed)} images that there are, or point cache.path elsewhere."
        )
    old = set(cached)
    return [listed[name] for name in cached] + [sample for name, sample in listed.items() if name not in old]


def cached_samples(data: DataSet, store: Store) -> list[Sample]:
    """The sample of every row. Raises: StaleCache when the data set has more or fewer images than the cache."""
    samples = in_row_order(data, store.samples, store.path)
    if len(samples) != store.num_samples:
        raise StaleCache(
            f"{store.path}: caches {store.num_samples} images, {data.name} lists {len(samples)}; the first that is "
            f"not cached is {samples[store.num_samples].id!r}. Run `cli.py extract`: it makes the new ones only."
        )
    return samples


def samples_of(data: DataSet, store: Store, rows: range) -> list[Sample]:
    """The samples of some rows, without reading all ids. Raises: StaleCache as `in_row_order`."""
    listed, ids = data.by_id("train"), store.ids(rows)
    if any(name not in listed for name in ids):
        in_row_order(data, ids, store.path)  # raises, and says what to do
    return [listed[name] for name in ids]


def span(rows: range) -> list[int]:
    """Rows as a record names them."""
    return [rows.start, rows.stop]


def made_from(config: Config, data: DataSet, samples: Sequence[Sample]) -> list[str]:
    """What extraction makes each row from: its image, and where tokens stream its labels too."""
    images = data.stamps(samples)
    if config.cache.tokens != STREAM:
        return images
    return [f"{image} {mask}" for image, mask in zip(images, data.stamps(samples, "labels"), strict=True)]


def check_unchanged(
    ledger: Ledger, fingerprint: str, samples: Sequence[Sample], stamps: Sequence[str]
) -> None:
    """Compares what each recorded row was made from with what there is now.

    Raises: StaleCache naming the first image that changed.
    """
    for shard, entry in ledger.entries_of(fingerprint).items():
        first, stop = entry["rows"]
        for row, (was, now) in enumerate(
            zip(entry.get("stamps", ()), stamps[first:stop], strict=False), start=first
        ):
            if was != now:
                raise StaleCache(
                    f"{ledger.path(shard)}: image {samples[row].id!r} has changed since it was extracted (it was "
                    f"{was}, it is {now}). Put the old one back, or delete this file and run `cli.py extract`: it "
                    f"makes the {stop - first} images of that shard again."
                )
