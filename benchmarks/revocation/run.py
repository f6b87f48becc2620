"""Measures revocations: ``python -m benchmarks.revocation.run OPTIONS RESULT``, JSON files, inside the namespaces."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import asyncpg
import uvloop

from authbackend_load.fleet import Fleet
from authbackend_load.plan import Plan
from benchmarks import load_client
from benchmarks.revocation.certificates import certificates
from benchmarks.revocation.environment import SENDER, Device, Environment, Options, running_environment
from benchmarks.storm.processes import cpu_s
from tests.broker.clients import Management
from tests.broker.processes import HarnessError

REVOKE_EVERY_S = 0.4
REST_S = 4.0
"""How long a device stays revoked: until its task has been checked a second time."""

_SUBSCRIBERS = 20
_NARROWED = 60
_NODE_DOWN = 30
_TASK = "select state, receipt, extract(epoch from finished_at - noted_at)::float8 as took from enforcement where name = $1 order by id desc limit 1"


def say(text: str) -> None:
    """Print progress to standard error."""
    print(f"revocation: {text}", file=sys.stderr, flush=True)  # noqa: T201


def quantiles(values: list[float]) -> dict[str, float]:
    """Return number, median, p99 and maximum of times in seconds, in milliseconds."""
    ordered = sorted(values)
    return {
        "number": len(ordered),
        "p50_ms": round(1000 * statistics.median(ordered), 1),
        "p99_ms": round(1000 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 1),
        "longest_ms": round(1000 * ordered[-1], 1),
    }


class Measurements:
    """The measurements, all in one environment; the database connection makes the changes."""

    def __init__(self, environment: Environment, database: asyncpg.Connection) -> None:
        self.environment = environment
        self.database = database

    async def set_status(self, names: list[str], status: str) -> float:
        """Commit a status and return the time, by the monotonic clock."""
        await self.database.execute("update device set status = $2 where device_id = any ($1)", names, status)
        return time.monotonic()

    async def finished(self, limit_s: float = 120.0) -> None:
        """
        Wait until no enforcement task is open.

        Raises:
            HarnessError: A task is still open.
        """
        deadline = time.monotonic() + limit_s
        while left := await self.database.fetchval("select count(*) from enforcement where finished_at is null"):
            if time.monotonic() > deadline:
                raise HarnessError(f"{left} enforcement tasks are still open after {limit_s:g} s")
            await asyncio.sleep(0.05)

    async def publishers(self, number: int) -> list[Device]:
        """Connect devices and start publishing."""
        devices = self.environment.devices[1 : number + 1]
        for device in devices:
            await device.connect()
            device.publish_on()
        return devices

    async def revocations(self) -> dict[str, Any]:
        """Revoke publishers one after the other; measure until the last accepted message, and until the disconnect."""
        devices = await self.publishers(self.environment.options.publishers)
        accepted, closed = [], []
        resting: list[tuple[float, Device]] = []
        for number in range(self.environment.options.revocations):
            begin = time.monotonic()
            device = devices[number % len(devices)]
            last, lost = await self._revoke(device)
            accepted.append(last)
            closed.append(lost)
            resting.append((time.monotonic() + REST_S, device))
            await self._reinstate(resting)
            if number % 50 == 49:
                say(f"{number + 1} revocations: last message accepted after {quantiles(accepted)}")
            await asyncio.sleep(max(0.0, REVOKE_EVERY_S - (time.monotonic() - begin)))
        await self.finished()
        rows = await self.database.fetch("select receipt from enforcement where causes = '{revoked}'")
        return {
            "last_accepted": quantiles(accepted),
            "closed": quantiles(closed),
            "closed_ms": [round(1000 * each, 2) for each in closed],
            "accepted_ms": [round(1000 * each, 2) for each in accepted],
            "receipts": len(rows),
            "closed_connections": sum(sum(json.loads(row["receipt"])["closed"].values()) for row in rows),
        }

    async def _revoke(self, device: Device) -> tuple[float, float]:
        assert device.connection is not None
        committed = await self.set_status([device.name], "revoked")
        async with asyncio.timeout(60):
            await device.connection.lost
            while device.lost_at < committed:  # noqa: ASYNC110 - the publishing task records it a moment later
                await asyncio.sleep(0.001)
        return max(0.0, device.accepted_at - committed), device.lost_at - committed

    async def _reinstate(self, resting: list[tuple[float, Device]]) -> None:
        while resting and resting[0][0] < time.monotonic():
            _, device = resting.pop(0)
            await self.set_status([device.name], "active")
            await asyncio.sleep(0.05)
            await device.connect()
            device.publish_on()

    async def node_stopped(self) -> dict[str, Any]:
        """Measure revocations right after a node was killed, of devices on the other two."""
        node = self.environment.cluster.nodes[2]
        devices = [
            d for d in self.environment.devices[1:] if d.port != node.doors.mqtt_tls and d.connection is not None
        ]
        alive = [d for d in devices if d.connection and not d.connection.lost.done()][:_NODE_DOWN]
        await asyncio.to_thread(node.kill)
        accepted = []
        for device in alive:
            accepted.append((await self._revoke(device))[0])
        await asyncio.to_thread(node.start)
        await self.finished()
        names = [device.name for device in alive]
        done = await self.database.fetchval(
            "select count(distinct name) from enforcement where name = any ($1) and state = 'done' and receipt ->> 'checked_at' is not null",
            names,
        )
        await self.set_status(names, "active")
        return {"last_accepted": quantiles(accepted), "revoked": len(names), "verified": done}

    async def subscribers(self) -> dict[str, Any]:
        """Count messages to revoked subscribers after the receipt, and in their sessions after they are reinstated."""
        sender = self.environment.devices[0]
        await sender.connect()
        assert sender.connection is not None
        after = left = 0
        for device in self.environment.devices[-_SUBSCRIBERS:]:
            connection = await device.connect(clean=False)
            topic = f"fleet/{device.name}/commands/x"
            await connection.subscribe([f"fleet/{device.name}/commands/#"], 1)
            over = asyncio.Event()

            async def send(topic: str = topic, over: asyncio.Event = over) -> None:
                assert sender.connection is not None
                while not over.is_set():
                    await sender.connection.publish(topic, b"x", 1)
                    await asyncio.sleep(0.02)

            sending = asyncio.create_task(send())
            await asyncio.sleep(0.1)
            await self.set_status([device.name], "revoked")
            while (await self.database.fetchrow(_TASK, device.name))["state"] != "done":  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            before = connection.messages
            await asyncio.sleep(0.3)
            after += connection.messages - before
            over.set()
            await sending
            await self.set_status([device.name], "active")
            await asyncio.sleep(0.1)
            again = await device.connect(clean=False)
            await asyncio.sleep(0.3)
            left += again.messages
            again.cut()
        return {"subscribers": _SUBSCRIBERS, "messages_after_the_receipt": after, "messages_after_reinstating": left}

    async def narrowed(self) -> dict[str, Any]:
        """Take a subscription from a type, and count what is left in its sessions."""
        devices = self.environment.devices[-_SUBSCRIBERS - _NARROWED : -_SUBSCRIBERS]
        for number, device in enumerate(devices):
            connection = await device.connect(clean=False)
            topics = [f"fleet/{device.name}/commands/#", f"fleet/{device.name}/telemetry/#"]
            await connection.subscribe(topics, 1)
            if number % 2:
                connection.disconnect()
        begin = time.monotonic()
        await self.database.execute(
            "insert into topic_rule (device_type, effect, action, topic) values ('APM', 'deny', 'subscribe', 'fleet/+/telemetry/#')"
        )
        await self.finished()
        took_s = time.monotonic() - begin
        kept = illegitimate = 0
        management = Management(
            str(self.environment.certificates.ca_file),
            port=self.environment.cluster.nodes[0].doors.management_tls,
            username="enforcer",
            password="enforcer-password",  # noqa: S106 - of the benchmark's own account
        )
        async with management as api:
            for device in devices:
                _, bindings = await api.get(f"queues/%2F/mqtt-subscription-{device.name}qos1/bindings")
                keys = (
                    {each["routing_key"] for each in bindings if each["source"]}
                    if isinstance(bindings, list)
                    else set()
                )
                kept += f"fleet.{device.name}.commands.#" in keys
                illegitimate += f"fleet.{device.name}.telemetry.#" in keys
        return {"sessions": len(devices), "kept": kept, "illegitimate_left": illegitimate, "took_s": round(took_s, 2)}

    async def mass(self) -> dict[str, Any]:
        """Revoke many devices in one statement; measure the duration, and the latency of other devices' decisions."""
        options = self.environment.options
        connected = self.environment.devices[1 : options.fleet - _SUBSCRIBERS - _NARROWED]
        await self.set_status([device.name for device in connected], "active")
        await asyncio.sleep(0.5)
        for device in connected:
            if device.connection is None or device.connection.lost.done():
                await device.connect()
        names = [device.name for device in connected]
        names += [f"other{n}" for n in range(1, options.mass - len(names) + 1)]
        forms = [load_client.topic_form(SENDER, f"fleet.{SENDER}.telemetry.x")]
        quiet, meanwhile = [], []
        over = threading.Event()

        def measure_p99(p99_s: list[float], once: bool) -> None:
            while True:
                p99_s.append(load_client.latencies(self.environment.other.broker_port, forms, 300, 2.0).quantile(0.99))
                if once or over.is_set():
                    return

        for _ in range(3):
            await asyncio.to_thread(measure_p99, quiet, True)
        thread = threading.Thread(target=measure_p99, args=(meanwhile, False))
        thread.start()
        begin = await self.set_status(names, "revoked")
        await asyncio.gather(*(device.connection.lost for device in connected if device.connection is not None))
        closed_s = time.monotonic() - begin
        await self.finished(600)
        over.set()
        thread.join()
        return {
            "revoked": len(names),
            "connected": len(connected),
            "all_closed_s": round(closed_s, 1),
            "all_verified_s": round(time.monotonic() - begin, 1),
            "kicks_per_second": options.kicks_per_second,
            "p99_quiet_ms": round(1000 * statistics.median(quiet), 2),
            "p99_meanwhile_ms": round(1000 * statistics.median(meanwhile), 2),
        }

    async def sweep(self) -> dict[str, Any]:
        """Measure sweeps over many connections."""
        options, cluster = self.environment.options, self.environment.cluster
        names = [each.device_id for each in self.environment.identities]
        await self.set_status(names, "active")
        await self.finished()
        for each in (self.environment.other, self.environment.service):
            each.stop()
            each.enforce(cluster.management, sweep_interval_s="15")
            each.start()
        pids = [int(node.control("eval", "os:getpid().").strip().strip('"')) for node in cluster.nodes]
        over = threading.Event()
        with ExitStack() as stack:
            for number, node in enumerate(cluster.nodes):
                plan = Plan(
                    host="127.0.0.1",
                    port=node.doors.mqtt_tls,
                    server_name="localhost",
                    ca_file=str(self.environment.certificates.ca_file),
                    keep_alive_s=3600,
                    until="login",
                    in_flight=100,
                )
                own = self.environment.identities[: options.swept][number::3]
                fleet = stack.enter_context(Fleet(plan, own, 1))
                await asyncio.to_thread(fleet.storm, 600.0)
                say(f"{len(own)} connected to {node.name}")
                thread = threading.Thread(target=keep_connected, args=(fleet, over))
                thread.start()
                stack.callback(thread.join)
            stack.callback(over.set)
            return await self._swept(pids)

    async def _swept(self, pids: list[int]) -> dict[str, Any]:
        reports: list[dict[str, Any]] = []
        last = await self.database.fetchval("select max(at) from enforcement_sweep")
        busy, idle = [], []
        deadline = time.monotonic() + 240
        while len(reports) < 4 and time.monotonic() < deadline:
            before = cpu_s(pids)
            await asyncio.sleep(1.0)
            used = cpu_s(pids) - before
            row = await self.database.fetchrow("select at, report from enforcement_sweep")
            if row is None or row["at"] == last:
                idle.append(used)
                continue
            last = row["at"]
            report = json.loads(row["report"])
            busy.append(used)
            reports.append({name: report[name] for name in ("connections", "sessions", "duration_s", "found")})
            say(f"sweep: {reports[-1]}")
        whole = [each for each in reports if each["connections"] >= self.environment.options.swept]
        return {
            "connections": self.environment.options.swept,
            "sweeps": reports,
            "duration_s": [each["duration_s"] for each in whole],
            "broker_cpu_s_a_second_idle": round(statistics.median(idle), 3) if idle else None,
            "broker_cpu_s_in_the_second_of_a_sweep": [round(each, 3) for each in busy],
        }


