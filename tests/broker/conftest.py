"""
Fixtures: one broker, one database and one service for all tests, and clients for each test.

Each process is started once per session. A test that stops or changes one restores it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from .clients import Management, Mosquitto
from .fleet import EDITOR, Fleet
from .identities import Certificates, Identity, anonymous_context
from .mounts import remove_tree
from .mqtt import MQTTClient
from .node import LAX, RABBITMQ_FILES, REPOSITORY, Broker
from .service import Database, Service

HERE = Path(__file__).parent
ROOT = os.environ.get("AUTHBACKEND_TEST_RABBITMQ_ROOT", "")
PATIENCE_CONF = HERE / "overlay/patience.conf"
PLAIN_CONF = HERE / "overlay/plain.conf"
WEB_MQTT = RABBITMQ_FILES / "conf.d-optional/web-mqtt.conf"
STREAM_CONF = HERE / "overlay/stream.conf"
PLAIN_MQTT = RABBITMQ_FILES / "conf.d-optional/plain-mqtt.advanced.config"

_LOGS: dict[str, Path] = {}
_MARKS = pytest.StashKey[dict[str, int]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse to run these tests without the namespaces that tools/test-broker creates."""
    if ROOT:
        return
    skip = pytest.mark.skip(reason="needs a RabbitMQ: run tools/test-broker, as root")
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(skip)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Record the size of each log, so that only a failing test's part of it is shown."""
    item.stash[_MARKS] = {name: path.stat().st_size for name, path in _LOGS.items() if path.exists()}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Any:  # pluggy's wrapper: yields, gets the report, returns it
    """Add what the broker and the service logged during a failed test."""
    report = yield
    if report.failed and item.path.is_relative_to(HERE):
        for name, path in _LOGS.items():
            if path.exists():
                begin = item.stash.get(_MARKS, {}).get(name, 0)
                text = path.read_bytes()[begin:][-16_000:].decode(errors="replace")
                report.sections.append((f"{name} ({call.when})", text))
    return report


@pytest.fixture(scope="session")
def workplace() -> Iterator[Path]:
    """
    Create the directory for all files, kept if AUTHBACKEND_TEST_KEEP is set. PostgreSQL must be able to enter it.
    """
    directory = Path(tempfile.mkdtemp(prefix="authbackend-broker-"))
    directory.chmod(0o755)
    yield directory
    if not os.environ.get("AUTHBACKEND_TEST_KEEP"):
        remove_tree(directory)


@pytest.fixture(scope="session")
def certificates(workplace: Path) -> Certificates:
    """Both authorities, server certificates, and client certificates on demand."""
    return Certificates(workplace / "certs")


@pytest.fixture(scope="session")
def booting(workplace: Path, certificates: Certificates) -> Iterator[Callable[[str], Broker]]:
    """Start nodes by name; both can boot while other fixtures are set up."""
    with ThreadPoolExecutor(1) as pool:
        strict = _broker(workplace, certificates, "rabbit")
        future = pool.submit(strict.start)
        started: dict[str, Broker] = {"rabbit": strict}

        def get(name: str) -> Broker:
            future.result()
            if name not in started:
                lax = _broker(workplace, certificates, name)
                lax.start()
                started[name] = lax
            return started[name]

        yield get
        future.exception()
        for node in reversed(started.values()):
            node.close()


def _broker(workplace: Path, certificates: Certificates, name: str) -> Broker:
    state = workplace / name
    state.mkdir()
    node = Broker(Path(ROOT), state, certificates, name, overlays=[PATIENCE_CONF])
    if name == "lax":
        node.doors, node.advanced = LAX, PLAIN_MQTT
        node.overlays = [PATIENCE_CONF, PLAIN_CONF, WEB_MQTT, STREAM_CONF]
        node.plugins = ["rabbitmq_web_mqtt", "rabbitmq_stream"]
    node.prepare()
    if name == "lax":
        with (state / "etc/certs/ca.pem").open("ab") as trusted:
            trusted.write(certificates.rival.certificate_pem)
    _LOGS[f"RabbitMQ {name} log"], _LOGS[f"RabbitMQ {name} console"] = node.logs
    return node


@pytest.fixture(scope="session")
def broker(booting: Callable[[str], Broker]) -> Broker:
    """The node with the unchanged files of ``rabbitmq/``, except for a longer timeout."""
    return booting("rabbit")


