"""Storms without faults: backends in turn, and what each step costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from authbackend_load.fleet import Fleet, Sample
from authbackend_load.plan import STEPS, Plan
from authbackend_load.record import Record
from authbackend_load.run import timeline
from benchmarks.storm import processes
from benchmarks.storm.environment import Stage

Say = Callable[[str], None]
WARM_UP = 300


def make_plan(stage: Stage, **changes: Any) -> Plan:
    """Return what the fleet of a storm does: subscribe with QoS 1, publish once with QoS 1."""
    values: dict[str, Any] = {
        "host": "127.0.0.1",
        "server_name": "localhost",
        "ca_file": str(stage.certificates.ca_file),
        "in_flight": stage.options.in_flight,
        # Devices stay quiet after their cycle, so that nothing but the storm is measured.
        "keep_alive_s": 600,
    }
    return Plan(**(values | changes))


def storm(stage: Stage, backend: str, plan: Plan, devices: int | None = None) -> dict[str, Any]:
    """Let the fleet connect once, and return time, CPU time and latencies."""
    with Fleet(plan, stage.fleet[:devices], stage.options.processes) as fleet:
        before = _cpu(stage, fleet)
        done = fleet.storm(stage.options.time_limit_s)
        after = _cpu(stage, fleet)
        fleet.stop()
    stage.wait_until_empty()
    used = {name: round(after[name] - before[name], 2) for name in before}
    # The kernel's own work, this process, and whatever else runs on the machine.
    machine = used.pop("machine")
    used["others"] = round(max(0.0, machine - sum(used.values())), 2)
    return {"backend": backend, **done.as_dict(), "cpu_s": used, **_report(fleet.record, fleet.samples)}


def _cpu(stage: Stage, fleet: Fleet) -> dict[str, float]:
    return stage.cpu() | {"generator": processes.cpu_s(fleet.pids), "machine": processes.machine_cpu_s()}


def _report(record: Record, samples: list[Sample]) -> dict[str, Any]:
    return {**record.report(), "timeline": timeline(samples), "distributions_ms": record.distributions()}


def rounds(stage: Stage, say: Say) -> dict[str, Any]:
    """Storm with every backend in turn, so many times, each round beginning with another one; compare."""
    options, plan = stage.options, make_plan(stage)
    for backend in options.backends:
        stage.use(backend)
        storm(stage, backend, plan, WARM_UP)
    runs = []
    for number in range(options.rounds):
        turn = number % len(options.backends)
        for backend in (*options.backends[turn:], *options.backends[:turn]):
            stage.use(backend)
            done = {"round": number + 1, **storm(stage, backend, plan)}
            runs.append(done)
            say(f"round {number + 1}: {_line(done)}")
    return {"runs": runs, "summary": summary(runs)}


def _line(done: dict[str, Any]) -> str:
    cpu = ", ".join(f"{name} {used:.1f}" for name, used in done["cpu_s"].items() if used >= 0.1)
    failures = sum(done["failures"].values())
    return (
        f"{done['backend']}: {done['complete']}/{done['devices']} in {done['duration_s']:.1f} s,"
        f" {done['cycles_per_s']:.0f}/s, failures {failures}; CPU s: {cpu}"
    )


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Return for each backend the median and the spread of devices per second, CPU milliseconds per device, and its rate
    as a fraction of always-allow's: of the medians, and round by round.
    """
    names = list(dict.fromkeys(run["backend"] for run in runs))
    found: dict[str, Any] = {}
    for name in names:
        own = [run for run in runs if run["backend"] == name]
        rates = [run["cycles_per_s"] for run in own]
        cpu = {
            part: round(statistics.median(run["cpu_s"][part] / max(1, run["complete"]) * 1000 for run in own), 3)
            for part in own[0]["cpu_s"]
        }
        found[name] = {
            "cycles_per_s": {"median": statistics.median(rates), "lowest": min(rates), "highest": max(rates)},
            "duration_s": statistics.median(run["duration_s"] for run in own),
            "cpu_ms_per_device": cpu,
        }
    base = {run["round"]: run["cycles_per_s"] for run in runs if run["backend"] == "always-allow"}
    for name in names if base else ():
        median = found["always-allow"]["cycles_per_s"]["median"]
        own_rates = {run["round"]: run["cycles_per_s"] for run in runs if run["backend"] == name}
        found[name]["ratio_to_always_allow"] = {
            "of_medians": round(found[name]["cycles_per_s"]["median"] / median, 3) if median else None,
            "by_round": [round(rate / base[number], 3) for number, rate in own_rates.items() if base.get(number)],
        }
    return found


def steps(stage: Stage, say: Say) -> dict[str, Any]:
    """
    Storm with cycles that end earlier and earlier, to see where the broker's time goes.

    The difference between two steps is what the later one costs. The first, the TLS handshake, asks no backend.
    """
    found: dict[str, Any] = {}
    for backend in (name for name in ("internal", "authbackend") if name in stage.options.backends):
        stage.use(backend)
        found[backend] = []
        for until in STEPS:
            done = storm(stage, backend, make_plan(stage, until=until))
            per_device = {
                part: round(used / max(1, done["complete"]) * 1000, 3) for part, used in done["cpu_s"].items()
            }
            entry = {"until": until, "cpu_ms_per_device": per_device}
            found[backend].append(entry | {key: done[key] for key in ("duration_s", "cycles_per_s", "failures")})
            say(f"until {until}: {_line(done)}")
    return {"storms": found, "shares": _shares(found)}


def _shares(found: dict[str, Any]) -> dict[str, Any]:
    """Return for each backend which share of all CPU time, and of the broker's, the TLS handshake alone has."""
    shares = {}
    for backend, entries in found.items():
        first, last = entries[0]["cpu_ms_per_device"], entries[-1]["cpu_ms_per_device"]
        if last["broker"]:
            shares[backend] = {
                "handshake_of_broker": round(first["broker"] / last["broker"], 3),
                "broker_of_all": round(last["broker"] / sum(last.values()), 3),
            }
    return shares
