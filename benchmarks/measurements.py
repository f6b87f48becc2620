"""The measurements without RabbitMQ, each against its reference in turn, in one run."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import asyncpg
import uvloop

from benchmarks import applying, fixtures, load_client
from benchmarks.fixtures import Running
from benchmarks.propagation import Watcher
from tests.support.postgres import Server

Say = Callable[[str], None]
SMALL, LARGE = 2000 + 2 * fixtures.SPECIAL, 1_000_000
THIRD = 1 / 3
_CLIENT_NICE = 10
"""Nice value of clients, which need more CPU for thousands of requests per second than the service that is measured."""
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Extent:
    """The size of a run: rounds, seconds per round, devices of the large fleet, and numbers of changes and applies."""

    rounds: int = 10
    seconds: float = 2.0
    devices: int = LARGE
    changes: int = 500
    mass: int = 100_000
    applies: int = 5


QUICK = Extent(rounds=2, seconds=1.0, devices=20_000, changes=20, mass=2000, applies=2)


@dataclass
class Environment:
    """The database and settings that all measurements share."""

    extent: Extent
    server: Server
    large: str
    small: str
    say: Say
    capacity: float = 0.0
    """Requests per second of one process; set by :func:`throughput`."""


@contextmanager
def running_environment(extent: Extent, say: Say) -> Iterator[Environment]:
    """Run PostgreSQL with a small and a large fleet for the duration of the block."""
    with fixtures.postgres() as server:
        say(f"registering {SMALL} and {extent.devices} devices")
        small = fixtures.registry(server, SMALL)
        large = small if extent.devices == SMALL else fixtures.registry(server, extent.devices)
        yield Environment(extent, server, large, small, say)


def alternating(environment: Environment, measures: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Take each measure in turn, round after round; a warm-up round does not count."""
    values: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(environment.extent.rounds + 1):
        for name, measure in measures.items():
            value = measure()
            if number:
                values[name].append(round(value, 6))
        if number:
            environment.say(f"round {number}: " + ", ".join(f"{name} {values[name][-1]:g}" for name in measures))
    return values


def ratio(one: list[float], other: list[float]) -> dict[str, float]:
    """Return the median, the lowest and the highest of the rounds' ratios."""
    each = [a / b for a, b in zip(one, other, strict=True)]
    return {"median": round(statistics.median(each), 3), "lowest": round(min(each), 3), "highest": round(max(each), 3)}


def throughput(environment: Environment) -> dict[str, Any]:
    """Measure requests per second of one process, a bare aiohttp handler, and Django under gunicorn."""
    forms = load_client.publishes(environment.extent.devices, 20_000)
    with ExitStack() as stack:
        service = stack.enter_context(fixtures.service("one", environment.large))
        bare = stack.enter_context(fixtures.bare())
        gunicorns = {kind: stack.enter_context(fixtures.django(kind)) for kind in ("sync", "gthread")}
        seconds = environment.extent.seconds

        def django(running: Running) -> Callable[[], float]:
            return lambda: load_client.throughput(running.port, forms, seconds, method="GET")

        rates = alternating(
            environment,
            {
                "authbackend": lambda: load_client.throughput(service.port, forms, seconds),
                "aiohttp": lambda: load_client.throughput(bare.port, forms, seconds),
                **{f"django {kind}": django(running) for kind, running in gunicorns.items()},
            },
        )
    faster = max(("django sync", "django gthread"), key=lambda name: statistics.median(rates[name]))
    environment.capacity = statistics.median(rates["authbackend"])
    return {
        "requests_per_s": rates,
        "to_aiohttp": ratio(rates["authbackend"], rates["aiohttp"]),
        "to_django": ratio(rates["authbackend"], rates[faster]),
        "faster_django": faster,
    }


def workers(environment: Environment) -> dict[str, Any]:
    """Measure requests per second of one worker and of two."""
    forms = load_client.publishes(environment.extent.devices, 20_000)
    with fixtures.service("one", environment.large) as one, fixtures.service("two", environment.large, 2) as two:
        rates = alternating(
            environment,
            {
                "1 worker": lambda: load_client.throughput(one.port, forms, environment.extent.seconds, connections=64),
                "2 workers": lambda: load_client.throughput(
                    two.port, forms, environment.extent.seconds, connections=64
                ),
            },
        )
    return {"requests_per_s": rates, "two_to_one": ratio(rates["2 workers"], rates["1 worker"])}


