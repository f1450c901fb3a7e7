"""The host memory of a whole training, foretold from a few steps of one of its processes."""

from __future__ import annotations

from dataclasses import dataclass, field

import psutil

from pipeline.config import Train
from pipeline.learning.batches import CachedViews
from pipeline.learning.journal import peak_resident_bytes

LAUNCHER_BYTES = 0.05e9  # of the process that starts several and waits; it loads no torch (measured)


@dataclass
class Forecast:
    """Resident bytes, as a sum over processes: libraries that several share count in each, as in `ps`.

    `own` and `loaders` are of one training process after some steps; `views` is what it and its loaders will keep
    beyond that, `saving` the copy of the student that the first process makes to write a checkpoint.
    """

    processes: int
    own: int = 0
    loaders: dict[int, int] = field(default_factory=dict)  # by process id
    views: int = 0
    saving: int = 0

    def look(self) -> None:
        """Takes the peaks so far, of this process and of the loaders while they live."""
        self.own = peak_resident_bytes()
        for child in psutil.Process().children(recursive=True):
            try:
                self.loaders[child.pid] = peak_resident_bytes(child.pid)
            except (OSError, ValueError, psutil.Error):  # ended meanwhile
                continue

    @property
    def total(self) -> int:
        each = self.own + sum(self.loaders.values()) + self.views
        launcher = LAUNCHER_BYTES if self.processes > 1 else 0
        return int(self.processes * each + self.saving + launcher)

    def line(self) -> str:
        parts = [f"{self.own / 1e9:.2f} GB the training"]
        parts += [f"{sum(self.loaders.values()) / 1e9:.2f} its loaders"] * bool(self.loaders)
        parts += [f"{self.views / 1e9:.2f} views that it is still to keep"] * (self.views >= 5e6)
        each = f"in each of {self.processes} processes " if self.processes > 1 else ""
        return f"{self.total / 1e9:.2f} GB of the machine's at its peak, {each}{', '.join(parts)}"


def views_to_keep(views: CachedViews, train: Train, room_bytes: int, num_processes: int, seen: int) -> int:
    """Bytes of replayed views that one training process will still keep after `seen` iterations.

    An epoch visits all views, so that all are kept while there is room, or as many as there are iterations for.
    """
    share = train.batch // num_processes
    one = 4 * views.size**2  # three colours and the labels
    images = len(views.rows) * views.num_views + len(views.held_out)

    def kept(iterations: int) -> int:
        return min(one * min(iterations * share, images), room_bytes)

    return kept(train.iterations) - kept(min(seen, train.iterations))
