"""
Passes TCP on, and cuts all of its connections every so often. ``python -m benchmarks.storm.relay PORT TARGET SECONDS``.

Prints ``ready`` when it listens, and how many connections it has cut when it is ended.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import cast

import uvloop


class _End(asyncio.Protocol):
    """One end of a pair; what arrives here leaves at the other one."""

    def __init__(self, everything: set[asyncio.Transport]) -> None:
        self.everything = everything
        self.other: _End | None = None
        self.transport: asyncio.Transport | None = None
        self.early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.everything.add(self.transport)

    def data_received(self, data: bytes) -> None:
        if self.other is None or self.other.transport is None:
            self.early.append(data)
        else:
            self.other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        if self.transport is not None:
            self.everything.discard(self.transport)
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class _Door(_End):
    """The end that the broker connects to."""

    def __init__(self, everything: set[asyncio.Transport], target: int) -> None:
        super().__init__(everything)
        self.target = target
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.task = asyncio.create_task(self._pair())

    async def _pair(self) -> None:
        assert self.transport is not None
        other = _End(self.everything)
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
    """Pass on and cut until SIGTERM."""
    everything: set[asyncio.Transport] = set()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    await loop.create_server(lambda: _Door(everything, target), "127.0.0.1", port, backlog=4096)
    print("ready", flush=True)  # noqa: T201
    count = 0
    while not stop.is_set():
        try:
            await asyncio.wait_for(stop.wait(), every_s)
        except TimeoutError:
            count += len(everything) // 2
            for transport in tuple(everything):
                transport.abort()
    print(f"cut {count}", flush=True)  # noqa: T201


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
