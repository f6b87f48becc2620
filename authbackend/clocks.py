"""
The clocks by which ages are told.

An age is told by the time since the machine started, sleep included (``CLOCK_BOOTTIME``): nobody sets that clock, and it
goes on while the machine is suspended, when ``CLOCK_MONOTONIC`` stands still. What happens at a time of day (expiry, holds) is
told by the database's clock, carried on by this one, so that it is the same on every replica.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_TIMEX_BYTES = 512  # struct timex has 208
_TIME_ERROR = 5


class AgeUnknown(Exception):
    """How long ago something was cannot be told; the message says why."""


def uptime() -> float:
    """Return the seconds since the machine started, the same in all its processes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@cache
def boot() -> str:
    """Return a name for what :func:`uptime` counts from: this start of the machine, and the time namespace."""
    with contextlib.suppress(OSError):
        started = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{started} {Path('/proc/self/ns/time').readlink()}"
    return str(uuid.uuid4())  # no other process's


def synchronised() -> bool:
    """Return whether the kernel knows this machine's time of day to be right, from NTP or the like."""
    with contextlib.suppress(OSError, AttributeError):
        state: int = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
        return 0 <= state < _TIME_ERROR
    return False


@dataclass(frozen=True, slots=True)
class Instant:
    """
    A moment on this machine, by each clock that may tell later how long ago it was.

    Args:
        wall: Seconds since the epoch.
    """

    wall: float
    uptime: float
    boot: str

    @classmethod
    def now(cls) -> Instant:
        """Return this moment."""
        return cls(time.time(), uptime(), boot())


def age_s(then: Instant, database_time: float | None) -> float:
    """
    Return how many seconds ago something was, rather too many than too few; negative if a clock was set back.

    Args:
        database_time: What the database's clock said then, seconds since the epoch.
    Raises:
        AgeUnknown: The machine has been started since, and its time of day may be wrong.
    """
    now = Instant.now()
    if then.boot == now.boot:
        return now.uptime - then.uptime
    if not synchronised():
        raise AgeUnknown("the machine has been started since, and its clock is not synchronised (see: timedatectl)")
    since_wall = now.wall - then.wall
    if since_wall < 0:
        return since_wall
    return max(since_wall, now.uptime, now.wall - (then.wall if database_time is None else database_time))
