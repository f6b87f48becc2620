"""Whether the database takes what a replica writes; one that does not is followed all the same."""

from __future__ import annotations

import structlog

log = structlog.get_logger(__name__)


class Writability:
    """Shared by the parts of a process that write; ``fault`` is None while writing works."""

    def __init__(self) -> None:
        self.fault: str | None = None

    def failed(self, fault: str) -> None:
        """Tell that something could not be written, and why."""
        if self.fault is None:
            log.warning("database.not_writable", fault=fault, next="what can be read is followed")
        self.fault = fault

    def succeeded(self) -> None:
        """Tell that something was written."""
        if self.fault is not None:
            log.info("database.writable")
        self.fault = None
