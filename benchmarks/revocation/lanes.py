"""
Measures single revocations during mass changes. Run as ``python -m benchmarks.revocation.lanes OPTIONS RESULT``, two
JSON files.

Runs inside the namespaces, in the same environment as the other measurements of revocations.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import uvloop

from authbackend.enforcement.inventory import STATISTICS_LATE_S
from authbackend.enforcement.management_api import Access, ManagementAPI
from authbackend_load.fleet import Fleet
from authbackend_load.plan import Plan
from benchmarks import load_client
from benchmarks.revocation.environment import SENDER, Device, Environment, Options, running_environment
from benchmarks.revocation.run import keep_connected, quantiles, say
from tests.broker.processes import HarnessError

RATE = 20
"""Single revocations per second."""

_SPAWN = multiprocessing.get_context("spawn")

CONNECTED = 1000
"""Connected devices of a mass revocation, and connected devices for single revocations."""

_TYPE_RULE = "insert into topic_rule (device_type, effect, action, topic) values ('APM', 'deny', 'subscribe', 'fleet/+/telemetry/#')"


class Lanes:
    """The measurements, all in one environment."""

    def __init__(self, environment: Environment, pool: asyncpg.Pool) -> None:
        self.environment = environment
        self.pool = pool
        self.mass = environment.devices[1 : CONNECTED + 1]
        self.single = environment.devices[CONNECTED + 1 : 2 * CONNECTED + 1]

    async def set_status(self, names: list[str], status: str) -> float:
        """Commit a status and return the time, by the monotonic clock."""
        await self.pool.execute("update device set status = $2 where device_id = any ($1)", names, status)
        return time.monotonic()

    async def reset(self, devices: list[Device], limit_s: float = 300.0) -> None:
        """
        Reinstate the devices, wait until no task is open, and connect those that are not connected.

        Raises:
            HarnessError: A task is still open.
        """
        await self.set_status([device.name for device in devices], "active")
        deadline = time.monotonic() + limit_s
        while left := await self.pool.fetchval("select count(*) from enforcement where finished_at is null"):
            if time.monotonic() > deadline:
                raise HarnessError(f"{left} enforcement tasks are still open after {limit_s:g} s")
            await asyncio.sleep(0.1)
        await asyncio.sleep(1.0)  # until every replica uses the new status
        for device in devices:
            if device.connection is None or device.connection.lost.done():
                await device.connect()

    async def restart(self, clusters: str, per_second: int) -> None:
        """Restart both replicas with other settings."""
        for each in (self.environment.other, self.environment.service):
            await asyncio.to_thread(each.stop)
            each.enforce(clusters, sweep_interval_s="3600")
            each.configure(ENFORCEMENT__KICKS_PER_SECOND=str(per_second))
            await asyncio.to_thread(each.start)
        deadline = time.monotonic() + 30
        while True:
            try:
                _ = self.environment.leading
            except StopIteration:
                if time.monotonic() > deadline:
                    raise HarnessError("no replica enforces after 30 s") from None
                await asyncio.sleep(0.1)
            else:
                self.environment.separate()
                return

    async def singles(self, number: int) -> list[float]:
        """Revoke devices at :data:`RATE`; return the seconds from each commit until the connection was lost."""

        async def one(device: Device) -> float:
            assert device.connection is not None
            committed = await self.set_status([device.name], "revoked")
            async with asyncio.timeout(120):
                await device.connection.lost
            return time.monotonic() - committed

        begin = time.monotonic()
        running = []
        for n, device in enumerate(self.single[:number]):
            await asyncio.sleep(max(0.0, begin + n / RATE - time.monotonic()))
            running.append(asyncio.create_task(one(device)))
        return list(await asyncio.gather(*running))

    async def quiet(self) -> dict[str, Any]:
        """Measure single revocations with nothing else to do."""
        await self.reset(self.single[:200])
        return {"closed": quantiles(await self.singles(200))}

    async def busy_brokers(self) -> dict[str, Any]:
        """Measure decisions while the management API keeps the brokers busy, with nothing to enforce."""
        urls = tuple(self.environment.cluster.management.split())
        access = Access(urls, lambda: ("enforcer", "enforcer-password"), str(self.environment.certificates.ca_file))
        async with contextlib.aclosing(ManagementAPI(access)) as cluster, decisions(self.environment) as latency:
            end = time.monotonic() + 10

            async def list_nodes() -> None:
                while time.monotonic() < end:
                    await cluster.nodes()

            await asyncio.gather(*(list_nodes() for _ in range(8)))
        return latency

    async def mass_change(self, per_second: int, singles: int = 0, *, asked: bool = True) -> dict[str, Any]:
        """
        Revoke 10,000 of 100,000 devices, 1,000 of them connected, and meanwhile ``singles`` others one by one.

        Args:
            asked: Whether a client measures decisions meanwhile; it needs CPU time that brokers would have.
        """
        await self.restart(self.environment.cluster.management, per_second)
        await self.reset([*self.mass, *self.single[:singles]])
        names = [device.name for device in self.mass]
        names += [f"other{n}" for n in range(1, self.environment.options.mass - len(names) + 1)]
        await asyncio.sleep(STATISTICS_LATE_S)  # until RabbitMQ lists those that have just connected
        async with contextlib.AsyncExitStack() as stack:
            latency = await stack.enter_async_context(decisions(self.environment)) if asked else {}
            begin = await self.set_status(names, "revoked")
            revoking = asyncio.create_task(self.singles(singles))
            await asyncio.gather(*(each.connection.lost for each in self.mass if each.connection is not None))
            closed_s = time.monotonic() - begin
            open_ = "select count(*) from enforcement where finished_at is null and lane = 'mass'"
            while await self.pool.fetchval(open_):  # noqa: ASYNC110 - there is only the table to wait for
                await asyncio.sleep(0.05)
            verified_s = time.monotonic() - begin
            closed = await revoking
        return {
            "revoked": len(names),
            "connected": len(self.mass),
            "kicks_per_second": per_second,
            "last_closed_s": round(closed_s, 2),
            "all_verified_s": round(verified_s, 2),
            **({"single": quantiles(closed)} if closed else {}),
            **latency,
        }

    async def type_change(self) -> dict[str, Any]:
        """Take a subscription from a type with 20,000 connected devices; measure single revocations meanwhile."""
        await self.restart(self.environment.cluster.management, self.environment.options.kicks_per_second)
        await self.reset(self.single[:400])
        publishers = {device.name for device in self.environment.devices}
        over = threading.Event()
        with ExitStack() as stack:
            for number, node in enumerate(self.environment.cluster.nodes):
                plan = Plan(
                    host="127.0.0.1",
                    port=node.doors.mqtt_tls,
                    server_name="localhost",
                    ca_file=str(self.environment.certificates.ca_file),
                    keep_alive_s=3600,
                    subscribe=("fleet/{device_id}/commands/#", "fleet/{device_id}/telemetry/#"),
                    subscribe_qos=0,
                    until="subscribe",
                    in_flight=100,
                )
                own = [each for each in self.environment.identities if each.device_id not in publishers][number::3]
                fleet = stack.enter_context(Fleet(plan, own, 1))
                await asyncio.to_thread(fleet.storm, 900.0)
                say(f"{len(own)} connected to {node.name}")
                thread = threading.Thread(target=keep_connected, args=(fleet, over))
                thread.start()
                stack.callback(thread.join)
            stack.callback(over.set)
            async with decisions(self.environment) as latency:
                await self.pool.execute(_TYPE_RULE)
                closed = await self.singles(400)
        look = (
            "select (receipt ->> 'devices')::int from enforcement where kind = 'device_type' order by id desc limit 1"
        )
        while (sessions := await self.pool.fetchval(look)) is None:  # noqa: ASYNC110 - there is only the table to wait for
            await asyncio.sleep(0.1)
        return {"sessions": sessions, "single": quantiles(closed), **latency}

    async def cluster_down(self) -> dict[str, Any]:
        """Measure single revocations with and without a second cluster that accepts connections but never answers."""
        one = self.environment.cluster.management
        rounds: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
        with socket.create_server(("127.0.0.2", 15671), backlog=1024):
            for _ in range(3):
                for name, clusters in (("without", one), ("with", f"{one},https://127.0.0.2:15671")):
                    await self.restart(clusters, 100)
                    if rounds["with"] and name == "without":  # not before: a replica that has it could add it
                        await asyncio.to_thread(self.environment.service.command, "enforcement", "forget", "127.0.0.2")
                    await self.reset(self.single[:200])
                    rounds[name].append(quantiles(await self.singles(200)))
            await self.restart(one, 100)
            await asyncio.to_thread(self.environment.service.command, "enforcement", "forget", "127.0.0.2")
        p99 = {name: statistics.median(each["p99_ms"] for each in measured) for name, measured in rounds.items()}
        return {"rounds": rounds, "p99_ms": p99, "ratio": round(p99["with"] / p99["without"], 3)}


@asynccontextmanager
async def decisions(environment: Environment) -> AsyncIterator[dict[str, float]]:
    """
    Measure the p99 of decisions before and during the block; the result is complete after the block.

    In a separate process: in this one, answers would wait for everything else that runs here.
    """
    over, meanwhile = _SPAWN.Event(), _SPAWN.Queue()
    quiet = []
    for _ in range(3):
        client = _SPAWN.Process(target=_measure_p99, args=(environment.other.broker_port, None, meanwhile))
        client.start()
        quiet.append(await asyncio.to_thread(meanwhile.get))
        await asyncio.to_thread(client.join)
    client = _SPAWN.Process(target=_measure_p99, args=(environment.other.broker_port, over, meanwhile))
    client.start()
    latency: dict[str, float] = {}
    try:
        yield latency
    finally:
        over.set()
        await asyncio.to_thread(client.join)
        during = [meanwhile.get() for _ in range(meanwhile.qsize())]
        latency["p99_quiet_ms"] = round(1000 * statistics.median(quiet), 2)
        latency["p99_meanwhile_ms"] = round(1000 * statistics.median(during), 2)


def _measure_p99(port: int, over: Any, p99_s: Any) -> None:
    """Put the p99 of two seconds into a queue, once or until ``over``, at real-time priority."""
    os.setsid()
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    forms = [load_client.topic_form(SENDER, f"fleet.{SENDER}.telemetry.x")]
    while True:
        p99_s.put(load_client.latencies(port, forms, 300, 2.0).quantile(0.99))
        if over is None or over.is_set():
            return


async def measure(options: Options) -> dict[str, Any]:
    """
    Start all parts, measure, and return the result for JSON.

    Raises:
        HarnessError: A part did not start or failed.
    """
    say("booting a cluster of three nodes, PostgreSQL and two replicas")
    with running_environment(options) as environment:
        async with asyncpg.create_pool(environment.database.dsn_of(), min_size=4, max_size=16) as pool:
            environment.separate()
            lanes = Lanes(environment, pool)
            result: dict[str, Any] = {"options": options.as_dict()}
            for name, part in (
                ("quiet", lanes.quiet),
                ("busy_brokers", lanes.busy_brokers),
                ("mass_100", lambda: lanes.mass_change(100, asked=False)),
                ("mass_1000", lambda: lanes.mass_change(1000, asked=False)),
                ("asked_100", lambda: lanes.mass_change(100)),
                ("asked_1000", lambda: lanes.mass_change(1000)),
                ("mixed_100", lambda: lanes.mass_change(100, 400)),
                ("mixed_1000", lambda: lanes.mass_change(1000, 400)),
                ("cluster_down", lanes.cluster_down),
                ("type_change", lanes.type_change),
            ):
                say(f"--- {name}")
                result[name] = await part()
                say(f"{name}: {json.dumps(result[name])[:600]}")
    return result


def main() -> None:
    """Read the options, measure, write the result."""
    changes = json.loads(Path(sys.argv[1]).read_text())
    options = replace(Options(fleet=2 * CONNECTED + 1), **changes)
    try:
        result = uvloop.run(measure(options))
    except HarnessError as error:
        say(str(error))
        sys.exit(1)
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
