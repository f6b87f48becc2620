"""A client for RabbitMQ's stream protocol that can only connect."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
from typing import Self

from .mqtt import ANSWER_TIMEOUT_S, HOST

PEER_PROPERTIES, HANDSHAKE, AUTHENTICATE, TUNE, OPEN = 0x11, 0x12, 0x13, 0x14, 0x15
OK = 1


class StreamConnection:
    """A connection that has logged in by certificate."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._requests = 0

    @classmethod
    async def open(cls, tls: ssl.SSLContext, port: int) -> Self:
        """
        Connect to the virtual host ``/``.

        Raises:
            ConnectionRefusedError: The broker refuses it.
        """
        connection = cls(*await asyncio.open_connection(HOST, port, ssl=tls))
        await connection._ask(PEER_PROPERTIES, struct.pack(">i", 0))
        await connection._ask(HANDSHAKE)
        await connection._ask(AUTHENTICATE, _text("EXTERNAL") + struct.pack(">i", -1))
        await connection._frame()  # the broker's Tune request
        connection._send(struct.pack(">HHII", TUNE, 1, 1 << 20, 60))
        await connection._ask(OPEN, _text("/"))
        return connection

    async def closed(self, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        """Wait until the broker ends the connection."""
        with contextlib.suppress(ConnectionResetError):
            async with asyncio.timeout(timeout_s):
                while await self._reader.read(4096):
                    pass

    @property
    def open_still(self) -> bool:
        """Whether the connection is still open, as far as this end can tell."""
        return not self._reader.at_eof()

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()

    async def _ask(self, key: int, body: bytes = b"") -> None:
        self._requests += 1
        self._send(struct.pack(">HHI", key, 1, self._requests) + body)
        answer = await self._frame()
        code = struct.unpack(">H", answer[8:10])[0]
        if code != OK:
            self.close()
            raise ConnectionRefusedError(f"the stream command {key:#x} was answered with {code}")

    def _send(self, frame: bytes) -> None:
        self._writer.write(struct.pack(">I", len(frame)) + frame)

    async def _frame(self) -> bytes:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            (length,) = struct.unpack(">I", await self._reader.readexactly(4))
            return await self._reader.readexactly(length)


def _text(text: str) -> bytes:
    return struct.pack(">h", len(text)) + text.encode()
