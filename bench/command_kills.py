"""SIGKILL at random moments of predict, prepare, report and Snakemake: does the same command end as if there were none?

    python -m bench.kills --stage predict        one of them; bench/kills.py deals them out with the others

After every kill each result that stands under its own name must be whole: the bytes of an uninterrupted run. After
the start that lives, all results must be there and nothing half-written. Of Snakemake (a small run of all stages)
only it is killed or its jobs with it, by turns, and what is compared are the cache's content and the scores.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from bench.small_run import ROOT, SETTINGS, content_digest, forkserver, small_arguments, small_config

NUM_PICTURES, SIDE = 24, 64
STARTS = 40  # of Snakemake after a kill, while a job that outlived it holds the cache's lock


@dataclass
class Count:
    """What was seen of one command."""

    kills: int = 0
    rounds: int = 0
    usual_s: float = 0.0
    half_done: int = 0  # kills that left some results and not all
    faults: list[str] = field(default_factory=list)


def run_command(arguments: list[str], log: Path) -> None:
    """`cli.py ARGUMENTS` in this process."""
    os.chdir(ROOT)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import cli

    sys.argv = ["cli.py", *arguments]
    cli.main()


@dataclass
class Command:
    """Arguments of cli.py, and the folder that they fill, for results below a folder."""

    arguments: Callable[[Path], list[str]]
    results: Callable[[Path], Path]


def commands(inputs: Path) -> dict[str, Command]:
    """By name; `inputs` holds pictures, annotations, and a finished small run."""
    run = small_config(inputs).run_path
    return {
        "predict": Command(
            lambda here: [
                *("predict", str(inputs / "pictures"), "--run", str(run), "--out", str(here / "out")),
                "--probabilities",
            ],
            lambda here: here / "out",
        ),
        "prepare": Command(
            lambda here: ["prepare", "coco14", "--root", str(here), "--source", str(inputs / "annotations")],
            lambda here: here / "SegmentationClass",
        ),
        "report": Command(
            lambda here: ["report", str(run), "--out", str(here / "page" / "index.html")], lambda here: here / "page"
        ),
    }


def make_inputs(inputs: Path) -> None:
    """A finished small run, pictures to segment, and annotations in COCO's form."""
    rng = np.random.default_rng(0)
    (inputs / "pictures").mkdir(parents=True)
    for number in range(NUM_PICTURES):
        pixels = rng.integers(0, 256, (SIDE // 8, SIDE // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(inputs / "pictures" / f"{number:03}.png")
    (inputs / "annotations").mkdir()
    for part in ("train", "val"):
        images = [
            {"id": i, "file_name": f"{part}_{i:03}.jpg", "height": 480, "width": 640} for i in range(NUM_PICTURES)
        ]
        boxes = rng.integers(0, 240, (NUM_PICTURES, 2)).tolist()
        objects = [
            {"image_id": i, "category_id": 1, "area": 1, "segmentation": [[x, y, x + 99, y, x + 99, y + 99, x, y + 99]]}
            for i, (x, y) in enumerate(boxes)
        ]
        found = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "person"}]}
        (inputs / "annotations" / f"instances_{part}2014.json").write_text(json.dumps(found))
    for stage in ("extract", "cluster", "train", "eval"):
        _lived([stage, *small_arguments(inputs)], inputs / "log")


def _lived(arguments: list[str], log: Path, kill_after_s: float | None = None) -> bool:
    """Whether a start of cli.py ended by itself, well; else it was killed."""
    process = forkserver().Process(target=run_command, args=(arguments, log))
    process.start()
    process.join(kill_after_s)
    process.kill()
    process.join()
    if process.exitcode not in (0, -9):
        raise SystemExit(f"{arguments[0]} failed by itself, exit code {process.exitcode}: {log.read_text()[-3000:]}")
    return process.exitcode == 0


def results_of(folder: Path) -> dict[str, Path]:
    """What stands under its own name, by its path in the folder."""
    return {
        str(path.relative_to(folder)): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".partial")
    }


