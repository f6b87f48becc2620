"""Measures the cost of logging each login: storms with and without ``conf.d-optional/quiet-logins.conf``, in turn."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.storm.environment import Environment
from benchmarks.storm.rounds import Say, make_plan, storm
from tests.broker.node import RABBITMQ_FILES

QUIET = RABBITMQ_FILES / "conf.d-optional/quiet-logins.conf"
WARM_UP = 100


def logins(environment: Environment, say: Say) -> dict[str, Any]:
    """Compare lines, bytes, CPU and rate of storms with and without login lines; the node is restarted for each."""
    plan = make_plan(environment)
    runs: list[dict[str, Any]] = []
    for number in range(max(1, environment.options.rounds)):
        for quiet in (False, True) if number % 2 == 0 else (True, False):
            environment.restart_broker(QUIET if quiet else None)
            storm(environment, "authbackend", plan, WARM_UP)
            begin = environment.log_size()
            done = storm(environment, "authbackend", plan)
            lines = environment.log_since(begin)
            devices = done["devices"]
            run = {
                "quiet": quiet,
                "round": number + 1,
                "cycles_per_s": done["cycles_per_s"],
                "broker_cpu_ms_per_device": round(done["cpu_s"]["broker"] / devices * 1000, 3),
                "lines_per_device": round(len(lines) / devices, 2),
                "bytes_per_device": round(sum(len(line) + 1 for line in lines) / devices, 1),
                "failures": done["failures"],
                "sample": lines[:20],
            }
            runs.append(run)
            say(
                f"logins: {'quiet' if quiet else 'as shipped'}: "
                + ", ".join(f"{k} {v}" for k, v in run.items() if k != "sample")
            )
    names = ("cycles_per_s", "broker_cpu_ms_per_device", "lines_per_device", "bytes_per_device")
    return {
        "runs": runs,
        "medians": {
            word: {name: statistics.median(run[name] for run in runs if run["quiet"] == quiet) for name in names}
            for word, quiet in (("as shipped", False), ("quiet", True))
        },
    }
