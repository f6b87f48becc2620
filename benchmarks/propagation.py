"""Measures the time from a commit until every worker uses it in decisions."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg

from benchmarks import load_client
from benchmarks.fixtures import BenchmarkError, Running
from benchmarks.storm.processes import descendants

_PAUSE_S = 0.001


class Watcher:
    """Keeps one connection to each worker of some replicas, and polls decisions about one device on each."""

    def __init__(self, dsn: str, replicas: tuple[Running, ...]) -> None:
        self._dsn = dsn
        self._replicas = replicas
        self._device = "d0002500"
        self._quiet: list[float] = []

    async def _connections(self) -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Connect until there is one connection to each worker; the kernel chooses the worker of each."""
        connections = []
        for replica in self._replicas:
            workers: dict[int, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}
            for _ in range(200):
                reader, writer = await asyncio.open_connection("127.0.0.1", replica.port)
                await _answer(reader, writer, load_client.http_post("/auth/user", "username=nobody"))
                worker = _owner(replica, writer.get_extra_info("sockname")[1])
                if worker in workers:
                    writer.close()
                else:
                    workers[worker] = (reader, writer)
                if len(workers) == 2:
                    break
            else:
                raise BenchmarkError("200 connections, and the kernel has given all of them to one worker")
            connections += workers.values()
        return connections

    async def changes(self, number: int, say: Callable[[str], None]) -> list[float]:
        """Suspend and reinstate a device in turn; return the seconds from each commit until the last worker uses it."""
        connections = await self._connections()
        database = await asyncpg.connect(self._dsn)
        took = []
        for n in range(number):
            status, answer = ("active", b"allow") if n % 2 else ("suspended", b"deny")
            watching = [asyncio.create_task(self._until(*one, answer)) for one in connections]
            await asyncio.sleep(0.005)
            await database.execute("update device set status = $1 where device_id = $2", status, self._device)
            committed = time.monotonic()
            took.append(max(await asyncio.gather(*watching)) - committed)
            if n % 100 == 99:
                say(f"{n + 1} changes, the last after {1000 * took[-1]:.1f} ms")
        await database.close()
        for _, writer in connections:
            writer.close()
        return took

    async def mass(self, number: int, say: Callable[[str], None]) -> dict[str, Any]:
        """Update many devices in one statement; measure until all workers use it, and the latency meanwhile."""
        connections = await self._connections()
        database = await asyncpg.connect(self._dsn, command_timeout=600)
        quiet: list[float] = []
        await asyncio.gather(*(self._until(*one, b"nothing", quiet, time.monotonic() + 3.0) for one in connections))
        during: list[float] = []
        watching = [asyncio.create_task(self._until(*one, b"deny", during)) for one in connections]
        begun = time.monotonic()
        await database.execute(
            "update device set status = 'suspended' where device_id >= 'd0002000' and device_id < 'd' || lpad($1::text, 7, '0')",
            str(2000 + number),
        )
        committed = time.monotonic()
        last = max(await asyncio.gather(*watching)) - committed
        await database.execute("update device set status = 'active' where status = 'suspended'")
        await database.close()
        for _, writer in connections:
            writer.close()
        result = {
            "devices": number,
            "statement_s": round(committed - begun, 2),
            "commit_to_last_s": round(last, 3),
            "p99_quiet_ms": _p99_ms(quiet),
            "p99_meanwhile_ms": _p99_ms(during),
        }
        say(f"mass change: {result}")
        return result

    async def _until(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        answer: bytes,
        times: list[float] | None = None,
        end: float | None = None,
    ) -> float:
        """Poll until the answer is this one, or until ``end``; return the time of the last answer."""
        form = load_client.topic_form(self._device, f"fleet.{self._device}.telemetry.s1")
        request = load_client.http_post("/auth/topic", form)
        while True:
            asked = time.monotonic()
            text = await _answer(reader, writer, request)
            now = time.monotonic()
            if times is not None:
                times.append(now - asked)
            if text == answer or (end is not None and now >= end):
                return now
            await asyncio.sleep(_PAUSE_S)


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> bytes:
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: *([0-9]+)", head)
    assert length is not None
    return await reader.readexactly(int(length[1]))


def _p99_ms(times: list[float]) -> float:
    return round(1000 * sorted(times)[int(0.99 * len(times))], 2)


def _owner(replica: Running, client_port: int) -> int:
    """Return the process of a replica that has the other end of a connection from this port."""
    inode = ""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[2].split(":")[1], 16) == client_port and int(fields[1].split(":")[1], 16) == replica.port:
            inode = fields[9]
    for pid in descendants(replica.process.pid):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                if fd.readlink().name == f"socket:[{inode}]":
                    return pid
            except OSError:
                continue
    raise BenchmarkError(f"no process of {replica.name} has the connection from port {client_port}")