def sizes(environment: Environment) -> dict[str, Any]:
    """Measure the effect of the size of the fleet, the number of rules, and the size of a request."""
    extent = environment.extent
    rate = environment.capacity * THIRD
    with fixtures.service("small", environment.small) as small, fixtures.service("large", environment.large) as large:
        forms = {"small": load_client.publishes(SMALL), "large": load_client.publishes(extent.devices)}

        def p99(running: Running, which: str) -> Callable[[], float]:
            return lambda: 1000 * load_client.latencies(running.port, forms[which], rate, extent.seconds).quantile(0.99)

        environment.say(f"p99 at {rate:.0f} requests a second")
        fleet = alternating(environment, {"small": p99(small, "small"), "large": p99(large, "large")})
        five = load_client.publishes(extent.devices, kind="T5")
        many = load_client.publishes(extent.devices, kind="T500")
        rules = alternating(
            environment,
            {
                "5 rules": lambda: load_client.throughput(large.port, five, extent.seconds),
                "500 rules": lambda: load_client.throughput(large.port, many, extent.seconds),
            },
        )
        curves = _curves(large, extent)
    return {
        "p99_ms": fleet,
        "large_to_small": ratio(fleet["large"], fleet["small"]),
        "rules_requests_per_s": rules,
        "500_to_5": ratio(rules["500 rules"], rules["5 rules"]),
        "curves": curves,
    }


