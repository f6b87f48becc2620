"""Lanes: no mass change, error, lock or silent cluster delays a revocation, and no receipt claims too much."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from authbackend.cli.common import why_open
from authbackend.enforcement import lanes
from authbackend.enforcement.clusters import ClusterActions
from authbackend.enforcement.inventory import ListedInventory
from authbackend.policy import decide
from authbackend.policy.requests import VhostRequest
from authbackend.postgres import enforcement
from authbackend.postgres.change_feed import ChangeFeed
from authbackend.postgres.connection import Target
from authbackend.postgres.crls import StoredCrl, save_crl
from tests.enforcement.conftest import Rig
from tests.support.memory_cluster import Broker, MemoryCluster
from tests.support.postgres import connected
from tests.support.registry import new_store

two_clusters = pytest.mark.clusters("east", "west")


async def test_a_revoked_device_is_closed_and_its_session_deleted(rig: Rig) -> None:
    await rig.devices("A", "B")
    rig.broker.connect("A", "A", "fleet/A/#")
    rig.broker.connect("B", "B", "fleet/B/#")
    async with rig.enforcing():
        await rig.set_status("revoked", "A")
        (task,) = await rig.finished()
    assert rig.broker.users() == ["B"]
    assert [name for _, name in rig.broker.queues] == ["mqtt-subscription-Bqos1"]
    assert (task["lane"], task["state"], task["cluster"]) == ("urgent", "done", "rabbit")
    assert task["receipt"]["closed"] == {"rabbit@one": 1}
    assert task["receipt"]["checked_at"]


async def test_who_may_not_be_connected_is_closed_at_every_look(rig: Rig) -> None:
    """For example if a login was being allowed while the first connection was closed."""
    await rig.devices("A")
    rig.broker.connect("A")
    async with rig.enforcing():
        await rig.set_status("revoked", "A")
        await rig.broker.until(lambda: rig.broker.closed == ["A"])
        rig.broker.connect("A", connected_at=4e9)
        (task,) = await rig.finished()
    assert task["receipt"]["closed"] == {"rabbit@one": 2}


@two_clusters
async def test_a_silent_cluster_leaves_its_own_part_open_and_is_named(rig: Rig) -> None:
    await rig.devices("A")
    east, west = rig.brokers.values()
    east.connect("A", "A", "fleet/A/#")
    west.connect("A", "A", "fleet/A/#")
    west.down = True
    async with rig.enforcing():
        await rig.set_status("revoked", "A")
        (done,) = await rig.finished("cluster = 'east'")
        assert done["state"] == "done"
        assert east.users() == []
        assert east.queues == {}
        (open_,) = await rig.tasks("cluster = 'west'")
        assert open_["state"] == "waiting"
        assert "cluster west" in open_["fault"]
        west.down = False  # its failed tasks become due now
        (done,) = await rig.finished("cluster = 'west'")
    assert done["receipt"]["closed"] == {"rabbit@one": 1}
    assert west.queues == {}


async def test_one_queue_that_cannot_be_deleted_keeps_no_other_task_from_finishing(rig: Rig) -> None:
    names = [f"D{n}" for n in range(20)]
    await rig.devices(*names)
    for name in names:
        rig.broker.connect(name, name, f"fleet/{name}/#")
    rig.broker.refuses = lambda method, argument: method == "delete_queue" and argument == "mqtt-subscription-D7qos1"
    async with rig.enforcing():
        await rig.set_status("revoked", *names)
        done = await rig.finished("name <> 'D7'")
        assert len(done) == 19
        await rig.broker.until(lambda: rig.broker.calls.count(("delete_queue", "mqtt-subscription-D7qos1")) >= 2)
        (bad,) = await rig.tasks("name = 'D7'")
        assert bad["finished_at"] is None
        rig.broker.refuses = lambda _method, _argument: False
        (done_,) = await rig.finished("name = 'D7'")
    assert done_["receipt"]["closed"] == {"rabbit@one": 1}
    assert [queue["queue"] for queue in done_["receipt"]["queues_deleted"]] == ["mqtt-subscription-D7qos1"]


async def test_a_bug_in_one_task_does_not_touch_the_others(rig: Rig) -> None:
    await rig.devices("A", "B")
    rig.broker.connect("A")
    rig.broker.connect("B")

    def crash(method: str, argument: str) -> bool:
        if method == "close_user" and argument == "A":
            raise ZeroDivisionError
        return False

    rig.broker.refuses = crash
    async with rig.enforcing():
        await rig.set_status("revoked", "A", "B")
        await rig.finished("name = 'B'")
        await rig.broker.until(lambda: rig.broker.calls.count(("close_user", "A")) >= 2)
        (bad,) = await rig.tasks("name = 'A'")
    assert "ZeroDivisionError in authbackend" in bad["fault"]


async def test_a_revocation_in_the_middle_of_a_mass_change_is_not_kept_waiting(rig: Rig) -> None:
    """The mass change is stopped at its list of connections; the revocation that follows is done anyway."""
    names = [f"D{n}" for n in range(300)]
    await rig.devices(*names, "stolen")
    for name in [*names, "stolen"]:
        rig.broker.connect(name, name, f"fleet/{name}/#")
    rig.broker.gates["connections"] = asyncio.Event()  # the list of all connections, which only a mass change requests
    async with rig.enforcing():
        await rig.set_status("revoked", *names)
        await rig.broker.until(lambda: ("connections", "") in rig.broker.calls)
        await rig.set_status("revoked", "stolen")
        (task,) = await rig.finished("name = 'stolen'")
        assert task["receipt"]["closed"] == {"rabbit@one": 1}
        assert len(rig.broker.users()) == 300
        rig.broker.gates.pop("connections").set()
        await rig.finished()
    assert rig.broker.users() == []
    assert rig.broker.queues == {}


async def test_a_small_change_goes_before_the_rest_of_a_mass_change(rig: Rig) -> None:
    names = [f"D{n:03}" for n in range(450)]
    await rig.devices(*names, "me")
    for name in [*names, "me"]:
        rig.broker.connect(name, name, f"fleet/{name}/#")
    async with rig.enforcing():
        rig.broker.gates["close_connection"] = asyncio.Event()
        await rig.set_status("revoked", *names)
        await rig.broker.until(lambda: any(method == "close_connection" for method, _ in rig.broker.calls))
        await rig.sql.execute("update device set common_name = 'me2' where device_id = 'me'")
        rig.broker.gates.pop("close_connection").set()
        await rig.finished("name = 'me'")
    assert rig.broker.closed.index("me") < 449


async def test_a_mass_change_lists_connections_and_sessions_once(rig: Rig) -> None:
    """Most devices are not connected and have no session: their tasks finish together, without a call for each."""
    names = [f"D{n}" for n in range(2000)]
    await rig.devices(*names)
    for name in names[:30]:
        rig.broker.connect(name, name, f"fleet/{name}/#")
    rig.broker.subscribe("D1000", "fleet/D1000/#")
    async with rig.enforcing():
        await rig.set_status("revoked", *names)
        done = await rig.finished()
    assert rig.broker.users() == []
    assert rig.broker.queues == {}
    assert len(done) == 2000
    assert {task["lane"] for task in done} == {"mass"}
    assert all(task["receipt"]["checked_at"] and task["receipt"]["looks"] >= 2 for task in done)
    looks = [method for method, _ in rig.broker.calls]
    assert looks.count("connections") <= 6
    assert looks.count("queues") <= 6
    assert looks.count("connections_of") <= 100
    assert sum(sum(task["receipt"]["closed"].values()) for task in done) == 30


async def test_a_connection_too_young_for_the_list_is_found_by_the_next_look(rig: Rig) -> None:
    names = [f"D{n}" for n in range(100)]
    await rig.devices(*names)
    rig.broker.statistics = False
    rig.broker.connect("D5", "D5")
    async with rig.enforcing():
        await rig.set_status("revoked", *names)
        await rig.broker.until(lambda: ("connections", "") in rig.broker.calls)
        rig.broker.tracked_only.clear()
        await rig.finished()
    assert rig.broker.users() == []


async def test_an_idle_transaction_on_a_device_with_a_due_schedule_stops_nothing_else(rig: Rig) -> None:
    await rig.devices("held", "A", "B")
    rig.broker.connect("A")
    rig.broker.connect("B")
    async with connected(rig.dsn, server_settings={"application_name": "psql"}) as idle, rig.enforcing():
        transaction = idle.transaction()
        await transaction.start()
        await idle.execute("update device set status_reason = 'x' where device_id = 'held'")
        schedule = "insert into device_schedule (device_id, at, status) values ($1, now(), 'revoked')"
        await rig.sql.execute(schedule, "held")
        await rig.sql.execute(schedule, "B")
        await rig.set_status("revoked", "A")
        await rig.finished("name = 'A'")
        async with asyncio.timeout(10):
            while "B" in rig.broker.users():
                await asyncio.sleep(0.02)
            while not (overdue := await enforcement.list_overdue(Target(rig.dsn))):
                await asyncio.sleep(0.05)
            while not (rig.observer.last_backlog and rig.observer.last_backlog.overdue):
                await asyncio.sleep(0.05)
        assert [each.device_id for each in overdue] == ["held"]
        assert f"process {idle.get_server_pid()} (psql, role postgres)" in overdue[0].holder
        await transaction.rollback()
        await rig.finished()
        async with asyncio.timeout(10):
            while await rig.sql.fetchval("select status from device where device_id = 'held'") != "revoked":
                await asyncio.sleep(0.02)


async def test_several_who_hold_a_row_are_all_named(rig: Rig) -> None:
    await rig.devices("held")
    await rig.sql.execute(
        "insert into device_schedule (device_id, at, status) values ('held', now() - interval '2 s', 'revoked')"
    )
    async with connected(rig.dsn) as one, connected(rig.dsn) as two:
        async with one.transaction(), two.transaction():
            for each in (one, two):
                await each.execute("select from device where device_id = 'held' for share")
            overdue = await enforcement.list_overdue(Target(rig.dsn))
            pids = {one.get_server_pid(), two.get_server_pid()}
    assert {int(each.holder.split()[1]) for each in overdue if each.holder} == pids


async def test_somebody_who_holds_a_task_keeps_no_other_one_waiting(rig: Rig) -> None:
    await rig.devices("A", "B")
    rig.broker.connect("A")
    rig.broker.connect("B")
    async with connected(rig.dsn) as idle, rig.enforcing():
        await rig.set_status("revoked", "A")
        transaction = idle.transaction()
        await transaction.start()
        await idle.execute("select from enforcement where name = 'A' for update")
        await rig.set_status("revoked", "B")
        await rig.finished("name = 'B'")
        await transaction.rollback()
        await rig.finished()


async def test_a_hold_that_somebody_is_taking_keeps_no_other_device_waiting(rig: Rig) -> None:
    await rig.devices("A", "B")
    rig.broker.connect("A")
    rig.broker.connect("B")
    deny = "insert into topic_rule (device_id, effect, action, topic) values ($1, 'deny', 'publish', 'x')"
    async with connected(rig.dsn) as idle:
        await rig.sql.execute("delete from enforcement_setup")
        await rig.sql.execute("insert into enforcement_setup (hold_limit_s) values (30)")
        transaction = idle.transaction()
        await transaction.start()
        await idle.execute("insert into device_hold (device_id, until) values ('A', now() + interval '1 h')")
        await rig.sql.execute(
            "insert into enforcement (cluster, kind, name, causes, details) values ('rabbit', 'device', 'A', '{renamed}', '{\"common_name\": \"A\"}')"
        )
        async with rig.enforcing():
            await rig.sql.execute(deny, "B")
            await rig.finished("name = 'B'")
            (task,) = await rig.tasks("name = 'A'")
            assert task["finished_at"] is None
            await transaction.rollback()
            await rig.finished()


async def test_a_reinstated_device_is_left_alone(rig: Rig) -> None:
    """It was revoked while no replica enforced, and is active again when one does."""
    await rig.devices("A")
    await rig.set_status("revoked", "A")
    await rig.set_status("active", "A")
    await rig.refresh_copy()
    rig.broker.connect("A", "A", "fleet/A/#")
    async with rig.enforcing():
        (task,) = await rig.finished()
    assert rig.broker.users() == ["A"]
    assert (task["state"], task["receipt"]["superseded"]) == ("superseded", "the device is active again")
    assert task["receipt"]["closed"] == {}


async def test_a_device_reinstated_in_the_middle_of_a_mass_change_is_left_alone(rig: Rig) -> None:
    names = [f"D{n:03}" for n in range(100)]
    await rig.devices(*names)
    for name in names:
        rig.broker.connect(name)
    rig.broker.gates["close_connection"] = asyncio.Event()
    async with rig.enforcing():
        await rig.set_status("revoked", *names)
        await rig.broker.until(lambda: any(method == "close_connection" for method, _ in rig.broker.calls))
        await rig.set_status("active", "D099")
        await rig.refresh_copy()
        rig.broker.gates.pop("close_connection").set()
        await rig.finished()
    assert rig.broker.users() == ["D099"]
    (task,) = await rig.tasks("name = 'D099'")
    assert task["state"] == "superseded"
    assert task["receipt"]["closed"] == {}


async def test_a_device_that_is_deleted_and_registered_anew_is_not_spared(rig: Rig) -> None:
    await rig.devices("A")
    rig.broker.connect("A", "A", "fleet/A/#")
    await rig.sql.execute("delete from device where device_id = 'A'")
    await rig.devices("A")
    async with rig.enforcing():
        (task,) = await rig.finished()
    assert task["receipt"]["closed"] == {"rabbit@one": 1}


async def test_a_renamed_id_does_not_throw_the_device_out_again_and_again(rig: Rig) -> None:
    await rig.sql.execute("insert into device (device_id, common_name, type) values ('A', 'cn', 'T')")
    await rig.refresh_copy()
    rig.broker.connect("cn", "A")
    async with rig.enforcing():
        await rig.sql.execute("update device set device_id = 'Z' where device_id = 'A'")
        await rig.broker.until(lambda: rig.broker.closed == ["cn"])
        rig.broker.connect("cn", "Z", connected_at=4e9)
        await rig.finished()
    assert rig.broker.closed == ["cn"]


async def test_an_account_that_loses_a_rule_on_one_exchange_and_keeps_it_on_another(rig: Rig) -> None:
    await rig.sql.execute(
        "insert into account (name, login, vhosts, write) values ('svc', 'certificate', '{/}', '{own,other}');"
        "insert into topic_rule (account, effect, action, topic, exchange) values ('svc', 'allow', 'publish', 'a/#', 'own'), ('svc', 'allow', 'publish', 'a/#', 'other')"
    )
    await rig.refresh_copy()
    rig.broker.connect("svc", None, protocol="AMQP 0-9-1")
    async with rig.enforcing():
        await rig.sql.execute("delete from topic_rule where exchange = 'own'")
        (task,) = await rig.finished()
        assert task["receipt"]["closed"] == {"rabbit@one": 1}


async def test_a_pause_stops_the_bulk_lane_and_ends(rig: Rig) -> None:
    names = [f"D{n}" for n in range(60)]
    await rig.devices(*names, "stolen")
    for name in [*names, "stolen"]:
        rig.broker.connect(name)
    async with rig.enforcing():
        found = await enforcement.pause(Target(rig.dsn), "ann", "bulk")
        assert (found.scope, found.by, found.claimed_by) == ("bulk", "postgres", "ann")
        await rig.set_status("revoked", *names)
        await rig.set_status("revoked", "stolen")
        await rig.finished("name = 'stolen'")
        assert rig.broker.closed == ["stolen"]
        async with asyncio.timeout(10):
            while rig.observer.last_backlog.paused is None:
                await asyncio.sleep(0.05)
        assert await enforcement.resume(Target(rig.dsn), "ben")
        await rig.finished()
    assert rig.broker.users() == []
    trail = await rig.sql.fetch(
        "select operation, actor, claimed_by from audit where entity = 'enforcement_pause' order by id"
    )
    assert [tuple(row) for row in trail] == [("INSERT", "postgres", "ann"), ("DELETE", "postgres", "ben")]


async def test_a_pause_of_all_stops_the_urgent_lane_and_the_sweep_only_reports(rig: Rig) -> None:
    await rig.devices("A", "B")
    rig.broker.connect("A")
    rig.broker.connect("B", "A")  # not its client id
    await enforcement.pause(Target(rig.dsn), "ann", "all")
    async with rig.enforcing(sweep_s=1.0):
        await rig.set_status("revoked", "A")
        async with asyncio.timeout(10):
            while len(rig.observer.reports) < 2:
                await asyncio.sleep(0.02)
        assert rig.observer.reports[-1].found["wrong_client_id"] == 1
        assert rig.broker.closed == []
        await enforcement.resume(Target(rig.dsn), "ann")
        await rig.finished()
        await rig.broker.until(lambda: rig.broker.users() == [])


INTERRUPTED = "select count(*) from enforcement where fault = 'paused before it was finished'"
UNDER_WAY = 4
"""How many calls a lane may have in progress; a pause does not stop those."""


async def pause_during_calls(rig: Rig, part: str, method: str, scope: str) -> None:
    """Pause while the first calls of a method are in progress; let them finish once a part of the leader has heard of it."""
    await rig.broker.until(lambda: any(called == method for called, _ in rig.broker.calls))
    await enforcement.pause(Target(rig.dsn), "ann", scope)
    await rig.has_heard(part)
    rig.broker.gates.pop(method).set()


async def interrupted(rig: Rig) -> None:
    """Wait until a task is recorded as interrupted by a pause."""
    async with asyncio.timeout(20):
        while not await rig.sql.fetchval(INTERRUPTED):
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("number", [40, 150])
async def test_a_pause_takes_effect_between_two_connections(rig: Rig, number: int) -> None:
    """40 devices are looked up by name, 150 are found in a list."""
    names = [f"D{n:03}" for n in range(number)]
    await rig.devices(*names)
    for name in names:
        rig.broker.connect(name, name, f"fleet/{name}/#")
    method = "close_user" if number <= 50 else "close_connection"
    rig.broker.gates[method] = asyncio.Event()
    async with rig.enforcing():
        await rig.set_status("revoked", *names)
        await pause_during_calls(rig, "bulk rabbit", method, "bulk")
        await interrupted(rig)
        assert 1 <= len(rig.broker.closed) <= UNDER_WAY
        assert len(rig.broker.queues) == number
        await enforcement.resume(Target(rig.dsn), "ann")
        done = await rig.finished()
    assert rig.broker.users() == []
    assert rig.broker.queues == {}
    assert all(task["receipt"]["closed"] == {"rabbit@one": 1} for task in done)
    assert all(len(task["receipt"]["queues_deleted"]) == 1 for task in done)


async def test_a_pause_of_all_takes_effect_between_two_revocations(rig: Rig) -> None:
    names = [f"D{n:03}" for n in range(15)]
    await rig.devices(*names)
    for name in names:
        rig.broker.connect(name, name, f"fleet/{name}/#")
    rig.broker.gates["close_user"] = asyncio.Event()
    async with rig.enforcing():
        await rig.set_status("revoked", *names)
        await pause_during_calls(rig, "urgent rabbit", "close_user", "all")
        await interrupted(rig)
        assert 1 <= len(rig.broker.closed) <= UNDER_WAY
        await enforcement.resume(Target(rig.dsn), "ann")
        done = await rig.finished()
    assert {task["lane"] for task in done} == {"urgent"}
    assert rig.broker.users() == []
    assert all(task["receipt"]["closed"] == {"rabbit@one": 1} for task in done)


async def test_a_pause_takes_effect_between_two_sessions(rig: Rig) -> None:
    names = [f"D{n:03}" for n in range(40)]
    await rig.devices(*names)
    for name in names:
        rig.broker.connect(name, name, f"fleet/{name}/#")
    rig.broker.gates["delete_queue"] = asyncio.Event()
    async with rig.enforcing():
        await rig.set_status("revoked", *names)
        await pause_during_calls(rig, "bulk rabbit", "delete_queue", "bulk")
        await interrupted(rig)
        assert len(names) - UNDER_WAY <= len(rig.broker.queues) < len(names)
        await enforcement.resume(Target(rig.dsn), "ann")
        done = await rig.finished()
    assert rig.broker.queues == {}
    assert all(len(task["receipt"]["queues_deleted"]) == 1 for task in done)


async def test_a_sweep_that_is_under_way_stops_at_a_pause(rig: Rig) -> None:
    names = [f"D{n:03}" for n in range(20)]
    await rig.devices(*names)
    for name in names:
        rig.broker.connect(name, "not its client id")
    rig.broker.gates["close_connection"] = asyncio.Event()
    async with rig.enforcing(sweep_s=1.0):
        await pause_during_calls(rig, "sweep rabbit", "close_connection", "bulk")
        async with asyncio.timeout(20):
            while not rig.observer.reports:
                await asyncio.sleep(0.02)
        assert len(rig.broker.closed) == 1
        assert rig.observer.reports[0].ended["wrong_client_id"] == 1
        await enforcement.resume(Target(rig.dsn), "ann")
        await rig.broker.until(lambda: rig.broker.users() == [])


async def test_a_type_that_narrows_touches_those_whom_it_takes_something_from(rig: Rig) -> None:
    await rig.devices("A", "B", "C")
    rig.broker.connect("A", "A", "news/#", "fleet/A/#")
    rig.broker.connect("B", "B", "fleet/B/#")
    rig.broker.subscribe("C", "news/#")
    async with rig.enforcing():
        await rig.sql.execute("delete from topic_rule where topic = 'news/#'")
        tasks = await rig.finished(limit_s=40)
    assert sorted(task["name"] for task in tasks if task["parent"]) == ["A", "C"]
    (parent,) = [task for task in tasks if not task["parent"]]
    assert parent["receipt"]["devices"] == 2
    assert rig.broker.closed == ["A"]
    assert {key: sorted(each) for key, each in rig.broker.bound.items()} == {
        ("/", "mqtt-subscription-Aqos1"): ["fleet.A.#"],
        ("/", "mqtt-subscription-Bqos1"): ["fleet.B.#"],
        ("/", "mqtt-subscription-Cqos1"): [],
    }
    assert await rig.sql.fetchval("select count(*) from device_hold") == 0


async def test_a_replica_that_is_silent_delays_nothing_but_the_receipt(rig: Rig) -> None:
    await rig.devices("A")
    rig.broker.connect("A")
    await rig.sql.execute(
        "insert into replica (id, name, program_version, workers, longest_staleness_s, introduced_at, confirmed_at, snapshot)"
        " values (gen_random_uuid(), 'silent', 'x', 1, 600, now() - interval '60 s', now() - interval '60 s', pg_current_snapshot())"
    )
    async with rig.enforcing():
        await rig.set_status("revoked", "A")
        await rig.broker.until(lambda: rig.broker.closed == ["A"])
        async with asyncio.timeout(10):
            while not (task := (await rig.tasks())[0])["receipt"]:
                await asyncio.sleep(0.02)
        assert task["receipt"]["unconfirmed"] == ["silent"]
        assert task["finished_at"] is None
        await rig.sql.execute("delete from replica")
        await rig.sql.execute("update enforcement set due_at = now()")
        await rig.finished()


async def test_a_cluster_that_is_forgotten(rig: Rig) -> None:
    await rig.sql.execute("insert into enforcement_cluster (name) values ('old')")
    await rig.devices("A")
    await rig.set_status("revoked", "A")
    async with rig.enforcing():
        await rig.finished("cluster = 'rabbit'")
        assert [task["cluster"] for task in await rig.tasks("finished_at is null")] == ["old"]
        assert await enforcement.forget_cluster(Target(rig.dsn), "ann", "old") == 1
    (task,) = await rig.tasks("cluster = 'old'")
    assert "not looked at again" in task["receipt"]["superseded"]
    await rig.devices("B")
    await rig.set_status("revoked", "B")
    assert [task["cluster"] for task in await rig.tasks("name = 'B'")] == ["rabbit"]


async def test_what_was_noted_before_there_were_clusters_is_not_lost(rig: Rig) -> None:
    await rig.devices("A")
    rig.broker.connect("A")
    await rig.sql.execute(
        "insert into enforcement (cluster, kind, name, causes, details) values ('', 'device', 'A', '{renamed}', '{\"common_name\": \"A\"}')"
    )
    async with rig.enforcing():
        await rig.finished()
    assert rig.broker.closed == ["A"]


@two_clusters
async def test_the_leader_leaves_only_when_no_cluster_can_be_reached(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another replica may reach them; but while one cluster answers, stepping down would only delay its revocations."""
    monkeypatch.setattr("authbackend.enforcement.leader.HAND_OVER_S", 0.0)
    await rig.devices("A")
    east, west = rig.brokers.values()
    west.down = True
    async with rig.enforcing():
        await rig.set_status("revoked", "A")
        await rig.finished("cluster = 'east'")
        assert rig.observer.leading
        east.down = True
        await rig.set_status("active", "A")
        await rig.set_status("revoked", "A")
        async with asyncio.timeout(10):
            while rig.observer.leading:
                await asyncio.sleep(0.005)


