"""Pauses between attempts that fail, and the word to everybody who waits that the server is back."""

from __future__ import annotations

import asyncio
import contextlib
import random


class Backoff:
    """
    Pauses between attempts, twice as long each time.

    Each is shortened at random, by up to half, so that many processes that lost the same server at the same moment do
    not come back at the same moment.

    Args:
        first_s: The first pause, before it is shortened.
        longest_s: No pause is longer.
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
        """Begin with the first pause again; call it when an attempt has succeeded as a whole."""
        self._next_s = self._first_s


class Reachability:
    """
    Shared by the parts of a process that need the same server: the first that connects wakes those that pause.

    Only the return of a server wakes. One that let somebody in between two pauses of a part is reachable: what that
    part meets is a fault of another kind, for example a missing right, and it has to wait its pauses out. Otherwise
    two parts that both connect and then fail would wake each other without end.
    """

    def __init__(self) -> None:
        self._failing: set[Backoff] = set()  # who has paused since anybody connected
        self._unreachable = False
        self._returned = asyncio.Event()

    def succeeded(self) -> None:
        """Tell that a part has just connected."""
        self._failing.clear()
        if self._unreachable:
            self._unreachable = False
            self._returned.set()
            self._returned = asyncio.Event()

    async def pause(self, backoff: Backoff) -> None:
        """Wait after a failure: the next pause of a part's own back-off, or less if the server is back before."""
        if backoff in self._failing:
            self._unreachable = True
        self._failing.add(backoff)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(backoff.next_s()):
                await self._returned.wait()
