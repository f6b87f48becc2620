"""Builds each process of a replica from the settings; of the service, only this module knows every part."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry

from authbackend import __version__, metrics
from authbackend.api.server import application
from authbackend.backoff import Reachability
from authbackend.broker.bounded_server import BoundedServer, Bounds, accepting
from authbackend.broker.handlers import Handlers, Limits
from authbackend.broker.metrics import BrokerMetrics
from authbackend.broker.protocol import LONGEST_REQUEST_LINE_BYTES
from authbackend.broker.server import BrokerServer, listening
from authbackend.broker.tls import TLSFiles, watch
from authbackend.certificates.crl_endpoint import PublishedCrls, from_plain, to_plain
from authbackend.certificates.crl_publisher import CrlPublisher, WatchedAuthority
from authbackend.certificates.metrics import CertificateMetrics
from authbackend.enforcement.leader import Leader, LeaderSettings
from authbackend.enforcement.management_api import Access, ManagementAPI
from authbackend.enforcement.metrics import EnforcementMetrics
from authbackend.enforcement.sweep import SweepSettings
from authbackend.errors import ConfigurationError
from authbackend.logs import Sampler
from authbackend.metrics import ListenerMetrics
from authbackend.passwords import PasswordChecker
from authbackend.policy.decide import DecisionSettings
from authbackend.postgres.change_feed import ChangeFeed
from authbackend.postgres.enforcement import leading, open_store
from authbackend.postgres.replicas import Identity, PostgresReplicaTable
from authbackend.registry.announcer import ReplicaAnnouncer
from authbackend.registry.follower import FeedRead, RefreshResult, RegistryFollower, SyncTimes
from authbackend.registry.metrics import Present, RegistryMetrics, ReplicaMetrics
from authbackend.registry.store import Store
from authbackend.registry.writability import Writability
from authbackend.secrets import read_password
from authbackend.service.health import Health
from authbackend.service.health_listener import health_application
from authbackend.service.heartbeats import WorkerHeartbeats
from authbackend.service.replica import ReplicaResources, open_replica, target
from authbackend.service.shared_value import SharedValue
from authbackend.settings import TLS, Broker, Settings, host_and_port, is_loopback
from authbackend.settings import Health as HealthSettings

log = structlog.get_logger(__name__)

BEAT_S = 0.1
KEEPALIVE_S = 75.0
DRAIN_S = 2.0
CRL_POLL_S = 0.05


def broker_tls(broker: Broker) -> TLSFiles | None:
    """
    Return the TLS files of the listener for RabbitMQ, None for plain HTTP.

    Raises:
        ConfigurationError: Other hosts could reach the listener without mutual TLS, or the TLS files cannot be used.
    """
    _check_tls("broker", broker.tls)
    if not is_loopback(broker.listen) and not broker.insecure and broker.tls.client_ca_file is None:
        raise ConfigurationError(
            f"broker.listen {broker.listen} is reachable from other hosts, where anybody could send requests and guess passwords: "
            "set broker.tls.certificate_file, broker.tls.key_file and broker.tls.client_ca_file for mutual TLS, "
            "listen on 127.0.0.1, or accept the risk with broker.insecure = true"
        )
    return _tls_files("broker", broker.tls)


def health_tls(health: HealthSettings) -> TLSFiles | None:
    """
    Return the TLS files of the health listener, None for plain HTTP.

    Raises:
        ConfigurationError: The TLS files cannot be used.
    """
    _check_tls("health", health.tls)
    return _tls_files("health", health.tls)


def _check_tls(section: str, tls: TLS) -> None:
    name = f"{section}.tls"
    if (tls.certificate_file is None) != (tls.key_file is None):
        raise ConfigurationError(f"{name}.certificate_file and {name}.key_file go together: set both or none")
    if tls.client_ca_file is not None and tls.certificate_file is None:
        raise ConfigurationError(f"{name}.client_ca_file needs {name}.certificate_file and {name}.key_file")


def _tls_files(section: str, tls: TLS) -> TLSFiles | None:
    if tls.certificate_file is None or tls.key_file is None:
        return None
    return TLSFiles(section, tls.certificate_file, tls.key_file, tls.client_ca_file)


OnEnd = Callable[[str], object]


@contextlib.asynccontextmanager
async def run_follower(
    settings: Settings,
    resources: ReplicaResources,
    store: Store,
    on_end: OnEnd,
    collector_registry: CollectorRegistry | None = None,
) -> AsyncIterator[None]:
    """
    Follow the database and enforce, for the duration of the block: the follower process.

    Args:
        collector_registry: The metrics of this process.
        on_end: Called with the name of a background task that ended by itself, which should never happen.
    Raises:
        ConfigurationError: ``pki.authority_dir`` cannot be used.
    """
    collector_registry = collector_registry or CollectorRegistry()
    registry_metrics = RegistryMetrics(collector_registry, resources.replica_state.write)
    database = target(settings)
    reachability = Reachability()
    feed, announcer, copy = _registry_parts(settings, resources, store, registry_metrics, reachability)
    certificates, crls = resources.certificate_counts, resources.published_crls
    publisher = CrlPublisher(
        database,
        WatchedAuthority(settings.pki),
        settings.pki.crl_lifetime_s,
        reachability,
        lambda published: crls.write(to_plain(published)),
        lambda counts: certificates.write(counts.told()),
    )
    parts = [("registry", copy.run), ("announcer", announcer.run), ("crl", publisher.run)]
    if leader := _leader(settings, store, collector_registry, reachability):
        parts.append(("enforcement", leader.run))

    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(feed.close)
        stack.push_async_callback(announcer.leave)
        for name, run in parts:
            await stack.enter_async_context(_background(name, run(), on_end))
        yield


def _registry_parts(
    settings: Settings,
    resources: ReplicaResources,
    store: Store,
    registry_metrics: RegistryMetrics,
    reachability: Reachability,
) -> tuple[ChangeFeed, ReplicaAnnouncer, RegistryFollower]:
    database, identity, writability = target(settings), _identity(settings, resources), Writability()
    feed = ChangeFeed(database, settings.registry.change_retention_s, identity, registry_metrics.ignored, writability)
    announcer = ReplicaAnnouncer(
        PostgresReplicaTable(database, identity),
        registry_metrics,
        reachability,
        comes_back=resources.snapshot_folder is not None,
        writability=writability,
    )
    observers = _Observers(registry_metrics, announcer)
    copy = RegistryFollower(
        feed, store, observers, _sync_times(settings), resources.snapshot_folder, reachability, writability
    )
    return feed, announcer, copy


def _replica_status(store: Store, heartbeats: WorkerHeartbeats) -> Present:
    return Present(store.state(), store.sizes(), heartbeats.states(), heartbeats.restarts, store.memory_bytes())


@contextlib.asynccontextmanager
async def run_admin(
    settings: Settings, store: Store, sock: socket.socket, collector_registry: CollectorRegistry | None = None
) -> AsyncIterator[None]:
    """
    Serve the admin listener for the duration of the block: the admin process.

    Args:
        sock: The listening socket.
        collector_registry: The metrics of this process.
    """
    listener_metrics = metrics.admin_metrics(collector_registry or CollectorRegistry())
    app = application(
        store.reader(),
        DecisionSettings(mqtt_exchange=settings.broker.mqtt_exchange),
        loopback=is_loopback(settings.admin.listen),
    )
    bounds = Bounds(KEEPALIVE_S, settings.admin.request_timeout_s, settings.admin.max_connections)
    async with _application_listening(app, sock, bounds, listener_metrics):
        yield


@contextlib.asynccontextmanager
async def run_health(
    settings: Settings,
    resources: ReplicaResources,
    store: Store,
    sock: socket.socket,
    on_end: OnEnd,
    collector_registry: CollectorRegistry | None = None,
    reload: asyncio.Event | None = None,
) -> AsyncIterator[None]:
    """
    Serve health, CRLs and metrics for the duration of the block: the health process.

    Args:
        sock: The listening socket.
        collector_registry: The metrics of this process; those of others come from files.
        on_end: Called with the name of a background task that ended by itself, which should never happen.
        reload: Set it to reload the certificates immediately.
    Raises:
        ConfigurationError: The certificates cannot be used.
    """
    collector_registry = collector_registry or CollectorRegistry()
    heartbeats, tls = resources.heartbeats, health_tls(settings.health)
    replica = ReplicaMetrics(lambda: _replica_status(store, heartbeats), resources.replica_state.read)
    certificates = CertificateMetrics(resources.certificate_counts.read)
    crls = PublishedCrls()
    app = health_application(
        lambda: metrics.exposition(collector_registry, resources.metrics, replica, certificates),
        Health(store.reader(), resources.replica_state.read, heartbeats, settings.registry.max_staleness_s),
        crls,
    )
    bounds = Bounds(KEEPALIVE_S, settings.health.request_timeout_s, settings.health.max_connections)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(_background("crls", _take_over_crls(resources.published_crls, crls), on_end))
        if tls is not None:
            await stack.enter_async_context(_background("certificates", watch(tls, reload or asyncio.Event()), on_end))
        listener_metrics = metrics.health_metrics(collector_registry)
        await stack.enter_async_context(_application_listening(app, sock, bounds, listener_metrics, tls))
        yield


async def _take_over_crls(shared_value: SharedValue, crls: PublishedCrls) -> None:
    """Serve each new set of CRLs that the follower process publishes."""
    served = None
    while True:
        latest = shared_value.read()
        if latest is not None and latest is not served:
            served = latest
            crls.replace(from_plain(latest))
        await asyncio.sleep(CRL_POLL_S)


def _leader(
    settings: Settings, store: Store, collector_registry: CollectorRegistry, reachability: Reachability
) -> Leader | None:
    """
    Build the leader election, which enforces while this replica leads; None without clusters.

    Raises:
        ConfigurationError: A URL or a file cannot be used.
    """
    enforcement = settings.enforcement
    if not enforcement.clusters:
        return None
    database = target(settings)
    limit_s = float("inf") if enforcement.hold_until_done else enforcement.hold_limit_s
    clusters = clusters_of(settings)
    metrics = EnforcementMetrics(collector_registry)
    return Leader(
        lambda: leading(database, limit_s, list(clusters), metrics.lock_taken),
        lambda part: open_store(database, part),
        store,
        metrics,
        LeaderSettings(
            clusters,
            enforcement.kicks_per_second,
            DecisionSettings(mqtt_exchange=settings.broker.mqtt_exchange),
            SweepSettings(enforcement.sweep_interval_s, frozenset(enforcement.sweep_closes)),
        ),
        reachability,
    )


def clusters_of(settings: Settings) -> dict[str, Callable[[], ManagementAPI]]:
    """
    Return the clusters to enforce on, by name, each with a function that creates a client with its own connections.

    Raises:
        ConfigurationError: A URL or a file cannot be used, or two clusters have the same name.
    """
    enforcement = settings.enforcement
    ca_file = None if enforcement.ca_file is None else str(enforcement.ca_file)

    def credentials() -> tuple[str, str]:
        return enforcement.username, read_password(enforcement)

    def client_factory(urls: str) -> Callable[[], ManagementAPI]:
        return lambda: ManagementAPI(Access(tuple(urls.split()), credentials, ca_file, enforcement.timeout_s))

    read_password(enforcement)
    clients: dict[str, Callable[[], ManagementAPI]] = {}
    for urls in enforcement.clusters:
        name = client_factory(urls)().name
        if name in clients:
            raise ConfigurationError(
                f"enforcement.clusters: two clusters begin with {name}, and a cluster is named after its first host; "
                "put another node first in one of them"
            )
        clients[name] = client_factory(urls)
    return clients


class _Observers:
    """Passes the follower's events on to metrics and announcer."""

    def __init__(self, registry_metrics: RegistryMetrics, announcer: ReplicaAnnouncer) -> None:
        self._announcer = announcer
        self._metrics = registry_metrics
        self.refresh_failed = registry_metrics.refresh_failed
        self.compared = registry_metrics.compared
        self.served_changes_gone = registry_metrics.served_changes_gone

    def refreshed(self, feed_read: FeedRead, refreshed: RefreshResult, *, lasting: bool) -> None:
        self._metrics.refreshed(feed_read, refreshed, lasting=lasting)
        if lasting:
            self._announcer.serves(feed_read)


