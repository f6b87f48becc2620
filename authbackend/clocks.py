"""
Measures ages by clocks that cannot be set, so that setting a clock cannot make stale data fresh.

Ages are measured with ``CLOCK_BOOTTIME``, the time since the machine started: nobody can set that clock, and unlike
``CLOCK_MONOTONIC`` it keeps running while the machine is suspended. Events at a time of day (expiry, holds) use the
database's clock, extrapolated with this one, so that they happen at the same time on every replica.
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
    """An age cannot be determined; the message says why."""


def uptime() -> float:
    """Return the seconds since the machine started, the same in all processes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@cache
def boot() -> str:
    """Return an identifier of the zero point of :func:`uptime`: this boot and the time namespace."""
    with contextlib.suppress(OSError):
        started = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{started} {Path('/proc/self/ns/time').readlink()}"
    return str(uuid.uuid4())  # matches no other process


def synchronised() -> bool:
    """Return whether the kernel considers the system clock synchronised, by NTP or similar."""
    with contextlib.suppress(OSError, AttributeError):
        state: int = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
        return 0 <= state < _TIME_ERROR
    return False


@dataclass(frozen=True, slots=True)
class Instant:
    """
    A moment on this machine, by each clock that can later give its age.

    Args:
        wall: Seconds since the epoch.
    """

    wall: float
    uptime: float
    boot: str

    @classmethod
    def now(cls) -> Instant:
        """Return the current instant."""
        return cls(time.time(), uptime(), boot())


def age_s(then: Instant, database_time: float | None) -> float:
    """
    Return the age of an instant in seconds, erring on the high side; negative if a clock was set back.

    Args:
        database_time: The database's clock at that instant, in seconds since the epoch.
    Raises:
        AgeUnknown: The machine has rebooted since, and its system clock may be wrong.
    """
    now = Instant.now()
    if then.boot == now.boot:
        return now.uptime - then.uptime
    if not synchronised():
        raise AgeUnknown("the machine has rebooted since, and its clock is not synchronised (see: timedatectl)")
    since_wall = now.wall - then.wall
    if since_wall < 0:
        return since_wall
    return max(since_wall, now.uptime, now.wall - (then.wall if database_time is None else database_time))
