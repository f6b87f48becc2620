"""
Does the work: deny everywhere first, then close, then purge, then look again, then say so.

One replica at a time runs this. Every step may be repeated: what has been ended already is not found again.
"""

from __future__ import annotations

import asyncio
import random
import time
from datetime import UTC, datetime
from typing import Any, Protocol

import structlog

from authbackend.enforcement.checks import Checker
from authbackend.enforcement.clusters import Actions, Clusters, Violation, inspect_session
from authbackend.enforcement.plans import CLOCKS_S, Plan, narrowed, plan_of, plans_of, receipt, since
from authbackend.enforcement.tasks import Confirmation, Task, TaskStore
from authbackend.errors import AuthbackendError, Unavailable
from authbackend.policy.decide import DecisionSettings
from authbackend.policy.rules import Device
from authbackend.registry.store import Reader

log = structlog.get_logger(__name__)

LOOK_AGAIN_S = 2.0
"""An allow that was given before the change may become a connection a moment after the others were closed."""

UNVERIFIED_S = 5.0
"""How soon what could not be verified, for a node or a replica that is silent, is looked at again."""

STATISTICS_LATE_S = 6.0
"""The list of all connections may be so late."""

LONGEST_PAUSE_S = 1.0
LONGEST_BACK_OFF_S = 30.0
_CONFIRM_EVERY_S = 0.01
_FAILURES_TO_LEAVE = 5


class Observer(Protocol):
    """Is told what happens, for metrics."""

    def ended(self, done: Actions) -> None:
        """Connections were closed, queues deleted, subscriptions removed."""

    def enforced(self, causes: frozenset[str], seconds: float) -> None:
        """A task is done; ``seconds`` from the change to the end of the last connection."""

    def enforcement_failed(self, tasks: int) -> None:
        """Tasks could not be done now."""