MOVE = """
insert into device_type (name, client_ids, vhosts) values ('N', array['{device_id}'], '{/}');
insert into topic_rule (device_type, effect, action, topic) values ('N', 'allow', 'subscribe', 'fleet/{device_id}/#');
insert into device (device_id, type) values ('APM', 'T'), ('APM_1', 'N'), ('APM_2', 'N');
delete from enforcement; delete from device_hold; -- as if the registration of APM_1 and APM_2 were enforced already
"""
WIDEN = "update device_type set client_ids = client_ids || '{device_id}_*'::text where name = 'N'"


def may_log_in(rig: Rig, user: str, client_id: str) -> bool:
    with rig.copy.store.reader() as registry:
        request = VhostRequest(user, "/", "127.0.0.1", client_id)
        return decide.vhost(registry, request, time.time()).allowed


async def test_a_client_id_that_passes_to_another_device_is_taken_from_the_former_owner_first(rig: Rig) -> None:
    """APM_1_x passes to APM_1, which may use it only when APM is closed and its session deleted; others go on."""
    await rig.sql.execute(MOVE)
    await rig.refresh_copy()
    rig.broker.connect("APM", "APM_1_x", "fleet/APM/#")
    rig.broker.connect("APM", "APM", "fleet/APM/#")
    rig.broker.connect("APM_1", "APM_1", "fleet/APM_1/#")
    rig.broker.subscribe("APM_1_stored", "fleet/APM/#")
    rig.broker.refuses = lambda method, _argument: method == "close_connection"
    async with rig.enforcing():
        await rig.sql.execute(WIDEN)
        await rig.refresh_copy()
        assert not may_log_in(rig, "APM", "APM_1_x")
        assert not may_log_in(rig, "APM_1", "APM_1_x")
        async with asyncio.timeout(10):
            while await rig.sql.fetchval("select held from client_id_move") != ["APM_1_stored", "APM_1_x"]:
                await asyncio.sleep(0.02)
        await rig.refresh_copy()
        found = {name: may_log_in(rig, "APM_1", name) for name in ("APM_1_x", "APM_1_stored", "APM_1_y", "APM_1")}
        assert found == {"APM_1_x": False, "APM_1_stored": False, "APM_1_y": True, "APM_1": True}
        assert may_log_in(rig, "APM_2", "APM_2_x")
        rig.broker.refuses = lambda _method, _argument: False
        await rig.finished()
        assert await rig.sql.fetchval("select count(*) from client_id_move") == 0
        await rig.refresh_copy()
        assert may_log_in(rig, "APM_1", "APM_1_x")
    assert rig.broker.closed == ["APM"]
    assert sorted(each.client_id for each in rig.broker.live.values()) == ["APM", "APM_1"]
    assert sorted(name for _, name in rig.broker.queues) == ["mqtt-subscription-APM_1qos1", "mqtt-subscription-APMqos1"]


