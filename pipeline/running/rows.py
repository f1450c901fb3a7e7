"""Which image is which row of the cache, and whether it still is what its row was made from.

A data set may grow between two runs, and a new name may sort before an old one. So the order of a cache is
its own: images keep their rows, new ones come after them, and readers go by the sample ids that the
cache holds. An image that the data set no longer lists keeps its row too, which `status` takes out of use. What an
image was like when its row was made is in the ledger, as its stamp: every stage that reads the cache compares.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cache.errors import StaleCache
from cache.ledger import Ledger
from cache.places import Place
from cache.store import Store
from pipeline.data.base import DataSet, Sample
from pipeline.running.table import STREAM

NOT_LISTED = 2  # code in `status` of an image that the data set no longer lists
NO_STAMP = "not listed"  # in place of the stamp of such an image
NOWHERE = ""  # and of its path


def in_row_order(data: DataSet, cached: Sequence[str]) -> list[Sample]:
    """The training samples: those that are cached in the order of their rows, then the others as listed.

    A cached image that the data set no longer lists is there as well, without a path: see `is_listed`.
    """
    listed, old = data.by_id("train"), set(cached)
    rows = [listed.get(name, Sample(name, NOWHERE)) for name in cached]
    return rows + [sample for name, sample in listed.items() if name not in old]


def is_listed(sample: Sample) -> bool:
    return sample.image != NOWHERE


def stamps_of(data: DataSet, samples: Sequence[Sample], what: str = "images") -> list[str]:
    """The stamp of each row's image, or of its "labels"."""
    found = iter(data.stamps([sample for sample in samples if is_listed(sample)], what))
    return [next(found) if is_listed(sample) else NO_STAMP for sample in samples]


def cached_samples(data: DataSet, store: Store) -> list[Sample]:
    """The sample of every row. Raises: StaleCache when the data set lists more or fewer images than are cached."""
    samples = in_row_order(data, store.samples)
    todo = "Run `cli.py extract`"
    gone = np.array([not is_listed(sample) for sample in samples[: store.num_samples]])
    known = store.read_whole("status") == NOT_LISTED
    if (gone & ~known).any():
        first = samples[int(np.flatnonzero(gone & ~known)[0])].id
        raise StaleCache(
            f"{store.path}: caches image {first!r}, which {data.name} no longer lists. {todo}: it takes the rows of "
            f"such images out of use (here {int((gone & ~known).sum())}) and computes nothing."
        )
    if len(samples) != store.num_samples:
        raise StaleCache(
            f"{store.path}: caches {store.num_samples} images, {data.name} lists {len(data.by_id('train'))}; the first "
            f"that is not cached is {samples[store.num_samples].id!r}. {todo}: it makes the new ones only."
        )
    if (known & ~gone).any():
        first = samples[int(np.flatnonzero(known & ~gone)[0])].id
        raise StaleCache(
            f"{store.path}: image {first!r} was out of use, and {data.name} lists it again. {todo}: it takes its row "
            "into use again and computes nothing."
        )
    return samples


def current_samples(data: DataSet, store: Store) -> list[Sample]:
    """The sample of every row, each image still what its row was made from, the classes those of the text features.

    Raises: StaleCache naming what changed and what renews it.
    """
    check_classes(data, store)
    samples = cached_samples(data, store)
    identity = str(store.attributes["fingerprint"])
    stamps = made_from(store.fact(str, "tokens"), data, samples)
    check_unchanged(Ledger(store.path, "extract"), identity, samples, stamps)
    return samples


def check_current(cache_path: str | Place, stage: str, data: DataSet, fingerprint: str) -> None:
    """Compares classes, images and masks of the training part with what the cache, and `stage` of it, were made from.

    `fingerprint` is the stage's.

    Raises: StaleCache naming what changed and what renews it.
    """
    store = Store.open(cache_path)
    samples, ledger = current_samples(data, store), Ledger(store.path, stage)
    check_labels_unchanged(ledger, fingerprint, samples, stamps_of(data, samples, "labels"))


