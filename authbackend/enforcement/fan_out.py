"""Finds the devices that a change of their type touches on one cluster, and notes a task for each of them."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Any

from authbackend.enforcement.batch import Enforcer, chunks
from authbackend.enforcement.checks import Checker, SessionQueue
from authbackend.enforcement.clusters import inspect_session
from authbackend.enforcement.inventory import LOOK_AGAIN_S, STATISTICS_LATE_S
from authbackend.enforcement.management_api import Binding, LiveConnection
from authbackend.enforcement.plans import CLOCKS_S, narrowed, since
from authbackend.enforcement.tasks import Confirmation, Task
from authbackend.policy.rules import Device

_PART = 2000
_LOOKS = 2
"""The second look sees connections that were too young for the first one."""


async def fan_out(enforcer: Enforcer, task: Task, confirmed: Confirmation, nodes: dict[str, bool]) -> None:
    """
    Note tasks for the devices of a type, or finish when all of those are finished.

    Raises:
        AuthbackendError: The store or the cluster cannot be used.
    """
    confirmed_at = task.receipt.get("confirmed_at") or time.time()
    looks = task.receipt.get("looks", 0)
    if confirmed.missing and looks == 1:
        looks = 0  # the look that counts is the one when everybody decides by it
    if looks < _LOOKS:
        touched = list((await _touched(enforcer, task, confirmed_at)).items())
        for part in chunks(touched, _PART):
            await enforcer.store.add(task, dict(part))
    devices, open_ = await enforcer.store.children(task)
    found = {
        "took_s": since(task),
        "confirmed_at": None if confirmed.missing else confirmed_at,
        "confirmed_by": confirmed.by,
        "unconfirmed": confirmed.missing,
        "nodes": {enforcer.actions.name: nodes},
        "devices": devices,
        "looks": looks + 1,
    }
    if not looks:
        await enforcer.store.check_later({task.id: found}, STATISTICS_LATE_S)
    elif confirmed.missing or open_:
        await enforcer.store.check_later({task.id: found}, LOOK_AGAIN_S)
    else:
        enforcer.observer.enforced(task.causes, found["took_s"])
        checked_at = datetime.now(UTC).isoformat(timespec="milliseconds")
        await enforcer.store.finish({task.id: {**found, "checked_at": checked_at}})


async def _touched(enforcer: Enforcer, task: Task, confirmed_at: float) -> dict[str, dict[str, Any]]:
    """Return the devices that are connected, or have a session, and lose something by the change."""
    actions = enforcer.check(lambda checker: narrowed(checker, task))
    touched: dict[str, dict[str, Any]] = {}

    def loses(checker: Checker, connection: LiveConnection) -> Device | None:
        device = checker.registry.device_by_name(connection.user)
        if device is None or device.type != task.name:
            return None
        older = connection.connected_at <= confirmed_at + CLOCKS_S
        return device if checker.connection(connection) or ("publish" in actions and older) else None

    async for page in enforcer.actions.cluster.connections():
        for device in await enforcer.in_parts(page, loses):
            if device is not None:
                touched[device.device_id] = _details(task, device)
    await _touched_sessions(enforcer, task, touched)
    return touched


async def _touched_sessions(enforcer: Enforcer, task: Task, touched: dict[str, dict[str, Any]]) -> None:
    """Add the devices of the type whose sessions are not as they should be."""

    def owner(checker: Checker, session: SessionQueue) -> Device | None:
        found = checker.owner(session.client_id)
        return found if isinstance(found, Device) and found.type == task.name else None

    sessions = await enforcer.actions.sessions()
    owners = await enforcer.in_parts(sessions, owner)
    mine = [(s, o) for s, o in zip(sessions, owners, strict=True) if o is not None and o.device_id not in touched]
    bindings = await enforcer.actions.listed_bindings([session for session, _ in mine]) if mine else {}

    def wrong(checker: Checker, item: tuple[SessionQueue, Device]) -> bool:
        session, _ = item
        bound: list[Binding] = bindings[session.queue.vhost, session.queue.name]
        return inspect_session(checker, session, bound) is not None

    for (_, device), violated in zip(mine, await enforcer.in_parts(mine, wrong), strict=True):
        if violated:
            touched[device.device_id] = _details(task, device)
    await asyncio.sleep(0)


def _details(task: Task, device: Device) -> dict[str, Any]:
    return {"common_name": device.common_name, "rules": task.details.get("rules", [])}
