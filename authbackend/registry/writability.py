"""Whether the replica can write to the database; it can follow one that is read-only."""

from __future__ import annotations

import structlog

log = structlog.get_logger(__name__)


class Writability:
    """Shared by the parts of a process that write; ``fault`` is None while writing works."""

    def __init__(self) -> None:
        self.fault: str | None = None

    def failed(self, fault: str) -> None:
        """Record that a write failed, and why."""
        if self.fault is None:
            log.warning("database.not_writable", fault=fault, next="the replica goes on reading changes")
        self.fault = fault

    def succeeded(self) -> None:
        """Record that a write succeeded."""
        if self.fault is not None:
            log.info("database.writable")
        self.fault = None
