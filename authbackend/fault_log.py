"""Logs a fault that lasts: at once, then once a minute, and when it is over."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog

log = structlog.get_logger(__name__)

AGAIN_S = 60.0
_MOST_TEXTS = 10


class FaultLog:
    """
    The log lines of one thing that is tried again and again.

    While it fails, each fault that has not been met before is logged at once, and the present one once a minute.
    Somebody who cannot be reached is often met with two faults by turns, so "another one than last time" is no measure.

    Args:
        event: Logged for a fault, with ``fault``, and how many attempts since the last line were ``unlogged``.
        over: Logged when it succeeds again; None: whoever succeeds says it otherwise.
        values: Part of every line.
    """

    def __init__(self, event: str, over: str | None = None, **values: Any) -> None:
        self._event = event
        self._over = over
        self._values = values
        self._met: set[str] = set()
        self._next_line = 0.0
        self._unlogged = 0

    @property
    def failing(self) -> bool:
        """Whether the last attempt failed."""
        return bool(self._met)

    def failed(self, fault: str, **values: Any) -> None:
        """Note an attempt that failed."""
        now = asyncio.get_running_loop().time()
        new = fault not in self._met and len(self._met) < _MOST_TEXTS
        if not new and now < self._next_line:
            self._unlogged += 1
            return
        unlogged = {"unlogged": self._unlogged} if self._unlogged else {}
        log.warning(self._event, fault=fault, **self._values, **values, **unlogged)
        if new:
            self._met.add(fault)
        self._next_line = now + AGAIN_S
        self._unlogged = 0

    def succeeded(self) -> None:
        """Note an attempt that succeeded."""
        if self._met and self._over is not None:
            log.info(self._over, **self._values)
        self._met.clear()
        self._next_line = 0.0
        self._unlogged = 0