@pytest.fixture(scope="session")
def lax_broker(booting: Callable[[str], Broker]) -> Broker:
    """
    The second node: plain MQTT, TLS without a required client certificate, MQTT over WebSocket, streams, and
    certificates of another authority as well. Started on demand.
    """
    return booting("lax")


@pytest.fixture(scope="session")
def policy_file() -> Path:
    """The content of the registry when the tests begin."""
    return HERE / "policy.yaml"


@pytest.fixture(scope="session")
def database(postgres_version: str) -> Iterator[Database]:
    """An empty PostgreSQL."""
    database = Database(postgres_version)
    yield database
    database.server.remove()


@pytest.fixture(scope="session")
def registry(workplace: Path, certificates: Certificates, database: Database, policy_file: Path) -> Service:
    """The database with its schema, the roles of sql/roles.sql and the policy file; no service is running yet."""
    service = make_service(workplace, certificates, database)
    service.command("migrate", dsn=database.dsn_of())
    database.sql("insert into brake (devices) values (1000000000)")  # only tests of the brake need it
    database.sql((REPOSITORY / "sql/roles.sql").read_text())
    for role in ("authbackend_service", EDITOR, "authbackend_reader"):
        database.sql(f"alter role {role} login")
    service.command("policy", "apply", policy_file)
    return service


def make_service(
    workplace: Path,
    certificates: Certificates,
    database: Database,
    *,
    broker_port: int = 8080,
    health_port: int = 8082,
) -> Service:
    """Return a service with the least privileges that suffice, not started."""
    dsns = (database.dsn_of("authbackend_service"), database.dsn_of(EDITOR))
    process = Service(workplace, certificates, *dsns, broker_port=broker_port, health_port=health_port)
    process.configure(BROKER__REQUEST_TIMEOUT_S="10")  # for busy machines; see overlay/patience.conf
    _LOGS[f"authbackend log {process.broker_port}"] = process.log
    return process


@pytest.fixture(scope="session")
def service(booting: Callable[[str], Broker], registry: Service) -> Iterator[Service]:
    """The running service, ready; the broker boots at the same time."""
    registry.start()
    yield registry
    registry.stop()


@pytest.fixture(scope="session")
def fleet(database: Database, service: Service) -> Fleet:
    """Unused devices, and changes of the registry."""
    fleet = Fleet(database, service)
    fleet.register()
    return fleet


@pytest.fixture
def device(certificates: Certificates) -> Callable[..., Identity]:
    """``device(common_name, **validity)`` makes a client certificate."""
    return certificates.device


@pytest_asyncio.fixture
async def mqtt(
    broker: Broker, service: Service, certificates: Certificates
) -> AsyncIterator[Callable[..., MQTTClient]]:
    """
    ``mqtt(identity, client_id=..., **options)`` makes a client, not yet connected; it is closed after the test.

    ``identity`` is an Identity, the common name for a new one, or None for TLS without a certificate.
    ``plain=True`` means plain TCP. ``port`` defaults to the strict node's TLS listener, the client id to the common name.
    """
    clients: list[MQTTClient] = []

    def make(identity: Identity | str | None, *, plain: bool = False, **options: Any) -> MQTTClient:
        if isinstance(identity, str):
            identity = certificates.device(identity)
        options.setdefault("client_id", "" if identity is None else identity.name)
        options.setdefault("port", broker.doors.mqtt_tls)
        tls = anonymous_context(certificates.ca_file) if identity is None else identity.context()
        client = MQTTClient(None if plain else tls, **options)
        clients.append(client)
        return client

    yield make
    for client in clients:
        await client.close()


@pytest_asyncio.fixture
async def management(
    broker: Broker, service: Service, certificates: Certificates
) -> AsyncIterator[Callable[..., Management]]:
    """
    ``async with management("monitoring", "password") as api: status, body = await api.get("overview")``.
    """

    def make(username: str, password: str, *, port: int = broker.doors.management_tls) -> Management:
        return Management(str(certificates.ca_file), port=port, username=username, password=password)

    yield make


@pytest.fixture
def mosquitto(broker: Broker, service: Service, certificates: Certificates) -> Callable[[str], Mosquitto]:
    """``mosquitto("APM0001")`` runs mosquitto_pub and mosquitto_sub with a certificate of that name."""
    return lambda name: Mosquitto(certificates.device(name), broker.doors.mqtt_tls)