async def test_a_client_id_in_use_that_only_the_second_look_sees_is_taken_too(rig: Rig) -> None:
    await rig.sql.execute(MOVE)
    await rig.refresh_copy()
    rig.broker.connect("APM", "APM_1_x", "fleet/APM/#")
    rig.broker.statistics = False
    young = rig.broker.connect("APM", "APM_1_y")
    async with rig.enforcing():
        await rig.sql.execute(WIDEN)
        await rig.broker.until(lambda: rig.broker.closed == ["APM"])
        rig.broker.tracked_only.discard(young)
        await rig.finished()
    assert rig.broker.live == {}


async def test_a_device_that_gains_client_ids_and_loses_a_virtual_host_at_once(rig: Rig) -> None:
    await rig.sql.execute(MOVE)
    await rig.sql.execute("update device_type set vhosts = '{/,v}' where name = 'N'")
    await rig.refresh_copy()
    rig.broker.connect("APM", "APM_1_x", "fleet/APM/#")
    rig.broker.connect("APM_1", "APM_1", vhost="v")
    async with rig.enforcing():
        await rig.sql.execute(
            "update device_type set vhosts = '{/}', client_ids = '{\"{device_id}\",\"{device_id}_*\"}' where name = 'N'"
        )
        tasks = await rig.finished(limit_s=60)
    assert sorted(rig.broker.closed) == ["APM", "APM_1"]
    (parent,) = [task for task in tasks if task["kind"] == "device_type" and task["receipt"]["devices"]]
    assert parent["receipt"]["devices"] == 1


