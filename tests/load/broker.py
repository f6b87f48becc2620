"""A fake broker on a separate thread, for faults that cannot be caused in a real RabbitMQ."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self


class FakeBroker:
    """
    Accepts MQTT over mutual TLS and parses only what it answers; runs for the duration of a ``with`` block.

    Args:
        directory: Output of ``authbackend certs``.
        connack: Code of CONNACK by client id; 0 for all others.
        suback: Code of SUBACK by client id; QoS 1 for all others.
        silent: Client ids whose publishes are never acknowledged.
        closes_on_publish: Client ids whose connection is closed on a publish, which is how RabbitMQ refuses one.
    """

    def __init__(
        self,
        directory: Path,
        *,
        connack: Mapping[str, int] = {},
        suback: Mapping[str, int] = {},
        silent: frozenset[str] = frozenset(),
        closes_on_publish: frozenset[str] = frozenset(),
    ) -> None:
        self.connack, self.suback = connack, suback
        self.silent, self.closes_on_publish = silent, closes_on_publish
        self.received: Counter[str] = Counter()
        self.names: Counter[str] = Counter()
        self.topics: list[str] = []
        self.port = 0
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=directory / "ca.pem")
        self._context.load_cert_chain(directory / "rabbitmq.pem", directory / "rabbitmq.key")
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()

    def __enter__(self) -> Self:
        self._server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        )
        self.port = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)

    def close_all(self) -> None:
        """Close all connections, like a broker that stops."""
        self._loop.call_soon_threadsafe(lambda: [writer.transport.abort() for writer in self._writers])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        subject = writer.get_extra_info("peercert")["subject"]
        self.names[dict(pair for part in subject for pair in part)["commonName"]] += 1
        self._writers.add(writer)
        try:
            await self._converse(reader, writer)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client_id, v5 = "", True
        while True:
            head, length = await reader.readexactly(2)
            if length >= 0x80:
                length = length & 0x7F | (await reader.readexactly(1))[0] << 7
            body = await reader.readexactly(length)
            kind = head >> 4
            self.received[
                ("", "connect", "", "publish", "puback", "", "", "", "subscribe", "", "", "", "ping", "", "disconnect")[
                    kind
                ]
            ] += 1
            if kind == 1:
                v5 = body[6] == 5
                begin = 11 + body[10] if v5 else 10
                client_id = body[begin + 2 :].decode()
                code = self.connack.get(client_id, 0)
                writer.write(b"\x20\x03\x00" + bytes((code, 0)) if v5 else b"\x20\x02\x00" + bytes((code,)))
                if code:
                    return await writer.drain()
            elif kind == 8:
                code = self.suback.get(client_id, 1)
                writer.write((b"\x90\x04" + body[:2] + b"\x00" if v5 else b"\x90\x03" + body[:2]) + bytes((code,)))
            elif kind == 3:
                length = body[0] << 8 | body[1]
                self.topics.append(body[2 : 2 + length].decode())
                if client_id in self.closes_on_publish:
                    return None
                if head & 2 and client_id not in self.silent:
                    writer.write(b"\x40\x02" + body[2 + length : 4 + length])
            elif kind == 12:
                writer.write(b"\xd0\x00")
            elif kind == 14:
                return None
