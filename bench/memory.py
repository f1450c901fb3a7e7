"""Peak memory of extract and of cluster, each in a fresh process, over the number of images.

    python bench/memory.py                     200, 2,000 and 20,000 synthetic rows

The demo's teacher on scenes of 64 x 64 (8 x 8 tokens, the fewest that 7 x 7 windows fit into), so that 20,000 take
minutes; what grows with the number of rows grows here too. The demo keeps scenes that it has rendered, up to 4,096,
which no data set of files does: here it may keep one shard's.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from interleaved import heading, verdict

from cache.schema import SHARD

ROOT = Path(__file__).resolve().parents[1]
SIZES = (200, 2_000, 20_000)
WORLD = "import functools, pipeline.data.demo as world; "
WORLD += f"world._rendered = functools.lru_cache({SHARD})(world._rendered.__wrapped__); "
RUN = WORLD + "import resource, sys; sys.argv[0] = 'cli.py'; import cli; cli.app(standalone_mode=False); "
SAY = "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


def peak_mb(stage: str, settings: list[str]) -> float:
    """Largest resident memory of a stage's own process, in MB."""
    words = [sys.executable, "-c", RUN + SAY, stage, "--config", "config/demo.yaml"]
    words += [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.rpartition("PEAK")[2]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    chosen = parser.parse_args()
    heading(f"memory over {', '.join(map(str, chosen.sizes))} images")
    peaks: dict[str, list[float]] = {"extract": [], "cluster": []}
    for num in chosen.sizes:
        folder = tempfile.mkdtemp()
        try:
            settings = [f"runs={folder}", f"data.train={num}", "data.test=1", "data.size=64", "teacher.image_size=64"]
            for stage, found in peaks.items():
                found.append(peak_mb(stage, settings))
                print(f"  {stage:<8} {num:>7} images: {found[-1]:7.0f} MB", flush=True)
        finally:
            shutil.rmtree(folder)
    for stage, found in peaks.items():
        verdict(f"{stage}: most images / fewest", found[-1] / found[0], 1.05, at_most=True)


if __name__ == "__main__":
    main()
