"""
The identity of a replica: the id of its folder, which is permanent, and an id for each boot (start of the service).

Each boot has a row of its own in the database. A restart replaces earlier boots only if the kernel proves that they
have ended: all processes of a boot hold the folder's lock until they end, and this boot holds it now. That proves
something only for one lock file under one kernel. In a copied folder the lock is another file, and under another kernel
(another host, or this one rebooted) locks held elsewhere are unknown.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

_KERNEL_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MAX_FORMER = 100


@dataclass(frozen=True, slots=True)
class Boot:
    """
    One start of the service.

    Args:
        folder: The id of the folder with the copy on disk; None without one.
        former: The earlier boots that used the same lock file, oldest first.
        former_ended: Whether all of them have provably ended; if not, only those that signed off count as ended.
    """

    id: uuid.UUID
    folder: uuid.UUID | None = None
    former: tuple[uuid.UUID, ...] = ()
    former_ended: bool = False


def begin(folder: uuid.UUID, record: bytes | None, lock: int) -> tuple[Boot, bytes]:
    """
    Return this boot, and the record to store in the folder for the next one.

    Args:
        record: The record of the previous boot; None if there is none.
        lock: File descriptor of the folder's lock, held by this process.
    """
    current_lock = _lock(lock)
    # Before boots had ids of their own, a replica's row had the folder's id.
    former: tuple[uuid.UUID, ...] = (folder,)
    previous_lock = None
    if record is not None:
        former = ()
        with contextlib.suppress(ValueError, KeyError, TypeError):
            previous = json.loads(record)
            previous_lock = previous["lock"]
            former = tuple(uuid.UUID(text) for text in previous["boots"])
            if previous_lock["inode"] != current_lock["inode"]:
                former = ()
    boot = Boot(uuid.uuid4(), folder, former, previous_lock == current_lock)
    # The next boot can prove only that this one has ended: boots that are not proven to have ended must not be in its list.
    ended = former if boot.former_ended else ()
    boots = [str(boot_id) for boot_id in (*ended, boot.id)][-_MAX_FORMER:]
    return boot, json.dumps({"lock": current_lock, "boots": boots}).encode() + b"\n"


def _lock(descriptor: int) -> dict[str, str | int]:
    """Identify the lock file: no other file under this kernel has the same three values while it is open."""
    stat = os.fstat(descriptor)
    kernel = _KERNEL_BOOT_ID.read_text(encoding="ascii").strip()
    return {"kernel": kernel, "device": stat.st_dev, "inode": stat.st_ino}
