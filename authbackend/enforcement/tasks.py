"""Tasks: what a change took away, to be made true on one cluster, with its receipt; and the store that keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from authbackend.errors import Unavailable

URGENT, SMALL, MASS = "urgent", "small", "mass"
"""Lanes of tasks. The urgent one is served apart; the bulk lane serves small changes before mass changes."""


class TaskStoreError(Unavailable):
    """The store cannot be used now; the tasks are as they were."""


@dataclass(frozen=True, slots=True)
class Task:
    """
    One change that narrowed something, on one cluster.

    Args:
        version: The transaction that made it, as text.
        cluster: Name of the cluster.
        lane: ``urgent``, ``small`` or ``mass``.
        kind: ``device``, ``device_type``, ``account`` or ``certificate``.
        name: Device id, name of the type or account, or serial number.
        causes: What narrowed, for example ``revoked`` or ``rules``.
        details: What only the old rows knew: ``common_name``, ``client_ids``, ``users``, ``rules``,
            ``moved`` (client ids that passed from ``users`` to the device).
        state: ``waiting`` for the first attempt, or ``checking`` that nothing is left.
        active: Whether the device may be connected now, by the database.
        due_for_s: How long it has been due, in seconds.
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
    cluster: str = ""
    lane: str = MASS
    active: bool = False
    due_for_s: float = 0.0
    parent: int | None = None
    receipt: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReplicaConfirmation:
    """
    Which replicas decide by some versions.

    Args:
        by: Names of those that do.
        missing: Names of those that may still answer by an older copy.
        awaited: Those of the missing that were heard a moment ago, so that waiting for them is worthwhile.
    """

    by: list[str]
    missing: list[str]
    awaited: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Listed:
    """
    A revoked certificate on the lists of its authority.

    Args:
        number: Of the first list with it; None: it is on none.
        nodes: Those whose host has reported a list, and what is known of it: ``installed``, ``behind`` or ``silent``; see
            ``plans.lists_on``.
    """

    number: str | None
    nodes: dict[str, str]


@dataclass(frozen=True, slots=True)
class Pause:
    """
    Enforcement is paused.

    Args:
        scope: ``bulk``, or ``all`` for the urgent lane as well.
        until: When it ends by itself.
        by: The role that paused it, or whom a role that may speak for others named.
        claimed_by: What the client said of who it is.
    """

    scope: str
    until: datetime
    by: str
    claimed_by: str | None = None

    def stops(self, lane: str) -> bool:
        """Return whether tasks of a lane wait."""
        return self.scope == "all" or lane != URGENT


@dataclass(frozen=True, slots=True)
class Overdue:
    """
    A scheduled change that should have been made and was not.

    Args:
        holder: Who keeps the row locked: process id, application, role and since when; None if nobody is seen.
    """

    device_id: str
    at: datetime
    status: str
    holder: str | None


@dataclass(frozen=True, slots=True)
class Backlog:
    """
    What is open.

    Args:
        tasks: By state.
        oldest_s: Age of the oldest open task, 0 without one.
        holds: Devices whose login is held.
        overdue_holds: Holds that ended by their limit, before the work was done.
        paused: Which lanes are paused, if any.
        overdue: Scheduled changes that are late.
    """

    tasks: dict[str, int]
    oldest_s: float
    holds: int
    overdue_holds: int
    paused: Pause | None = None
    overdue: tuple[Overdue, ...] = ()


class TaskStore(Protocol):
    """
    The tasks of all clusters; ``postgres.enforcement`` has the real one. Each part of enforcement has a store of its own.

    Every method raises ``TaskStoreError`` when the store cannot be used. None waits for a row that somebody has locked.
    """

    async def due(self, cluster: str, lane: str, being_done: set[int], limit: int) -> list[Task]:
        """Return open tasks that are due, the longest due first; none while the lane is paused."""

    async def due_of_users(self, cluster: str, users: list[str], limit: int) -> list[Task]:
        """Return tasks of the bulk lane that are due for the first time and are about these users."""

    async def wait_for_tasks(self, longest_s: float) -> None:
        """Wait until something is noted, for up to ``longest_s``."""

    async def paused(self) -> Pause | None:
        """Return the pause that is in force."""

    async def is_paused(self, lane: str) -> bool:
        """Return whether a lane is paused; cheap enough to be asked before each connection that is closed."""

    async def confirmation(self, versions: set[str]) -> ReplicaConfirmation:
        """Return who decides by all of these versions."""

    async def hold(self, device_ids: list[str]) -> str:
        """
        Hold the logins of devices that are active, and return the version that does it.

        Raises:
            Conflict: Somebody else is changing one of the holds.
        """

    async def release(self, device_ids: list[str], tasks: list[int]) -> None:
        """End holds, but for devices that have other open tasks than these."""

    async def add(self, parent: Task, devices: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """
        Note tasks for devices on behalf of another.

        Args:
            devices: Ids and details. For each device at most one about client ids that have moved to it, and one about
                everything else; of those that are there already, client ids are added.
        """

    async def hold_client_ids(self, device_type: str) -> None:
        """Of the client ids that passed to the devices of a type, hold only those in the receipts from now on."""

    async def release_client_ids(self, device_type: str, task: int) -> None:
        """Let the devices of a type use what they gained, unless another open task than this is about that."""

    async def children(self, parent: Task) -> tuple[int, int]:
        """Return how many tasks were noted on behalf of this one, and how many of them are open."""

    async def check_later(self, receipts: dict[int, dict[str, Any]], after_s: float) -> None:
        """Keep what was done, and make the tasks due for another look."""

    async def finish(self, receipts: dict[int, dict[str, Any]], state: str = "done") -> None:
        """Close tasks with their receipts."""

    async def nothing_found(self, tasks: list[int], common: dict[str, Any], after_s: float | None) -> None:
        """
        Note for many tasks at once that nothing was connected or stored.

        Args:
            common: What all receipts have in common.
            after_s: When to look again; None: the tasks are done.
        """

    async def failed(self, tasks: dict[int, tuple[dict[str, Any] | None, float]], fault: str) -> None:
        """Keep tasks open and in their state, each with its receipt so far and the seconds until it is tried again."""

    async def retry_failed(self, cluster: str) -> None:
        """Make due at once what failed on a cluster that answers again."""

    async def lists_of(self, certificates: list[tuple[str, str]]) -> dict[tuple[str, str], Listed]:
        """Return where certificates, issuer and serial number, are listed as revoked."""

    async def certificates_on_record(self, serials: list[str], names: list[str]) -> list[dict[str, Any]]:
        """Return the certificates with these serial numbers, and the revoked ones of these common names."""

    async def save_sweep(self, cluster: str, report: dict[str, Any]) -> None:
        """Keep the report of a sweep in the place of the one before."""

    async def forget_done(self) -> None:
        """Forget tasks that were done long ago."""

    async def record_due(self) -> str | None:
        """Make what has become due by time: expiries and scheduled changes. Returns why one could not be made."""

    async def backlog(self) -> Backlog:
        """Return what is open."""
