"""Liveness and readiness, used by container health checks and load balancers."""

from types import SimpleNamespace

import pytest

from authbackend import clocks
from authbackend.service import heartbeats
from tests.api.conftest import MARK, MAX_STALENESS_S


async def ready(client):
    async with client.get("/health/ready") as answer:
        assert answer.content_type == "application/json"
        return answer.status, await answer.json()


async def test_a_process_that_answers_is_live_whatever_it_knows(aiohttp_client, empty):
    client = await aiohttp_client(empty.health_application())
    async with client.get("/health/live") as answer:
        assert (answer.status, answer.content_type) == (200, "application/json")
        assert await answer.json() == {"status": "live"}


async def test_a_replica_in_step_is_ready(client):
    status, health = await ready(client)
    assert status == 200
    assert health["status"] == "ready"
    assert health["fault"] is None
    assert health["workers"] == {"serving": 2, "starting": 0, "hanging": 0}
    assert 0 <= health["sync_age_s"] < MAX_STALENESS_S


async def test_before_the_first_load_it_is_not_ready(aiohttp_client, empty):
    empty.serve()
    status, health = await ready(await aiohttp_client(empty.health_application()))
    assert status == 503
    assert health["status"] == "not ready: the registry has not been loaded"
    assert (health["sync_age_s"], health["fault"]) == (None, "the registry has not been loaded yet")


async def test_before_the_first_load_it_says_what_is_in_the_way(aiohttp_client, empty):
    empty.counted.refresh_failed("PostgreSQL cannot be reached: TimeoutError")
    assert (await ready(await aiohttp_client(empty.health_application())))[1]["fault"] == (
        "PostgreSQL cannot be reached: TimeoutError"
    )


async def test_a_copy_that_grows_old_is_ready_and_says_why_it_does(client, replica):
    replica.store.note(synced_at=clocks.uptime() - 600)
    replica.store.note(fault="PostgreSQL cannot be reached: TimeoutError")
    status, health = await ready(client)
    assert (status, health["fault"]) == (200, "PostgreSQL cannot be reached: TimeoutError")
    assert 600 <= health["sync_age_s"] < MAX_STALENESS_S


async def test_a_copy_that_is_too_old_is_not_ready_until_it_is_in_step_again(client, replica):
    replica.store.note(synced_at=clocks.uptime() - MAX_STALENESS_S - 1)
    status, health = await ready(client)
    assert status == 503
    assert health["status"] == "not ready: the copy of the registry is stale, everything is denied"
    assert health["sync_age_s"] > MAX_STALENESS_S
    replica.store.note(position=MARK, synced_at=clocks.uptime())
    assert (await ready(client))[0] == 200


async def test_a_copy_from_disk_is_stale_by_the_limit_it_was_written_under(client, replica):
    replica.store.restored(clocks.uptime() - 20, longest_staleness_s=10)
    assert (await ready(client))[0] == 503


@pytest.mark.parametrize(
    ("worker", "serving", "expected", "status"),
    [
        ("gone", 1, "ready", 200),
        ("hangs", 1, "not ready: 1 of 2 workers hang", 503),
        ("all gone", 0, "not ready: no worker serves yet", 503),
    ],
)
async def test_workers_count(client, replica, monkeypatch, worker, serving, expected, status):
    if worker == "hangs":
        long_ago = SimpleNamespace(monotonic=lambda: clocks.uptime() - heartbeats.HANGS_AFTER_S - 1)
        with monkeypatch.context() as then:
            then.setattr(heartbeats, "time", long_ago)
            replica.heartbeats.beat(1, 1)
    for number in {"gone": (0,), "all gone": (0, 1)}.get(worker, ()):
        replica.heartbeats.gone(number)
    code, health = await ready(client)
    assert (code, health["status"], health["workers"]["serving"]) == (status, expected, serving)


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
async def test_health_is_read_only(client, path):
    async with client.post(path) as answer:
        assert answer.status == 405
    async with client.head(path) as answer:
        assert answer.status == 200


async def test_a_bug_is_told_as_not_ready(client, monkeypatch):
    def broken(_):
        raise RuntimeError("nobody thought of it")

    monkeypatch.setattr(heartbeats.WorkerHeartbeats, "states", broken)
    status, health = await ready(client)
    assert status == 503
    assert health["status"] == "not ready: RuntimeError in authbackend, see its log"
