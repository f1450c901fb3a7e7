"""Several training processes on one machine: this very command, started N times.

accelerate finds its rank, its peers and its address in the environment, as torchrun leaves them; so
`accelerate launch` and `torchrun` work as well, on several machines too. `accelerate launch --cpu` starts
one process whatever it is told (accelerate 1.15 leaves CPU processes to MPI), hence this file. Loads no
torch: the process that starts the others only waits.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import IO

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


def start(num: int) -> None:
    """Runs this command in `num` processes and returns when all have ended well.

    The first speaks to the terminal; what the others say is shown when one of them is what failed. When
    one ends before its time the others are ended: none waits for a peer that is gone.

    Raises: ProcessError for a process that a signal ended; SystemExit with the code of one that failed.
    """
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
            command = [sys.executable, *sys.argv]
            children.append(subprocess.Popen(command, env={**os.environ, **own}, stderr=said[rank]))
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
    """Ends this process soon after the one that started it: nobody trains on unwatched."""
    if PARENT not in os.environ:
        return

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        os._exit(1)

    threading.Thread(target=watch, args=(int(os.environ[PARENT]),), daemon=True).start()
