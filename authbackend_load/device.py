"""One device of a load test: it connects with its certificate, subscribes, publishes and stays connected."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from authbackend_load import codec
from authbackend_load.connection import CUT, Connection, ConnectionFailed
from authbackend_load.plan import Identity, LoadError, Plan, fill
from authbackend_load.record import Record
from authbackend_load.tls import TLS, make_context

_CLOSED = "closed by the broker"
_REFUSED = frozenset({0x80, *codec.UNAUTHORIZED})
NOBODY_SUBSCRIBED = 0x10


class Failed(Exception):
    """
    A step of a cycle failed.

    Attributes:
        step: One of handshake, connack, suback, puback and connected.
        cause: A few words, the same for all devices.
        refused: Whether the broker refused it, as opposed to a fault.
        connected: Whether the connection still works.
    """

    def __init__(self, step: str, cause: str, *, refused: bool = False, connected: bool = False) -> None:
        super().__init__(f"{step}: {cause}")
        self.step = step
        self.cause = cause
        self.refused = refused
        self.connected = connected


class Device:
    """
    One device with at most one connection at a time.

    Args:
        address: IP address and port of the broker.
        source: Local address to connect from; None leaves the choice to the system.
    Raises:
        LoadError: A certificate cannot be used.
    """

    def __init__(
        self,
        plan: Plan,
        identity: Identity,
        record: Record,
        *,
        address: tuple[str, int],
        source: str | None = None,
    ) -> None:
        self.identity = identity
        self.record = record
        self._plan = plan
        try:
            self._context = make_context(identity.certificate_file, plan.ca_file or None, plan.tls_version)
        except OSError as error:
            raise LoadError(f"{identity.certificate_file} or {plan.ca_file or 'its key'}: {error}") from error
        self._address = address
        self._source = source
        self._connection: Connection | None = None
        self._published = 0
        self._payload = b"x" * plan.payload_bytes

    @property
    def connected(self) -> bool:
        """Whether there is a connection that has not ended."""
        return self._connection is not None and not self._connection.lost.done()

    async def cycle(self) -> None:
        """
        Take the steps of the plan once, and stay connected; if already connected, only publish.

        Raises:
            Failed: A step failed; it is in the record. The connection has ended, unless only a publish was refused.
        """
        if self._connection is not None and self._connection.lost.done():  # since the last call
            self.record.count("lost")
            self._count_failure(Failed("connected", self._connection.lost.result()))
            self.cut()
        self.record.count("attempts")
        try:
            if not self.connected:
                await self._connect()
            await self._publish_all()
        except Failed as failure:
            self._count_failure(failure)
            if not failure.connected:
                self.cut()
            raise
        except asyncio.CancelledError:
            self.cut()
            raise
        if not self.identity.active and self._plan.goes_to("login"):
            self.record.count("wrongly_let_in")

    def _count_failure(self, failure: Failed) -> None:
        if failure.cause == CUT:
            return
        if self.identity.active:
            self.record.failure(failure.step, failure.cause)
            if failure.refused:
                self.record.count("wrongly_refused")
        elif failure.refused and failure.step == "connack":
            self.record.count("rightly_refused")
        else:
            self.record.failure(f"must be refused: {failure.step}", failure.cause)
            if failure.step in ("suback", "puback"):
                self.record.count("wrongly_let_in")

    async def _connect(self) -> None:
        plan, device_id = self._plan, self.identity.device_id
        async with self._step("handshake"):
            connection = await self._open()
            await connection.established
        if not plan.goes_to("login"):
            return
        async with self._step("connack"):
            await self._login(connection)
        self.record.count("logins")
        if plan.goes_to("subscribe") and plan.subscribe:
            async with self._step("suback"):
                filters = [fill(name, device_id) for name in plan.subscribe]
                for code in await connection.subscribe(filters, plan.subscribe_qos):
                    if code >= 0x80:
                        raise Failed("suback", codec.reason_text(code), refused=code in _REFUSED)

    async def _publish_all(self) -> None:
        plan, connection = self._plan, self._connection
        assert connection is not None
        if plan.goes_to("publish") and plan.publish:
            for _ in range(plan.publishes):
                await self._publish(connection)

    async def _open(self) -> Connection:
        connection = Connection(TLS(self._context, self._plan.server_name or self._plan.host), self._plan.version)
        self._connection = connection
        local = None if self._source is None else (self._source, 0)
        await asyncio.get_running_loop().create_connection(lambda: connection, *self._address, local_addr=local)
        return connection

    async def _login(self, connection: Connection) -> None:
        plan, begin = self._plan, time.perf_counter()
        code = await connection.connect(
            fill(plan.client_id, self.identity.device_id),
            keep_alive_s=plan.keep_alive_s,
            clean=plan.clean,
            session_expiry_s=plan.session_expiry_s,
        )
        if code:
            if not self.identity.active:
                self.record.latency("refusal", time.perf_counter() - begin)
            raise Failed("connack", codec.reason_text(code), refused=code in codec.UNAUTHORIZED)

    async def _publish(self, connection: Connection) -> None:
        plan = self._plan
        topic = fill(plan.publish[self._published % len(plan.publish)], self.identity.device_id, self._published)
        self._published += 1
        self.record.count("publishes")
        async with self._step("puback"):
            code = await connection.publish(topic, self._payload, plan.publish_qos)
            if code not in (0, NOBODY_SUBSCRIBED):
                raise Failed("puback", codec.reason_text(code), refused=code in _REFUSED, connected=True)

    @asynccontextmanager
    async def _step(self, name: str) -> AsyncIterator[None]:
        """Time a step, and turn every kind of failure into :class:`Failed`."""
        begin = time.perf_counter()
        try:
            async with asyncio.timeout(self._plan.timeout_s):
                yield
        except TimeoutError:
            raise Failed(name, f"no answer in {self._plan.timeout_s:g} s") from None
        except ConnectionFailed as error:
            # RabbitMQ refuses a publish by closing the connection, without a packet.
            raise Failed(name, str(error), refused=name == "puback" and str(error) == _CLOSED) from None
        except OSError as error:
            raise Failed(name, f"tcp: {(error.strerror or str(error)).lower()}") from None
        self.record.latency(name, time.perf_counter() - begin)

    async def stay(self) -> None:
        """
        Keep the connection alive and publish at the plan's interval until it ends.

        Raises:
            Failed: It ended, or a publish was refused or not acknowledged; it is in the record.
        """
        connection = self._connection
        assert connection is not None
        try:
            await self._stay(connection)
            raise Failed("connected", connection.lost.result())
        except Failed as failure:
            self._count_failure(failure)
            if not failure.connected:
                self.record.count("lost")
                self.cut()
            raise

    async def _stay(self, connection: Connection) -> None:
        plan = self._plan
        if plan.until == "handshake":
            await asyncio.wait((connection.lost,))
            return
        publishing = plan.interval_s > 0 and plan.goes_to("publish") and bool(plan.publish)
        # The first publish comes after a random part of the interval, so that not all devices publish at the same time.
        due = time.monotonic() + random.random() * plan.interval_s if publishing else math.inf
        ping_s = (connection.keep_alive_s or plan.keep_alive_s) * 0.75 or math.inf
        while True:
            wait_s = min(due - time.monotonic(), ping_s)
            await asyncio.wait((connection.lost,), timeout=None if wait_s == math.inf else max(0.0, wait_s))
            if connection.lost.done():
                return
            if time.monotonic() >= due:
                due += plan.interval_s
                await self._publish(connection)
            else:
                connection.ping()

    def _release(self) -> Connection | None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self.record.count("messages", connection.messages)
        return connection

    def cut(self) -> None:
        """Abort the connection without DISCONNECT; do nothing if there is none."""
        if (connection := self._release()) is not None:
            connection.cut()

    def disconnect(self) -> None:
        """Send DISCONNECT and close the connection; do nothing if there is none."""
        if (connection := self._release()) is not None:
            connection.disconnect()