def _sync_times(settings: Settings) -> SyncTimes:
    registry = settings.registry
    return SyncTimes(registry.poll_interval_s, registry.compare_interval_s, registry.prune_interval_s)


def _identity(settings: Settings, resources: ReplicaResources) -> Identity:
    return Identity(
        boot=resources.boot,
        name=settings.replica.name or socket.gethostname(),
        program_version=__version__,
        workers=settings.replica.workers,
        longest_staleness_s=settings.registry.max_staleness_s,
    )


@contextlib.asynccontextmanager
async def run_worker(
    settings: Settings,
    resources: ReplicaResources,
    store: Store,
    worker: int,
    port: int,
    on_end: OnEnd,
    collector_registry: CollectorRegistry | None = None,
    reload: asyncio.Event | None = None,
) -> AsyncIterator[int]:
    """
    Answer RabbitMQ for the duration of the block and yield the port: a worker process.

    Args:
        reload: Set it to reload the certificates immediately.
    Raises:
        ConfigurationError: The address or the certificates cannot be used.
    """
    tls = broker_tls(settings.broker)
    broker_metrics = BrokerMetrics(collector_registry or CollectorRegistry())
    broker = settings.broker
    passwords = _password_checker(settings, broker_metrics)
    server = _broker_server(settings, resources, store, broker_metrics, passwords)
    host, _ = host_and_port(broker.listen)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(passwords.close)
        if tls is not None:
            await stack.enter_async_context(_background("certificates", watch(tls, reload or asyncio.Event()), on_end))
        port = await stack.enter_async_context(
            listening(
                server,
                host,
                port,
                tls=tls,
                backlog=broker.backlog,
                shared=resources.shared,
                drain_s=settings.replica.drain_timeout_s / 2,
            )
        )
        await stack.enter_async_context(
            _background("beat", _beat(resources.heartbeats, worker, broker_metrics), on_end)
        )
        yield port