async def test_wider_patterns_that_take_nothing_from_anybody_disturb_nobody(rig: Rig) -> None:
    await rig.devices("A", "B")
    rig.broker.connect("A", "A", "fleet/A/#")
    rig.broker.connect("B", "B_1", "fleet/B/#")
    async with rig.enforcing():
        await rig.sql.execute(
            "update device_type set client_ids = client_ids || '{device_id}-*'::text where name = 'T'"
        )
        await rig.finished()
    assert rig.broker.closed == []
    assert len(rig.broker.queues) == 2


async def test_a_type_that_loses_a_virtual_host_touches_only_who_is_in_it(rig: Rig) -> None:
    await rig.sql.execute("update device_type set vhosts = '{/,v}'")
    await rig.devices("A", "B")
    rig.broker.connect("A", vhost="v")
    rig.broker.connect("B")
    async with rig.enforcing():
        await rig.sql.execute("update device_type set vhosts = '{/}'")
        await rig.finished()
    assert rig.broker.closed == ["A"]


CERTIFICATE = """
insert into certificate (fingerprint, serial, issuer, subject, common_name, not_before, not_after)
values (repeat('a', 64), 'ab', 'CN=ca', 'CN=A', 'A', '2026-01-01Z', '2030-01-01Z')
"""


@pytest.mark.parametrize(
    ("serial", "issuer", "closed", "untold"),
    [("AB", "CN=ca", 1, 0), ("AB", "CN=forged", 0, 0), ("AC", "CN=ca", 0, 0), (None, "CN=ca", 0, 1)],
)
async def test_a_revoked_certificate_ends_what_certainly_shows_it(
    rig: Rig, serial: str | None, issuer: str, closed: int, untold: int
) -> None:
    """If the broker reports too little, the connection stays, and the receipt says so."""
    await rig.devices("A")
    await rig.sql.execute(CERTIFICATE)
    rig.broker.connect("A", certificate_serial=serial, certificate_issuer=issuer, certificate_subject="CN=A")
    async with rig.enforcing():
        await rig.sql.execute("update certificate set state = 'revoked'")
        (task,) = await rig.finished()
    assert (len(rig.broker.closed), task["receipt"]["untold"]) == (closed, untold)
    assert task["lane"] == "urgent"


