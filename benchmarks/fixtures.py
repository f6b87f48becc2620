"""Starts what is measured: a real PostgreSQL with fleets of several sizes, the service, and its references."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from authbackend.postgres import migrate
from authbackend.postgres.connection import Target
from benchmarks.storm.processes import descendants
from tests.support.postgres import Server

REPOSITORY = Path(__file__).resolve().parents[1]
START_LIMIT_S = 180.0
RULES = {"T5": 5, "T20": 20, "T500": 500}
"""Number of rules by device type: three fifths allow publishing, a fifth allow subscribing, a fifth deny."""

SPECIAL = 1000
"""Number of devices of each type other than ``T20``, at the beginning of the fleet."""


class BenchmarkError(Exception):
    """The benchmark cannot continue; the message says why."""


def free_port() -> int:
    """Return a free port on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def type_of(number: int) -> str:
    """Return the type of a device by its number."""
    return {0: "T5", 1: "T500"}.get(number // SPECIAL, "T20")


def publish_levels(kind: str) -> list[str]:
    """Return the last levels that devices of a type may publish to."""
    return [f"s{n}" for n in range(RULES[kind] * 3 // 5)]


async def fill(dsn: str, devices: int) -> None:
    """Register a fleet: the types of :data:`RULES`, and devices with two attributes each."""
    connection = await asyncpg.connect(dsn)
    try:
        for kind, number in RULES.items():
            await connection.execute(
                "insert into device_type (name, client_ids, vhosts) values ($1, array['{device_id}', '{device_id}_*'], array['/'])",
                kind,
            )
            topics = [("allow", "publish", f"fleet/{{device_id}}/telemetry/{end}") for end in publish_levels(kind)]
            topics += [("allow", "subscribe", f"fleet/{{device_id}}/commands/c{n}") for n in range(number // 5)]
            topics += [("deny", "publish", f"fleet/+/secret/x{n}/#") for n in range(number - len(topics))]
            await connection.executemany(
                "insert into topic_rule (device_type, effect, action, topic) values ($1, $2, $3, $4)",
                [(kind, *topic) for topic in topics],
            )
        await connection.execute(
            "insert into device (device_id, type, attributes) select 'd' || lpad(n::text, 7, '0'), "
            "case n / $2 when 0 then 'T5' when 1 then 'T500' else 'T20' end, jsonb_build_object('site', 'kiel-' || n % 50, 'line', n % 9 || 'a') "
            "from generate_series(0, $1 - 1) n",
            devices,
            SPECIAL,
            timeout=600,
        )
        await connection.execute("analyze")
    finally:
        await connection.close()


@contextlib.contextmanager
def postgres() -> Iterator[Server]:
    """Run a PostgreSQL server for the duration of the block."""
    server = Server(settings={"shared_buffers": "512MB", "max_wal_size": "8GB", "fsync": "on"})
    try:
        server.create()
        server.start()
        yield server
    finally:
        server.remove()


def registry(server: Server, devices: int) -> str:
    """Create a database with a fleet and return its connection URI."""
    name = f"fleet_{devices}"
    server.psql("postgres", f"create database {name}")
    dsn = str(server.dsn(name))

    async def make() -> None:
        await migrate.migrate(Target(dsn))
        await fill(dsn, devices)

    asyncio.run(make())
    server.psql(name, "insert into brake (devices) values (1000000000)")
    return dsn


@dataclass
class Running:
    """A running server process."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    health: int = 0
    ready_after_s: float = 0.0

    def memory_bytes(self) -> dict[str, int]:
        """Return the proportional set size (PSS) of each process; shared pages are divided among their users."""
        sizes = {}
        for pid in (self.process.pid, *descendants(self.process.pid)):
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                sizes[str(pid)] = 1024 * int(text.partition("\nPss:")[2].split()[0])
        return sizes

    def load_s(self) -> float:
        """Return how long the load from the database took, according to the log."""
        limit = time.monotonic() + 10
        while time.monotonic() < limit:
            for line in self.log.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    if entry.get("event") == "registry.loaded":
                        return float(entry["duration_s"])
            time.sleep(0.05)
        raise BenchmarkError(f"{self.name} has not logged registry.loaded within 10 s")

    def metrics(self) -> str:
        """Return the service's metrics in Prometheus' text format."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.health}/metrics", timeout=30) as response:
            return str(response.read().decode())


@contextlib.contextmanager
def process(name: str, command: list[str], port: int, environment: dict[str, str] | None = None) -> Iterator[Running]:
    """Run a server for the duration of the block; yield once it accepts connections. Its output goes to a file."""
    log = Path(tempfile.mkstemp(prefix=f"bench-{name.replace(' ', '-')}-", suffix=".log")[1])
    started = time.monotonic()
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, cwd=REPOSITORY, env={**os.environ, **(environment or {})}, stdout=output, stderr=output
        )
    running = Running(name, port, child, log)
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if child.poll() is not None or time.monotonic() > started + START_LIMIT_S:
                raise BenchmarkError(f"{name} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.01)
        yield running
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        log.unlink(missing_ok=True)


@contextlib.contextmanager
def service(name: str, dsn: str, workers: int = 1, **settings: str) -> Iterator[Running]:
    """Run ``authbackend serve`` for the duration of the block; yield once it is ready."""
    port, health = free_port(), free_port()
    environment = {
        "AUTHBACKEND_DATABASE__DSN": dsn,
        "AUTHBACKEND_BROKER__LISTEN": f"127.0.0.1:{port}",
        "AUTHBACKEND_ADMIN__LISTEN": "127.0.0.1:0",
        "AUTHBACKEND_HEALTH__LISTEN": f"127.0.0.1:{health}",
        "AUTHBACKEND_REPLICA__WORKERS": str(workers),
        "AUTHBACKEND_REPLICA__NAME": name,
        "AUTHBACKEND_LOG__LEVEL": "info",
        **{f"AUTHBACKEND_{key}": value for key, value in settings.items()},
    }
    started = time.monotonic()
    with process(name, [sys.executable, "-m", "authbackend", "serve"], port, environment) as running:
        running.health = health
        _wait_ready(running, started)
        yield running


def _wait_ready(running: Running, started: float) -> None:
    while True:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{running.health}/health/ready", timeout=5),
        ):
            break
        if running.process.poll() is not None or time.monotonic() > started + START_LIMIT_S:
            raise BenchmarkError(f"{running.name} did not become ready:\n{running.log.read_text()[-2000:]}")
        time.sleep(0.01)
    running.ready_after_s = time.monotonic() - started


@contextlib.contextmanager
def bare() -> Iterator[Running]:
    """Run the bare aiohttp handler."""
    port = free_port()
    with process("aiohttp", [sys.executable, "-m", "benchmarks.references.bare", str(port)], port) as running:
        yield running


@contextlib.contextmanager
def django(kind: str) -> Iterator[Running]:
    """Run the Django views under one gunicorn worker: ``sync`` or ``gthread``."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "--bind",
        f"127.0.0.1:{port}",
        "--workers",
        "1",
        "--log-level",
        "error",
    ]
    command += ["--worker-class", kind, *(["--threads", "8", "--keep-alive", "150"] if kind == "gthread" else [])]
    with process(f"django {kind}", [*command, "benchmarks.references.django_allow:application"], port) as running:
        yield running
