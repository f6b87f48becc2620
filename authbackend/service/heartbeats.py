"""Heartbeats of the workers in shared memory, allocated before the first fork; readiness and metrics read them."""

from __future__ import annotations

import mmap
import struct
import time
from enum import IntEnum

_SLOT = struct.Struct("=qdqq")  # state, last beat (monotonic), restarts, process id
HANGS_AFTER_S = 5.0


class WorkerState(IntEnum):
    """The state of a worker, as written to its slot."""

    STARTING = 0
    SERVING = 1


class WorkerHeartbeats:
    """
    A slot for each worker, written by the worker, and by the supervisor once the worker has ended.

    A worker beats ten times a second; one that is serving and has not beaten for 5 s counts as hanging.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._memory = mmap.mmap(-1, max(mmap.PAGESIZE, workers * _SLOT.size))

    def beat(self, worker: int, process_id: int) -> None:
        """Record that a worker is serving."""
        restarts = self._slot(worker)[2]
        _SLOT.pack_into(self._memory, worker * _SLOT.size, WorkerState.SERVING, time.monotonic(), restarts, process_id)

    def gone(self, worker: int) -> None:
        """Record that a worker has ended and will be restarted."""
        restarts = self._slot(worker)[2]
        _SLOT.pack_into(self._memory, worker * _SLOT.size, WorkerState.STARTING, 0.0, restarts + 1, 0)

    def states(self) -> dict[str, int]:
        """Count the workers that are serving, starting and hanging."""
        counts = {"serving": 0, "starting": 0, "hanging": 0}
        now = time.monotonic()
        for worker in range(self.workers):
            state, beat, *_ = self._slot(worker)
            if state == WorkerState.STARTING:
                counts["starting"] += 1
            else:
                counts["hanging" if now - beat > HANGS_AFTER_S else "serving"] += 1
        return counts

    @property
    def restarts(self) -> int:
        """How often a worker had to be restarted."""
        return sum(self._slot(worker)[2] for worker in range(self.workers))

    def _slot(self, worker: int) -> tuple[int, float, int, int]:
        return _SLOT.unpack_from(self._memory, worker * _SLOT.size)
