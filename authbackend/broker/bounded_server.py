"""aiohttp's server with limits on connections, header size, and the time to send a request and read the answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from socket import socket
from typing import Any, Protocol

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

HANDSHAKE_TIMEOUT_S = 5.0
SHUTDOWN_TIMEOUT_S = 1.0
LONGEST_LINE_BYTES = 8190
"""Limit for a request line and for each header; aiohttp limits the number of headers to 128."""
_ACCEPT_AGAIN_S = 0.05


@dataclass(frozen=True, slots=True)
class Bounds:
    """
    Limits on a listener's clients.

    Args:
        keepalive_timeout_s: How long an idle connection stays open.
        request_timeout_s: Longest time for a client to send a request header, or to read nothing of an answer.
        max_connections: Any more are closed immediately. Capped at half of the process's open-file limit.
        line_bytes: Longest request line and longest header line.
    """

    keepalive_timeout_s: float
    request_timeout_s: float
    max_connections: int
    line_bytes: int = LONGEST_LINE_BYTES


class ConnectionObserver(Protocol):
    """Receives connection counts, for metrics."""

    def connections_open(self, number: int) -> None:
        """Set the number of open connections."""

    def connection_closed(self, cause: str) -> None:
        """Count a connection that the server closed, by cause: too_many, slow."""


class BoundedServer(web.Server):
    """aiohttp's low-level server, with :class:`Bounds`."""

    def __init__(
        self,
        handler: Callable[[Any], Awaitable[web.StreamResponse]],
        bounds: Bounds,
        observer: ConnectionObserver,
        **options: Any,
    ) -> None:
        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            protocol = request.protocol
            assert isinstance(protocol, BoundedConnection)
            protocol.answered = True
            return await handler(request)

        super().__init__(
            handle,
            access_log=None,
            keepalive_timeout=bounds.keepalive_timeout_s,
            max_line_size=bounds.line_bytes,
            max_field_size=bounds.line_bytes,
            lingering_time=0,
            auto_decompress=False,  # a small body must not expand into a large one
            **options,
        )
        self._observer = observer
        self._request_timeout_s = bounds.request_timeout_s
        self._max_connections = min(bounds.max_connections, _room_for_connections())
        self._open: set[BoundedConnection] = set()
        self._handshakes: set[asyncio.Task[None]] = set()

    def __call__(self) -> RequestHandler:
        """Return the protocol of a new connection."""
        return BoundedConnection(self, loop=self._loop, **self._kwargs)

    def admit(self, connection: BoundedConnection) -> bool:
        """Return whether there is room for one more connection."""
        if len(self._open) >= self._max_connections:
            self._observer.connection_closed("too_many")
            return False
        self._open.add(connection)
        self._observer.connections_open(len(self._open))
        return True

    def forget(self, connection: BoundedConnection) -> None:
        """Record that a connection has ended."""
        self._open.discard(connection)
        self._observer.connections_open(len(self._open))

    async def accept_over_tls(self, listener: socket, tls: ssl.SSLContext) -> None:
        """
        Accept connections and start their TLS handshakes, until cancelled.

        asyncio's own server reports a connection only after its handshake. Clients that connect and send nothing would
        each hold a file descriptor and some hundred kilobytes until the handshake times out, without any limit.
        """
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    accepted, _ = await loop.sock_accept(listener)
                except OSError:  # no file descriptor left, or the client has already gone
                    await asyncio.sleep(_ACCEPT_AGAIN_S)
                    continue
                if len(self._open) + len(self._handshakes) >= self._max_connections:
                    self._observer.connection_closed("too_many")
                    accepted.close()
                    continue
                handshake = asyncio.create_task(self._shake_hands(accepted, tls))
                self._handshakes.add(handshake)
                handshake.add_done_callback(self._handshakes.discard)
        finally:
            for handshake in self._handshakes:
                handshake.cancel()

    async def _shake_hands(self, accepted: socket, tls: ssl.SSLContext) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(
                self,
                accepted,
                ssl=tls,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
                ssl_shutdown_timeout=SHUTDOWN_TIMEOUT_S,
            )
        except OSError:  # the client does not speak TLS, has no accepted certificate, or has gone
            accepted.close()

    async def cut_slow_clients(self) -> None:
        """
        Close connections whose client does not finish, or never starts, its request, or does not read its answer.

        Runs until cancelled.
        """
        while True:
            await asyncio.sleep(self._request_timeout_s / 2)
            now = time.monotonic()
            latest = now - self._request_timeout_s
            for connection in list(self._open):
                if connection.sending_since(latest):
                    self._observer.connection_closed("slow")
                    connection.force_close()
                elif connection.reading_nothing_since(latest, now):
                    self._observer.connection_closed("slow")
                    connection.abort()