def check_labels_unchanged(ledger: Ledger, fingerprint: str, samples: Sequence[Sample], now: Sequence[str]) -> None:
    """Compares the labels that a stage has read, row by row, with the stamps of today's. Raises: StaleCache."""
    if changed := changed_rows(ledger, fingerprint, samples, now):
        raise StaleCache(
            f"{ledger.folder}: the labels of image {samples[changed[0][0]].id!r}, or what the data set's description "
            f"says of its masks, have changed since `{ledger.stage}` read them. Run `cli.py {ledger.stage}` again: it "
            "makes what has changed."
        )


def check_classes(data: DataSet, store: Store) -> None:
    """Raises: StaleCache when the cache is of another data set's name, or its text features of other class names."""
    name = dict(store.attributes.get("data") or {}).get("name")
    if name != data.name:
        raise StaleCache(
            f"{store.path}: was made of data set {name!r}, whose name the views are drawn by, and this one is called "
            f"{data.name!r}. Give it its name back, or point cache.path elsewhere."
        )
    found = list(store.attributes.get("classes") or [])
    if found != list(data.classes):
        raise StaleCache(
            f"{store.path}: its text features are of other classes than {data.name}'s: "
            f"{different_classes(found, data.classes)}. Run `cli.py extract`: it renews the text features alone."
        )


def different_classes(found: Sequence[str], wanted: Sequence[str]) -> str:
    """The first difference of two lists of names, in words."""
    for place, (was, now) in enumerate(zip(found, wanted, strict=False)):
        if was != now:
            return f"class {place} was {was!r} and is {now!r}"
    longer, word = (wanted, "new") if len(wanted) > len(found) else (found, "gone")
    rest = [repr(name) for name in longer[min(len(found), len(wanted)) :]]
    return f"{', '.join(rest[:3])}{', ...' if len(rest) > 3 else ''} {'is' if len(rest) == 1 else 'are'} {word}"


def samples_of(data: DataSet, store: Store, rows: range) -> list[Sample]:
    """The samples of some rows, without reading all ids."""
    listed = data.by_id("train")
    return [listed.get(name, Sample(name, NOWHERE)) for name in store.ids(rows)]


def span(rows: range) -> list[int]:
    """Rows as a record names them."""
    return [rows.start, rows.stop]


def made_from(tokens: str, data: DataSet, samples: Sequence[Sample]) -> list[str]:
    """What extraction makes each row from: its image, and where tokens stream its labels too."""
    images = stamps_of(data, samples)
    if tokens != STREAM:
        return images
    return [f"{image} {mask}" for image, mask in zip(images, stamps_of(data, samples, "labels"), strict=True)]


def changed_rows(
    ledger: Ledger, fingerprint: str, samples: Sequence[Sample], stamps: Sequence[str]
) -> list[tuple[int, int, str, str]]:
    """(row, shard, stamp then, stamp now) of the recorded rows whose image, or what else they are of, has changed."""
    found = []
    for shard, entry in ledger.entries_of(fingerprint).items():
        first, stop = entry["rows"]
        for row, (was, now) in enumerate(zip(entry.get("stamps", ()), stamps[first:stop], strict=False), start=first):
            if was != now and is_listed(samples[row]):
                found.append((row, shard, was, now))
    return found


def check_unchanged(ledger: Ledger, fingerprint: str, samples: Sequence[Sample], stamps: Sequence[str]) -> None:
    """Compares what each recorded row was made from with what there is now.

    Raises: StaleCache naming the first image that changed, and how many.
    """
    if changed := changed_rows(ledger, fingerprint, samples, stamps):
        row, _, was, now = changed[0]
        shards = {shard for _, shard, _, _ in changed}
        raise StaleCache(
            f"{ledger.folder}: image {samples[row].id!r} has changed since it was extracted (it was {was}, it is "
            f"{now}; {len(changed)} changed in all). Put the old files back, or run `cli.py extract --renew`: it makes "
            f"the {len(shards)} of {len(ledger.entries())} shards that hold such images again."
        )
