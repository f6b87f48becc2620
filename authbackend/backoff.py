"""Exponential back-off between attempts to reach a server, cut short for everyone waiting when the server returns."""

from __future__ import annotations

import asyncio
import contextlib
import random


class Backoff:
    """
    Exponential back-off with jitter: each pause is twice as long as the last.

    Each is shortened at random by up to half, so that processes that lost the same server at the same moment do not all
    reconnect at the same moment.

    Args:
        first_s: The first pause, before jitter.
        longest_s: Upper limit of a pause.
    """

    def __init__(self, first_s: float = 0.05, longest_s: float = 0.5) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._next_s = first_s

    def next_s(self) -> float:
        """Return the length of the next pause."""
        pause_s = self._next_s * random.uniform(0.5, 1.0)
        self._next_s = min(self._longest_s, self._next_s * 2)
        return pause_s

    def reset(self) -> None:
        """Start over with the first pause; call this when an attempt has succeeded completely."""
        self._next_s = self._first_s


class Reachability:
    """
    Shared by the parts of a process that need the same server: the first to connect wakes those that are pausing.

    Only the return of an unreachable server wakes them. If any part connects between two pauses of another, the server
    is reachable: the other fails for a different reason, for example a missing privilege, and must wait out its pauses.
    Otherwise two parts that both connect and then fail would wake each other endlessly.
    """

    def __init__(self) -> None:
        self._failing: set[Backoff] = set()  # parts that have paused since any part last connected
        self._unreachable = False
        self._returned = asyncio.Event()

    def succeeded(self) -> None:
        """Record that a part has just connected."""
        self._failing.clear()
        if self._unreachable:
            self._unreachable = False
            self._returned.set()
            self._returned = asyncio.Event()

    async def pause(self, backoff: Backoff) -> None:
        """Wait after a failure: the next pause of the part's back-off, or less if the server returns earlier."""
        if backoff in self._failing:
            self._unreachable = True
        self._failing.add(backoff)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(backoff.next_s()):
                await self._returned.wait()