def _broker_server(
    settings: Settings,
    resources: ReplicaResources,
    store: Store,
    broker_metrics: BrokerMetrics,
    passwords: PasswordChecker,
) -> BrokerServer:
    broker = settings.broker
    health = Health(
        store.reader(), resources.replica_state.read, resources.heartbeats, settings.registry.max_staleness_s
    )
    handlers = Handlers(
        store.reader(),
        passwords,
        broker_metrics,
        Sampler(settings.log.denials_per_device, settings.log.denials),
        DecisionSettings(mqtt_exchange=broker.mqtt_exchange),
        Limits(broker.request_timeout_s, settings.registry.max_staleness_s),
        deny_reasons=broker.deny_reasons,
    )
    return BrokerServer(
        handlers,
        {"/health/live": health.live, "/health/ready": health.ready},
        broker_metrics,
        Bounds(
            broker.keepalive_timeout_s,
            broker.request_timeout_s,
            broker.max_connections,
            line_bytes=LONGEST_REQUEST_LINE_BYTES,
        ),
    )


async def _beat(heartbeats: WorkerHeartbeats, worker: int, broker_metrics: BrokerMetrics) -> None:
    """Record that the worker serves, and measure how late its event loop is."""
    process_id = os.getpid()
    while True:
        heartbeats.beat(worker, process_id)
        due = time.monotonic() + BEAT_S
        await asyncio.sleep(BEAT_S)
        broker_metrics.stalls.observe(max(0.0, time.monotonic() - due))


