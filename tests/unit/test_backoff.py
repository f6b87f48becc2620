"""The length of pauses after failures, and what cuts them short."""

import asyncio
import itertools

import pytest

from authbackend.backoff import Backoff, Reachability
from tests.support.clock import run_on_clock


def now():
    return asyncio.get_running_loop().time()


async def finishes(part, deadline_s):
    """Return whether a part ends by itself before this time of the event loop's clock."""
    _, waiting = await asyncio.wait([part], timeout=deadline_s)
    return not waiting


async def unreachable(reachability):
    """Make a part fail twice, after which the server counts as unreachable."""
    backoff = Backoff()
    for _ in range(2):
        await reachability.pause(backoff)


def test_pauses_double_up_to_the_longest_and_begin_again_after_a_reset(monkeypatch):
    monkeypatch.setattr("random.uniform", lambda shortest, longest: longest)
    backoff = Backoff()
    assert [backoff.next_s() for _ in range(7)] == [0.05, 0.1, 0.2, 0.4, 0.5, 0.5, 0.5]
    backoff.reset()
    assert [backoff.next_s() for _ in range(2)] == [0.05, 0.1]
    other = Backoff(first_s=0.2, longest_s=10)
    assert [other.next_s() for _ in range(8)] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10]


def test_jitter_spreads_the_pauses_of_many_and_makes_none_longer_or_less_than_half():
    pauses = [Backoff(1, 1).next_s() for _ in range(1000)]
    assert 0.5 <= min(pauses) < 0.55
    assert 0.95 < max(pauses) <= 1.0


def test_fifty_replicas_that_lost_their_server_together_do_not_come_back_together():
    """With four parts each, as in reality: at most a sixth of all parts try within any 10 ms."""

    async def attempts():
        begun = []

        async def part():
            backoff, reachability = Backoff(), Reachability()
            for _ in range(20):
                await reachability.pause(backoff)
                begun.append(now())

        await asyncio.gather(*(part() for _ in range(200)))
        return sorted(at for at in begun if at > 2)  # when all have reached their longest pause

    counted = [len(list(group)) for _, group in itertools.groupby(run_on_clock(attempts()), lambda at: int(at * 100))]
    assert max(counted) < 200 / 6


def test_the_first_that_connects_wakes_all_that_pause():
    async def scene():
        reachability = Reachability()
        await unreachable(reachability)
        others = [asyncio.create_task(reachability.pause(Backoff(60, 60))) for _ in range(3)]
        await asyncio.sleep(1)
        began = now()
        reachability.succeeded()
        await asyncio.gather(*others)
        assert now() == began

    run_on_clock(scene())


def test_a_wake_up_is_for_those_that_pause_now_and_not_for_whoever_pauses_later():
    async def scene():
        reachability = Reachability()
        await unreachable(reachability)
        reachability.succeeded()
        assert not await finishes(asyncio.create_task(reachability.pause(Backoff(60, 60))), 29)

    run_on_clock(scene())


def test_a_server_that_nobody_found_away_wakes_nobody():
    """One part fails for a different reason while others keep connecting: its pauses do not get shorter."""

    async def scene():
        reachability = Reachability()
        backoff = Backoff(60, 60)

        async def connects_all_the_time():
            while True:
                reachability.succeeded()
                await asyncio.sleep(0.02)

        other = asyncio.create_task(connects_all_the_time())
        for _ in range(3):
            began = now()
            await reachability.pause(backoff)
            assert now() - began >= 30
        other.cancel()

    run_on_clock(scene())


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_that_connect_and_then_fail_do_not_wake_each_other(parts):
    """For example with a role that may connect but not read: no more attempts than one part alone would make."""

    async def scene():
        reachability = Reachability()
        attempts = [0] * parts

        async def part(number):
            backoff = Backoff()
            while True:
                reachability.succeeded()
                attempts[number] += 1
                await reachability.pause(backoff)

        running = [asyncio.create_task(part(number)) for number in range(parts)]
        await asyncio.sleep(60)
        for one in running:
            one.cancel()
        return attempts

    assert max(run_on_clock(scene())) <= 60 / 0.25 + 10


def test_one_that_is_refused_tries_at_most_once_more_for_each_time_that_another_connects():
    async def scene():
        reachability = Reachability()
        attempts = connections = 0

        async def is_refused():
            nonlocal attempts
            backoff = Backoff()
            while True:
                attempts += 1
                await reachability.pause(backoff)

        async def connects_and_fails():
            nonlocal connections
            backoff = Backoff()
            while True:
                connections += 1
                reachability.succeeded()
                await reachability.pause(backoff)

        running = [asyncio.create_task(is_refused()), asyncio.create_task(connects_and_fails())]
        await asyncio.sleep(60)
        for one in running:
            one.cancel()
        return attempts, connections

    attempts, connections = run_on_clock(scene())
    assert connections <= 60 / 0.25 + 10
    assert attempts <= connections + 60 / 0.25 + 10
