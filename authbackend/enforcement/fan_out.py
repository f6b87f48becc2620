"""Finds the devices that a change of their type touches on one cluster, and notes a task for each of them."""

from __future__ import annotations

from typing import Any

from authbackend.enforcement.batch import LONGEST_BACK_OFF_S, Enforcer, chunks
from authbackend.enforcement.checks import Checker, SessionQueue
from authbackend.enforcement.clusters import inspect_session
from authbackend.enforcement.inventory import LOOK_AGAIN_S, STATISTICS_LATE_S
from authbackend.enforcement.management_api import LiveConnection
from authbackend.enforcement.plans import CLOCKS_S, narrowed, since, unseen
from authbackend.enforcement.tasks import ReplicaConfirmation, Task
from authbackend.policy.model import Device

_OWNER = "client_id_owner"
_PART = 2000
_LOOKS = 2
"""Looks at which all replicas decided by the change and every node was seen; the second sees what was too young for the first."""


async def fan_out(enforcer: Enforcer, task: Task, confirmed: ReplicaConfirmation, nodes: dict[str, bool]) -> None:
    """
    Note tasks for the devices of a type, or finish when all of those are finished.

    Raises:
        AuthbackendError: The store or the cluster cannot be used.
    """
    confirmed_at = task.receipt.get("confirmed_at") or enforcer.now()
    looks = task.receipt.get("looks", 0) + 1
    verified = task.receipt.get("verified_looks", 0)
    moved = set(task.receipt.get("moved") or ())
    if verified < _LOOKS:
        touched = await _Touched.find(enforcer, task, confirmed_at)
        moved |= touched.moved
        for part in chunks([*touched.losing.items(), *touched.gaining.items()], _PART):
            await enforcer.store.add(task, part)
        verified += not confirmed.missing and all(nodes.values())
    devices, open_ = await enforcer.store.children(task)
    found: dict[str, Any] = {
        "took_s": since(task, enforcer.now()),
        "confirmed_at": None if confirmed.missing else confirmed_at,
        "confirmed_by": confirmed.by,
        "unconfirmed": confirmed.missing,
        "nodes": {enforcer.actions.name: nodes},
        "unseen_nodes": unseen({enforcer.actions.name: nodes}),
        "devices": devices,
        "looks": looks,
        "verified_looks": verified,
    }
    if verified >= _LOOKS:  # until now a look may have missed young connections, so all that moved were held
        found["moved"] = sorted(moved)
    if verified < _LOOKS:
        await enforcer.store.check_later({task.id: found}, min(LONGEST_BACK_OFF_S, STATISTICS_LATE_S * looks))
        return
    if open_:
        await enforcer.store.check_later({task.id: found}, LOOK_AGAIN_S)
        if _OWNER in task.causes:
            await enforcer.store.hold_client_ids(task.name)
        return
    enforcer.observer.enforced(task.causes, found["took_s"])
    await enforcer.store.finish({task.id: {**found, "checked_at": enforcer.now_as_text()}})
    if _OWNER in task.causes:
        await enforcer.store.release_client_ids(task.name, task.id)


class _Touched:
    """
    The devices of a type to which its change does something.

    Attributes:
        losing: by device id, the details of a task for a device from which something is taken.
        gaining: by device id, the details of a task for a device that gets client ids which others use; it may lose, too.
        moved: client ids in use that passed from one device to another.
    """

    def __init__(self, enforcer: Enforcer, task: Task) -> None:
        self.losing: dict[str, dict[str, Any]] = {}
        self.gaining: dict[str, dict[str, Any]] = {}
        self.moved: set[str] = set()
        self._enforcer = enforcer
        self._task = task
        self._former = tuple(task.details.get("client_ids") or ()) if _OWNER in task.causes else None

    @classmethod
    async def find(cls, enforcer: Enforcer, task: Task, confirmed_at: float) -> _Touched:
        """Return those that are connected, or have a session."""
        found = cls(enforcer, task)
        await found._connections(confirmed_at)
        await found._sessions()
        return found

    def _move(self, checker: Checker, client_id: str | None) -> bool:
        """Note a client id that is in use if it has passed to a device of the type; return whether it has."""
        pair = None
        if self._former is not None and client_id:
            pair = checker.taken_from(self._task.name, self._former, client_id)
        if pair is None or client_id is None:
            return False
        owner, before = pair
        details = self.gaining.setdefault(owner.device_id, self._details_of(owner))
        details["users"] = sorted({*details.get("users", ()), before.common_name})
        details["moved"] = sorted({*details.get("moved", ()), client_id})
        self.moved.add(client_id)
        return True

    async def _connections(self, confirmed_at: float) -> None:
        task = self._task
        # By other causes only those are touched that would be refused now.
        by_rules = not task.causes.isdisjoint({"rules", "renamed"})
        narrows = self._enforcer.check(lambda checker: narrowed(checker, task)) if by_rules else frozenset[str]()

        def loses(checker: Checker, connection: LiveConnection) -> Device | None:
            if self._move(checker, connection.client_id):
                return None
            device = checker.registry.device_by_name(connection.user)
            if device is None or device.type != task.name:
                return None
            older = connection.connected_at <= confirmed_at + CLOCKS_S
            return device if checker.connection(connection) or ("publish" in narrows and older) else None

        async for page in self._enforcer.actions.cluster.connections():
            for device in await self._enforcer.in_parts(page, loses):
                if device is not None:
                    self.losing.setdefault(device.device_id, self._details_of(device))

    async def _sessions(self) -> None:
        """Add the devices of the type whose sessions are not as they should be."""

        def owner(checker: Checker, session: SessionQueue) -> Device | None:
            if self._move(checker, session.client_id):
                return None
            found = checker.owner(session.client_id)
            return found if isinstance(found, Device) and found.type == self._task.name else None

        sessions = await self._enforcer.actions.sessions()
        owners = await self._enforcer.in_parts(sessions, owner)
        mine = [
            (session, device)
            for session, device in zip(sessions, owners, strict=True)
            if device is not None and device.device_id not in self.losing
        ]
        bindings = await self._enforcer.actions.listed_bindings([session for session, _ in mine]) if mine else {}

        def wrong(checker: Checker, item: tuple[SessionQueue, Device]) -> bool:
            session, _ = item
            return inspect_session(checker, session, bindings[session.queue.vhost, session.queue.name]) is not None

        for (_, device), violated in zip(mine, await self._enforcer.in_parts(mine, wrong), strict=True):
            if violated:
                self.losing.setdefault(device.device_id, self._details_of(device))

    def _details_of(self, device: Device) -> dict[str, Any]:
        return {"common_name": device.common_name, "rules": self._task.details.get("rules", [])}
