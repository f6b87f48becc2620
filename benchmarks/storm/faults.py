"""Storms while something is broken: who is refused wrongly, who is let in wrongly, what waits how long."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from authbackend_load.fleet import Fleet
from authbackend_load.run import timeline
from benchmarks.storm.environment import RELAY_PORT, Stage
from benchmarks.storm.processes import descendants
from benchmarks.storm.rounds import Say, make_plan

KILL_EVERY_S = 10.0
CUT_EVERY_S = 1.0
REFUSALS = 100
_TRESPASS_S = 5.0
_HTTP_ERROR = re.compile(
    r"rabbit_auth_backend_http.{0,40}?(timeout|socket_closed_remotely|econnrefused|failed_connect|error)"
)
_BROKER_TIMEOUT_S = 3.0
_DEFAULT_TIMEOUT_S = 15.0


def faults(stage: Stage, say: Say) -> dict[str, Any]:
    """Run the scenarios of the options, each with storms one after the other until it has lasted long enough."""
    scenarios: dict[str, Callable[[Stage], Any]] = {
        "postgres": _postgres_away,
        "worker": _worker_killed,
        "listener": _listener_cut,
        "connections": _connections_cut,
    }
    found = {}
    for name in stage.options.faults:
        stage.use("authbackend")
        found[name] = _scenario(stage, name, scenarios[name])
        stage.use("authbackend")
        stage.wait_until_empty()
        counts = found[name]["counts"]
        say(
            f"fault {name}: {len(found[name]['storms'])} storms,"
            f" wrongly refused {counts.get('wrongly_refused', 0)},"
            f" wrongly let in {counts.get('wrongly_let_in', 0)},"
            f" rightly refused {counts.get('rightly_refused', 0)}, failures {found[name]['failures']}"
        )
    return found


def _scenario(stage: Stage, name: str, broken: Callable[[Stage], Any]) -> dict[str, Any]:
    options = stage.options
    lasts_s = options.outage_s if name == "postgres" else options.fault_s
    log = stage.log_size()
    everybody = [*stage.fleet, *stage.revoked]
    random.Random(0).shuffle(everybody)
    with Fleet(make_plan(stage), everybody, options.processes) as fleet, broken(stage) as events:
        before = _answers(stage)
        begin = time.monotonic()
        fleet.storm(options.time_limit_s)
        while time.monotonic() - begin < lasts_s:
            fleet.cut()
            fleet.storm(options.time_limit_s)
        fleet.stop()
        lasted_s = time.monotonic() - begin
        answers = {name: number - before.get(name, 0) for name, number in _answers(stage).items()}
        trespassed = _trespass(stage)
    logins = fleet.record.latencies["connack"]
    return {
        "lasted_s": round(lasted_s, 1),
        "forbidden_publishes": trespassed,
        "answers": {name: number for name, number in answers.items() if number},
        "events": events,
        "revoked": len(stage.revoked),
        "storms": [each.as_dict() for each in fleet.storms],
        **fleet.record.report(),
        "slow_logins": {
            "longer_than_3_s": logins.at_least(_BROKER_TIMEOUT_S),
            "longer_than_15_s": logins.at_least(_DEFAULT_TIMEOUT_S),
            "longest_s": round(logins.largest_s, 3),
        },
        "broker_log": _http_errors(stage.log_since(log)),
        "timeline": timeline(fleet.samples),
    }


def _answers(stage: Stage) -> dict[str, int]:
    """Return what the service has answered so far: allowed, denied by reason, failed and shed."""
    found: dict[str, int] = {}
    for family in text_string_to_metric_families(_metrics(stage)):
        for sample in family.samples:
            labels = sample.labels
            if sample.name == "authbackend_decisions_total":
                name = "allowed" if labels["verdict"] == "allow" else f"denied: {labels['reason']}"
            elif sample.name == "authbackend_request_failures_total":
                name = f"failed: {labels['cause']}"
            elif sample.name == "authbackend_requests_shed_total":
                name = f"shed: {labels['endpoint']}"
            else:
                continue
            found[name] = found.get(name, 0) + int(sample.value)
    return found


def _metrics(stage: Stage) -> str:
    deadline = time.monotonic() + 30
    while True:
        try:
            return stage.service.metrics()
        except OSError:  # the process that tells them may just have been killed
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _trespass(stage: Stage) -> dict[str, int]:
    """Let some devices publish to a topic of another one, and count the tries and those the broker took."""
    plan = make_plan(stage, publish=("fleet/somebody/telemetry/speed",), retry_delay_s=0.5)
    with Fleet(plan, stage.fleet[:REFUSALS], stage.options.processes) as fleet:
        fleet.storm(_TRESPASS_S)
        fleet.stop()
    return {"tried": fleet.record.counts["publishes"], "taken": fleet.record.counts["completed"]}


def _http_errors(lines: list[str]) -> dict[str, int]:
    """Count what the broker logged about questions that were not answered, by cause."""
    return dict(Counter(found.group(1) for line in lines if (found := _HTTP_ERROR.search(line))))


@contextmanager
def _postgres_away(stage: Stage) -> Iterator[list[str]]:
    """PostgreSQL is stopped at once when the storm begins, and started again when all is over."""
    events: list[str] = []
    stage.database.server.stop("immediate")
    events.append("PostgreSQL stopped")
    try:
        yield events
    finally:
        stage.database.server.start()
        events.append("PostgreSQL started")


@contextmanager
def _worker_killed(stage: Stage) -> Iterator[list[str]]:
    """A process of the service is killed every ten seconds: a worker, or the one that follows the database."""
    events: list[str] = []
    over = threading.Event()

    def kill() -> None:
        while not over.wait(KILL_EVERY_S):
            children = descendants(stage.service.pid)
            victim = random.choice(children)
            os.kill(victim, signal.SIGKILL)
            events.append(f"killed process {victim} of {len(children)}")

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield events
    finally:
        over.set()
        thread.join()


@contextmanager
def _listener_cut(stage: Stage) -> Iterator[list[str]]:
    """The connection on which the service listens to PostgreSQL is cut every second."""
    events: list[str] = []
    over = threading.Event()
    cut = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'authbackend listener'"

    def kill() -> None:
        while not over.wait(CUT_EVERY_S):
            events.extend("cut" for line in stage.database.sql(cut).splitlines() if line == "t")

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield events
    finally:
        over.set()
        thread.join()
        events[:] = [f"cut {len(events)} times"]


@contextmanager
def _connections_cut(stage: Stage) -> Iterator[list[str]]:
    """All connections between broker and service are cut every second."""
    events: list[str] = []
    relay = stage.relay(CUT_EVERY_S)
    stage.use("authbackend", RELAY_PORT)
    try:
        yield events
    finally:
        stage.use("authbackend")
        relay.stop()
        events.append(relay.log.read_text().splitlines()[-1])


def refusals(stage: Stage, say: Say) -> dict[str, Any]:
    """
    Count what publishes that are not allowed cost in questions, with connections that end for it and that do not.

    Each of a hundred devices tries for ten seconds to publish to a topic that it may not, once a second.
    """
    found = {}
    stage.use("authbackend")
    for disconnect in (True, False):
        stage.control(f"application:set_env(rabbitmq_mqtt, disconnect_on_unauthorized, {str(disconnect).lower()})")
        plan = make_plan(stage, publish=("fleet/somebody/else",), retry_delay_s=1.0)
        before = stage.service.count("authbackend_decisions")
        with Fleet(plan, stage.fleet[:REFUSALS], stage.options.processes) as fleet:
            fleet.storm(10.0)
            fleet.stop()
        asked = stage.service.count("authbackend_decisions") - before
        refused = fleet.record.counts["wrongly_refused"]
        name = "disconnect" if disconnect else "stay_connected"
        found[name] = {
            "publishes": fleet.record.counts["publishes"],
            "refused": refused,
            "questions": asked,
            "questions_per_refusal": round(asked / refused, 2) if refused else None,
            "failures": dict(fleet.record.failures),
        }
        say(f"refused publishes, {name}: {found[name]}")
        stage.wait_until_empty()
    stage.control("application:set_env(rabbitmq_mqtt, disconnect_on_unauthorized, true)")
    return found
