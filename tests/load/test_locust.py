"""A distributed Locust run: a headless master and two workers, each with its own devices."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess
import sys
from pathlib import Path

from tests.load.broker import FakeBroker

LOCUSTFILE = Path(__file__).resolve().parents[2] / "authbackend_load/locustfile.py"


def _free_port() -> int:
    """Return a free port outside the range of ephemeral ports, so that no process takes it before Locust starts."""
    while True:
        port = random.randrange(10_000, 25_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def test_a_master_and_two_workers_share_the_devices(directory: Path, tmp_path: Path) -> None:
    """Ten active devices, five for each worker; no certificate is used twice, and revoked ones are never used."""
    locust = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE)]
    port = str(_free_port())
    with FakeBroker(directory) as broker:
        options = ["--host", "localhost", "--mqtt-port", str(broker.port), "--certificates", str(directory)]
        fleet = ["--users", "10", "--spawn-rate", "10", "--run-time", "5s", "--interval", "1"]
        ends = ["--headless", "--expect-workers", "2", "--only-summary", "--json", "--exit-code-on-error", "1"]
        workers = [
            subprocess.Popen(
                [*locust, "--worker", "--master-port", port], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            for _ in range(2)
        ]
        try:
            bind = ["--master", "--master-bind-host", "127.0.0.1", "--master-bind-port", port]
            done = subprocess.run(
                [*locust, *bind, *options, *fleet, *ends], cwd=tmp_path, capture_output=True, text=True, timeout=120
            )
            outputs = [worker.communicate(timeout=60)[0].decode() for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
    assert done.returncode == 0, (done.stdout, done.stderr, outputs)
    assert broker.names == {f"APM{number:06d}": 1 for number in range(1, 11)}
    figures = {row["name"]: row for row in json.loads(done.stdout)}
    assert {name: figures[name]["num_requests"] for name in ("handshake", "connack", "suback")} == dict.fromkeys(
        ("handshake", "connack", "suback"), 10
    )
    assert 10 < figures["puback"]["num_requests"] <= 60
    assert broker.received["disconnect"] == 10
