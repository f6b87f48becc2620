"""One MQTT connection over TLS on asyncio; thin, because thousands of them may share a core with the tested broker."""

from __future__ import annotations

import asyncio
from typing import cast

from authbackend_load import codec
from authbackend_load.tls import TLS, TLSError

CUT = "cut"
"""The cause if this end cut the connection."""


class ConnectionFailed(Exception):
    """The connection ended or could not be used; the text is the cause, with the same words for all devices."""


class Connection(asyncio.Protocol):
    """
    A device's MQTT connection; create it with ``loop.create_connection``.

    Args:
        tls: The TLS of this connection, before the handshake.
        version: 4 is MQTT 3.1.1, 5 is 5.0.
    """

    def __init__(self, tls: TLS, version: int) -> None:
        self.version = version
        self.established: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the TLS handshake has succeeded or failed."""
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done when the connection has ended; the result is the cause."""
        self.messages = 0
        """Number of messages received."""
        self.keep_alive_s: int | None = None
        """The server keep-alive, None if the broker has not set one."""
        self._decoder = codec.Decoder(version)
        self._waiting: dict[tuple[int, int], asyncio.Future[codec.Packet]] = {}
        self._next_id = 0
        self._transport: asyncio.Transport | None = None
        self._tls = tls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the TLS handshake."""
        transport = cast("asyncio.Transport", transport)  # uvloop's is not a subclass
        self._transport = transport
        if self.lost.done():  # cut while TCP was connecting
            transport.abort()
            return
        try:
            self._tls.begin()
            transport.write(self._tls.output())
        except TLSError as error:
            self._end(f"tls: {error}")

    def data_received(self, data: bytes) -> None:
        """Handle bytes from the broker."""
        if self.lost.done():
            return
        try:
            plain = self._tls.receive(data)
            if self._tls.established and not self.established.done():
                self.established.set_result(None)
            for packet in self._decoder.feed(plain):
                self._take(packet)
        except TLSError as error:
            self._flush()
            self._end(f"tls: {error}")
            return
        except codec.ProtocolError as error:
            self._end(f"protocol: {error}")
            return
        self._flush()
        if self._tls.closed:
            self._end("closed by the broker")

    def connection_lost(self, exc: Exception | None) -> None:
        """Record that the TCP connection has ended."""
        self._end("closed by the broker" if exc is None else f"tcp: {_words(exc)}")

    def _take(self, packet: codec.Packet) -> None:
        match packet.kind:
            case codec.PUBLISH:
                self.messages += 1
                if packet.packet_id:
                    self._write(codec.puback(packet.packet_id))
            case codec.DISCONNECT:
                self._end(f"disconnect: {codec.reason_text(packet.codes[0])}")
            case codec.PINGRESP:
                pass
            case _:
                self.keep_alive_s = packet.keep_alive_s or self.keep_alive_s
                waiting = self._waiting.pop((packet.kind, packet.packet_id), None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(packet)

    def _write(self, data: bytes) -> None:
        if self.lost.done():
            raise ConnectionFailed(self.lost.result())
        try:
            self._tls.send(data)
        except TLSError as error:
            raise ConnectionFailed(f"tls: {error}") from error
        self._flush()

    def _flush(self) -> None:
        assert self._transport is not None
        if data := self._tls.output():
            self._transport.write(data)

    def _end(self, cause: str) -> None:
        if self.lost.done():
            return
        self.lost.set_result(cause)
        if not self.established.done():
            self.established.set_exception(ConnectionFailed(cause))
            self.established.exception()  # mark it as retrieved: nobody may be waiting for it
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(ConnectionFailed(cause))
        self._waiting.clear()
        if self._transport is not None:
            self._transport.abort()

    def _packet_id(self) -> int:
        self._next_id = self._next_id % 65_535 + 1
        return self._next_id

    async def _ask(self, data: bytes, kind: int, packet_id: int = 0) -> codec.Packet:
        answer: asyncio.Future[codec.Packet] = asyncio.get_running_loop().create_future()
        self._waiting[kind, packet_id] = answer
        try:
            self._write(data)
            return await answer
        finally:
            self._waiting.pop((kind, packet_id), None)

    async def connect(self, client_id: str, *, keep_alive_s: int, clean: bool, session_expiry_s: int) -> int:
        """
        Log in and return the reason code of CONNACK (of MQTT 5; 0 is success).

        Raises:
            ConnectionFailed: The connection ended instead.
        """
        data = codec.connect(
            client_id,
            version=self.version,
            keep_alive_s=keep_alive_s,
            clean=clean,
            session_expiry_s=session_expiry_s,
        )
        return (await self._ask(data, codec.CONNACK)).codes[0]

    async def subscribe(self, filters: list[str], qos: int) -> tuple[int, ...]:
        """
        Subscribe and return the reason codes of SUBACK: the granted QoS, or 0x80 and more for a refusal.

        Raises:
            ConnectionFailed: The connection ended instead.
        """
        number = self._packet_id()
        data = codec.subscribe(number, filters, qos, version=self.version)
        return (await self._ask(data, codec.SUBACK, number)).codes

    async def publish(self, topic: str, payload: bytes, qos: int) -> int:
        """
        Publish; return the reason code of PUBACK for QoS 1; for QoS 0, return 0 once it is sent.

        Raises:
            ConnectionFailed: The connection ended instead, which is how RabbitMQ refuses a publish.
        """
        number = self._packet_id() if qos else 0
        data = codec.publish(topic, payload, qos, number, version=self.version)
        if not qos:
            self._write(data)
            return 0
        return (await self._ask(data, codec.PUBACK, number)).codes[0]

    def ping(self) -> None:
        """
        Send PINGREQ.

        Raises:
            ConnectionFailed: The connection has ended.
        """
        self._write(codec.PINGREQ_BYTES)

    def disconnect(self) -> None:
        """Send DISCONNECT and close the connection."""
        if self.lost.done() or not self._tls.established:
            self.cut()
            return
        self._write(codec.disconnect(version=self.version))
        self.lost.set_result("ended")
        assert self._transport is not None
        self._transport.close()

    def cut(self) -> None:
        """Abort the connection without DISCONNECT, as if the network were lost."""
        self._end(CUT)


def _words(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text or type(error).__name__).lower()
