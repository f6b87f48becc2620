"""Metrics take little time from the process that answers health checks, however many clients ask."""

import asyncio

import pytest

from authbackend.service import health_listener
from authbackend.service.health import Health
from authbackend.service.health_listener import METRICS_SHARE, Exposition, health_application
from tests.api.conftest import MAX_STALENESS_S


@pytest.fixture
async def counting(aiohttp_client, replica):
    """A client, and the state at each rendering, which the test sets."""
    rendered = []

    def render():
        rendered.append(replica.published)
        return f"published {replica.published}\n".encode()

    health = Health(replica.store.reader(), lambda: replica.published, replica.heartbeats, MAX_STALENESS_S)
    return await aiohttp_client(health_application(render, health, replica.lists)), rendered


async def scrape(client):
    async with client.get("/metrics") as answer:
        return await answer.text()


async def test_what_is_read_is_never_older_than_the_question(counting, replica):
    client, _ = counting
    for number in range(20):
        replica.published = number
        assert await scrape(client) == f"published {number}\n"


async def test_everybody_who_waits_is_answered_by_one_rendering(monkeypatch):
    clock, slept = [100.0], []

    async def sleep(seconds):
        slept.append(seconds)
        await everybody_asked.wait()
        clock[0] += max(0.0, seconds)

    monkeypatch.setattr(health_listener.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(health_listener.asyncio, "sleep", sleep)
    rendered = []

    def render():
        rendered.append(clock[0])
        clock[0] += 0.1
        return b"metrics"

    exposition = Exposition(render)
    for _ in range(3):
        everybody_asked = asyncio.Event()
        asking = [asyncio.ensure_future(exposition.show(None)) for _ in range(100)]
        for _ in asking:
            await asyncio.wait(asking, timeout=0)
        everybody_asked.set()
        assert {answer.body for answer in await asyncio.gather(*asking)} == {b"metrics"}
    assert len(rendered) == 3
    share = 0.1 * len(rendered) / (clock[0] - 100.0 + slept[1])  # including the pause after the last one
    assert share == pytest.approx(METRICS_SHARE)


async def test_a_rendering_that_fails_is_tried_again_for_the_next(aiohttp_client, replica):
    faults = [RuntimeError("no file left")]

    def render():
        if faults:
            raise faults.pop()
        return b"well\n"

    health = Health(replica.store.reader(), lambda: replica.published, replica.heartbeats, MAX_STALENESS_S)
    client = await aiohttp_client(health_application(render, health, replica.lists))
    async with client.get("/metrics") as answer:
        assert answer.status == 500
    assert await scrape(client) == "well\n"
