"""Builds the service from its settings, starts it and stops it: the only place that knows every part."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import structlog
from aiohttp import web

from authbackend.admin.health import Health
from authbackend.admin.listener import application
from authbackend.broker.endpoints import Endpoints
from authbackend.broker.listener import BrokerServer, TLSFiles, listening, watch
from authbackend.broker.passwords import PasswordChecker
from authbackend.errors import ConfigurationError, Unavailable
from authbackend.logs import Sampler
from authbackend.metrics import Metrics
from authbackend.policy.decide import Rules
from authbackend.postgres.connection import Target
from authbackend.postgres.feed import ChangeFeed
from authbackend.registry.sync import RegistryCopy, SyncTimes
from authbackend.settings import TLS, Broker, Settings, host_and_port, is_loopback, read_dsn

log = structlog.get_logger(__name__)


def target(settings: Settings, application_name: str = "authbackend") -> Target:
    """
    Return where the database is.

    Raises:
        ConfigurationError: No connection URI is set.
    """
    database = settings.database
    return Target(read_dsn(database), database.connect_timeout_s, database.statement_timeout_s, application_name)


def broker_tls(broker: Broker) -> TLSFiles | None:
    """
    Return the certificates of the broker's listener, None for plain HTTP.

    Raises:
        ConfigurationError: The listener could be reached from elsewhere without mutual TLS, or the files do not fit.
    """
    tls = broker.tls
    if (tls.certificate_file is None) != (tls.key_file is None):
        raise ConfigurationError("broker.tls.certificate_file and broker.tls.key_file go together: set both or none")
    if tls.client_ca_file is not None and tls.certificate_file is None:
        raise ConfigurationError("broker.tls.client_ca_file needs broker.tls.certificate_file and broker.tls.key_file")
    if not is_loopback(broker.listen) and not broker.insecure and tls.client_ca_file is None:
        raise ConfigurationError(
            f"broker.listen {broker.listen} can be reached from other hosts, where anybody could ask and guess passwords: "
            "set broker.tls.certificate_file, broker.tls.key_file and broker.tls.client_ca_file for mutual TLS, "
            "listen on 127.0.0.1, or accept it with broker.insecure = true"
        )
    return _tls_files(tls)


def _tls_files(tls: TLS) -> TLSFiles | None:
    if tls.certificate_file is None or tls.key_file is None:
        return None
    return TLSFiles(tls.certificate_file, tls.key_file, tls.client_ca_file)


class _PasswordMetrics:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def checked(self, result: str) -> None:
        self._metrics.password_checks.labels(result).inc()


@contextlib.asynccontextmanager
async def service(settings: Settings, on_end: Callable[[str], object] = log.error) -> AsyncIterator[dict[str, str]]:
    """
    Run everything for the time of the block and yield where it listens: ``broker`` and ``admin``.

    Listens at once and answers 503 until the registry is loaded.

    Args:
        on_end: Is told the name of a background task that ended by itself, which it never should.
    Raises:
        ConfigurationError: A setting cannot be used.
    """
    tls = broker_tls(settings.broker)
    metrics = Metrics()
    rules = Rules(mqtt_exchange=settings.broker.mqtt_exchange)
    feed = ChangeFeed(target(settings), settings.registry.change_retention_s)
    copy = _registry_copy(settings, feed, metrics)
    passwords = _password_checker(settings, metrics)
    health = Health(copy)
    server = BrokerServer(
        _endpoints(settings, copy, passwords, metrics, rules),
        {"/health/live": health.live, "/health/ready": health.ready},
        keepalive_timeout_s=settings.broker.keepalive_timeout_s,
    )
    app = application(copy, metrics, health, rules, loopback=is_loopback(settings.admin.listen))
    host, port = host_and_port(settings.broker.listen)
    admin_host, admin_port = host_and_port(settings.admin.listen)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(passwords.close)
        stack.push_async_callback(feed.close)
        await stack.enter_async_context(_background("registry", copy.run(), on_end))
        if tls is not None:
            await stack.enter_async_context(_background("certificates", watch(tls), on_end))
        backlog = settings.broker.backlog
        port = await stack.enter_async_context(listening(server, host, port, tls=tls, backlog=backlog))
        admin_port = await stack.enter_async_context(_application_listening(app, admin_host, admin_port))
        scheme = "https" if tls else "http"
        where = {"broker": _url(scheme, host, port), "admin": _url("http", admin_host, admin_port)}
        log.info("service.listening", **where)
        yield where
        log.info("service.stopping")


def _url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _registry_copy(settings: Settings, feed: ChangeFeed, metrics: Metrics) -> RegistryCopy:
    registry = settings.registry
    times = SyncTimes(
        registry.poll_interval_s, registry.max_staleness_s, registry.compare_interval_s, registry.prune_interval_s
    )
    copy = RegistryCopy(feed, metrics, times)
    metrics.watch_sync_age(lambda: copy.age_s)
    return copy


def _endpoints(
    settings: Settings, copy: RegistryCopy, passwords: PasswordChecker, metrics: Metrics, rules: Rules
) -> Endpoints:
    return Endpoints(
        copy,
        passwords,
        metrics,
        Sampler(settings.log.denials_per_device),
        rules,
        request_timeout_s=settings.broker.request_timeout_s,
        deny_reasons=settings.broker.deny_reasons,
    )


def _password_checker(settings: Settings, metrics: Metrics) -> PasswordChecker:
    accounts = settings.accounts
    passwords = PasswordChecker(
        _PasswordMetrics(metrics),
        threads=accounts.hashing_threads,
        queue=accounts.hashing_queue,
        reserved=accounts.reserved,
        remember_s=accounts.remember_s,
        remember_most=accounts.remember_most,
    )
    metrics.passwords_running.set_function(lambda: passwords.running)
    return passwords


@contextlib.asynccontextmanager
async def _application_listening(app: web.Application, host: str, port: int) -> AsyncIterator[int]:
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            raise ConfigurationError(f"admin.listen: cannot listen on {host}:{port}: {error.strerror}") from error
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def _background(
    name: str, coroutine: Coroutine[Any, Any, None], on_end: Callable[[str], object]
) -> AsyncIterator[None]:
    task = asyncio.create_task(coroutine, name=name)
    task.add_done_callback(lambda ended: None if ended.cancelled() else on_end(name))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


async def serve(settings: Settings, started: Callable[[dict[str, str]], object]) -> None:
    """
    Run until SIGTERM or SIGINT; ``started`` is told where it listens.

    Raises:
        ConfigurationError: A setting cannot be used.
        Unavailable: A background task ended by itself. Better to be started anew than to decide by a copy that
            nobody keeps true.
    """
    stop = asyncio.Event()
    ended: list[str] = []

    def on_end(name: str) -> None:
        ended.append(name)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with service(settings, on_end) as where:
        started(where)
        await stop.wait()
    if ended:
        raise Unavailable(f"the task {ended[0]} ended by itself; stopped, so that it is started anew")
