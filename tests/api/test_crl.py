"""The endpoint ``/crl/NAME.crl``, from which brokers fetch lists and wait for new ones."""

import asyncio
from datetime import UTC, datetime

import pytest

from authbackend.certificates.crl_endpoint import PublishedCrl, PublishedCrls

FIRST = PublishedCrl(b"\x30\x01", datetime(2030, 1, 31, 12, 0, tzinfo=UTC))
SECOND = PublishedCrl(b"\x30\x02", datetime(2030, 2, 1, 12, 0, tzinfo=UTC))
PATH = "/crl/fleet.crl"


@pytest.fixture
def lists(replica):
    replica.lists.replace({"fleet": FIRST})
    return replica.lists


@pytest.fixture
def waiting(monkeypatch):
    """An event that is set when a request has begun to wait."""
    begun = asyncio.Event()
    original = PublishedCrls._next

    async def watched(*arguments):
        begun.set()
        return await original(*arguments)

    monkeypatch.setattr(PublishedCrls, "_next", watched)
    return begun


async def ask(client, **headers):
    async with client.get(PATH, headers=headers) as answer:
        return answer.status, await answer.read(), answer.headers


async def test_a_list_is_served_with_what_caches_and_brokers_need(client, lists):
    status, body, headers = await ask(client)
    assert (status, body) == (200, FIRST.der)
    assert headers["Content-Type"] == "application/pkix-crl"
    assert headers["ETag"] == FIRST.etag
    assert headers["Last-Modified"] == "Thu, 31 Jan 2030 12:00:00 GMT"
    assert headers["Cache-Control"] == "no-cache"


async def test_who_has_it_is_told_so_without_a_body(client, lists):
    status, body, headers = await ask(client, **{"If-None-Match": FIRST.etag})
    assert (status, body, headers["ETag"]) == (304, b"", FIRST.etag)
    assert (await ask(client, **{"If-None-Match": '"another"'}))[:2] == (200, FIRST.der)


async def test_a_new_list_is_another_and_served_from_then_on(client, lists):
    lists.replace({"fleet": SECOND})
    assert (await ask(client, **{"If-None-Match": FIRST.etag}))[:2] == (200, SECOND.der)


@pytest.mark.parametrize("path", ["/crl/other.crl", "/crl/FLEET.crl", "/crl/..%2Ffleet.crl", "/crl/.crl", "/crl/fleet"])
async def test_a_name_without_a_list_is_not_found(client, lists, path):
    async with client.get(path) as answer:
        assert answer.status == 404
        if path == "/crl/other.crl":
            assert answer.content_type == "application/problem+json"
            assert "no authority 'other' has a revocation list here" in (await answer.json(content_type=None))["detail"]


async def test_before_any_list_was_loaded_it_is_unavailable_and_not_missing(client):
    """A client that takes 404 for an empty list would accept every certificate."""
    status, body, _ = await ask(client)
    assert (status, b"have not been loaded yet" in body) == (503, True)


async def test_who_waits_is_answered_by_the_next_list(client, lists, waiting):
    asking = asyncio.create_task(ask(client, **{"If-None-Match": FIRST.etag, "Prefer": "wait=30"}))
    await waiting.wait()
    lists.replace({"fleet": FIRST, "other": SECOND})  # a change of another authority's list is no reason to answer
    lists.replace({"fleet": SECOND})
    assert (await asking)[:2] == (200, SECOND.der)


async def test_who_waits_for_a_list_that_is_removed_is_told(client, lists, waiting):
    asking = asyncio.create_task(ask(client, **{"If-None-Match": FIRST.etag, "Prefer": "wait=30"}))
    await waiting.wait()
    lists.replace({})
    assert (await asking)[0] == 404


async def test_who_waits_is_answered_when_the_listener_stops(client, lists, waiting):
    asking = asyncio.create_task(ask(client, **{"If-None-Match": FIRST.etag, "Prefer": "wait=60"}))
    await waiting.wait()
    await lists.close(client.app)
    assert (await asyncio.wait_for(asking, 30))[0] == 304


@pytest.mark.parametrize("prefer", ["respond-async, wait=0", 'wait="0"', "WAIT = 0; x=1"])
async def test_a_wait_that_has_passed_is_answered_as_it_is(client, lists, waiting, prefer):
    assert (await ask(client, **{"If-None-Match": FIRST.etag, "Prefer": prefer}))[0] == 304
    assert waiting.is_set()


@pytest.mark.parametrize("prefer", ["wait", "wait=", "wait=-1", "wait=soon", "wait=1.5", "wait=9999999", "await=30"])
async def test_what_is_no_number_of_seconds_is_not_waited_for(client, lists, waiting, prefer):
    assert (await ask(client, **{"If-None-Match": FIRST.etag, "Prefer": prefer}))[0] == 304
    assert not waiting.is_set()


async def test_who_does_not_have_it_does_not_wait(client, lists, waiting):
    assert (await ask(client, Prefer="wait=30"))[0] == 200
    assert not waiting.is_set()
