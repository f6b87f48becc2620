"""What is measured, each against its reference in turn, in one run."""

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
_CLIENTS_GIVE_WAY = 10
"""A client that makes thousands of requests a second costs more CPU than answering them does, and is not measured."""
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Extent:
    """How much is done: rounds, seconds of each, and the size of the large fleet."""

    rounds: int = 10
    seconds: float = 2.0
    devices: int = LARGE
    changes: int = 500
    mass: int = 100_000
    applies: int = 5


QUICK = Extent(rounds=2, seconds=1.0, devices=20_000, changes=20, mass=2000, applies=2)


@dataclass
class Stage:
    """What all measurements share."""

    extent: Extent
    server: Server
    large: str
    small: str
    say: Say
    capacity: float = 0.0
    """Requests a second of one process, once it is measured."""


@contextmanager
def staged(extent: Extent, say: Say) -> Iterator[Stage]:
    """Run PostgreSQL with a small and a large fleet for the time of the block."""
    with fixtures.postgres() as server:
        say(f"registering {SMALL} and {extent.devices} devices")
        small = fixtures.registry(server, SMALL)
        large = small if extent.devices == SMALL else fixtures.registry(server, extent.devices)
        yield Stage(extent, server, large, small, say)


def alternating(stage: Stage, what: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Measure each in turn, round after round, after one round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in what}
    for number in range(stage.extent.rounds + 1):
        for name, measure in what.items():
            value = measure()
            if number:
                found[name].append(round(value, 6))
        if number:
            stage.say(f"round {number}: " + ", ".join(f"{name} {found[name][-1]:g}" for name in what))
    return found


def ratio(one: list[float], other: list[float]) -> dict[str, float]:
    """Return the median of the rounds' ratios, the lowest and the highest."""
    each = [a / b for a, b in zip(one, other, strict=True)]
    return {"median": round(statistics.median(each), 3), "lowest": round(min(each), 3), "highest": round(max(each), 3)}


def throughput(stage: Stage) -> dict[str, Any]:
    """One process against a bare aiohttp handler and Django under gunicorn."""
    forms = load_client.publishes(stage.extent.devices, 20_000)
    with ExitStack() as stack:
        ours = stack.enter_context(fixtures.service("one", stage.large))
        bare = stack.enter_context(fixtures.bare())
        gunicorns = {kind: stack.enter_context(fixtures.django(kind)) for kind in ("sync", "gthread")}
        seconds = stage.extent.seconds

        def django(running: Running) -> Callable[[], float]:
            return lambda: load_client.throughput(running.port, forms, seconds, method="GET")

        found = alternating(
            stage,
            {
                "authbackend": lambda: load_client.throughput(ours.port, forms, seconds),
                "aiohttp": lambda: load_client.throughput(bare.port, forms, seconds),
                **{f"django {kind}": django(running) for kind, running in gunicorns.items()},
            },
        )
    faster = max(("django sync", "django gthread"), key=lambda name: statistics.median(found[name]))
    stage.capacity = statistics.median(found["authbackend"])
    return {
        "requests_per_s": found,
        "to_aiohttp": ratio(found["authbackend"], found["aiohttp"]),
        "to_django": ratio(found["authbackend"], found[faster]),
        "faster_django": faster,
    }


def workers(stage: Stage) -> dict[str, Any]:
    """Two workers against one."""
    forms = load_client.publishes(stage.extent.devices, 20_000)
    with fixtures.service("one", stage.large) as one, fixtures.service("two", stage.large, 2) as two:
        found = alternating(
            stage,
            {
                "1 worker": lambda: load_client.throughput(one.port, forms, stage.extent.seconds, connections=64),
                "2 workers": lambda: load_client.throughput(two.port, forms, stage.extent.seconds, connections=64),
            },
        )
    return {"requests_per_s": found, "two_to_one": ratio(found["2 workers"], found["1 worker"])}


