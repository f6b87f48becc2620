"""What the processes of a replica tell each other: a page of shared memory, made before the first fork."""

from __future__ import annotations

import mmap
import struct
import time
from enum import IntEnum

_SLOT = struct.Struct("=qdqq")  # state, last beat (monotonic), restarts, process id
HANGS_AFTER_S = 5.0


class WorkerState(IntEnum):
    """The life of a worker, as it says itself."""

    STARTING = 0
    SERVING = 1


class WorkerHeartbeats:
    """
    A slot for each worker, which that worker writes, and the supervisor when it is gone.

    A worker beats ten times a second; one that serves and has not beaten for 5 s hangs.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._memory = mmap.mmap(-1, max(mmap.PAGESIZE, workers * _SLOT.size))

    def beat(self, worker: int, process_id: int) -> None:
        """Say that a worker serves."""
        restarts = self._slot(worker)[2]
        _SLOT.pack_into(self._memory, worker * _SLOT.size, WorkerState.SERVING, time.monotonic(), restarts, process_id)

    def gone(self, worker: int) -> None:
        """Note that a worker has ended and will be started again."""
        restarts = self._slot(worker)[2]
        _SLOT.pack_into(self._memory, worker * _SLOT.size, WorkerState.STARTING, 0.0, restarts + 1, 0)

    def states(self) -> dict[str, int]:
        """Return how many workers are serving, starting and hanging."""
        found = {"serving": 0, "starting": 0, "hanging": 0}
        now = time.monotonic()
        for worker in range(self.workers):
            state, beat, *_ = self._slot(worker)
            if state == WorkerState.STARTING:
                found["starting"] += 1
            else:
                found["hanging" if now - beat > HANGS_AFTER_S else "serving"] += 1
        return found

    @property
    def restarts(self) -> int:
        """How often a worker had to be started again."""
        return sum(self._slot(worker)[2] for worker in range(self.workers))

    def _slot(self, worker: int) -> tuple[int, float, int, int]:
        return _SLOT.unpack_from(self._memory, worker * _SLOT.size)
