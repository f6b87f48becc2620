"""
Changes of a device type: find the devices that a change affects on one cluster, and create a task for each of them.

Finds them through ``Enforcer``; closes and deletes nothing itself.
"""

from __future__ import annotations

from typing import Any

from authbackend.enforcement.batch import LONGEST_BACK_OFF_S, Enforcer, chunks
from authbackend.enforcement.checks import Checker, SessionQueue
from authbackend.enforcement.clusters import inspect_session
from authbackend.enforcement.inventory import LOOK_AGAIN_S, STATISTICS_LATE_S
from authbackend.enforcement.management_api import LiveConnection
from authbackend.enforcement.plans import CLOCKS_S, age_s, common_receipt, narrowed_by
from authbackend.enforcement.tasks import ReplicaConfirmation, Task
from authbackend.policy.model import Device

_OWNER = "client_id_owner"
_TASKS_PER_STATEMENT = 2000
_VERIFIED_LOOKS = 2
"""
How many looks are needed at which all replicas decided by the change and every node was seen.

The second one sees connections that were too new for the first.
"""


async def fan_out(enforcer: Enforcer, task: Task, confirmation: ReplicaConfirmation, nodes: dict[str, bool]) -> None:
    """
    Look for affected devices of a type until that is verified, then wait for their tasks, then finish.

    Each call does one step and makes the task due again, or closes it.

    Raises:
        AuthbackendError: The store or the cluster cannot be used.
    """
    confirmed_at = task.receipt.get("confirmed_at") or enforcer.now()
    looks = task.receipt.get("looks", 0) + 1
    verified_looks = task.receipt.get("verified_looks", 0)
    moved = set(task.receipt.get("moved") or ())
    if verified_looks < _VERIFIED_LOOKS:
        moved |= await _create_tasks(enforcer, task, confirmed_at)
        verified_looks += not confirmation.missing and all(nodes.values())
    number, open_ = await enforcer.store.children(task)
    receipt: dict[str, Any] = {
        "took_s": age_s(task, enforcer.now()),
        **common_receipt(confirmation.by, confirmation.missing, {enforcer.actions.name: nodes}, confirmed_at),
        "devices": number,
        "looks": looks,
        "verified_looks": verified_looks,
    }
    if verified_looks < _VERIFIED_LOOKS:
        await enforcer.store.check_later({task.id: receipt}, min(LONGEST_BACK_OFF_S, STATISTICS_LATE_S * looks))
        return
    # Not before: once receipts have it, only these client ids stay held, and earlier looks may have missed some.
    receipt["moved"] = sorted(moved)
    if open_:
        await enforcer.store.check_later({task.id: receipt}, LOOK_AGAIN_S)
        if _OWNER in task.causes:
            await enforcer.store.hold_client_ids(task.name)
        return
    enforcer.observer.enforced(task.causes, receipt["took_s"])
    await enforcer.store.finish({task.id: {**receipt, "checked_at": enforcer.now_as_text()}})
    if _OWNER in task.causes:
        await enforcer.store.release_client_ids(task.name, task.id)


async def _create_tasks(enforcer: Enforcer, task: Task, confirmed_at: float) -> set[str]:
    """Create tasks for the affected devices that one look sees; return the client ids in use that moved."""
    affected = await _AffectedDevices.find(enforcer, task, confirmed_at)
    for devices in chunks([*affected.losing.items(), *affected.gaining.items()], _TASKS_PER_STATEMENT):
        await enforcer.store.add(task, devices)
    return affected.moved


class _AffectedDevices:
    """
    The devices of a type that its change affects, among those that are connected or have a session.

    Attributes:
        losing: Details of a task by device id, for each device that loses something.
        gaining: Details of a task by device id, for each device that gains client ids which another device still uses;
            it may also be losing.
        moved: Client ids in use that passed from one device to another.
    """

    def __init__(self, enforcer: Enforcer, task: Task) -> None:
        self.losing: dict[str, dict[str, Any]] = {}
        self.gaining: dict[str, dict[str, Any]] = {}
        self.moved: set[str] = set()
        self._enforcer = enforcer
        self._task = task
        self._former_patterns = tuple(task.details.get("client_ids") or ()) if _OWNER in task.causes else None

    @classmethod
    async def find(cls, enforcer: Enforcer, task: Task, confirmed_at: float) -> _AffectedDevices:
        """Look through all connections and sessions of the cluster."""
        affected = cls(enforcer, task)
        await affected._add_connected(confirmed_at)
        await affected._add_owners_of_sessions()
        return affected

    def _add_if_moved(self, checker: Checker, client_id: str | None) -> bool:
        """Add the new owner of a client id in use, if the id passed to a device of the type; return whether it did."""
        if self._former_patterns is None or not client_id:
            return False
        change = checker.owner_change(self._task.name, self._former_patterns, client_id)
        if change is None:
            return False
        owner, former_owner = change
        details = self.gaining.setdefault(owner.device_id, self._details_of(owner))
        details["users"] = sorted({*details.get("users", ()), former_owner.common_name})
        details["moved"] = sorted({*details.get("moved", ()), client_id})
        self.moved.add(client_id)
        return True

    async def _add_connected(self, confirmed_at: float) -> None:
        """
        Add the devices with connections that must end.

        RabbitMQ remembers for a connection what it may publish. So if the rules for publishing may have narrowed, every
        connection from before the confirmation ends; otherwise only connections that would be refused now.
        """
        task = self._task
        by_rules = not task.causes.isdisjoint({"rules", "renamed"})
        narrowed = self._enforcer.check(lambda checker: narrowed_by(checker, task)) if by_rules else frozenset[str]()

        def losing_device(checker: Checker, connection: LiveConnection) -> Device | None:
            if self._add_if_moved(checker, connection.client_id):
                return None
            device = checker.registry.device_by_name(connection.user)
            if device is None or device.type != task.name:
                return None
            older = connection.connected_at <= confirmed_at + CLOCKS_S
            return device if checker.connection(connection) or ("publish" in narrowed and older) else None

        async for page in self._enforcer.actions.cluster.connections():
            for device in await self._enforcer.check_each(page, losing_device):
                if device is not None:
                    self.losing.setdefault(device.device_id, self._details_of(device))

    async def _add_owners_of_sessions(self) -> None:
        """Add the devices with sessions that the registry does not allow, or not entirely."""

        def owning_device(checker: Checker, session: SessionQueue) -> Device | None:
            if self._add_if_moved(checker, session.client_id):
                return None
            owner = checker.owner(session.client_id)
            return owner if isinstance(owner, Device) and owner.type == self._task.name else None

        sessions = await self._enforcer.actions.sessions()
        owners = await self._enforcer.check_each(sessions, owning_device)
        owned = [
            (session, device)
            for session, device in zip(sessions, owners, strict=True)
            if device is not None and device.device_id not in self.losing
        ]
        bindings = await self._enforcer.actions.bindings_of_all([session for session, _ in owned]) if owned else {}

        def is_violation(checker: Checker, item: tuple[SessionQueue, Device]) -> bool:
            session, _ = item
            return inspect_session(checker, session, bindings[session.queue.vhost, session.queue.name]) is not None

        for (_, device), violated in zip(owned, await self._enforcer.check_each(owned, is_violation), strict=True):
            if violated:
                self.losing.setdefault(device.device_id, self._details_of(device))

    def _details_of(self, device: Device) -> dict[str, Any]:
        return {"common_name": device.common_name, "rules": self._task.details.get("rules", [])}