class _PasswordMetrics:
    def __init__(self, broker_metrics: BrokerMetrics) -> None:
        self._metrics = broker_metrics

    def checked(self, result: str) -> None:
        self._metrics.password_checks.labels(result).inc()

    def running(self, number: int) -> None:
        self._metrics.passwords_running.set(number)


def _password_checker(settings: Settings, broker_metrics: BrokerMetrics) -> PasswordChecker:
    accounts = settings.accounts
    return PasswordChecker(
        _PasswordMetrics(broker_metrics),
        threads=accounts.hashing_threads,
        queue=accounts.hashing_queue,
        reserved=accounts.reserved,
        remember_s=accounts.remember_s,
        remember_most=accounts.remember_most,
    )


@contextlib.asynccontextmanager
async def service(settings: Settings, folder: Path, on_end: OnEnd = log.error) -> AsyncIterator[dict[str, str]]:
    """
    Run everything in this process, with one worker, for the duration of the block; yield the URLs ``broker``, ``admin`` and ``health``.

    It listens immediately and answers 503 until the registry is loaded. For tests; ``supervisor.serve`` runs the
    processes of a replica from the same parts.

    Args:
        folder: An empty folder on a file system in memory.
    Raises:
        ConfigurationError: A setting cannot be used.
    """
    _, port = host_and_port(settings.broker.listen)
    with open_replica(settings, folder, shared=False) as resources, contextlib.closing(Store(folder)) as store:
        admin = listening_socket("admin.listen", settings.admin.listen)
        health = listening_socket("health.listen", settings.health.listen)
        collector_registry = CollectorRegistry()
        async with (
            run_follower(settings, resources, store, on_end, collector_registry),
            run_admin(settings, store, admin, collector_registry),
            run_health(settings, resources, store, health, on_end, collector_registry),
            run_worker(settings, resources, store, 0, port, on_end, collector_registry) as bound_port,
        ):
            service_urls = urls(settings, bound_port, admin, health)
            log.info("service.listening", **service_urls)
            yield service_urls
            log.info("service.stopping")


