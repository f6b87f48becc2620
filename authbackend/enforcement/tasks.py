"""
The model of enforcement: tasks with their receipts, pauses, the backlog, and the store that keeps them, as a Protocol.

Everything else in this package builds on these types. Nothing here does I/O; ``postgres.enforcement`` implements the
store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from authbackend.errors import Unavailable

URGENT, SMALL, MASS = "urgent", "small", "mass"
"""
The values of :attr:`Task.lane`.

The urgent lane serves the first; the bulk lane serves the other two, small changes before mass changes.
"""


class TaskStoreError(Unavailable):
    """The store cannot be used now; no task has changed."""


@dataclass(frozen=True, slots=True)
class Task:
    """
    The work that one change causes on one cluster: ending what the change no longer allows.

    Args:
        version: The transaction that made the change, as text.
        cluster: Name of the cluster.
        lane: ``urgent``, ``small`` or ``mass``.
        kind: ``device``, ``device_type``, ``account`` or ``certificate``.
        name: Device id, name of the type or account, or serial number of the certificate.
        causes: What took something away, for example ``revoked`` or ``rules``.
        details: Values from before the change that are no longer in the registry: ``common_name``, ``client_ids``,
            ``users``, ``rules``, ``moved`` (client ids that passed from ``users`` to the device).
        state: ``waiting`` for its first look, or ``checking`` that nothing is left.
        active: Whether the database lets the device connect now.
        due_for_s: How long it has been due, in seconds.
        parent: The task about a device type for which this one was created.
        receipt: What has been done so far; JSON.
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
    Which replicas already decide by some registry versions.

    Args:
        by: Names of the replicas that do.
        missing: Names of the replicas that may still answer from an older copy.
        awaited: Those missing replicas that reported a moment ago, so that waiting for them is worthwhile.
    """

    by: list[str]
    missing: list[str]
    awaited: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Listed:
    """
    Which CRL of its authority lists a revoked certificate, and which nodes have that CRL.

    Args:
        number: The number of the first CRL that lists it; None if none does.
        nodes: The state of each node whose host has ever reported a CRL: ``installed``, ``behind`` or ``silent``; see
            ``plans.crl_states``.
    """

    number: str | None
    nodes: dict[str, str]


@dataclass(frozen=True, slots=True)
class Pause:
    """
    A pause of enforcement.

    Args:
        scope: ``bulk``, or ``all`` to include the urgent lane.
        until: When it ends by itself.
        by: The database role that paused it, or the actor named by a role that may act for others.
        claimed_by: Who the client claimed to be; not verified.
    """

    scope: str
    until: datetime
    by: str
    claimed_by: str | None = None

    def stops(self, lane: str) -> bool:
        """Return whether it stops a lane."""
        return self.scope == "all" or lane != URGENT


@dataclass(frozen=True, slots=True)
class Overdue:
    """
    A scheduled change of a device that is late.

    Args:
        at: When it was due.
        status: The status that the device was to get.
        holder: The session that holds the row's lock: process id, application, role and since when; None if none is
            seen.
    """

    device_id: str
    at: datetime
    status: str
    holder: str | None


@dataclass(frozen=True, slots=True)
class Backlog:
    """
    What has not been done yet.

    Args:
        tasks: The number of open tasks, by state.
        oldest_s: Age of the oldest open task; 0 without one.
        holds: The number of devices whose logins are held.
        overdue_holds: The number of holds that reached their time limit before the repair was done.
        paused: The pause that is in force, if any.
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
    The tasks of all clusters. Each part of enforcement opens its own store; implemented in ``postgres.enforcement``.

    Every method raises ``TaskStoreError`` when the store cannot be used. None of them waits for a locked row.
    """

    async def due(self, cluster: str, lane: str, being_done: set[int], limit: int) -> list[Task]:
        """Return open tasks that are due, longest due first, without ``being_done``; none while the lane is paused."""

    async def due_of_users(self, cluster: str, users: list[str], limit: int) -> list[Task]:
        """Return tasks of the bulk lane about these users that are due for their first look."""

    async def wait_for_tasks(self, longest_s: float) -> None:
        """Wait until a task is created or a pause changes, for up to ``longest_s``."""

    async def paused(self) -> Pause | None:
        """Return the pause that is in force."""

    async def is_paused(self, lane: str) -> bool:
        """Return whether a lane is paused; cheap enough to call before closing each connection."""

    async def confirmation(self, versions: set[str]) -> ReplicaConfirmation:
        """Return which replicas decide by all of these versions."""

    async def hold(self, device_ids: list[str]) -> str:
        """
        Hold the logins of those devices that are active, and return the version in which they are held.

        Raises:
            Conflict: Another session is changing one of the holds.
        """

    async def release(self, device_ids: list[str], tasks: list[int]) -> None:
        """End the holds of devices that have no open tasks other than these."""

    async def add(self, parent: Task, devices: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """
        Create tasks for devices as children of a task about their type.

        Args:
            devices: Device ids with the tasks' details. A device has up to two such tasks: one for client ids that
                moved to it, and one for everything else. If a task exists already, only client ids are added to it.
        """

    async def hold_client_ids(self, device_type: str) -> None:
        """Hold, of the client ids that a type has gained, only those found in use; its tasks' receipts list them as moved."""

    async def release_client_ids(self, device_type: str, task: int) -> None:
        """Let the devices of a type use the client ids they gained, unless another open task still moves some."""

    async def children(self, parent: Task) -> tuple[int, int]:
        """Return how many children a task has, and how many of them are open."""

    async def check_later(self, receipts: dict[int, dict[str, Any]], after_s: float) -> None:
        """Save the receipts so far, and make the tasks due for another look."""

    async def finish(self, receipts: dict[int, dict[str, Any]], state: str = "done") -> None:
        """Close tasks with their final receipts."""

    async def nothing_found(self, tasks: list[int], common: dict[str, Any], after_s: float | None) -> None:
        """
        Record in one statement, for many tasks, that nothing was connected or stored.

        Args:
            common: The fields that all receipts share.
            after_s: When to look again; None if the tasks are done.
        """

    async def failed(self, tasks: dict[int, tuple[dict[str, Any] | None, float]], fault: str) -> None:
        """Postpone tasks without changing their state, each with its receipt so far and the seconds until it is due."""

    async def retry_failed(self, cluster: str) -> None:
        """Make failed tasks of a cluster due now, because it answers again."""

    async def lists_of(self, certificates: list[tuple[str, str]]) -> dict[tuple[str, str], Listed]:
        """Return the CRL state of certificates, given and keyed by issuer and serial number."""

    async def certificates_on_record(self, serials: list[str], names: list[str]) -> list[dict[str, Any]]:
        """Return the certificates with these serial numbers, and the revoked certificates with these common names."""

    async def save_sweep(self, cluster: str, report: dict[str, Any]) -> None:
        """Replace the cluster's last sweep report."""

    async def forget_done(self) -> None:
        """Delete tasks that were done long ago."""

    async def record_due(self) -> str | None:
        """Carry out expiries and scheduled changes that are due; return why one failed, or None."""

    async def backlog(self) -> Backlog:
        """Return what has not been done yet."""