async def list_certificate(rig: Rig, number: int, serials: list[str]) -> None:
    """Save a CRL of the authority with these serial numbers."""
    now = datetime.now(UTC)
    await rig.sql.execute(
        "insert into authority values ('fleet', 'CN=ca', '-----BEGIN CERTIFICATE-----', now()) on conflict do nothing"
    )
    await save_crl(rig.sql, "fleet", StoredCrl(number, now, now + timedelta(days=1), str(number).encode()), serials)


async def looked(rig: Rig, number: int) -> dict[str, Any]:
    """Wait until the only task has had a number of looks or is finished, and return it."""
    async with asyncio.timeout(30):
        while True:
            (task,) = await rig.tasks()
            if task["finished_at"] or (task["receipt"] or {}).get("looks", 0) >= number:
                return task
            await asyncio.sleep(0.02)


ReportCrl = Callable[[str, int], Awaitable[None]]


@pytest.fixture
async def report_crl(rig: Rig) -> AsyncIterator[ReportCrl]:
    """A function that reports a CRL as the host of rabbit@one or rabbit@two, each with its own role."""
    names = ("one", "two")
    for name in names:
        await rig.sql.execute(f"create role host_{name} login; grant execute on function crl_report to host_{name}")

    async def report(name: str, number: int) -> None:
        async with connected(rig.dsn, user=f"host_{name}") as host:
            await host.execute("select crl_report($1, 'CN=ca', $2, now() + interval '1 day')", f"rabbit@{name}", number)

    yield report
    for name in names:
        await rig.sql.execute(f"drop owned by host_{name}; drop role host_{name}")


