"""The processes of a replica, and their answers when one of them dies or the database is unreachable."""

import asyncio
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import asyncpg
import pytest

from authbackend.postgres import registry_edits, replicas
from authbackend.postgres.connection import Target
from tests.service.conftest import HASH, PATIENT, POLICY, Running, apply, memory, until
from tests.service.test_tls import Bench


def children(process_id):
    """Return the child processes of a process."""
    return [int(child) for child in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()]


class Replica(Running):
    """A running ``authbackend serve``."""

    def __init__(self, process, http, lines):
        super().__init__("", "", "", http)
        self.process = process
        self.lines = lines

    def logged(self, event):
        """Return the log lines of an event."""
        return [line for line in self.lines if line.get("event") == event]

    async def status(self):
        """Return the answer of /health/ready, as (status, document)."""
        status, text = await self.get("/health/ready")
        return status, json.loads(text)

    async def end(self):
        """Send SIGTERM and return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), 30)


@contextlib.asynccontextmanager
async def replica(dsn, *, workers=2, ready=True, files=None, patience_s=60, **environment):
    """
    Run a replica for the duration of the block.

    Args:
        files: Limit on open files of each of its processes.
        patience_s: Time allowed for the start, for busy machines.
    """
    others = {name: value for name, value in os.environ.items() if not name.startswith("AUTHBACKEND")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "authbackend", "serve", "--workers", str(workers)),
        env={
            **others,
            "AUTHBACKEND_DATABASE__DSN": dsn,
            "AUTHBACKEND_BROKER__LISTEN": "127.0.0.1:0",
            "AUTHBACKEND_ADMIN__LISTEN": "127.0.0.1:0",
            "AUTHBACKEND_HEALTH__LISTEN": "127.0.0.1:0",
            **{f"AUTHBACKEND_{name}": value for name, value in {**PATIENT, **environment}.items()},
        },
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=files and (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))),
    )
    lines = []

    async def read():
        while line := await process.stderr.readline():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))

    reading = asyncio.create_task(read())
    async with aiohttp.ClientSession() as http:
        running = Replica(process, http, lines)
        try:

            async def listening():
                return running.logged("service.listening")

            async def up():
                return await running.ready() and (await running.status())[1]["workers"]["serving"] == workers

            (where,) = await until(listening, "the replica listens", patience_s)
            running.broker, running.admin, running.health = where["broker"], where["admin"], where["health"]
            if ready:
                await until(up, "the replica is ready", patience_s)
            yield running
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            await reading


@pytest.fixture
async def policy(dsn):
    """Load the sample registry."""
    await apply(dsn, POLICY.replace("HASH", f'"{HASH}"'))


@contextlib.asynccontextmanager
async def away(dsn):
    """Close all connections to the database and block new ones for the duration of the block."""
    other = await asyncpg.connect(dsn, database="postgres")
    name = dsn.split("/")[3].partition("?")[0]
    try:
        await other.execute(f'alter database "{name}" allow_connections false')
        await other.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = $1", name)
        yield
    finally:
        await other.execute(f'alter database "{name}" allow_connections true')
        await other.close()


async def test_a_killed_worker_is_started_again_and_the_sums_do_not_go_back(dsn, policy):
    async with replica(dsn) as running:
        for _ in range(20):
            async with aiohttp.ClientSession() as fresh:  # another connection, perhaps to the other worker
                data = {"username": "APM0001"}
                async with fresh.post(f"{running.broker}/auth/user", data=data) as response:
                    assert await response.text() == "allow"
        assert await running.metric("authbackend_decisions_total", endpoint="user") == 20
        worker = children(running.process.pid)[-1]
        os.kill(worker, signal.SIGKILL)

        async def restarted():
            return await running.metric("authbackend_worker_restarts") == 1 and await running.ready()

        await until(restarted, "the worker is started again")
        assert await running.metric("authbackend_decisions_total", endpoint="user") == 20

        async def both():
            return (await running.status())[1]["workers"]["serving"] == 2

        await until(both, "both serve")
        assert await running.login("APM0001") == "allow"
        assert running.logged("process.died")[0]["how"] == "killed by signal 9"
        assert await running.end() == 0


async def test_the_killed_process_that_follows_the_database_goes_on_where_it_was(dsn, policy, sql):
    async with replica(dsn) as running:
        os.kill(children(running.process.pid)[0], signal.SIGKILL)
        assert await running.login("APM0001") == "allow"
        await sql("update device set status = 'revoked' where device_id = 'APM0001'")

        async def denied():
            return await running.login("APM0001") == "deny"

        await until(denied, "the revocation is decided by")
        assert await running.end() == 0


@pytest.mark.parametrize("name", ["admin", "health"])
async def test_a_killed_process_that_answers_people_or_balancers_is_started_again_and_nothing_else_notices(
    dsn, policy, sql, name
):
    async with replica(dsn) as running:
        everybody = children(running.process.pid)
        await until(lambda: running.metric("authbackend_replicas", state="live"), "the replicas are counted")
        killed = everybody.pop(["registry", "admin", "health"].index(name))
        os.kill(killed, signal.SIGKILL)
        assert await running.login("APM0001") == "allow"
        await sql("update device set status = 'revoked' where device_id = 'APM0001'")

        async def denied():
            return await running.login("APM0001") == "deny"

        await until(denied, "the revocation is decided by")

        async def answered():
            with contextlib.suppress(aiohttp.ClientError):
                assert (await running.get("/api/explain"))[0] == 400
                return await running.ready() and await running.metric("authbackend_replicas", state="live") == 1

        await until(answered, "everybody is answered again")
        after = children(running.process.pid)
        assert killed not in after and set(everybody) < set(after)
        assert [line["name"] for line in running.logged("process.died")] == [name]
        assert await running.end() == 0


def flood(stack, url, number):
    """Open connections that each begin a request and never finish it."""
    where = urlsplit(url)
    for _ in range(number):
        opened = stack.enter_context(contextlib.closing(socket.create_connection((where.hostname, where.port))))
        opened.setblocking(False)
        with contextlib.suppress(OSError):  # closed already
            opened.send(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Endless: ")


@pytest.mark.parametrize("listener", ["admin", "health"])
async def test_half_sent_requests_are_cut_off_and_changes_are_followed_meanwhile(dsn, policy, sql, listener):
    async with replica(dsn, workers=1, files=96) as running:
        with contextlib.ExitStack() as stack:
            flood(stack, getattr(running, listener), 120)
            await sql(
                "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
            )
            await sql("update device set status = 'revoked' where device_id = 'APM0001'")

            async def denied():
                return await running.login("APM0001") == "deny"

            await until(denied, "the revocation is decided by, over a connection opened during the flood")

            closed = f"authbackend_{listener}_connections_closed_total"

            async def answered():
                with contextlib.suppress(aiohttp.ClientError):
                    assert (await running.get("/api/explain"))[0] == 400
                    return await running.metric(closed, cause="slow") >= 1

            await until(answered, "everybody is answered when the slow ones have been cut off")
            assert await running.metric(closed, cause="too_many") >= 1
        assert not running.logged("process.died")
        assert await running.end() == 0


async def test_whatever_is_done_to_the_listener_for_people_balancers_and_brokers_hosts_are_answered(dsn, policy, sql):
    await sql("insert into authority values ('fleet', 'CN=fleet', '-----BEGIN CERTIFICATE-----', now())")
    await sql("insert into crl values ('fleet', 1, now(), now() + interval '1 day', '\\x01')")
    patient = {"ADMIN__REQUEST_TIMEOUT_S": "60"}  # the flood continues until the end of this test
    async with replica(dsn, workers=1, files=96, **patient) as running:

        async def served():
            return (await running.get("/crl/fleet.crl"))[0] == 200

        await until(served, "the list is served")
        with contextlib.ExitStack() as stack:
            flood(stack, running.admin, 120)

            async def full():
                return await running.metric("authbackend_admin_connections_closed_total", cause="too_many") >= 1

            await until(full, "the listener for people is full")
            with pytest.raises(aiohttp.ClientError):
                await running.get("/api/explain")
            async with aiohttp.ClientSession() as running.http:  # new connections
                assert (await running.status())[0] == 200
                assert await served()
                assert (await running.get("/health/live"))[0] == 200
        assert not running.logged("process.died")


@pytest.fixture
async def folder():
    """Create an empty folder in memory that no other replica uses."""
    async with memory() as empty:
        yield empty


async def test_nothing_is_left_when_the_parent_is_killed(dsn, policy, folder):
    async with replica(dsn, REGISTRY__MEMORY_DIR=str(folder)) as running:
        everybody = children(running.process.pid)
        assert len(everybody) == 5
        running.process.kill()

        async def gone():
            return not any(Path(f"/proc/{child}").exists() for child in everybody)

        await until(gone, "the children have ended")
    (left,) = folder.iterdir()
    async with replica(dsn, REGISTRY__MEMORY_DIR=str(folder)) as running:
        (own,) = folder.iterdir()  # the new replica removed what the killed one had left
        assert own != left
        assert await running.end() == 0


async def test_sigterm_ends_everything_and_leaves_nothing(dsn, policy, folder):
    async with replica(dsn, REGISTRY__MEMORY_DIR=str(folder)) as running:
        assert await running.login("APM0001") == "allow"
        assert list(folder.iterdir())
        assert await running.end() == 0
        assert not list(folder.iterdir())
        assert running.logged("service.stopped")
    connection = await asyncpg.connect(dsn)
    assert await connection.fetchval("select count(*) from replica_state where may_answer") == 0
    await connection.close()


def hears_hangups(process_id):
    """Return whether a process has a handler for SIGHUP."""
    for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return int(line.split()[1], 16) >> (signal.SIGHUP - 1) & 1 == 1
    return False


async def hang_up(process_id):
    """Send SIGHUP to a service and all its processes as fast as possible, until it has ended."""
    while not hears_hangups(process_id):  # the interpreter itself is still starting
        await asyncio.sleep(0)
    sent = 0
    with contextlib.suppress(OSError, asyncio.CancelledError):
        while True:
            for each in [process_id, *children(process_id)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGHUP)
            sent += 1
            await asyncio.sleep(0.001)
    return sent


async def test_no_hangup_ends_any_process_while_it_starts_runs_or_stops(dsn, policy, monkeypatch):
    started = asyncio.create_subprocess_exec
    storms = []

    async def in_a_storm(*arguments, **others):
        process = await started(*arguments, **others)
        storms.append(asyncio.create_task(hang_up(process.pid)))
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", in_a_storm)
    async with replica(dsn) as running:
        assert await running.login("APM0001") == "allow"
        assert await running.end() == 0
        (storm,) = storms
        storm.cancel()
        assert await storm > 100
        assert not running.logged("process.died")
        assert running.logged("service.stopped")


async def test_a_hangup_has_every_worker_read_its_certificates_again(dsn, policy, tmp_path):
    bench = Bench(tmp_path)
    async with replica(dsn, **bench.environment) as running:
        running.process.send_signal(signal.SIGHUP)

        async def everybody_did():
            return (
                len(
                    {
                        line["process"]
                        for line in running.logged("certificates.reloaded")
                        if line["listener"] == "broker"
                    }
                )
                == 2
            )

        await until(everybody_did, "both workers have read them")
        assert running.logged("service.reloading")
        form = {"username": "APM0001"}
        assert await running.ask("user", form, ssl=bench.context(bench.client_ca)) == (200, "allow")
        assert await running.end() == 0


async def test_a_hangup_has_the_listener_for_health_read_its_certificates_again(dsn, policy, tmp_path):
    bench = Bench(tmp_path)
    tls = {name.replace("BROKER", "HEALTH"): file for name, file in bench.environment.items()}
    async with replica(dsn, ready=False, **tls) as running:
        running.process.send_signal(signal.SIGHUP)

        async def reloaded():
            return {
                line["process"] for line in running.logged("certificates.reloaded") if line["listener"] == "health"
            } == {"health"}

        await until(reloaded, "the listener for health has read them")
        assert await running.end() == 0


async def test_a_replica_that_starts_without_the_database_decides_by_its_disk(dsn, policy, tmp_path):
    snapshot_folder = {"REGISTRY__SNAPSHOT_DIR": str(tmp_path / "disk")}
    async with replica(dsn, **snapshot_folder) as running:
        version = await registry_edits.set_device_status(Target(dsn), "ann", "APM0001", "revoked", "")
        await replicas.wait(Target(dsn), version, 60)  # announced once it is on disk
        assert await running.metric("authbackend_registry_on_disk") == 1
        running.process.kill()
        for child in children(running.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    async with away(dsn):
        async with replica(dsn, **snapshot_folder) as running:
            assert await running.login("APM0001") == "deny"
            assert await running.login("APM0002") == "allow"
            status, health = await running.status()
            assert status == 200
            assert health["sync_age_s"] > 0
            assert "database" in health["fault"] or "PostgreSQL" in health["fault"]
            assert await running.end() == 0
        async with replica(dsn, ready=False, REGISTRY__MAX_STALENESS_S="0.001", **snapshot_folder) as running:
            assert await running.login("APM0002") == "deny"
            assert (await running.status())[0] == 503
            assert await running.end() == 0


def kill(running):
    """Send SIGKILL to all processes of a replica, as when a machine runs out of memory."""
    everybody = [running.process.pid, *children(running.process.pid)]
    for process_id in everybody:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGKILL)


async def test_a_killed_replica_that_is_started_again_is_one_and_copies_of_its_folder_are_two(dsn, policy, tmp_path):
    snapshot_folder = {"REGISTRY__SNAPSHOT_DIR": str(tmp_path / "disk")}

    async def serving():
        """Make a change and return the replicas that confirm it."""
        version = await registry_edits.set_device_status(Target(dsn), "ann", "APM0001", "suspended", "")
        version = version or await registry_edits.set_device_status(Target(dsn), "ann", "APM0001", "active", "")
        return await replicas.wait(Target(dsn), version, 60)

    async with replica(dsn, **snapshot_folder) as running:
        assert len(await serving()) == 1
        kill(running)
        await running.process.wait()
    async with replica(dsn, **snapshot_folder) as first:
        assert len(await serving()) == 1
        shutil.copytree(tmp_path / "disk", tmp_path / "copied")
        async with replica(dsn, REGISTRY__SNAPSHOT_DIR=str(tmp_path / "copied")) as second:
            assert "was copied" in second.logged("registry.disk_copy_refused")[0]["fault"]
            assert len(await serving()) == 2

            async def alarmed():
                return await first.metric("authbackend_replicas_of_a_shared_folder") == 2

            await until(alarmed, "the copy is alarmed")


async def test_a_damaged_copy_is_refused_and_the_replica_waits_for_the_database(dsn, policy, tmp_path):
    snapshot_folder = {"REGISTRY__SNAPSHOT_DIR": str(tmp_path / "disk")}
    async with replica(dsn, **snapshot_folder) as running:

        async def on_disk():
            return list((tmp_path / "disk").glob("manifest.json"))

        await until(on_disk, "it is on disk")
        assert await running.end() == 0
    image = next((tmp_path / "disk").glob("image-*"))
    data = bytearray(image.read_bytes())
    data[len(data) // 2] ^= 1
    image.write_bytes(data)
    async with away(dsn):
        async with replica(dsn, ready=False, **snapshot_folder) as running:
            assert "damaged" in running.logged("registry.disk_copy_refused")[0]["fault"]
            assert (await running.status())[0] == 503
            assert (await running.ask("user", {"username": "APM0002"}))[0] == 503
    async with replica(dsn, **snapshot_folder) as running:
        assert await running.login("APM0002") == "allow"


async def test_an_outage_changes_no_verdict_and_its_age_is_told_from_the_first_missed_look(dsn, policy):
    async with replica(dsn, REGISTRY__POLL_INTERVAL_S="0.1") as running:
        async with away(dsn):

            async def reported():
                return (await running.status())[1]["fault"]

            await until(reported, "the fault is reported")
            assert await running.login("APM0001") == "allow"
            assert await running.login("GONE") == "deny"
            before = await running.metric("authbackend_registry_sync_age_seconds")

            async def older():
                return await running.metric("authbackend_registry_sync_age_seconds") > before

            await until(older, "the copy grows older")
            assert running.logged("registry.refresh_failed")[0]["copy_age_s"] >= 0

        async def well():
            return (await running.status())[1]["fault"] is None

        await until(well, "it follows again", 30)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_database_that_was_stopped_is_followed_again_by_every_part(postgres, dsn, policy, mode):
    async with replica(dsn) as running:

        async def failures():
            return await running.metric("authbackend_registry_sync_failures_total")

        async def failed_often():
            return await failures() >= 5

        before, began = await failures(), time.monotonic()
        await asyncio.to_thread(postgres.stop, mode)
        try:
            await until(failed_often, "several attempts have failed", 60)
            assert await running.login("APM0001") == "allow"
        finally:
            await asyncio.to_thread(postgres.start)

        async def well():
            return (await running.status())[1]["fault"] is None

        await until(well, "the copy follows again", 60)
        attempts, lasted_s = await failures() - before, time.monotonic() - began
        assert attempts <= lasted_s / 0.25 + 10  # half of the longest pause, plus the first pauses
        version = await registry_edits.set_device_status(Target(dsn), "ann", "APM0001", "revoked", "")
        assert [one["serves"] for one in await replicas.wait(Target(dsn), version, 60)] == [True]  # it announces again
        assert await running.login("APM0001") == "deny"
        faults = [line["fault"] for line in running.logged("registry.refresh_failed")]
        assert len(faults) == len({*faults}), "a fault is logged once, however often it is met"
        lists = [line["fault"] for line in running.logged("crl.refresh_failed")]
        assert len(lists) == len({*lists})


async def test_a_type_with_a_limit_of_its_own_is_denied_earlier_than_others(dsn, policy, sql):
    await sql(
        "insert into device_type (name, client_ids, vhosts, max_staleness_s) values ('STRICT', '{\"{device_id}\"}', '{/}', 0.5)"
    )
    await sql("insert into device (device_id, type) values ('S1', 'STRICT')")
    async with replica(dsn, REGISTRY__POLL_INTERVAL_S="0.1") as running:

        async def allowed():
            return await running.login("S1") == "allow"

        await until(allowed, "it is allowed", 30)
        async with away(dsn):

            async def denied():
                return await running.login("S1") == "deny"

            await until(denied, "the strict type is denied")
            assert (
                await running.metric("authbackend_decisions_total", reason="registry_stale", device_type="STRICT") >= 1
            )
            assert await running.login("APM0001") == "allow"
        await until(allowed, "it is allowed again", 30)


async def test_a_database_that_accepts_and_hangs_is_noticed(dsn, policy):
    with socket.create_server(("127.0.0.1", 0)) as server:  # the kernel accepts connections, and nobody ever answers
        hanging = f"postgresql://postgres@127.0.0.1:{server.getsockname()[1]}/registry"
        async with replica(hanging, ready=False, DATABASE__CONNECT_TIMEOUT_S="0.3") as running:

            async def reported():
                return running.logged("registry.refresh_failed")

            await until(reported, "the fault is reported")
            assert (await running.status())[0] == 503
            assert await running.end() == 0


async def test_too_old_requests_are_shed_logins_first(monkeypatch):
    from prometheus_client import CollectorRegistry

    from authbackend.broker.handlers import QUESTIONS, Handlers, Limits
    from authbackend.broker.metrics import BrokerMetrics
    from authbackend.logs import Sampler
    from authbackend.policy.decide import DecisionSettings
    from tests.support.registry import new_store

    registry = CollectorRegistry()
    handlers = Handlers(
        new_store().reader(), None, BrokerMetrics(registry), Sampler(1, 1), DecisionSettings(), Limits(1.0)
    )
    now = asyncio.get_running_loop().time()
    shed = {}
    for waited in (0.1, 0.3, 0.7, 1.1):
        monkeypatch.setattr("time.monotonic", lambda waited=waited: now + waited)
        for path, question in QUESTIONS.items():
            before = registry.get_sample_value("authbackend_requests_shed_total", {"endpoint": question.name}) or 0
            answer = handlers.answer(question, b"username=a&vhost=b&ip=c", now)
            after = registry.get_sample_value("authbackend_requests_shed_total", {"endpoint": question.name}) or 0
            shed[path, waited] = after > before
            assert not shed[path, waited] or answer.message().startswith(b"HTTP/1.1 503")
    assert {path for path, waited in shed if waited == 0.1 and shed[path, waited]} == set()
    assert {path for path, waited in shed if waited == 0.3 and shed[path, waited]} == {"/auth/user"}
    assert {path for path, waited in shed if waited == 0.7 and shed[path, waited]} == {"/auth/user", "/auth/vhost"}
    assert {path for path, waited in shed if waited == 1.1 and shed[path, waited]} == set(QUESTIONS)
