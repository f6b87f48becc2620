"""
HTTP responses that are built once and reused: nearly all answers to RabbitMQ are `allow` or `deny`.

aiohttp builds a new response for each request, which costs more than deciding. The client receives the same: status,
length, type, date.
"""

from __future__ import annotations

import time
from email.utils import formatdate
from typing import Any

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter

MOST_UNREAD_BYTES = 64 * 1024
"""A client that sends requests without reading the answers is disconnected above this."""

_HTTP_1_1 = (1, 1)


class _Clock:
    """The Date header, formatted once a second (RFC 9110 section 6.6.1)."""

    def __init__(self) -> None:
        self._second = 0
        self._line = b""

    def line(self) -> bytes:
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._line = f"Date: {formatdate(second, usegmt=True)}\r\n\r\n".encode()
        return self._line


_clock = _Clock()


class Prepared(web.StreamResponse):
    """
    A complete response, shared between requests; for HTTP/1.1 with keep-alive.

    Args:
        status: For example ``200 OK``.
        text: ASCII.
    """

    def __init__(self, status: str, text: str) -> None:
        super().__init__(status=int(status[:3]))
        self._keep_alive = True
        self._text = text
        self._content = text.encode("ascii")
        self._head = (
            f"HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {len(text)}\r\n"
        ).encode()

    def message(self) -> bytes:
        """Return the response as it is sent to the client."""
        return self._head + _clock.line() + self._content

    def suited_to(self, request: web.BaseRequest) -> web.StreamResponse:
        """Return this response, or for an old client or another method one that aiohttp builds for this request."""
        plain = request.method in (hdrs.METH_POST, hdrs.METH_GET)
        if request.version == _HTTP_1_1 and request.keep_alive and plain:
            return self
        return web.Response(status=self.status, text=self._text)

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Write the whole response."""
        if request.transport is None:
            raise ConnectionResetError
        write(request.transport, self.message())
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing: :meth:`prepare` has written everything."""


def write(transport: Any, message: bytes) -> None:
    """
    Write a complete response.

    Raises:
        ConnectionResetError: The client does not read its answers and was disconnected.
    """
    if transport.get_write_buffer_size() > MOST_UNREAD_BYTES:
        transport.abort()
        raise ConnectionResetError
    transport.write(message)


class Responses:
    """Cached responses by text; ``unavailable`` is 503."""

    def __init__(self) -> None:
        self._ok: dict[str, Prepared] = {}
        self.unavailable = Prepared("503 Service Unavailable", "unavailable")

    def ok(self, text: str) -> Prepared:
        """Return a 200 response with an answer of RabbitMQ's protocol."""
        response = self._ok.get(text)
        if response is None:
            response = self._ok[text] = Prepared("200 OK", text)
        return response
