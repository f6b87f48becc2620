"""When each part of a replica tries again after an outage of the database, with a simulated clock."""

import asyncio
import contextlib
import itertools
from datetime import UTC, datetime

import pytest
from structlog.testing import capture_logs

from authbackend.backoff import Reachability
from authbackend.certificates import crl_publisher
from authbackend.certificates.crl_publisher import CrlPublisher
from authbackend.errors import Forbidden, NoRoom, Unavailable
from authbackend.registry.announcer import Peers, ReplicaAnnouncer
from authbackend.registry.follower import FeedRead, RegistryFollower
from authbackend.registry.position import FeedPosition
from authbackend.registry.records import Patch
from tests.support.clock import run_on_clock
from tests.support.registry import Observed, new_store

AWAY = Unavailable("PostgreSQL cannot be reached: ConnectionRefusedError")
NOBODY = (float("inf"), 0)


def now():
    return asyncio.get_running_loop().time()


class Server:
    """
    A database that is unreachable for a time, and records the attempts of each part.

    ``first`` is the part that can connect before all others, ``faults`` are failures of single parts at any time.
    """

    def __init__(self, away=NOBODY, first=None, **faults):
        self.away = away
        self.first = first
        self.faults = faults
        self.asked = {"copy": [], "listener": [], "announcer": [], "lists": []}
        self._marks = itertools.count(100)

    def reachable(self, part):
        if now() < self.away[0]:
            return True
        return now() >= self.away[1] and (self.first in (None, part) or self.asked[self.first][-1] >= self.away[1])

    def answer(self, part):
        self.asked[part].append(now())
        if not self.reachable(part):
            raise AWAY
        if part in self.faults:
            raise self.faults[part]

    def first_after(self, part, moment):
        """Return when a part tried for the first time after this moment."""
        return next(at for at in self.asked[part] if at >= moment)

    def pauses(self, part, begin, end):
        """Return the pauses of a part between its attempts in a period."""
        asked = [at for at in self.asked[part] if begin <= at < end]
        return [after - before for before, after in itertools.pairwise(asked)]

    def feed_read(self):
        number = next(self._marks)
        return FeedRead(FeedPosition("epoch", "incarnation", f"{number}:{number}:"), datetime.now(UTC))

    async def lost(self):
        """Wait until connections are cut."""
        await asyncio.sleep(max(0.0, self.away[0] - now()) if now() < self.away[0] else 1e9)


class Feed:
    """Implements ``registry.follower.Feed`` for an empty registry."""

    def __init__(self, server):
        self.server = server

    async def load(self, store, synced_at):
        self.server.answer("copy")
        feed_read = self.server.feed_read()
        with store.loading(feed_read.position, synced_at):
            pass
        return feed_read

    async def changes(self, position, devices):
        self.server.answer("copy")
        return Patch(), self.server.feed_read()

    async def later_changes(self, position):
        return set()

    async def prune(self):
        pass

    async def close(self):
        pass

    @contextlib.asynccontextmanager
    async def wake_ups(self):
        self.server.answer("listener")

        async def next_change():
            await self.server.lost()
            raise AWAY

        yield next_change


class PostgresReplicaTable:
    """Implements ``registry.announcer.ReplicaTable``."""

    def __init__(self, server):
        self.server = server

    async def announce(self, position, confirmed_at):
        self.server.answer("announcer")

    async def peers(self):
        return Peers({}, {})

    async def close(self):
        pass


class Observer(Observed):
    """Passes refreshes to the announcer, as the service does."""

    def __init__(self):
        super().__init__()
        self.announcer = None

    def refreshed(self, feed_read, refreshed, *, lasting):
        super().refreshed(feed_read, refreshed, lasting=lasting)
        self.announcer.serves(feed_read)

    def peers(self, peers):
        pass


@pytest.fixture
def run_replica(monkeypatch):
    """Run the parts of a replica against a server for some seconds of simulated time."""

    def run(server, seconds):
        @contextlib.asynccontextmanager
        async def connected(target):
            server.answer("lists")
            yield None

        class Listener:
            def __init__(self, connection):
                pass

            async def listen(self, *channels):
                pass

        async def follow(publisher, connection, listener):
            publisher._faults.succeeded()
            publisher._backoff.reset()
            await server.lost()
            raise AWAY

        monkeypatch.setattr(crl_publisher, "connected", connected)
        monkeypatch.setattr(crl_publisher, "Listener", Listener)
        monkeypatch.setattr(CrlPublisher, "_follow", follow)

        async def scene():
            reachability, observer = Reachability(), Observer()
            observer.announcer = ReplicaAnnouncer(
                PostgresReplicaTable(server), observer, reachability, comes_back=False
            )
            copy = RegistryFollower(Feed(server), new_store(), observer, reachability=reachability)
            publisher = CrlPublisher(None, None, 3600, reachability)
            parts = [asyncio.create_task(part.run()) for part in (copy, observer.announcer, publisher)]
            await asyncio.sleep(seconds)
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
            return copy

        with capture_logs() as logged:
            return run_on_clock(scene()), logged

    return run


PARTS = ["copy", "listener", "announcer", "lists"]


@pytest.mark.parametrize("part", PARTS)
def test_attempts_begin_soon_and_are_never_more_than_half_a_second_apart(run_replica, part):
    server = Server(away=(5, 65))
    run_replica(server, 70)
    pauses = server.pauses(part, 5, 65)
    if part in ("listener", "lists"):  # they have a connection, and must first see that it has ended
        pauses.insert(0, server.first_after(part, 5) - 5)
    assert pauses[0] <= 0.05
    assert pauses[1] <= 0.1
    assert max(pauses) <= 0.5
    assert min(pauses[5:]) >= 0.25
    assert len(pauses) <= 60 / 0.25 + 10


@pytest.mark.parametrize("first", PARTS)
@pytest.mark.parametrize("back", [5.5, 40, 1000.123])
def test_all_parts_connect_when_the_first_has_and_that_is_within_half_a_second(run_replica, first, back):
    server = Server(away=(5, back), first=first)
    copy, _ = run_replica(server, back + 1)
    moment = server.first_after(first, back)
    assert moment <= back + 0.5
    assert [moment in server.asked[part] for part in PARTS] == [True] * 4
    assert copy.fault is None


def test_an_outage_is_logged_at_once_then_once_a_minute_and_so_is_its_end(run_replica):
    _, logged = run_replica(Server(away=(5, 170)), 175)
    events = [line["event"] for line in logged if line["log_level"] != "debug"]
    assert events[:2] == ["registry.loaded", "registry.following"]
    assert sorted(events[2:-2]) == ["crl.refresh_failed"] * 3 + ["registry.refresh_failed"] * 3
    assert sorted(events[-2:]) == ["crl.following", "registry.following"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("fault", [Forbidden("no right"), RuntimeError("a fault that nobody thought of")], ids=type)
def test_a_part_that_fails_while_the_others_do_well_waits_its_pauses_out_and_is_logged_once(run_replica, part, fault):
    server = Server(**{part: fault})
    _, logged = run_replica(server, 60)
    assert len(server.asked[part]) <= 60 / 0.25 + 10
    assert len([line for line in logged if line["log_level"] in ("warning", "error")]) <= 2


def test_a_registry_that_does_not_fit_is_not_read_again_and_again(run_replica):
    server = Server(copy=NoRoom("the registry does not fit into the memory"))
    run_replica(server, 60)
    assert min(server.pauses("copy", 0, 60)) >= 5