def sizes(stage: Stage) -> dict[str, Any]:
    """The fleet's size, the number of rules, and the size of what is asked."""
    extent = stage.extent
    rate = stage.capacity * THIRD
    with fixtures.service("small", stage.small) as small, fixtures.service("large", stage.large) as large:
        forms = {"small": load_client.publishes(SMALL), "large": load_client.publishes(extent.devices)}

        def p99(running: Running, which: str) -> Callable[[], float]:
            return lambda: 1000 * load_client.latencies(running.port, forms[which], rate, extent.seconds).quantile(0.99)

        stage.say(f"p99 at {rate:.0f} requests a second")
        fleet = alternating(stage, {"small": p99(small, "small"), "large": p99(large, "large")})
        five = load_client.publishes(extent.devices, kind="T5")
        many = load_client.publishes(extent.devices, kind="T500")
        rules = alternating(
            stage,
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


def memory(stage: Stage) -> dict[str, Any]:
    """Bytes per device: all processes of a replica together, shared pages counted once."""
    found: dict[str, Any] = {}
    for name, dsn in (("small", stage.small), ("large", stage.large)):
        for number in (1, 2, 4):
            with fixtures.service(name, dsn, number) as running:
                load_client.throughput(
                    running.port, load_client.publishes(SMALL if name == "small" else stage.extent.devices), 1
                )
                found[f"{name}, {number} workers"] = sum(running.memory_bytes().values())
    grown = stage.extent.devices - SMALL
    for number in (1, 2, 4):
        growth = found[f"large, {number} workers"] - found[f"small, {number} workers"]
        found[f"bytes_per_device, {number} workers"] = round(growth / grown, 1)
    stage.say(f"memory: {found}")
    return found


def loading(stage: Stage) -> dict[str, Any]:
    """From the start of the process until it is ready: from PostgreSQL, and from disk while PostgreSQL is away."""
    found: dict[str, list[float]] = {"postgresql_s": [], "postgresql_load_s": [], "disk_s": []}
    with TemporaryDirectory(prefix="bench-snapshot-") as folder:
        settings = {"REGISTRY__SNAPSHOT_DIR": str(Path(folder) / "snapshot")}
        for _ in range(3):
            with fixtures.service("database", stage.large) as running:
                found["postgresql_s"].append(round(running.ready_after_s, 2))
                found["postgresql_load_s"].append(running.load_s())
        with fixtures.service("writer", stage.large, **settings) as running:
            while "authbackend_registry_on_disk 1.0" not in running.metrics():
                time.sleep(0.1)
        stage.server.stop()
        try:
            for _ in range(3):
                with fixtures.service("disk", stage.large, **settings) as running:
                    found["disk_s"].append(round(running.ready_after_s, 2))
        finally:
            stage.server.start()
    stage.say(f"loading: {found}")
    return found


def changes(stage: Stage) -> dict[str, Any]:
    """From a commit until the last worker of two replicas decides by it, under load."""
    extent = stage.extent
    forms = load_client.publishes(extent.devices)
    with fixtures.service("north", stage.large, 2) as north, fixtures.service("south", stage.large, 2) as south:
        with _load((north, south), forms, stage.capacity * THIRD / 2):
            single = uvloop.run(Watcher(stage.large, (north, south)).changes(extent.changes, stage.say))
            mass = uvloop.run(Watcher(stage.large, (north, south)).mass(extent.mass, stage.say))
        stalls = [_stalls(running.metrics()) for running in (north, south)]
        with _load((north, south), forms, None):
            busy = sorted(uvloop.run(Watcher(stage.large, (north, south)).changes(extent.changes, stage.say)))
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
    Ask replicas all the time, from a process for each.

    Args:
        rate: Of each, from processes that give way to what is measured; None: without a pause, giving way to nobody, so
            that all cores are busy.
    """
    over = _SPAWN.Event()
    if rate is None:
        askers = [_SPAWN.Process(target=_ask_without_pause, args=(each.port, forms, over)) for each in replicas]
    else:
        askers = [_SPAWN.Process(target=_ask_on, args=(each.port, forms, rate, over)) for each in replicas]
    for asker in askers:
        asker.start()
    try:
        yield
    finally:
        over.set()
        for asker in askers:
            asker.join()


def _ask_on(port: int, forms: list[str], rate: float, over: Any) -> None:
    os.nice(_CLIENTS_GIVE_WAY)
    while not over.is_set():
        load_client.latencies(port, forms, rate, 1.0)


def _ask_without_pause(port: int, forms: list[str], over: Any) -> None:
    requests = [load_client.http_post("/auth/topic", form) for form in forms]
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for request in itertools.cycle(requests):
            connection.sendall(request)
            connection.recv(65536)
            if over.is_set():
                return


def _stalls(metrics: str) -> float:
    """Return the upper bound of the longest stall that was seen."""
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


def overload(stage: Stage) -> dict[str, Any]:
    """Revoked devices try again and again, at a third of the capacity; what the others notice."""
    extent = stage.extent
    good = load_client.publishes(extent.devices)
    revoked = [f"username=gone{n:05d}&client_id=gone{n:05d}" for n in range(10_000)]
    uvloop.run(_revoke(stage.large, len(revoked)))
    rate = stage.capacity * THIRD
    shed = 0
    with fixtures.service("one", stage.large) as running:

        def quiet() -> float:
            return 1000 * load_client.latencies(running.port, good, rate / 4, extent.seconds).quantile(0.99)

        def attacked() -> float:
            nonlocal shed
            # In a process of its own: in this one, the good devices' questions would wait for it in the client.
            attack = _SPAWN.Process(target=_attack, args=(running.port, revoked, rate, extent.seconds + 2))
            attack.start()
            time.sleep(1.0)
            answers = load_client.latencies(running.port, good, rate / 4, extent.seconds)
            attack.join()
            if attack.exitcode:
                raise fixtures.BenchmarkError("a revoked device was not denied")
            shed += sum(count for text, count in answers.texts.items() if text != b"200 allow")
            return 1000 * answers.quantile(0.99)

        found = alternating(stage, {"quiet": quiet, "attacked": attacked})
    return {"p99_ms": found, "attacked_to_quiet": ratio(found["attacked"], found["quiet"]), "good_not_allowed": shed}


def _attack(port: int, forms: list[str], rate: float, seconds: float) -> None:
    os.nice(_CLIENTS_GIVE_WAY)
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


def apply(stage: Stage) -> dict[str, Any]:
    """A policy of the whole fleet is applied while devices are revoked."""
    extent = stage.extent
    return applying.measure(stage.server, f"fleet_{extent.devices}", extent.devices, extent.applies, stage.say)


ALL: dict[str, Callable[[Stage], dict[str, Any]]] = {
    "throughput": throughput,
    "workers": workers,
    "sizes": sizes,
    "memory": memory,
    "loading": loading,
    "changes": changes,
    "overload": overload,
    "apply": apply,
}
