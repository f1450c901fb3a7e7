"""What a training run writes down as it goes: where its time went, its loss curve, a line for people."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import psutil
import torch

from cache.files import write_text, writing
from cache.records import misfit, parsed


class Clock:
    """Where a step's time goes, in seconds by phase, since the start."""

    def __init__(self) -> None:
        self.total: dict[str, float] = {}
        self.began = self.last = time.perf_counter()

    def mark(self, phase: str) -> None:
        now = time.perf_counter()
        self.total[phase] = self.total.get(phase, 0.0) + now - self.last
        self.last = now

    def elapsed_s(self) -> float:
        return self.last - self.began

    def shares(self) -> dict[str, float]:
        whole = sum(self.total.values()) or 1.0
        return {f"time/{phase}": seconds / whole for phase, seconds in self.total.items()}

    def line(self) -> str:
        return ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in self.total.items())


def peak_memory_bytes() -> int:
    """The most memory held so far: allocated on the GPU if there is one, else resident in this process."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident_bytes()


def peak_resident_bytes(pid: int | None = None) -> int:
    """The most memory that a process, this one or a living child, has held; of a child without /proc what it holds."""
    status = Path(f"/proc/{pid or 'self'}/status")
    if status.is_file():  # getrusage(2) would count what the process held that started this one
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    if pid is not None:
        return int(psutil.Process(pid).memory_info().rss)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


WIDE = 140  # columns of a terminal beside whose bar all terms have room


def note(values: Mapping[str, float], images_per_s: float, columns: int) -> str:
    """Loss terms (their sum on a narrow terminal), images a second and memory, for the progress line."""
    terms = " ".join(f"{name} {value:.2f}" for name, value in values.items())
    if columns < WIDE:
        return f"loss {sum(values.values()):.3f}"
    return f"{terms}  {images_per_s:.0f} images/s  {peak_memory_bytes() / 1e9:.1f} GB"


class Curve:
    """losses.jsonl: the values of an iteration a line. Cut back to `start` when training resumes.

    Raises: CacheWriteFailed.
    """

    def __init__(self, folder: Path, start: int) -> None:
        path = folder / "losses.jsonl"
        kept = [line for line in _lines(path) if _iteration(line) <= start] if start else []
        # Whole: a kill here must not lose what is kept.
        write_text(path, "".join(line + "\n" for line in kept))
        self.path = path
        self.file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        rounded = {name: round(value, 6) for name, value in values.items()}
        with writing(self.path):
            self.file.write(json.dumps({"iteration": iteration, **rounded}) + "\n")
            self.file.flush()

    def close(self) -> None:
        self.file.close()


def _lines(path: Path) -> list[str]:
    """The whole lines of a file that a kill may have cut short."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def _iteration(line: str) -> float:
    """Of a line of the curve; infinite where it isn't one."""
    try:
        row = parsed(line.encode())
    except ValueError:
        return math.inf
    return row["iteration"] if misfit(row, {"iteration": int}) is None else math.inf
