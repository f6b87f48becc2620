"""Decisions when a clock is set, or a machine or process is suspended."""

import os
import signal
import time

import pytest

from authbackend import clocks
from tests.service.conftest import HASH, POLICY, apply, until
from tests.service.test_processes import children, replica
from tests.support.registry import new_store
from tests.unit.test_snapshot import MARK


def set_clock(monkeypatch, by_s):
    """Set this machine's clock; the database's stays correct."""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + by_s)


async def expires(service, sql, device, interval):
    await sql(f"update device set expires_at = clock_timestamp() + interval '{interval}' where device_id = '{device}'")


@pytest.mark.parametrize("by_s", [-86400, 86400])
async def test_setting_a_replicas_clock_moves_no_expiry(service, sql, monkeypatch, by_s):
    set_clock(monkeypatch, by_s)
    await expires(service, sql, "APM0001", "-1 hour")
    await expires(service, sql, "APM0002", "1 hour")
    await sql("update device set status = 'active' where device_id = 'GONE'")

    async def followed():
        return await service.login("GONE") == "allow"

    await until(followed, "the changes are followed")
    assert await service.login("APM0001") == "deny"
    assert await service.login("APM0002") == "allow"


@pytest.mark.parametrize("by_s", [-86400, 86400])
async def test_setting_a_replicas_clock_ends_no_hold_and_prolongs_none(service, sql, monkeypatch, by_s):
    set_clock(monkeypatch, by_s)
    await sql(
        "insert into device_hold (device_id, since, until) values "
        "('APM0001', clock_timestamp(), clock_timestamp() + interval '1 hour'), "
        "('APM0002', clock_timestamp() - interval '2 hours', clock_timestamp() - interval '1 hour')"
    )

    async def held():
        return await service.login("APM0001") == "deny"

    await until(held, "the hold is followed")
    assert await service.login("APM0002") == "allow"


def test_the_time_that_a_machine_was_suspended_counts_for_the_age_of_its_copy(monkeypatch):
    store = new_store()
    with store.loading(MARK, clocks.uptime(), time.time()):
        pass
    boottime, now = time.clock_gettime, time.time()
    # CLOCK_MONOTONIC does not advance during a suspend, so time.monotonic() is not changed.
    monkeypatch.setattr(time, "clock_gettime", lambda clock: boottime(clock) + 3600)
    with store.reader() as registry:
        assert registry.stale(900)
        assert registry.age_s == pytest.approx(3600, abs=60)
        assert registry.now == pytest.approx(now + 3600, abs=60)


@pytest.mark.parametrize("by_s", [-86400.0, 86400.0])
def test_setting_the_databases_clock_makes_a_copy_neither_younger_nor_older(by_s):
    """The age of the last read before a replica was cut off does not depend on the database's clock."""
    store = new_store()
    with store.loading(MARK, clocks.uptime() - 600, time.time() - 600):
        pass
    for database_time in (time.time() - 600, time.time() - 600 + by_s):
        store.note(synced_at=clocks.uptime() - 600, database_time=database_time)
        with store.reader() as registry:
            assert registry.age_s == pytest.approx(600, abs=60)
            assert registry.stale(540)
            assert not registry.stale(900)


async def test_workers_deny_when_the_process_that_follows_the_database_stands_still(dsn):
    await apply(dsn, POLICY.replace("HASH", f'"{HASH}"'))
    async with replica(dsn, workers=1, REGISTRY__MAX_STALENESS_S="3") as running:
        follower = children(running.process.pid)[0]
        os.kill(follower, signal.SIGSTOP)

        async def denied():
            return await running.login("APM0001") == "deny"

        async def allowed():
            return await running.login("APM0001") == "allow"

        try:
            await until(denied, "the copy is stale")
        finally:
            os.kill(follower, signal.SIGCONT)
        await until(allowed, "it follows again")
