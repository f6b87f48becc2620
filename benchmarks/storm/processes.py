"""CPU time of processes, read from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str] | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def descendants(pid: int) -> list[int]:
    """Return the children of a process, their children, and so on."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))) is not None:
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    result, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        result += children
        queue += children
    return result


def cpu_s(roots: Iterable[int]) -> float:
    """Return the CPU seconds, user and system, of these processes and all their descendants, including ended ones."""
    total = 0
    for root in roots:
        for pid in (root, *descendants(root)):
            if (fields := _stat(pid)) is not None:
                total += sum(map(int, fields[11:15]))
    return total * _TICK_S


def machine_cpu_s() -> float:
    """Return the CPU seconds that the whole machine has used."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    return sum(map(int, (user, nice, system, irq, softirq))) * _TICK_S
