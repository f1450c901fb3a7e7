"""What 200,000 rows cost the store and the ledger, without a teacher: time a row, and whether it stays flat.

    python bench/rows.py                       2,000, 20,000 and 200,000 synthetic rows of CLS tokens and boxes
    python bench/rows.py --folder DIR          DIR on the disk to be measured

A shard is written, read back, compared and recorded, as extraction does it, in the order of the rows. Then what a
second start costs: reading all records (which shards are done), and what a training run reads of every row.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from interleaved import heading, verdict

from cache.ledger import Ledger
from cache.schema import SHARD
from cache.store import Store

SIZES = (2_000, 20_000, 200_000)
CHANNELS, VIEWS = 512, 1


def filled(folder: Path, num: int) -> list[float]:
    """Makes a cache of `num` rows; the seconds that each shard took."""
    sizes = {"N": num, "V": VIEWS, "C": CHANNELS, "h": 32, "w": 32, "K": 1}
    samples = [f"image-{row:09d}" for row in range(num)]
    store = Store.create(folder, sizes=sizes, arrays=["view", "cls", "status"], samples=samples, attributes={})
    ledger, rng = Ledger(folder, "extract"), np.random.default_rng(0)
    taken = []
    for shard in range(store.num_shards):
        rows = len(store.rows(shard))
        blocks = {
            "view": rng.random((rows, VIEWS, 4), np.float32),
            "cls": rng.random((rows, VIEWS, CHANNELS), np.float32).astype(np.float16),
            "status": np.zeros(rows, np.uint8),
        }
        began = time.perf_counter()
        digests = {name: store.write_shard(name, shard, block) for name, block in blocks.items()}
        span = [shard * SHARD, shard * SHARD + rows]
        ledger.record(shard, {"rows": span, "fingerprint": "f", "digests": digests, "quarantined": {}})
        taken.append(time.perf_counter() - began)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    chosen = parser.parse_args()
    heading(f"rows: {', '.join(map(str, chosen.sizes))} of {VIEWS} x {CHANNELS} CLS tokens on {chosen.folder}")
    per_row = {}
    for num in chosen.sizes:
        folder = Path(tempfile.mkdtemp(dir=chosen.folder))
        try:
            began = time.perf_counter()
            taken = filled(folder / "cache", num)
            whole = time.perf_counter() - began
            per_row[num] = statistics.median(taken) / SHARD
            began = time.perf_counter()
            done = len(Ledger(folder / "cache", "extract").done("f"))
            resumed = time.perf_counter() - began
            began = time.perf_counter()
            Store.open(folder / "cache").read_whole("cls")
            read = time.perf_counter() - began
            print(
                f"  {num:>8} rows: {1e6 * per_row[num]:6.1f} us a row (median of {done} shards; all {whole:.1f} s), "
                f"the ledger read in {resumed:.2f} s, all CLS tokens in {read:.2f} s"
            )
        finally:
            shutil.rmtree(folder)
    first, last = per_row[min(per_row)], per_row[max(per_row)]
    verdict("time a row, most rows / fewest", last / first, 1.1, at_most=True)


if __name__ == "__main__":
    main()
