"""
Who a replica is: a folder's id, which lasts, and an id of each boot, which is a start of the service.

Each boot has a row of its own in the database. A restart takes the place of the boots before it only where the kernel
proves that they have ended: they held the lock of the folder, all their processes hold it until they end, and this boot
has it now. The proof holds for one file under one kernel. In a folder that was copied the lock is another file, and under
another kernel (another host, or this one started anew) nobody knows who holds what elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

_KERNEL = Path("/proc/sys/kernel/random/boot_id")
_MOST_FORMER = 100


@dataclass(frozen=True, slots=True)
class Boot:
    """
    One start of the service.

    Args:
        folder: The id of the folder that it keeps its copy in; None without one.
        former: The boots of the same lock file before this one, oldest first.
        former_ended: Whether it is proven that none of them runs any more; else only those that signed off have ended.
    """

    id: uuid.UUID
    folder: uuid.UUID | None = None
    former: tuple[uuid.UUID, ...] = ()
    former_ended: bool = False


def begin(folder: uuid.UUID, record: bytes | None, lock: int) -> tuple[Boot, bytes]:
    """
    Return this boot, and what to keep in the folder for the next one.

    Args:
        record: What the boot before kept; None if there was none, or one that kept nothing.
        lock: The descriptor of the folder's lock, which this process holds.
    """
    here = _lock(lock)
    # Before boots had ids of their own, a replica's row had the folder's.
    former: tuple[uuid.UUID, ...] = (folder,)
    there = None
    if record is not None:
        former = ()
        with contextlib.suppress(ValueError, KeyError, TypeError):
            kept = json.loads(record)
            there = kept["lock"]
            former = tuple(uuid.UUID(one) for one in kept["boots"])
            if there["inode"] != here["inode"]:
                former = ()
    boot = Boot(uuid.uuid4(), folder, former, there == here)
    # What is not proven now must not look so to the next boot, which sees only that this one has ended.
    ended = former if boot.former_ended else ()
    boots = [str(one) for one in (*ended, boot.id)][-_MOST_FORMER:]
    return boot, json.dumps({"lock": here, "boots": boots}).encode() + b"\n"


def _lock(descriptor: int) -> dict[str, str | int]:
    """Return where the lock is: no other file of this kernel has the same three, as long as somebody has it open."""
    found = os.fstat(descriptor)
    kernel = _KERNEL.read_text(encoding="ascii").strip()
    return {"kernel": kernel, "device": found.st_dev, "inode": found.st_ino}
