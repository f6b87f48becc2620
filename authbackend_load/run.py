"""Runs a load test on one machine, from connecting the fleet to the result."""

from __future__ import annotations

import os
import platform
import ssl
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from authbackend_load.fleet import Fleet, Sample
from authbackend_load.plan import Identity, Plan

SCHEMA = "authbackend-load/1"


def machine() -> dict[str, Any]:
    """Describe the machine: cores, CPU, memory, kernel, versions."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    memory = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "0")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": model or platform.machine(),
        "memory_gib": round(int(memory) / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def run(
    plan: Plan,
    identities: Sequence[Identity],
    *,
    processes: int = 1,
    duration_s: float = 0.0,
    reconnects: int = 0,
    time_limit_s: float = 300.0,
    on_sample: Callable[[Sample], None] | None = None,
    on_phase: Callable[[str], None] = lambda _name: None,
) -> dict[str, Any]:
    """
    Connect the fleet, keep it connected, cut and reconnect it ``reconnects`` times, and return the result for JSON.

    Args:
        duration_s: How long the fleet stays connected after each storm.
        reconnects: How many times all connections are cut at the same time.
        time_limit_s: Time limit of each storm.
        on_sample: Called about four times a second.
        on_phase: Called at the beginning of each phase: ``connect``, ``hold``, ``reconnect`` and ``stop``.
    Raises:
        LoadError: The load test cannot run.
    """
    begin, cpu = datetime.now(UTC), time.process_time()
    with Fleet(plan, identities, processes, on_sample) as fleet:
        for turn in range(reconnects + 1):
            on_phase("reconnect" if turn else "connect")
            if turn:
                fleet.cut()
            fleet.storm(time_limit_s)
            if duration_s:
                on_phase("hold")
                fleet.hold(duration_s)
        on_phase("stop")
        fleet.stop()
    cpu_s = fleet.cpu_s + time.process_time() - cpu
    return {
        "schema": SCHEMA,
        "begin": begin.isoformat(timespec="seconds"),
        "machine": machine(),
        "devices": len(identities),
        "must_be_refused": sum(not identity.active for identity in identities),
        "processes": processes,
        "plan": plan.as_dict(),
        "storms": [storm.as_dict() for storm in fleet.storms],
        **fleet.record.report(),
        "generator_cpu_s": round(cpu_s, 2),
        "timeline": timeline(fleet.samples),
        "distributions_ms": fleet.record.distributions(),
    }


def timeline(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """Return the samples as columns: seconds, connected devices, cycles completed and failures since the start."""
    return {
        "at_s": [round(sample.at_s, 2) for sample in samples],
        "connected": [sample.connected for sample in samples],
        "completed": [sample.counts["completed"] for sample in samples],
        "failures": [sample.failures for sample in samples],
    }


def faults(result: dict[str, Any]) -> list[str]:
    """Return what is wrong in a result: devices that did not finish, and wrong verdicts; empty if nothing is."""
    messages = [
        f"{storm['name']}: {storm['devices'] - storm['complete']} of {storm['devices']} devices did not finish"
        for storm in result["storms"]
        if storm["complete"] < storm["devices"]
    ]
    counts = result["counts"]
    if counts.get("wrongly_refused"):
        messages.append(f"{counts['wrongly_refused']} times, a device that must be let in was refused")
    if counts.get("wrongly_let_in"):
        messages.append(f"{counts['wrongly_let_in']} times, a device that must be refused was let in")
    return messages
