"""Measures storms without faults, with each backend in turn, and the cost of each step of a cycle."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from authbackend_load.fleet import Fleet, Sample
from authbackend_load.plan import STEPS, Plan
from authbackend_load.record import Record
from authbackend_load.run import timeline
from benchmarks.storm import processes
from benchmarks.storm.environment import Environment

Say = Callable[[str], None]
WARM_UP = 300


def make_plan(environment: Environment, **changes: Any) -> Plan:
    """Return the plan of a storm: each device subscribes with QoS 1 and publishes once with QoS 1."""
    values: dict[str, Any] = {
        "host": "127.0.0.1",
        "server_name": "localhost",
        "ca_file": str(environment.certificates.ca_file),
        "in_flight": environment.options.in_flight,
        # Devices send nothing after their cycle, so that only the storm is measured.
        "keep_alive_s": 600,
    }
    return Plan(**(values | changes))


def storm(environment: Environment, backend: str, plan: Plan, devices: int | None = None) -> dict[str, Any]:
    """Connect the fleet once, and return duration, CPU time and latencies."""
    with Fleet(plan, environment.fleet[:devices], environment.options.processes) as fleet:
        before = _cpu(environment, fleet)
        done = fleet.storm(environment.options.time_limit_s)
        after = _cpu(environment, fleet)
        fleet.stop()
    environment.wait_until_empty()
    used = {name: round(after[name] - before[name], 2) for name in before}
    # Includes the kernel, this process, and anything else that runs on the machine.
    machine = used.pop("machine")
    used["others"] = round(max(0.0, machine - sum(used.values())), 2)
    return {"backend": backend, **done.as_dict(), "cpu_s": used, **_report(fleet.record, fleet.samples)}


def _cpu(environment: Environment, fleet: Fleet) -> dict[str, float]:
    return environment.cpu() | {"generator": processes.cpu_s(fleet.pids), "machine": processes.machine_cpu_s()}


def _report(record: Record, samples: list[Sample]) -> dict[str, Any]:
    return {**record.report(), "timeline": timeline(samples), "distributions_ms": record.distributions()}


def rounds(environment: Environment, say: Say) -> dict[str, Any]:
    """Compare the backends by storms with each in turn; each round begins with a different one."""
    options, plan = environment.options, make_plan(environment)
    for backend in options.backends:
        environment.use(backend)
        storm(environment, backend, plan, WARM_UP)
    runs = []
    for number in range(options.rounds):
        turn = number % len(options.backends)
        for backend in (*options.backends[turn:], *options.backends[:turn]):
            environment.use(backend)
            done = {"round": number + 1, **storm(environment, backend, plan)}
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
    result: dict[str, Any] = {}
    for name in names:
        own = [run for run in runs if run["backend"] == name]
        rates = [run["cycles_per_s"] for run in own]
        cpu = {
            part: round(statistics.median(run["cpu_s"][part] / max(1, run["complete"]) * 1000 for run in own), 3)
            for part in own[0]["cpu_s"]
        }
        result[name] = {
            "cycles_per_s": {"median": statistics.median(rates), "lowest": min(rates), "highest": max(rates)},
            "duration_s": statistics.median(run["duration_s"] for run in own),
            "cpu_ms_per_device": cpu,
        }
    base = {run["round"]: run["cycles_per_s"] for run in runs if run["backend"] == "always-allow"}
    for name in names if base else ():
        median = result["always-allow"]["cycles_per_s"]["median"]
        own_rates = {run["round"]: run["cycles_per_s"] for run in runs if run["backend"] == name}
        result[name]["ratio_to_always_allow"] = {
            "of_medians": round(result[name]["cycles_per_s"]["median"] / median, 3) if median else None,
            "by_round": [round(rate / base[number], 3) for number, rate in own_rates.items() if base.get(number)],
        }
    return result


def steps(environment: Environment, say: Say) -> dict[str, Any]:
    """
    Measure storms whose cycles end after each step, to see where the broker's time goes.

    The difference between two steps is the cost of the later one. The first, the TLS handshake, needs no backend.
    """
    storms: dict[str, Any] = {}
    for backend in (name for name in ("internal", "authbackend") if name in environment.options.backends):
        environment.use(backend)
        storms[backend] = []
        for until in STEPS:
            done = storm(environment, backend, make_plan(environment, until=until))
            per_device = {
                part: round(used / max(1, done["complete"]) * 1000, 3) for part, used in done["cpu_s"].items()
            }
            entry = {"until": until, "cpu_ms_per_device": per_device}
            storms[backend].append(entry | {key: done[key] for key in ("duration_s", "cycles_per_s", "failures")})
            say(f"until {until}: {_line(done)}")
    return {"storms": storms, "shares": _shares(storms)}


def _shares(storms: dict[str, Any]) -> dict[str, Any]:
    """Return for each backend the handshake's share of the broker's CPU time, and the broker's share of all."""
    shares = {}
    for backend, entries in storms.items():
        first, last = entries[0]["cpu_ms_per_device"], entries[-1]["cpu_ms_per_device"]
        if last["broker"]:
            shares[backend] = {
                "handshake_of_broker": round(first["broker"] / last["broker"], 3),
                "broker_of_all": round(last["broker"] / sum(last.values()), 3),
            }
    return shares
