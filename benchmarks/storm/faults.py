"""Measures storms during faults: devices wrongly refused, devices wrongly let in, and slow logins."""

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
from benchmarks.storm.environment import RELAY_PORT, Environment
from benchmarks.storm.processes import descendants
from benchmarks.storm.rounds import Say, make_plan

KILL_EVERY_S = 10.0
CUT_EVERY_S = 1.0
REFUSALS = 100
_FORBIDDEN_S = 5.0
_HTTP_ERROR = re.compile(
    r"rabbit_auth_backend_http.{0,40}?(timeout|socket_closed_remotely|econnrefused|failed_connect|error)"
)
_BROKER_TIMEOUT_S = 3.0
_DEFAULT_TIMEOUT_S = 15.0


def faults(environment: Environment, say: Say) -> dict[str, Any]:
    """Run the scenarios of the options, each with one storm after the other for as long as the options say."""
    scenarios: dict[str, Callable[[Environment], Any]] = {
        "postgres": _postgres_away,
        "worker": _worker_killed,
        "listener": _listener_cut,
        "connections": _connections_cut,
    }
    results = {}
    for name in environment.options.faults:
        environment.use("authbackend")
        result = results[name] = _scenario(environment, name, scenarios[name])
        environment.use("authbackend")
        environment.wait_until_empty()
        counts = result["counts"]
        say(
            f"fault {name}: {len(result['storms'])} storms,"
            f" wrongly refused {counts.get('wrongly_refused', 0)},"
            f" wrongly let in {counts.get('wrongly_let_in', 0)},"
            f" rightly refused {counts.get('rightly_refused', 0)}, failures {result['failures']}"
        )
    return results


def _scenario(environment: Environment, name: str, broken: Callable[[Environment], Any]) -> dict[str, Any]:
    options = environment.options
    lasts_s = options.outage_s if name == "postgres" else options.fault_s
    log = environment.log_size()
    identities = [*environment.fleet, *environment.revoked]
    random.Random(0).shuffle(identities)
    with Fleet(make_plan(environment), identities, options.processes) as fleet, broken(environment) as events:
        before = _answers(environment)
        begin = time.monotonic()
        fleet.storm(options.time_limit_s)
        while time.monotonic() - begin < lasts_s:
            fleet.cut()
            fleet.storm(options.time_limit_s)
        fleet.stop()
        lasted_s = time.monotonic() - begin
        answers = {name: number - before.get(name, 0) for name, number in _answers(environment).items()}
        forbidden = _publish_forbidden(environment)
    logins = fleet.record.latencies["connack"]
    return {
        "lasted_s": round(lasted_s, 1),
        "forbidden_publishes": forbidden,
        "answers": {name: number for name, number in answers.items() if number},
        "events": events,
        "revoked": len(environment.revoked),
        "storms": [each.as_dict() for each in fleet.storms],
        **fleet.record.report(),
        "slow_logins": {
            "longer_than_3_s": logins.at_least(_BROKER_TIMEOUT_S),
            "longer_than_15_s": logins.at_least(_DEFAULT_TIMEOUT_S),
            "longest_s": round(logins.largest_s, 3),
        },
        "broker_log": _http_errors(environment.log_since(log)),
        "timeline": timeline(fleet.samples),
    }


def _answers(environment: Environment) -> dict[str, int]:
    """Return the number of answers so far: allowed, denied by reason, failed and shed."""
    answers: dict[str, int] = {}
    for family in text_string_to_metric_families(_metrics(environment)):
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
            answers[name] = answers.get(name, 0) + int(sample.value)
    return answers


def _metrics(environment: Environment) -> str:
    deadline = time.monotonic() + 30
    while True:
        try:
            return environment.service.metrics()
        except OSError:  # the health process may just have been killed
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _publish_forbidden(environment: Environment) -> dict[str, int]:
    """Let some devices publish to another one's topic, and count the attempts and those that the broker accepted."""
    plan = make_plan(environment, publish=("fleet/somebody/telemetry/speed",), retry_delay_s=0.5)
    with Fleet(plan, environment.fleet[:REFUSALS], environment.options.processes) as fleet:
        fleet.storm(_FORBIDDEN_S)
        fleet.stop()
    return {"tried": fleet.record.counts["publishes"], "taken": fleet.record.counts["completed"]}


def _http_errors(lines: list[str]) -> dict[str, int]:
    """Count the requests without an answer that the broker has logged, by cause."""
    return dict(Counter(match.group(1) for line in lines if (match := _HTTP_ERROR.search(line))))


@contextmanager
def _postgres_away(environment: Environment) -> Iterator[list[str]]:
    """Stop PostgreSQL immediately when the storm begins, and start it again at the end."""
    events: list[str] = []
    environment.database.server.stop("immediate")
    events.append("PostgreSQL stopped")
    try:
        yield events
    finally:
        environment.database.server.start()
        events.append("PostgreSQL started")


@contextmanager
def _worker_killed(environment: Environment) -> Iterator[list[str]]:
    """Kill a random process of the service every ten seconds."""
    events: list[str] = []
    over = threading.Event()

    def kill() -> None:
        while not over.wait(KILL_EVERY_S):
            children = descendants(environment.service.pid)
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
def _listener_cut(environment: Environment) -> Iterator[list[str]]:
    """Cut the connection on which the service listens to PostgreSQL every second."""
    events: list[str] = []
    over = threading.Event()
    cut = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'authbackend listener'"

    def kill() -> None:
        while not over.wait(CUT_EVERY_S):
            events.extend("cut" for line in environment.database.sql(cut).splitlines() if line == "t")

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield events
    finally:
        over.set()
        thread.join()
        events[:] = [f"cut {len(events)} times"]


@contextmanager
def _connections_cut(environment: Environment) -> Iterator[list[str]]:
    """Cut all connections between broker and service every second."""
    events: list[str] = []
    relay = environment.relay(CUT_EVERY_S)
    environment.use("authbackend", RELAY_PORT)
    try:
        yield events
    finally:
        environment.use("authbackend")
        relay.stop()
        events.append(relay.log.read_text().splitlines()[-1])


def refusals(environment: Environment, say: Say) -> dict[str, Any]:
    """
    Count the requests that a refused publish causes, with ``mqtt.disconnect_on_unauthorized`` on and off.

    A hundred devices try for ten seconds, once a second, to publish to a topic that is denied to them.
    """
    results = {}
    environment.use("authbackend")
    for disconnect in (True, False):
        environment.control(
            f"application:set_env(rabbitmq_mqtt, disconnect_on_unauthorized, {str(disconnect).lower()})"
        )
        plan = make_plan(environment, publish=("fleet/somebody/else",), retry_delay_s=1.0)
        before = environment.service.count("authbackend_decisions")
        with Fleet(plan, environment.fleet[:REFUSALS], environment.options.processes) as fleet:
            fleet.storm(10.0)
            fleet.stop()
        requests = environment.service.count("authbackend_decisions") - before
        refused = fleet.record.counts["wrongly_refused"]
        name = "disconnect" if disconnect else "stay_connected"
        results[name] = {
            "publishes": fleet.record.counts["publishes"],
            "refused": refused,
            "questions": requests,
            "questions_per_refusal": round(requests / refused, 2) if refused else None,
            "failures": dict(fleet.record.failures),
        }
        say(f"refused publishes, {name}: {results[name]}")
        environment.wait_until_empty()
    environment.control("application:set_env(rabbitmq_mqtt, disconnect_on_unauthorized, true)")
    return results