def same(one: Path, two: Path | None) -> bool:
    """The same bytes; of probabilities the same numbers to float16's precision, since after a kill images meet others
    in a batch, and sums over another batch are rounded otherwise.
    """
    if two is None:
        return False
    if one.read_bytes() == two.read_bytes():
        return True
    if one.suffix != ".npy":
        return False
    return bool(np.allclose(np.load(one).astype(np.float32), np.load(two).astype(np.float32), atol=2e-3))


def kill_command(name: str, kills: int, seed: int, folder: Path) -> Count:
    """Rounds of one command until `kills` kills have been dealt out."""
    inputs, count, random_ = folder / "inputs", Count(), random.Random(f"{name} {seed}")
    make_inputs(inputs)
    command, log = commands(inputs)[name], folder / "log"
    (folder / "whole").mkdir()
    began = time.monotonic()
    _lived(command.arguments(folder / "whole"), log)
    count.usual_s = time.monotonic() - began
    wanted = results_of(command.results(folder / "whole"))
    while count.kills < kills:
        here = folder / f"round-{count.rounds}"
        here.mkdir()
        has_ended = False
        while not has_ended:
            limit = random_.uniform(0, count.usual_s) if count.kills < kills else None
            has_ended = _lived(command.arguments(here), log, limit)
            count.kills += not has_ended
            found = results_of(command.results(here))
            other = [file for file, path in found.items() if not same(path, wanted.get(file))]
            count.faults += [f"{name}: {path} is not what an uninterrupted run writes" for path in other]
            count.half_done += 0 < len(found) < len(wanted)
        count.rounds += 1
        count.faults += [f"{name}: {path} is missing" for path in wanted.keys() - found.keys()]
        count.faults += [f"{name}: {path} was left" for path in here.rglob("*.partial")]
        shutil.rmtree(here)
    return count


# ---- Snakemake itself -----------------------------------------------------------------------------


def kill_snakemake(kills: int, seed: int, folder: Path) -> Count:
    """One small run of all stages per round: Snakemake is killed once, then the same command is given again."""
    count, random_ = Count(), random.Random(f"snakemake {seed}")
    began = time.monotonic()
    code, said = _snakemake(folder / "whole")
    if code:
        raise SystemExit(f"snakemake failed by itself: {said[-3000:]}")
    count.usual_s = time.monotonic() - began
    wanted = _scores(folder / "whole")
    while count.kills < kills:
        here = folder / f"round-{count.rounds}"
        with_jobs = count.rounds % 2 == 0
        code, said = _snakemake(here, random_.uniform(0, count.usual_s), with_jobs=with_jobs)
        count.kills += code == -signal.SIGKILL
        for _ in range(STARTS):  # a job that outlived its Snakemake may hold the cache for a moment
            code, said = _snakemake(here)
            if code == 0 or "is writing to this cache" not in said:
                break
            time.sleep(0.5)
        count.rounds += 1
        if code:
            count.faults.append(f"snakemake: the same command ended with {code}: {said[-600:]}")
        elif _scores(here) != wanted:
            count.faults.append("snakemake: content or scores differ from those of an uninterrupted run")
        shutil.rmtree(here, ignore_errors=True)
    return count


def _snakemake(where: Path, kill_after_s: float | None = None, *, with_jobs: bool = False) -> tuple[int, str]:
    """Exit code and what was said of a small run's Snakemake, killed after a while, alone or with its jobs."""
    settings = " ".join((f"runs={where / 'runs'}", *SETTINGS, "data.train=64"))
    words = [sys.executable, "-m", "snakemake", "--cores", "1", "--quiet", "all", "--config", f"set={settings}"]
    (where / "log").parent.mkdir(parents=True, exist_ok=True)
    with (where / "log").open("w+") as log:
        process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            process.wait(kill_after_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL) if with_jobs else process.kill()
            process.wait()
        log.seek(0)
        return process.returncode, log.read()


def _scores(where: Path) -> tuple[str, dict[str, object]]:
    config = small_config(where, "data.train=64")
    metrics = json.loads((config.run_path / "eval" / "metrics.json").read_text(encoding="utf-8"))
    return content_digest(config.cache_path), {key: value for key, value in metrics.items() if key != "made"}
