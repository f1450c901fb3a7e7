"""What keeps the student from waiting for its images: replayed views stay in memory while there is room,
and the next batches are made while it computes. Neither changes a batch.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.running.console import say
from pipeline.running.processes import cores, most_processes

AHEAD = 2  # batches made before they are asked for: one being made while one is ready
MOST_PROCESSES = 8  # of the loader, unless the config says more: beyond it no data-centre GPU waits
# Of a loader process before it keeps anything, shared libraries apart: measured with torch 2.15.
LOADER_BYTES = 0.45e9

Work = TypeVar("Work")
Made = TypeVar("Made")
Tensors = tuple[Tensor, ...]


class Kept:
    """Tensors by key, up to a number of bytes: what comes once the room is taken is made again each time.

    Nothing is ever put out. Epochs visit every view in turn, and whoever puts out the oldest has, by the time
    it returns, put out each one. Two threads at once make an entry twice at worst.
    """

    def __init__(self, size_bytes: int) -> None:
        self.room_bytes = size_bytes
        self.held: dict[Hashable, Tensors] = {}

    def get(self, key: Hashable, make: Callable[[], Tensors]) -> Tensors:
        """What is held under the key, else what `make` makes. Nobody may write into it."""
        found = self.held.get(key)
        if found is None:
            found = make()
            needed = sum(tensor.nbytes for tensor in found)
            if needed <= self.room_bytes:
                self.held[key] = found
                self.room_bytes -= needed
        return found


def made_ahead(work: Iterable[Work], make: Callable[[Work], Made], num_ahead: int = AHEAD) -> Iterator[Made]:
    """make(w) for each piece of work, in order, made by one thread up to `num_ahead` pieces in advance.

    An error of `make` is raised where its result is asked for. The thread ends with the iterator.
    """
    pieces = iter(work)
    # Of torch's threads it gets one: small operations on all cores would only fight with the student's. A thread
    # that hasn't asked for its own number yet would take over this one, so the caller asks first.
    torch.get_num_threads()
    with ThreadPoolExecutor(1, "loader", initializer=torch.set_num_threads, initargs=(1,)) as thread:
        waiting = deque(thread.submit(make, piece) for piece in islice(pieces, num_ahead))
        try:
            while waiting:
                made = waiting.popleft().result()
                waiting.extend(thread.submit(make, piece) for piece in islice(pieces, 1))
                yield made
        finally:
            for piece in waiting:
                piece.cancel()


def loader_processes(
    wanted: int | None, num_processes: int, *, fits: bool, kept_bytes: int = 0, is_main: bool = True
) -> int:
    """How many processes make the batches of one training process; 0 stands for a thread of its own.

    None chooses: a thread where all views `fits` into memory, or where there is no GPU, since then the
    student has the cores; else what the cores allow. Never more than cores and memory allow, which is said by the
    main one of `num_processes`; each loader holds `kept_bytes` of the cache's arrays.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
    if wanted is None:
        if fits or not torch.cuda.is_available():
            return 0
        return max(0, min(MOST_PROCESSES, cores() // local - 1))
    num, reason = most_processes(wanted, LOADER_BYTES + kept_bytes, local)
    if reason and is_main:
        started = f"{num} {'is' if num == 1 else 'are'} started" if num else "batches are made by a thread"
        say(f"train.workers is {wanted}; {started}: {reason}")
    return num