class Enforcer:
    """
    Works off the table, until cancelled or the lock is lost.

    Args:
        registry: A reader of its own.
        batch: Tasks at once. What comes meanwhile waits for them, so few.
        confirm_s: How long to wait for the replicas before connections are closed all the same; those that did not
            confirm are named, and the task stays open until they have.
    """

    def __init__(
        self,
        work: TaskStore,
        clusters: Clusters,
        registry: Reader,
        observer: Observer,
        settings: DecisionSettings,
        *,
        batch: int = 50,
        confirm_s: float = 2.0,
    ) -> None:
        self._work = work
        self._clusters = clusters
        self._registry = registry
        self._observer = observer
        self._settings = settings
        self._batch = batch
        self._confirm_s = confirm_s

    async def run(self) -> None:
        """
        TaskStore until cancelled.

        Raises:
            AuthbackendError: The table cannot be used, or the brokers cannot for so long that another replica should try.
        """
        failures = 0
        while True:
            await self._work.record_due()
            tasks = await self._work.due(self._batch)
            if not tasks:
                await self._work.wait_for_tasks(LONGEST_PAUSE_S)
                continue
            began = time.monotonic()
            try:
                await self._enforce(tasks)
                failures = 0
                if len(tasks) == self._batch:  # a mass change: as much rest as work, unless something new is noted
                    await self._work.wait_for_tasks(min(LONGEST_PAUSE_S, time.monotonic() - began))
            except Unavailable as error:
                failures += 1
                await self._failed(tasks, error.detail)
                if failures >= _FAILURES_TO_LEAVE:
                    raise
            except AuthbackendError:
                raise
            except Exception as error:  # a fault of ours must neither lose the work nor end it
                log.exception("enforcement.crashed")
                await self._failed(tasks, f"{type(error).__name__} in the service, see its log")

    async def _failed(self, tasks: list[Task], fault: str) -> None:
        self._observer.enforcement_failed(len(tasks))
        attempts = max(task.attempts for task in tasks)
        pause = min(LONGEST_BACK_OFF_S, 0.5 * 2 ** min(attempts, 10)) * random.uniform(0.5, 1.0)
        log.warning("enforcement.failed", fault=fault, tasks=len(tasks), again_in_s=round(pause, 1))
        await self._work.failed([task.id for task in tasks], fault, pause)

    async def _enforce(self, tasks: list[Task]) -> None:
        confirmed = await self._confirmed({task.version for task in tasks})
        nodes = await self._clusters.nodes()  # before anybody is held: work that cannot be done now must hold nobody
        plans = self._cases([task for task in tasks if task.kind != "device_type"])
        if held := [case.task.name for case in plans if case.held and case.task.state == "waiting"]:
            holding = await self._confirmed({await self._work.hold(held)})
            confirmed = Confirmation(confirmed.by, sorted({*confirmed.missing, *holding.missing}))
        for case in plans:
            case.done.nodes = nodes
            case.confirmed = not confirmed.missing
        await self._close(plans)
        await self._purge([case for case in plans if case.sessions])
        await self._settle(plans, confirmed)
        for task in tasks:
            if task.kind == "device_type":
                await self._spread(task, confirmed)

    async def _confirmed(self, versions: set[str]) -> Confirmation:
        """Wait for the replicas, but not for ever, and return who confirmed and who did not."""
        deadline = time.monotonic() + self._confirm_s
        while True:
            found = await self._work.confirmation(versions)
            if not found.missing or time.monotonic() >= deadline:
                return found
            await asyncio.sleep(_CONFIRM_EVERY_S)

    def _cases(self, tasks: list[Task]) -> list[Plan]:
        with self._registry as registry:
            return plans_of(Checker(registry, time.time(), self._settings), tasks)

    async def _close(self, plans: list[Plan]) -> None:
        """Close the connections of the plans' users, and note where they were."""
        every = {user: case for case in plans for user in case.users if not case.selects()}
        for connection in await self._clusters.close_users(await self._clusters.connections_of(every)):
            every[connection.user].done.closed[connection.node] += 1
        for case in plans:
            condition = case.selects()
            if condition is None:
                continue
            found = await self._clusters.connections_of(case.users)
            closed, unknown = await self._clusters.close_where(found, condition)
            case.done.unknown += len(unknown)
            case.done.closed.update(connection.node for connection in closed)

    async def _purge(self, plans: list[Plan]) -> None:
        """Put right the sessions of the plans."""
        if not plans:
            return
        found = await self._clusters.sessions([owner for case in plans for owner in case.sessions])
        findings: list[tuple[Plan, Violation]] = []
        with self._registry as registry:
            checker = Checker(registry, time.time(), self._settings)
            cases_found = [plan_of(checker, plans, session.client_id) for _, session in found]
        mine = [(case, pair) for case, pair in zip(cases_found, found, strict=True) if case is not None]
        bindings = await self._clusters.bindings([pair for _, pair in mine])
        with self._registry as registry:
            checker = Checker(registry, time.time(), self._settings)
            for (case, (cluster, session)), bound in zip(mine, bindings, strict=True):
                finding = inspect_session(checker, cluster, session, bound)
                if "client_id_owner" in case.task.causes and case.task.state == "waiting":
                    finding = Violation(cluster, session, "client_id_owner")  # who had the id before had the session
                if finding is None and session.will and "publish" in case.actions:
                    finding = Violation(cluster, session, "rules")
                if finding is None:
                    case.done.kept += 1
                else:
                    findings.append((case, finding))
        for case, finding in findings:
            await self._clusters.repair_session(finding, case.done)

    async def _settle(self, plans: list[Plan], confirmed: Confirmation) -> None:
        """Finish what a later look found nothing left of, and keep the rest for another look."""
        soon: dict[int, dict[str, Any]] = {}
        later: dict[int, dict[str, Any]] = {}
        finished: dict[int, dict[str, Any]] = {}
        released = []
        for case in plans:
            found = receipt(case, confirmed.by, confirmed.missing)
            receipts = dict.fromkeys(case.ids, found)
            nothing_to_do = not case.users and not case.sessions
            if (case.task.state == "waiting" and not nothing_to_do) or case.done.anything or case.done.unknown:
                soon |= receipts
            elif confirmed.missing or case.done.unseen:
                later |= receipts
            else:
                found["checked_at"] = _now()
                finished |= receipts
                self._observer.enforced(case.task.causes, found["took_s"])
                released += [case.task.name] if case.device is not None else []
            if case.done.anything:
                self._observer.ended(case.done)
                closed, deleted = sum(case.done.closed.values()), len(case.done.deleted)
                log.info(
                    "enforcement.ended", kind=case.task.kind, name=case.task.name, connections=closed, queues=deleted
                )
        await self._work.check_later(soon, LOOK_AGAIN_S)
        looks = max((found["looks"] for found in later.values()), default=1)
        await self._work.check_later(later, min(LONGEST_BACK_OFF_S, UNVERIFIED_S * looks))
        await self._work.finish(finished)
        await self._work.release(released, list(finished))

    async def _spread(self, task: Task, confirmed: Confirmation) -> None:
        """Find the devices that a change of their type touches, and note a task for each of them."""
        confirmed_at = task.receipt.get("confirmed_at") or time.time()
        looks = task.receipt.get("looks", 0)
        if confirmed.missing and looks == 1:
            looks = 0  # the look that counts is the one when everybody decides by it
        if looks < 2:
            await self._work.add(task, await self._touched(task, confirmed_at))
        children = await self._work.children(task)
        found = {
            "took_s": since(task),
            "confirmed_at": None if confirmed.missing else confirmed_at,
            "confirmed_by": confirmed.by,
            "unconfirmed": confirmed.missing,
            "devices": sum(children.values()),
            "looks": looks + 1,
        }
        if not looks:  # a connection from just before the change may not have been listed yet
            await self._work.check_later({task.id: found}, STATISTICS_LATE_S)
        elif confirmed.missing or sum(children.values()) > children.get("done", 0):
            await self._work.check_later({task.id: found}, LOOK_AGAIN_S)
        else:
            self._observer.enforced(task.causes, found["took_s"])
            await self._work.finish({task.id: {**found, "checked_at": _now()}})

    async def _touched(self, task: Task, confirmed_at: float) -> dict[str, dict[str, Any]]:
        """Return the devices of a type that are connected, or have a session, and lose something by its change."""
        live = await self._clusters.connections()
        sessions = await self._clusters.sessions([])
        touched: dict[str, dict[str, Any]] = {}
        with self._registry as registry:
            checker = Checker(registry, time.time(), self._settings)
            actions = narrowed(checker, task)
            for _, connection in live:
                device = registry.device_by_name(connection.user)
                if device is None or device.type != task.name:
                    continue
                older = connection.connected_at <= confirmed_at + CLOCKS_S
                if checker.connection(connection) or ("publish" in actions and older):
                    touched[device.device_id] = _details(task, device)
            owners = [checker.owner(session.client_id) for _, session in sessions]
        mine = [
            (pair, owner)
            for pair, owner in zip(sessions, owners, strict=True)
            if isinstance(owner, Device) and owner.type == task.name and owner.device_id not in touched
        ]
        bindings = await self._clusters.bindings([pair for pair, _ in mine])
        with self._registry as registry:
            checker = Checker(registry, time.time(), self._settings)
            for ((cluster, session), owner), bound in zip(mine, bindings, strict=True):
                if inspect_session(checker, cluster, session, bound):
                    touched[owner.device_id] = _details(task, owner)
        return touched


def _details(task: Task, device: Device) -> dict[str, Any]:
    return {"common_name": device.common_name, "rules": task.details.get("rules", [])}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
