"""The work as a table: what is to be made true, what was done, and who is held meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Task:
    """
    One change that narrowed something.

    Args:
        version: The transaction that made it, as text.
        kind: ``device``, ``device_type``, ``account`` or ``registry``.
        name: Device id, or name of the type or account.
        causes: What narrowed, for example ``revoked`` or ``rules``.
        details: What only the old rows knew: ``common_name``, ``client_ids``, ``users``, ``rules``.
        state: ``waiting`` for the first attempt, or ``checking`` that nothing is left.
        receipt: What has been done so far.
    """

    id: int
    version: str
    kind: str
    name: str
    causes: frozenset[str]
    details: dict[str, Any]
    noted_at: datetime
    state: str
    attempts: int
    parent: int | None = None
    receipt: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Confirmation:
    """
    Which replicas decide by some versions.

    Args:
        by: Names of those that do.
        missing: Names of those that may still answer by an older copy.
    """

    by: list[str]
    missing: list[str]


class TaskStore(Protocol):
    """The table; ``postgres.enforcement`` has the real one. Every method raises ``AuthbackendError`` on a fault."""

    async def record_due(self) -> None:
        """Note what has become due by time: expiries and scheduled changes."""

    async def due(self, most: int) -> list[Task]:
        """Return the open tasks that are due, those of small changes first."""

    async def wait_for_tasks(self, longest_s: float) -> None:
        """Wait until something is noted, at most so long."""

    async def confirmation(self, versions: set[str]) -> Confirmation:
        """Return who decides by all of these versions."""

    async def hold(self, device_ids: list[str]) -> str:
        """Hold the logins of devices that are active, and return the version that does it."""

    async def release(self, device_ids: list[str], tasks: list[int]) -> None:
        """End holds, but for devices that have other open tasks than these."""

    async def add(self, parent: Task, devices: dict[str, dict[str, Any]]) -> int:
        """Note tasks for devices on behalf of another, once each, and return how many are open or done by now."""

    async def children(self, parent: Task) -> dict[str, int]:
        """Return how many tasks were noted on behalf of this one, by state."""

    async def check_later(self, receipts: dict[int, dict[str, Any]], after_s: float) -> None:
        """Keep what was done, and make the tasks due for another look."""

    async def finish(self, receipts: dict[int, dict[str, Any]]) -> None:
        """Close tasks with their receipts."""

    async def failed(self, tasks: list[int], fault: str, after_s: float) -> None:
        """Keep tasks open, with why they could not be done, and make them due again."""

    async def backlog(self) -> Backlog:
        """Return what is open."""

    async def serial_states(self, serials: list[str]) -> dict[str, str]:
        """Return the state of the certificates with these serials that are on record."""

    async def keep_sweep(self, cluster: str, report: dict[str, Any]) -> None:
        """Keep the report of a sweep in the place of the one before, and forget tasks that were done long ago."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """
    What is open.

    Args:
        tasks: By state.
        oldest_s: Age of the oldest open task that is due, 0 without one.
        holds: Devices whose login is held.
        overdue_holds: Holds that ended by their limit, before the work was done.
    """

    tasks: dict[str, int]
    oldest_s: float
    holds: int
    overdue_holds: int