def urls(settings: Settings, port: int, admin: socket.socket, health: socket.socket) -> dict[str, str]:
    """Return the URLs of the listeners for RabbitMQ (at ``port``), admin and health."""
    return {
        "broker": _url(settings.broker.listen, port, settings.broker.tls),
        "admin": _url(settings.admin.listen, admin.getsockname()[1]),
        "health": _url(settings.health.listen, health.getsockname()[1], settings.health.tls),
    }


def _url(listen: str, port: int, tls: TLS | None = None) -> str:
    host, _ = host_and_port(listen)
    scheme = "https" if tls is not None and tls.certificate_file else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def listening_socket(setting: str, listen: str) -> socket.socket:
    """
    Open a socket and listen on it.

    Raises:
        ConfigurationError: The address cannot be listened on.
    """
    sock = bound_socket(setting, listen)
    sock.listen(128)
    return sock


def bound_socket(setting: str, listen: str, port: int | None = None, *, shared: bool = False) -> socket.socket:
    """
    Open a socket and bind it, without listening.

    Raises:
        ConfigurationError: The address cannot be bound.
    """
    host, configured_port = host_and_port(listen)
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host or None, configured_port if port is None else port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
    except OSError as error:
        raise ConfigurationError(f"{setting}: cannot listen on {listen}: {error.strerror}") from error
    return sock


@contextlib.asynccontextmanager
async def _application_listening(
    app: web.Application,
    sock: socket.socket,
    bounds: Bounds,
    listener_metrics: ListenerMetrics,
    tls: TLSFiles | None = None,
) -> AsyncIterator[None]:
    runner = web.AppRunner(app)
    await runner.setup()
    web_server = runner.server
    assert web_server is not None
    server = BoundedServer(
        web_server.request_handler, bounds, listener_metrics, request_factory=web_server.request_factory
    )
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(accepting(server, DRAIN_S, sock=sock, tls=tls.context if tls else None))
        stack.push_async_callback(runner.cleanup)  # runs before the server stops, to answer clients that wait for a CRL
        yield


@contextlib.asynccontextmanager
async def _background(name: str, coroutine: Coroutine[Any, Any, None], on_end: OnEnd) -> AsyncIterator[None]:
    task = asyncio.create_task(coroutine, name=name)
    task.add_done_callback(lambda ended: None if ended.cancelled() else on_end(name))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