def _curves(running: Running, extent: Extent) -> dict[str, dict[str, list[float]]]:
    device = f"d{2 * fixtures.SPECIAL:07d}"

    def micros(key: str, permission: str = "write") -> float:
        form = load_client.topic_form(device, key, permission)
        return round(1e6 / load_client.throughput(running.port, [form], extent.seconds), 1)

    levels = [3, 5, 10, 20, 40]
    lengths = [64, 1024, 4096, 16_384, 65_000]
    manies = [0, 1, 2, 10, 50]
    return {
        "topic levels": {"x": [*levels], "us": [micros(".".join(["a"] * n)) for n in levels]},
        "key bytes": {"x": [*lengths], "us": [micros("fleet." + "x" * (n - 6)) for n in lengths]},
        "levels of a 64 KiB key": {
            "x": [1, 1000, 8000, 32_000],
            "us": [micros(".".join(["x" * (65_000 // n - 1)] * n)) for n in (1, 1000, 8000, 32_000)],
        },
        "number of #": {"x": [*manies], "us": [micros(".".join(["fleet", *["#", "a"] * n]), "read") for n in manies]},
    }


def memory(environment: Environment) -> dict[str, Any]:
    """Measure the bytes per device of all processes of a replica together, shared pages counted once."""
    result: dict[str, Any] = {}
    for name, dsn in (("small", environment.small), ("large", environment.large)):
        for number in (1, 2, 4):
            with fixtures.service(name, dsn, number) as running:
                load_client.throughput(
                    running.port, load_client.publishes(SMALL if name == "small" else environment.extent.devices), 1
                )
                result[f"{name}, {number} workers"] = sum(running.memory_bytes().values())
    grown = environment.extent.devices - SMALL
    for number in (1, 2, 4):
        growth = result[f"large, {number} workers"] - result[f"small, {number} workers"]
        result[f"bytes_per_device, {number} workers"] = round(growth / grown, 1)
    environment.say(f"memory: {result}")
    return result


def loading(environment: Environment) -> dict[str, Any]:
    """Measure from start to readiness: from PostgreSQL, and from disk while PostgreSQL is stopped."""
    result: dict[str, list[float]] = {"postgresql_s": [], "postgresql_load_s": [], "disk_s": []}
    with TemporaryDirectory(prefix="bench-snapshot-") as folder:
        settings = {"REGISTRY__SNAPSHOT_DIR": str(Path(folder) / "snapshot")}
        for _ in range(3):
            with fixtures.service("database", environment.large) as running:
                result["postgresql_s"].append(round(running.ready_after_s, 2))
                result["postgresql_load_s"].append(running.load_s())
        with fixtures.service("writer", environment.large, **settings) as running:
            while "authbackend_registry_on_disk 1.0" not in running.metrics():
                time.sleep(0.1)
        environment.server.stop()
        try:
            for _ in range(3):
                with fixtures.service("disk", environment.large, **settings) as running:
                    result["disk_s"].append(round(running.ready_after_s, 2))
        finally:
            environment.server.start()
    environment.say(f"loading: {result}")
    return result


def changes(environment: Environment) -> dict[str, Any]:
    """Measure from a commit until the last worker of two replicas uses it in decisions, under load."""
    extent = environment.extent
    forms = load_client.publishes(extent.devices)
    with (
        fixtures.service("north", environment.large, 2) as north,
        fixtures.service("south", environment.large, 2) as south,
    ):
        with _load((north, south), forms, environment.capacity * THIRD / 2):
            single = uvloop.run(Watcher(environment.large, (north, south)).changes(extent.changes, environment.say))
            mass = uvloop.run(Watcher(environment.large, (north, south)).mass(extent.mass, environment.say))
        stalls = [_stalls(running.metrics()) for running in (north, south)]
        with _load((north, south), forms, None):
            busy = sorted(
                uvloop.run(Watcher(environment.large, (north, south)).changes(extent.changes, environment.say))
            )
    ordered = sorted(single)
    return {
        "milliseconds": [round(1000 * took, 2) for took in single],
        "p50_ms": round(1000 * ordered[len(ordered) // 2], 2),
        "p99_ms": round(1000 * ordered[int(0.99 * len(ordered))], 2),
        "mass": mass,
        "longest_stall_at_most_s": max(stalls),
        "busy_ms": {
            name: round(1000 * busy[int(share * (len(busy) - 1))], 2)
            for name, share in (("p50", 0.5), ("p99", 0.99), ("longest", 1.0))
        },
    }


@contextmanager
def _load(replicas: tuple[Running, ...], forms: list[str], rate: float | None) -> Iterator[None]:
    """
    Send requests to replicas for the duration of the block, from one process for each.

    Args:
        rate: Requests per second to each, from processes with low priority; None: without a pause and with normal
            priority, so that all cores are busy.
    """
    over = _SPAWN.Event()
    if rate is None:
        clients = [_SPAWN.Process(target=_send_without_pause, args=(each.port, forms, over)) for each in replicas]
    else:
        clients = [_SPAWN.Process(target=_send_at_rate, args=(each.port, forms, rate, over)) for each in replicas]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        over.set()
        for client in clients:
            client.join()


def _send_at_rate(port: int, forms: list[str], rate: float, over: Any) -> None:
    os.nice(_CLIENT_NICE)
    while not over.is_set():
        load_client.latencies(port, forms, rate, 1.0)


def _send_without_pause(port: int, forms: list[str], over: Any) -> None:
    requests = [load_client.http_post("/auth/topic", form) for form in forms]
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for request in itertools.cycle(requests):
            connection.sendall(request)
            connection.recv(65536)
            if over.is_set():
                return


def _stalls(metrics: str) -> float:
    """Return the upper bound of the bucket with the longest stall."""
    bounds = []
    before = 0.0
    for line in metrics.splitlines():
        if line.startswith("authbackend_event_loop_stall_seconds_bucket"):
            bound = float(line.split('le="')[1].split('"')[0])
            count = float(line.rpartition(" ")[2])
            if count > before:
                bounds.append(bound)
            before = count
    return max(bounds, default=0.0)


def overload(environment: Environment) -> dict[str, Any]:
    """Measure the latency of other devices while revoked ones keep retrying, at a third of the capacity."""
    extent = environment.extent
    good = load_client.publishes(extent.devices)
    revoked = [f"username=gone{n:05d}&client_id=gone{n:05d}" for n in range(10_000)]
    uvloop.run(_revoke(environment.large, len(revoked)))
    rate = environment.capacity * THIRD
    shed = 0
    with fixtures.service("one", environment.large) as running:

        def quiet() -> float:
            return 1000 * load_client.latencies(running.port, good, rate / 4, extent.seconds).quantile(0.99)

        def attacked() -> float:
            nonlocal shed
            # In a separate process: in this one, requests of the other devices would wait in the client.
            attack = _SPAWN.Process(target=_attack, args=(running.port, revoked, rate, extent.seconds + 2))
            attack.start()
            time.sleep(1.0)
            answers = load_client.latencies(running.port, good, rate / 4, extent.seconds)
            attack.join()
            if attack.exitcode:
                raise fixtures.BenchmarkError("overload: a revoked device was not denied")
            shed += sum(count for text, count in answers.texts.items() if text != b"200 allow")
            return 1000 * answers.quantile(0.99)

        p99_ms = alternating(environment, {"quiet": quiet, "attacked": attacked})
    return {"p99_ms": p99_ms, "attacked_to_quiet": ratio(p99_ms["attacked"], p99_ms["quiet"]), "good_not_allowed": shed}


def _attack(port: int, forms: list[str], rate: float, seconds: float) -> None:
    os.nice(_CLIENT_NICE)
    requests = [load_client.http_post("/auth/user", form) for form in forms]
    answers = uvloop.run(load_client.open_loop(port, requests, rate, seconds, 8))
    if set(answers.texts) != {b"200 deny"}:
        sys.exit(1)


async def _revoke(dsn: str, number: int) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        "insert into device (device_id, type, status) select 'gone' || lpad(n::text, 5, '0'), 'T20', 'revoked' from generate_series(0, $1 - 1) n on conflict (device_id) do nothing",
        number,
    )
    await connection.close()


def apply(environment: Environment) -> dict[str, Any]:
    """Apply a policy that changes the whole fleet while devices are revoked."""
    extent = environment.extent
    return applying.measure(
        environment.server, f"fleet_{extent.devices}", extent.devices, extent.applies, environment.say
    )


ALL: dict[str, Callable[[Environment], dict[str, Any]]] = {
    "throughput": throughput,
    "workers": workers,
    "sizes": sizes,
    "memory": memory,
    "loading": loading,
    "changes": changes,
    "overload": overload,
    "apply": apply,
}
