"""Logs a lasting fault immediately, then once a minute, and when it is over."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog

log = structlog.get_logger(__name__)

AGAIN_S = 60.0
_MOST_TEXTS = 10


class FaultLog:
    """
    Rate-limited logging for an operation that is retried.

    While it fails, each new fault is logged immediately, and the current one once a minute. A peer that cannot be
    reached often alternates between two faults, so "new" means not yet seen, rather than different from the last one.

    Args:
        event: Logged for a fault, with ``fault`` and the number of failures ``unlogged`` since the last line.
        over: Logged when the operation succeeds again; None if the caller logs that itself.
        values: Added to every line.
    """

    def __init__(self, event: str, over: str | None = None, **values: Any) -> None:
        self._event = event
        self._over = over
        self._values = values
        self._seen: set[str] = set()
        self._next_line = 0.0
        self._unlogged = 0

    @property
    def failing(self) -> bool:
        """Whether the last attempt failed."""
        return bool(self._seen)

    def failed(self, fault: str, **values: Any) -> None:
        """Record a failed attempt."""
        now = asyncio.get_running_loop().time()
        new = fault not in self._seen and len(self._seen) < _MOST_TEXTS
        if not new and now < self._next_line:
            self._unlogged += 1
            return
        unlogged = {"unlogged": self._unlogged} if self._unlogged else {}
        log.warning(self._event, fault=fault, **self._values, **values, **unlogged)
        if new:
            self._seen.add(fault)
        self._next_line = now + AGAIN_S
        self._unlogged = 0

    def succeeded(self) -> None:
        """Record a successful attempt."""
        if self._seen and self._over is not None:
            log.info(self._over, **self._values)
        self._seen.clear()
        self._next_line = 0.0
        self._unlogged = 0
