"""Training killed at random moments and resumed, against a run that nobody disturbed: equal to the last bit?

    python bench/resume.py                        20 kills, the demo's student, 60 iterations
    python bench/resume.py --kills 5 --set train.processes=2

Extracts and clusters a small demo into a temporary folder, trains it once undisturbed, then again with
SIGKILL to the whole process group at moments drawn evenly from a run's length. Compares losses.jsonl
(but for its times) and every tensor of student.safetensors. Exit code 1 when something differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]

SETTINGS = [
    "data.train=70",
    "data.test=6",
    "views.num=2",
    "train.iterations=60",
    "train.warmup=5",
    "train.batch=4",
    "train.bank=5",  # turns over many times
    "train.photometric=true",
    "train.checkpoint_every=2",
    "train.log_every=1",
]


def command(stage: str, settings: list[str]) -> list[str]:
    words = [word for setting in settings for word in ("--set", setting)]
    return [sys.executable, str(ROOT / "cli.py"), stage, "--config", str(ROOT / "config/demo.yaml"), *words]


def run(stage: str, settings: list[str]) -> None:
    subprocess.run(command(stage, settings), cwd=ROOT, check=True, stderr=subprocess.DEVNULL)


def result(folder: Path) -> tuple[list, dict]:
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    values = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
    return values, load_file(folder / "student.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        cache = f"cache.path={temporary}/cache"
        shared = [f"runs={temporary}/runs", cache, *SETTINGS, *options.settings]
        run("extract", shared)
        run("cluster", shared)
        began = time.monotonic()
        run("train", [*shared, "name=whole"])
        length = time.monotonic() - began
        print(f"undisturbed: {length:.1f} s", flush=True)
        folder, kills, reached, starts = Path(temporary, "runs", "killed", "train"), 0, [], 0
        while kills < options.kills:
            starts += 1
            child = subprocess.Popen(
                command("train", [*shared, "name=killed"]), cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
            )
            try:
                child.wait(rng.uniform(0, length))
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                kills += 1
                names = [path.name for path in folder.glob("checkpoint-*")]
                reached.append(max((int(name[-6:]) for name in names), default=0))
                continue
            if child.returncode:
                sys.exit(f"a resumed run failed with code {child.returncode}")
            # It ended before its kill: what it made must be right; then another one from the beginning.
            compare(temporary)
            subprocess.run(["rm", "-r", str(folder)], check=True)
        run("train", [*shared, "name=killed"])
        compare(temporary)
        print(f"{kills} kills in {starts} starts, newest checkpoint at each: {reached}")
        print("losses and weights are equal to the last bit")


def compare(temporary: str) -> None:
    (losses, student), (wanted_losses, wanted) = (
        result(Path(temporary, "runs", name, "train")) for name in ("killed", "whole")
    )
    if losses != wanted_losses:
        sys.exit("the losses differ")
    if student.keys() != wanted.keys() or any(not student[name].equal(wanted[name]) for name in wanted):
        sys.exit("the weights differ")


if __name__ == "__main__":
    main()
