"""Starts a real cluster of three nodes, PostgreSQL, two replicas that enforce, and devices that publish."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from authbackend_load import certificates
from authbackend_load.connection import Connection, ConnectionFailed
from authbackend_load.plan import read_identities
from authbackend_load.tls import TLS, make_context
from tests.broker.cluster import Cluster
from tests.broker.identities import Certificates
from tests.broker.mounts import remove_tree
from tests.broker.node import REPOSITORY
from tests.broker.processes import HarnessError
from tests.broker.service import Database, Service

PUBLISH_EVERY_S = 0.1
SENDER = "APM000001"
"""The device that may send commands to all others."""


@dataclass(frozen=True, slots=True)
class Options:
    """
    The sizes of a run.

    Attributes:
        revocations: Devices revoked one after the other.
        publishers: Devices that publish ten times a second; the revoked ones are among them.
        fleet: Devices with a certificate; nearly all of them connect for the mass revocation.
        registered: Devices in the registry.
        mass: Devices revoked in one statement.
        swept: Connections that a sweep checks.
        certificates: Certificates revoked one after the other.
        kicks_per_second: The setting ``enforcement.kicks_per_second``.
    """

    revocations: int = 300
    publishers: int = 200
    fleet: int = 1000
    registered: int = 100_000
    mass: int = 10_000
    swept: int = 20_000
    certificates: int = 20
    kicks_per_second: int = 100

    def as_dict(self) -> dict[str, Any]:
        """Return the options for JSON."""
        return asdict(self)


class Device:
    """A device that publishes ten times a second with QoS 1, and records when its last message was accepted."""

    def __init__(self, name: str, context: ssl.SSLContext, port: int) -> None:
        self.name = name
        self.port = port
        self._context = context
        self.connection: Connection | None = None
        self.accepted_at = 0.0
        self.lost_at = 0.0
        self._task: asyncio.Task[None] | None = None

    async def connect(self, *, clean: bool = True, client_id: str = "") -> Connection:
        """
        Log in.

        Raises:
            HarnessError: The broker refused it.
        """
        tls = TLS(self._context, "localhost")
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: Connection(tls, 5), "127.0.0.1", self.port)
        await connection.established
        expiry = 0 if clean else 3600
        code = await connection.connect(client_id or self.name, keep_alive_s=600, clean=clean, session_expiry_s=expiry)
        if code:
            raise HarnessError(f"{self.name} was refused: 0x{code:02x}")
        self.connection = connection
        return connection

    def publish_on(self) -> None:
        """Start publishing, until the connection is lost."""
        assert self.connection is not None
        self._task = asyncio.create_task(self._publishing(self.connection))

    async def _publishing(self, connection: Connection) -> None:
        due = time.monotonic()
        try:
            while True:
                await connection.publish(f"fleet/{self.name}/telemetry/speed", b"x" * 64, 1)
                self.accepted_at = time.monotonic()
                due = max(due + PUBLISH_EVERY_S, self.accepted_at)
                await asyncio.sleep(due - time.monotonic())
        except ConnectionFailed:
            self.lost_at = time.monotonic()


class Environment:
    """All parts; created by :func:`running_environment`."""

    def __init__(
        self, options: Options, workplace: Path, cluster: Cluster, database: Database, ca: Certificates
    ) -> None:
        self.options = options
        self.cluster = cluster
        self.database = database
        self.certificates = ca
        dsn = database.dsn_of()
        self.service = Service(workplace, ca, dsn, dsn)
        self.other = Service(workplace, ca, dsn, dsn, broker_port=8083, health_port=8084)
        for each in (self.service, self.other):
            each.enforce(cluster.management, sweep_interval_s="3600")
            each.configure(ENFORCEMENT__KICKS_PER_SECOND=str(options.kicks_per_second), LOG__LEVEL="warning")
        # The second replica answers over plain HTTP, so that the client can time its answers without TLS.
        self.other.configure(BROKER__TLS__CERTIFICATE_FILE="", BROKER__TLS__KEY_FILE="", BROKER__TLS__CLIENT_CA_FILE="")
        self.identities = read_identities(ca.directory)
        ports = [node.doors.mqtt_tls for node in cluster.nodes]
        self.devices = [
            Device(each.device_id, make_context(each.certificate_file, ca.ca_file), ports[n % 3])
            for n, each in enumerate(self.identities[: options.fleet])
        ]

    def prepare(self) -> None:
        """Fill the registry and start the replicas."""
        directory = self.certificates.directory
        self.service.command("migrate")
        self.database.sql("insert into brake (devices) values (1000000000)")
        self.service.command("policy", "apply", directory / "policy.yaml", "--devices", directory / "devices.csv")
        self.service.command("policy", "apply", accounts_file(directory))
        self.database.sql(
            "insert into topic_rule (device_type, effect, action, topic) values ('APM', 'allow', 'subscribe', 'fleet/{device_id}/telemetry/#');"
            f"insert into topic_rule (device_id, effect, action, topic) values ('{SENDER}', 'allow', 'publish', 'fleet/+/commands/#');"
            f"insert into device (device_id, type) select 'other' || n, 'APM' from generate_series(1, {self.options.registered - len(self.devices)}) n"
        )
        self.service.start()
        self.other.start()

    @property
    def leading(self) -> Service:
        """The replica that enforces."""
        return next(each for each in (self.service, self.other) if "enforcement_leading 1" in each.metrics())

    def separate(self) -> None:
        """
        Give whatever would run on other hosts (brokers, devices, PostgreSQL) less CPU time than the replicas.

        By the nice value of their sessions; each backend of PostgreSQL has its own. Source: sched(7), "The autogroup
        feature".
        """
        replicas = {os.getsid(each.pid) for each in (self.service, self.other)}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                if os.getsid(int(process.name)) not in replicas:
                    (process / "autogroup").write_text("19")

    def close(self) -> None:
        """Stop the replicas."""
        self.other.stop()
        self.service.stop()


def accounts_file(directory: Path) -> Path:
    """Write a policy file with the account for enforcement of the broker tests."""
    policy = yaml.safe_load((REPOSITORY / "tests/broker/policy.yaml").read_text())
    accounts = [account for account in policy["accounts"] if account["name"] == "enforcer"]
    file = directory / "enforcer.yaml"
    file.write_text(yaml.safe_dump({"schema": "authbackend/1", "accounts": accounts}))
    return file


@contextlib.contextmanager
def running_environment(options: Options) -> Iterator[Environment]:
    """
    Run all parts for the duration of the block.

    Raises:
        HarnessError: A part did not start.
    """
    workplace = Path(tempfile.mkdtemp(prefix="authbackend-revocation-"))
    workplace.chmod(0o755)
    try:
        bench = Certificates(workplace / "certs")
        ids = certificates.device_ids("APM", max(options.fleet, options.swept))
        processes = len(os.sched_getaffinity(0))
        certificates.make(bench.directory, ids, device_type="APM", processes=processes)
        root = Path(os.environ["AUTHBACKEND_TEST_RABBITMQ_ROOT"])
        cluster = Cluster(root, workplace, bench)
        database = Database()
        try:
            cluster.start()
            environment = Environment(options, workplace, cluster, database, bench)
            try:
                environment.prepare()
                yield environment
            finally:
                environment.close()
        finally:
            cluster.close()
            database.server.remove()
    finally:
        remove_tree(workplace)