def keep_connected(fleet: Fleet, over: threading.Event) -> None:
    """Keep the connections of a fleet until ``over`` is set."""
    while not over.is_set():
        fleet.hold(0.5)


async def measure(options: Options) -> dict[str, Any]:
    """
    Start all parts, measure, and return the result for JSON.

    Raises:
        HarnessError: A part did not start or failed.
    """
    say("booting a cluster of three nodes, PostgreSQL and two replicas")
    with running_environment(options) as environment:
        result: dict[str, Any] = {"options": options.as_dict()}
        database = await asyncpg.connect(environment.database.dsn_of())
        measurements = Measurements(environment, database)
        parts: tuple[Callable[[], Any], ...] = (
            measurements.revocations,
            measurements.node_stopped,
            measurements.subscribers,
            measurements.narrowed,
            measurements.mass,
            measurements.sweep,
        )
        for part in parts:
            say(f"--- {part.__name__}")
            result[part.__name__] = await part()
            shown = {name: value for name, value in result[part.__name__].items() if not name.endswith("_ms")}
            say(f"{part.__name__}: {json.dumps(shown)[:400]}")
        await database.close()
    return result


def main() -> None:
    """Read the options, measure, write the result."""
    options = Options(**json.loads(Path(sys.argv[1]).read_text()))
    try:
        result = uvloop.run(measure(options))
        say("--- certificates")
        times = certificates(options.certificates)
        result["certificates"] = {
            "refused_ms": quantiles(times["refused_s"]),
            "closed_ms": quantiles(times["closed_s"]),
            "dropped": times["dropped"],
        }
        say(f"certificates: {result['certificates']}")
    except HarnessError as error:
        say(str(error))
        sys.exit(1)
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
