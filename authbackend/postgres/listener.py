"""Wait for notifications of PostgreSQL; the only module that uses LISTEN."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from authbackend.errors import Unavailable
from authbackend.postgres.connection import Connection, translated_errors


class Listener:
    """
    The notifications on a connection, combined: however many have arrived, one wait consumes them all.

    Args:
        connection: An open connection; the caller closes it.
        on_notification: Called for each notification as it arrives.
    """

    def __init__(self, connection: Connection, on_notification: Callable[[], object] = lambda: None) -> None:
        self._connection = connection
        self._on_notification = on_notification
        self._notified = asyncio.Event()
        connection.add_termination_listener(lambda *_: self._notified.set())

    async def listen(self, *channels: str) -> None:
        """
        Start to listen on channels.

        Raises:
            Unavailable: The connection is lost.
        """
        with translated_errors():
            for channel in channels:
                await self._connection.add_listener(channel, self._receive)

    def _receive(self, *_: object) -> None:
        self._notified.set()
        self._on_notification()

    async def wait(self, longest_s: float) -> bool:
        """
        Wait for a notification, for up to ``longest_s``; return whether any has arrived since the last call.

        Raises:
            Unavailable: The connection is lost.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(longest_s):
                await self._notified.wait()
        if self._connection.is_closed():
            raise Unavailable("the listening connection to PostgreSQL was lost")
        notified = self._notified.is_set()
        self._notified.clear()
        return notified