async def look_now(rig: Rig, task: dict[str, Any]) -> dict[str, Any]:
    """Make the only task due, and return it after that look."""
    await rig.sql.execute("update enforcement set due_at = now()")
    return await looked(rig, task["receipt"]["looks"] + 1)


async def test_a_node_whose_host_reports_no_more_is_not_known_to_have_the_list(rig: Rig, report_crl: ReportCrl) -> None:
    """It had the CRL in its last report; the revocation is done when its host reports again."""
    await rig.devices("A")
    await rig.sql.execute(CERTIFICATE)
    await report_crl("one", 6)
    await list_certificate(rig, 6, ["ab"])
    await rig.sql.execute("update crl_installed set counts_until = now()")
    async with rig.enforcing():
        await rig.sql.execute("update certificate set state = 'revoked'")
        task = await looked(rig, 1)
        while task["receipt"]["looks"] < 3:
            task = await look_now(rig, task)
        assert task["finished_at"] is None
        assert task["receipt"]["lists"] == {
            "number": "6",
            "installed": [],
            "behind": [],
            "silent": ["rabbit@one"],
            "unknown": [],
        }
        assert "crl sync on the host of rabbit@one no longer reports" in why_open(task)
        rig.broker.connect("A", certificate_serial="ab", certificate_issuer="CN=ca", certificate_subject="CN=A")
        await report_crl("one", 6)
        await rig.sql.execute("update enforcement set due_at = now()")
        (task,) = await rig.finished()
    assert not rig.broker.live, "a client that came back is closed before the task is done"
    assert task["receipt"]["lists"]["installed"] == ["rabbit@one"]


