"""Several processes on one machine: how many it has room for, and that none outlives the one that started it.

Several training processes are this very command, started N times.

accelerate finds its rank, its peers and its address in the environment, as torchrun leaves them; so
`accelerate launch` and `torchrun` work as well, on several machines too. `accelerate launch --cpu` starts
one process whatever it is told (accelerate 1.15 leaves CPU processes to MPI), hence this file. Loads no
torch: the process that starts the others only waits.
"""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import IO, Any

import psutil

from pipeline.config import UserError

PARENT = "CLIPTEACHER_PARENT"  # process id of whoever started this one
POLL_S = 0.1
ALIKE_S = 1.5  # for the others to find what the first one that failed has found, and to say so
GRACE_S = 5.0  # for a process to end after it was asked to
LOST_S = 30.0  # how long a process that lost its peers waits to be ended before it speaks up itself


class ProcessError(UserError):
    """A training process has ended before its time."""


def is_launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return "LOCAL_RANK" in os.environ


def is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def start(num: int, command: Sequence[str] | None = None) -> None:
    """Runs a command, None: this one, in `num` processes and returns when all have ended well.

    The first speaks to the terminal; what the others say is shown when one of them is what failed. When
    one ends before its time the others are ended: none waits for a peer that is gone.

    Raises: ProcessError for a process that a signal ended; SystemExit with the code of one that failed.
    """
    if num > cores():
        from pipeline.running.console import say

        say(f"train.processes is {num}, and there are {cores()} cores: the processes take turns")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said: list[IO[bytes] | None] = [None, *(tempfile.TemporaryFile() for _ in range(1, num))]  # noqa: SIM115
    threads = str(max((os.cpu_count() or num) // num, 1))
    everyone = {"WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    everyone |= {PARENT: os.getpid(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    children: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(num):
            own = {str(k): str(v) for k, v in {**everyone, "RANK": rank, "LOCAL_RANK": rank}.items()}
            children.append(
                subprocess.Popen(command or [sys.executable, *sys.argv], env={**os.environ, **own}, stderr=said[rank])
            )
        first = _first_failure(children)
    except KeyboardInterrupt:  # the terminal has told the children too
        _end(children)
        raise
    finally:
        for child in children:
            child.kill()
            child.wait()
    if first is not None:
        _report(first, children, said)


def _first_failure(children: list[subprocess.Popen[bytes]]) -> int | None:
    """Waits; the rank of the first process that failed, the others ended by then, or None."""
    while True:
        codes = [child.poll() for child in children]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            _end(children)
            return failed[0]
        if all(code == 0 for code in codes):
            return None
        time.sleep(POLL_S)


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    """Ends what still runs, after a moment in which it may end by itself."""
    deadline = time.monotonic() + ALIKE_S
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(POLL_S)
    for child in children:
        child.terminate()
    deadline = time.monotonic() + GRACE_S
    for child in children:
        try:
            child.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _report(rank: int, children: list[subprocess.Popen[bytes]], said: list[IO[bytes] | None]) -> None:
    code, num = int(children[rank].returncode), len(children)
    if code < 0:
        raise ProcessError(
            f"train: process {rank} of {num} was ended by signal {-code}; the others were ended too. "
            "The last checkpoint stands, and the same command resumes from it."
        )
    log = said[rank]
    if log is not None and children[0].returncode <= 0:  # the first one has said nothing of its own
        log.seek(0)
        print(log.read().decode(errors="replace").strip(), file=sys.stderr)
    sys.exit(code)


def end_with_parent() -> None:
    """Ends this process soon after the one that started it, however that ended: nobody works on unwatched.

    That one is named by the environment, or else it is the launcher of several training processes.
    """
    if PARENT in os.environ:
        _watch(int(os.environ[PARENT]))
    elif is_launched() or "ACCELERATE_USE_CPU" in os.environ:  # torchrun, accelerate launch
        _watch(os.getppid())


@functools.cache
def _watch(parent: int) -> None:
    """Starts a thread that ends this process when `parent`, a process id, is gone."""

    def watch() -> None:
        is_direct = os.getppid() == parent
        while os.getppid() == parent if is_direct else _lives(parent):
            time.sleep(POLL_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class _Watched(SpawnProcess):
    """Of multiprocessing, spawned: in the child the watch begins before anything else is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _watched, (os.getpid(),), self.__dict__


def _watched(parent: int) -> _Watched:
    _watch(parent)
    return _Watched.__new__(_Watched)


class Watched(SpawnContext):
    """multiprocessing's `spawn`, for DataLoader and process pools; its processes end with the one that made them."""

    Process = _Watched


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


CGROUP = Path("/sys/fs/cgroup")  # of a container, version 2


def available_bytes() -> int:
    """Memory that processes can still take: the machine's, or what is left of the container's share."""
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return min(free, max(int(limit) - int(used), 0))
    except (OSError, ValueError):  # no such group, or "max"
        return free


def most_processes(wanted: int, each_bytes: float, sharing: int = 1) -> tuple[int, str]:
    """As many of `wanted` as cores and memory allow, and why not more, "" where all do.

    `sharing`: how many processes on this machine ask the same.
    """
    most, room = max(cores() // sharing, 1), int(available_bytes() / each_bytes) // sharing
    if wanted <= min(most, room):
        return wanted, ""
    shared = f" for each of {sharing} processes" if sharing > 1 else ""
    if room < most:
        free = f"{available_bytes() / 1e9:.1f} GB of memory free, {each_bytes / 1e9:.2f} GB for each"
        return room, f"{free}{shared}"
    return most, f"{cores()} core{'s' * (cores() != 1)}{shared}"
