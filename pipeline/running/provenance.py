"""When, on what and from which code a result was made."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path


def provenance() -> dict[str, str | None]:
    """When, on what and from which code: for results that people compare. Never part of a fingerprint.

    date (UTC day), machine (processor and its logical cores, and the GPU if there is one), torch, revision.
    """
    import torch

    cpu = next((line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")), "")
    machine = f"{cpu.partition(':')[2].strip() or platform.machine()}, {os.cpu_count()} logical cores"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine,
        "torch": torch.__version__,
        "revision": revision(),
    }


def revision() -> str | None:
    """The code's commit as git describes it, "-dirty" with changes; None outside a checkout of this project.

    An unpacked tarball inside another repository has no commit: git would name that repository's.
    """
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(here), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != here.parents[1]:
            return None
        return git("describe", "--always", "--dirty", "--abbrev=10")
    except (OSError, subprocess.SubprocessError):
        return None


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