async def test_a_node_that_begins_to_report_while_a_revocation_is_open_is_waited_for(
    rig: Rig, report_crl: ReportCrl
) -> None:
    """The look at which all have the CRL is not the last one: it may have missed a connection from a moment before."""
    await rig.sql.execute(CERTIFICATE)
    async with rig.enforcing():
        await rig.sql.execute("update certificate set state = 'revoked'")
        task = await looked(rig, 1)
        while not task["receipt"]["confirmed_at"]:
            task = await looked(rig, task["receipt"]["looks"] + 1)
        await report_crl("one", 5)
        await list_certificate(rig, 6, ["ab"])
        task = await looked(rig, task["receipt"]["looks"] + 1)
        looks = task["receipt"]["looks"]
        assert (task["finished_at"], task["receipt"]["lists"]["behind"]) == (None, ["rabbit@one"])
        await report_crl("one", 6)
        await rig.sql.execute("update enforcement set due_at = now()")
        (task,) = await rig.finished()
    assert task["receipt"]["looks"] == looks + 2


async def test_a_revoked_certificate_is_done_when_every_node_that_reports_has_the_list(
    rig: Rig, report_crl: ReportCrl
) -> None:
    await rig.devices("A")
    await rig.sql.execute(CERTIFICATE)
    rig.broker.running["rabbit@two"] = True
    nodes = sorted(rig.broker.running)
    await report_crl("one", 5)
    await report_crl("two", 5)
    await list_certificate(rig, 5, [])

    async with rig.enforcing():
        await rig.sql.execute("update certificate set state = 'revoked'")
        task = await looked(rig, 2)
        assert task["finished_at"] is None, "no CRL lists it"
        assert task["receipt"]["lists"] == {
            "number": None,
            "installed": [],
            "behind": nodes,
            "silent": [],
            "unknown": [],
        }
        await list_certificate(rig, 6, ["ab"])
        await report_crl("two", 6)
        await rig.sql.execute("update enforcement set due_at = now()")
        task = await looked(rig, task["receipt"]["looks"] + 1)
        assert task["finished_at"] is None, "the first node still has the previous CRL"
        assert task["receipt"]["lists"]["behind"] == nodes[:1]
        rig.broker.connect("A", certificate_serial="ab", certificate_issuer="CN=ca", certificate_subject="CN=A")
        await report_crl("one", 7)  # a later CRL counts as well
        await rig.sql.execute("update enforcement set due_at = now()")
        (task,) = await rig.finished()
    assert not rig.broker.live, "a client that came back is closed before the task is done"
    assert task["receipt"]["lists"] == {
        "number": "6",
        "installed": nodes,
        "behind": [],
        "silent": [],
        "unknown": [],
    }


async def test_a_node_that_reports_no_list_is_named_in_the_receipt(rig: Rig) -> None:
    await rig.sql.execute(CERTIFICATE)
    async with rig.enforcing():
        await rig.sql.execute("update certificate set state = 'revoked'")
        (task,) = await rig.finished()
    lists = task["receipt"]["lists"]
    assert (lists["installed"], lists["behind"], lists["unknown"]) == ([], [], sorted(rig.broker.running))


async def test_a_session_that_could_not_be_deleted_at_once_is_not_taken_for_the_new_owners(rig: Rig) -> None:
    """APM_1 is registered while APM uses its client id: APM's session with that id is deleted at the second attempt."""
    await rig.devices("APM")
    rig.broker.connect("APM", "APM_1_x", "fleet/APM/#")
    rig.broker.refuses = lambda method, _argument: method == "delete_queue"
    async with rig.enforcing():
        await rig.devices("APM_1")
        await rig.broker.until(lambda: any(method == "delete_queue" for method, _ in rig.broker.calls))
        rig.broker.refuses = lambda _method, _argument: False
        (task,) = await rig.finished()
    assert rig.broker.queues == {}
    assert task["receipt"]["closed"] == {"rabbit@one": 1}
    assert [queue["why"] for queue in task["receipt"]["queues_deleted"]] == ["client_id_owner"]


async def test_the_second_look_at_who_was_not_in_the_list_counts_from_the_list() -> None:
    """A login allowed before the list is in the next one 8 s later, however long closing connections took."""
    listed = ListedInventory(ClusterActions(MemoryCluster(Broker()), 100, 4), {})
    assert listed.look_again_for_absent_s() == listed.look_again_s
    listed.taken_at -= 5
    assert 2 < listed.look_again_for_absent_s() <= 3
    listed.taken_at -= 60
    assert listed.look_again_for_absent_s() == 0


async def test_connections_are_closed_also_when_queues_cannot_be_listed(rig: Rig) -> None:
    names = [f"D{n}" for n in range(60)]
    await rig.devices(*names)
    for name in names:
        rig.broker.connect(name, name, f"fleet/{name}/#")
    rig.broker.refuses = lambda method, _argument: method == "queues"
    async with rig.enforcing():
        await rig.set_status("revoked", *names)
        await rig.broker.until(lambda: rig.broker.users() == [])
        rig.broker.refuses = lambda _method, _argument: False
        done = await rig.finished()
    assert rig.broker.queues == {}
    assert all(task["receipt"]["closed"] == {"rabbit@one": 1} for task in done)


