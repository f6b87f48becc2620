"""The listener for RabbitMQ: HTTP/1.1 with keep-alive, TLS or mutual TLS, paths looked up in a dictionary."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import structlog
from aiohttp import web
from aiohttp.http import HttpVersion11, RawRequestMessage
from aiohttp.web_protocol import RequestHandler

from authbackend.broker import protocol as broker_protocol
from authbackend.broker.bounded_server import BoundedConnection, BoundedServer, Bounds, accepting
from authbackend.broker.handlers import QUESTIONS, Handlers, PendingLogin
from authbackend.broker.metrics import BrokerMetrics
from authbackend.broker.protocol import Malformed
from authbackend.broker.responses import write
from authbackend.broker.tls import TLSFiles
from authbackend.errors import ConfigurationError

log = structlog.get_logger(__name__)

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
_UNKNOWN_PATH_LOG_S = 60.0
_LONGEST_LOGGED_PATH = 256


class BrokerServer(BoundedServer):
    """
    aiohttp's low-level server, which answers requests that its parser rejects with ``deny`` instead of an error page.

    Each endpoint limits the time to send a body.
    """

    def __init__(
        self, handlers: Handlers, others: Mapping[str, Handler], metrics: BrokerMetrics, bounds: Bounds
    ) -> None:
        super().__init__(self._dispatch, bounds, metrics)
        self.handlers = handlers
        self._others = others
        self._unknown_paths = _UnknownPaths(metrics)
        self.request_factory = self._limited_request

    def __call__(self) -> RequestHandler:
        """Return the protocol of a new connection."""
        return _Protocol(self, loop=self._loop, **self._kwargs)

    def _limited_request(self, message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
        return web.BaseRequest(
            message, payload, protocol, writer, task, self._loop, client_max_size=broker_protocol.LONGEST_BODY_BYTES + 1
        )

    async def _dispatch(self, request: web.BaseRequest) -> web.StreamResponse:
        protocol = request.protocol
        assert isinstance(protocol, _Protocol)
        path = request.raw_path.partition("?")[0]
        question = QUESTIONS.get(path)
        if question is not None:
            return await self.handlers.handle(question, request, protocol.received, protocol.pending_login(request))
        other = self._others.get(path)
        if other is not None:
            return await other(request)
        self._unknown_paths.count(path)
        return web.Response(status=404, text="not found")


class _UnknownPaths:
    """Counts requests to unknown paths, and logs the expected path once a minute: nearly always a setting is wrong."""

    def __init__(self, metrics: BrokerMetrics) -> None:
        self._metrics = metrics
        self._next_line = 0.0
        self._unlogged = 0

    def count(self, path: str) -> None:
        """Count a request, and log it if none was logged in the last minute."""
        self._metrics.unknown_paths.inc()
        if time.monotonic() < self._next_line:
            self._unlogged += 1
            return
        self._next_line = time.monotonic() + _UNKNOWN_PATH_LOG_S
        unlogged, self._unlogged = self._unlogged, 0
        if not path.startswith("/"):
            path = "/" + path.partition("://")[2].partition("/")[2]  # the part before may contain a password
        expected = f"/auth/{path.rstrip('/').rpartition('/')[2]}"
        log.warning(
            "broker.unknown_path",
            path=path[:_LONGEST_LOGGED_PATH],
            expected=expected if expected in QUESTIONS else ", ".join(QUESTIONS),
            fix="correct auth_http.user_path, vhost_path, resource_path and topic_path in rabbitmq.conf; until then RabbitMQ refuses everybody that it checks at this path",
            unlogged=unlogged,
        )


class _Protocol(BoundedConnection):
    """One connection; ``_pending`` is a request's payload and the login in it that waits for a password check."""

    __slots__ = ("_pending",)

    def __init__(self, manager: BrokerServer, **kwargs: Any) -> None:
        super().__init__(manager, **kwargs)
        self._pending: tuple[Any, PendingLogin | None] = (None, None)

    def pending_login(self, request: web.BaseRequest) -> PendingLogin | None:
        """Take the pending login, if this request was parsed as one before it was passed to aiohttp."""
        payload, pending = self._pending
        self._pending = None, None
        return pending if payload is request.content else None

    def data_received(self, data: bytes) -> None:
        """Answer inline where possible; leave the rest to aiohttp."""
        self.arrived()
        waiter = self._waiter
        if waiter is None or self._messages:  # aiohttp is handling a request of this connection: keep the order
            RequestHandler.data_received(self, data)
            return
        self._waiter = None  # do not wake aiohttp's task before it is clear that it is needed
        try:
            RequestHandler.data_received(self, data)
        finally:
            self._waiter = waiter
        if self._messages and not self._answer_inline() and not waiter.done():
            waiter.set_result(None)

    def _answer_inline(self) -> bool:
        """
        Answer without waking aiohttp's task, if this is one complete, plain POST, as RabbitMQ sends them.

        Using a task costs aiohttp a quarter of its time (docs/performance.md). This does what ``RequestHandler.start``
        of aiohttp 3.14 does around a handler, and no parsing.
        """
        server, parser = self._manager, self._parser
        if len(self._messages) != 1 or not isinstance(server, BrokerServer) or parser is None or self._close:
            return False
        message, payload = self._messages[0]
        if not isinstance(message, RawRequestMessage) or message.method != "POST" or message.version != HttpVersion11:
            return False
        question = QUESTIONS.get(message.path)
        if question is None or message.should_close or message.upgrade or not payload.is_eof() or payload.exception():
            return False
        handlers = server.handlers
        answer = handlers.answer(question, payload.read_nowait(), self.received)
        if isinstance(answer, PendingLogin):
            self._pending = payload, answer
            return False
        handlers.metrics.answered(question.name, time.monotonic() - self.received)
        self._messages.popleft()
        parser.message_consumed()
        self.answered = True
        try:
            write(self.transport, answer.message())
        except ConnectionResetError:
            return True
        self._keepalive = True
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(self._next_keepalive_close_time, self._process_keepalive)
        return True

    def handle_error(
        self,
        request: web.BaseRequest,  # noqa: ARG002
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002
    ) -> web.StreamResponse:
        """Deny requests that are not HTTP or too long; log nothing of them, since they may contain a password."""
        server = self._manager
        assert isinstance(server, BrokerServer)
        if status >= 500:
            log.error("broker.request_crashed", status=status, error=type(exc).__name__)
            response = web.Response(status=503, text="unavailable")
        else:
            too_long = type(exc).__name__ == "LineTooLong"
            response = server.handlers.malformed("none", Malformed.TOO_LARGE if too_long else Malformed.NOT_HTTP)
        response.force_close()
        return response


@contextlib.asynccontextmanager
async def listening(
    server: BrokerServer,
    host: str,
    port: int,
    *,
    tls: TLSFiles | None = None,
    backlog: int = 128,
    shared: bool = False,
    drain_s: float = 5.0,
) -> AsyncIterator[int]:
    """
    Serve for the duration of the block and yield the port; then stop accepting and finish requests in flight.

    Args:
        shared: Other processes listen on the same port (SO_REUSEPORT); the kernel distributes connections among them.
        drain_s: Longest time to finish requests in flight.
    Raises:
        ConfigurationError: The address cannot be listened on.
    """
    try:
        async with accepting(
            server,
            drain_s,
            tls=tls.context if tls else None,
            host=host,
            port=port,
            backlog=backlog,
            reuse_port=shared or None,
        ) as bound_port:
            yield bound_port
    except OSError as error:
        raise ConfigurationError(f"broker.listen: cannot listen on {host}:{port}: {error.strerror}") from error