class BoundedConnection(RequestHandler):
    """A connection; times are from the monotonic clock."""

    __slots__ = ("_began", "_unsent", "_unsent_since", "answered", "received")

    def __init__(self, manager: BoundedServer, **kwargs: Any) -> None:
        super().__init__(manager, **kwargs)
        self.received = self._began = self._unsent_since = time.monotonic()
        self._unsent = 0
        self.answered = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the connection, or close it if there are too many."""
        server = self._manager
        assert isinstance(server, BoundedServer)
        super().connection_made(transport)
        if not server.admit(self):
            self.force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Release the connection's place."""
        server = self._manager
        if isinstance(server, BoundedServer):
            server.forget(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Record the time of arrival before parsing."""
        self.arrived()
        super().data_received(data)

    def arrived(self) -> None:
        """Record that data arrived: the start of a request, or more of it."""
        self.received = time.monotonic()
        if self.answered:
            self.answered = False
            self._began = self.received

    def sending_since(self, latest: float) -> bool:
        """Return whether the client started a request header before ``latest`` and has not finished it."""
        return not self.answered and self._began < latest and not self._messages and self._current_request is None

    def reading_nothing_since(self, latest: float, now: float) -> bool:
        """Return whether an answer is pending and the client has read nothing of it since before ``latest``."""
        unsent = 0 if self.transport is None else self.transport.get_write_buffer_size()
        if not self._unsent or unsent < self._unsent:
            self._unsent_since = now
        self._unsent = unsent
        return unsent > 0 and self._unsent_since < latest

    def abort(self) -> None:
        """Close immediately and discard what the client has not read."""
        if self.transport is not None:
            self.transport.abort()


@contextlib.asynccontextmanager
async def accepting(
    server: BoundedServer,
    drain_s: float,
    *,
    sock: socket | None = None,
    tls: ssl.SSLContext | None = None,
    **listen_options: Any,
) -> AsyncIterator[int]:
    """
    Serve while the block runs, and yield the port; then stop accepting and finish requests in flight.

    Args:
        drain_s: Longest time for requests in flight.
        sock: A listening socket; without one, ``listen_options`` are passed to the event loop's ``create_server``.
    Raises:
        OSError: Cannot listen on the address.
    """
    listener = await asyncio.get_running_loop().create_server(
        server, sock=sock, start_serving=tls is None, **listen_options
    )
    tasks = [asyncio.create_task(server.cut_slow_clients())]
    duplicates = []
    if tls is not None:
        for each in listener.sockets:
            duplicate = socket(fileno=os.dup(each.fileno()))
            duplicate.setblocking(False)
            duplicate.listen(listen_options.get("backlog", 128))
            duplicates.append(duplicate)
            tasks.append(asyncio.create_task(server.accept_over_tls(duplicate, tls)))
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for duplicate in duplicates:
            duplicate.close()
        listener.close()
        server.pre_shutdown()
        await asyncio.sleep(0)
        await server.shutdown(drain_s)


def _room_for_connections() -> int:
    """Return half of this process's open-file limit; the other half is for everything else that it opens."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**31 if files == resource.RLIM_INFINITY else max(1, files // 2)