async def test_of_a_mass_change_in_many_parts_those_that_are_connected_come_first(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "BULK_BATCH", 100)
    names = [f"D{n:03}" for n in range(400)]
    await rig.devices(*names)
    rig.broker.connect("D399", "D399", "fleet/D399/#")
    async with rig.enforcing():
        await rig.set_status("revoked", *names)
        done = await rig.finished()
    assert rig.broker.users() == []
    assert rig.broker.queues == {}
    (connected,) = [task for task in done if task["name"] == "D399"]
    assert connected["receipt"]["closed"] == {"rabbit@one": 1}
    looked_at = await rig.sql.fetch(
        "select name from enforcement order by (receipt ->> 'confirmed_at')::float8 limit 100"
    )
    assert "D399" in {row["name"] for row in looked_at}


async def test_what_changed_while_a_device_was_suspended_is_not_forgotten_when_it_is_active_again(rig: Rig) -> None:
    """Its old connection has the old rights: the suspension is superseded, the renaming is not."""
    await rig.devices("A")
    rig.broker.connect("A", "A", "fleet/A/#")
    await rig.set_status("suspended", "A")
    await rig.sql.execute("update device set common_name = 'A2' where device_id = 'A'")
    await rig.set_status("active", "A")
    await rig.refresh_copy()
    async with rig.enforcing():
        await rig.finished()
    assert rig.broker.closed == ["A"]


async def test_one_transaction_that_suspends_changes_and_activates(rig: Rig) -> None:
    await rig.devices("A")
    rig.broker.connect("A")
    async with rig.sql.transaction():
        await rig.set_status("suspended", "A")
        await rig.sql.execute(
            "insert into topic_rule (device_id, effect, action, topic) values ('A', 'deny', 'publish', 'fleet/A/x')"
        )
        await rig.set_status("active", "A")
    await rig.refresh_copy()
    async with rig.enforcing():
        await rig.finished()
    assert rig.broker.closed == ["A"]


async def test_the_look_at_which_all_have_confirmed_is_not_the_last_one(rig: Rig) -> None:
    """A silent replica may have let the device in just before."""
    await rig.devices("A")
    rig.broker.connect("A")
    await rig.sql.execute(
        "insert into replica (id, name, program_version, workers, longest_staleness_s, introduced_at, confirmed_at, snapshot)"
        " values (gen_random_uuid(), 'silent', 'x', 1, 600, now() - interval '60 s', now() - interval '60 s', pg_current_snapshot())"
    )
    async with rig.enforcing():
        await rig.set_status("revoked", "A")
        async with asyncio.timeout(10):
            while not (task := (await rig.tasks())[0])["receipt"]:
                await asyncio.sleep(0.02)
        looks = task["receipt"]["looks"]
        await rig.sql.execute("delete from replica where name = 'silent'")
        await rig.sql.execute("update enforcement set due_at = now()")
        (task,) = await rig.finished()
    assert task["receipt"]["looks"] >= looks + 2


async def test_a_session_that_cannot_be_repaired_does_not_throw_a_permitted_user_out_again_and_again(rig: Rig) -> None:
    await rig.devices("A")
    rig.broker.connect("A", "A", "news/#")
    rig.broker.refuses = lambda method, _argument: method == "unbind"
    deny = "insert into topic_rule (device_id, effect, action, topic) values ('A', 'deny', 'subscribe', 'news/#')"
    async with rig.enforcing():
        await rig.sql.execute(deny)
        await rig.broker.until(lambda: rig.broker.closed == ["A"])
        rig.broker.connect("A", connected_at=4e9)
        await rig.broker.until(lambda: sum(method == "unbind" for method, _ in rig.broker.calls) >= 3)
        rig.broker.refuses = lambda _method, _argument: False
        await rig.finished()
    assert rig.broker.closed == ["A"]


async def test_a_hold_that_a_dead_leader_left_is_released(rig: Rig) -> None:
    await rig.devices("A")
    await rig.sql.execute(
        "insert into device_hold (device_id, since, until) values ('A', now() - interval '20 s', 'infinity')"
    )
    async with rig.enforcing():
        async with asyncio.timeout(10):
            while await rig.sql.fetchval("select count(*) from device_hold"):
                await asyncio.sleep(0.02)


async def test_a_type_is_looked_at_again_when_a_node_was_not_seen(rig: Rig) -> None:
    """Devices on a node that is cut off are found when the node is back."""
    await rig.devices("A")
    rig.broker.running["rabbit@two"] = False
    async with rig.enforcing():
        await rig.sql.execute("delete from topic_rule where topic = 'fleet/{device_id}/#' and action = 'publish'")
        await rig.broker.until(lambda: sum(method == "connections" for method, _ in rig.broker.calls) >= 3)
        (task,) = await rig.tasks()
        assert task["finished_at"] is None
        rig.broker.connect("A", node="rabbit@two", connected_at=1.0)
        rig.broker.running["rabbit@two"] = True
        await rig.finished()
    assert rig.broker.closed == ["A"]


async def test_nobody_enforces_before_the_registry_is_loaded(rig: Rig) -> None:
    """With an empty copy every user would look unknown, and sessions would be deleted."""
    await rig.devices("A")
    rig.broker.connect("A", "A", "fleet/A/#", "news/#")
    store = new_store()
    task = asyncio.create_task(rig.leader(store).run())
    try:
        deny = "insert into topic_rule (device_id, effect, action, topic) values ('A', 'deny', 'subscribe', 'news/#')"
        await rig.sql.execute(deny)
        await asyncio.sleep(1.0)  # there is no event for something that must not happen
        assert not rig.observer.leading
        assert rig.broker.calls == []
        feed = ChangeFeed(Target(rig.dsn))
        await feed.load(store, time.monotonic())
        await feed.close()
        async with asyncio.timeout(10):
            while not rig.observer.leading:
                await asyncio.sleep(0.02)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert [name for _, name in rig.broker.queues] == ["mqtt-subscription-Aqos1"]
