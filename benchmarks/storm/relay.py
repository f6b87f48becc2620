"""
A TCP relay that cuts all connections at an interval: ``python -m benchmarks.storm.relay PORT TARGET SECONDS``.

Prints ``ready`` when it listens, and at the end how many connections it has cut.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import cast

import uvloop


class _Relayed(asyncio.Protocol):
    """One of a pair of connections; bytes that arrive on one are sent on the other."""

    def __init__(self, transports: set[asyncio.Transport]) -> None:
        self.transports = transports
        self.other: _Relayed | None = None
        self.transport: asyncio.Transport | None = None
        self.early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transports.add(self.transport)

    def data_received(self, data: bytes) -> None:
        if self.other is None or self.other.transport is None:
            self.early.append(data)
        else:
            self.other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        if self.transport is not None:
            self.transports.discard(self.transport)
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class _Incoming(_Relayed):
    """The connection from the broker."""

    def __init__(self, transports: set[asyncio.Transport], target: int) -> None:
        super().__init__(transports)
        self.target = target
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.task = asyncio.create_task(self._pair())

    async def _pair(self) -> None:
        assert self.transport is not None
        other = _Relayed(self.transports)
        try:
            await asyncio.get_running_loop().create_connection(lambda: other, "127.0.0.1", self.target)
        except OSError:
            self.transport.abort()
            return
        self.other, other.other = other, self
        assert other.transport is not None
        if self.transport.is_closing():
            other.transport.close()
        other.transport.writelines(self.early)


async def serve(port: int, target: int, every_s: float) -> None:
    """Relay, and cut all connections every ``every_s`` seconds, until SIGTERM."""
    transports: set[asyncio.Transport] = set()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    await loop.create_server(lambda: _Incoming(transports, target), "127.0.0.1", port, backlog=4096)
    print("ready", flush=True)  # noqa: T201
    count = 0
    while not stop.is_set():
        try:
            await asyncio.wait_for(stop.wait(), every_s)
        except TimeoutError:
            count += len(transports) // 2
            for transport in tuple(transports):
                transport.abort()
    print(f"cut {count}", flush=True)  # noqa: T201


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
