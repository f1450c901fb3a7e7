"""A 64-sample shard of dense tokens written and verified, against dd writing the same bytes with fsync.

    python bench/shard.py --folder DIR      DIR on the disk to be measured

Ours encodes, takes a checksum a sample, writes, forces to disk, renames, reads back, decodes and compares.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from interleaved import heading, medians, verdict

from cache.schema import SHARD
from cache.store import Store

SIZES = {"N": SHARD, "V": 1, "C": 512, "h": 32, "w": 32, "K": 1}  # ViT-B/16 at 512 x 512: 64 MiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=chosen.folder))
    try:
        samples = [f"image-{i}" for i in range(SHARD)]
        store = Store.create(
            folder / "cache", sizes=SIZES, arrays=["tokens"], samples=samples, attributes={"made": "bench"}
        )
        rng = np.random.default_rng(0)
        block = rng.standard_normal((SHARD, 1, 32, 32, 512), np.float32).astype(np.float16)
        source, target = folder / "source", folder / "target"
        source.write_bytes(block.tobytes())

        def dd() -> None:
            words = ["dd", f"if={source}", f"of={target}", "bs=1M", "conv=fsync", "status=none"]
            subprocess.run(words, check=True)

        def ours() -> None:
            store.write_shard("tokens", 0, block)

        heading(f"shard: {block.nbytes / 2**20:.0f} MiB on {chosen.folder}")
        seconds = medians({"dd": dd, "ours": ours}, chosen.rounds)
        for name, value in seconds.items():
            print(f"  {name:<6} {1e3 * value:7.1f} ms, {block.nbytes / 2**20 / value:7.0f} MiB/s")
        verdict("ours / dd, in MiB/s", seconds["dd"] / seconds["ours"], 0.6, at_most=False)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
