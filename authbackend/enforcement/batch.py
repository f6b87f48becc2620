"""
Carry out a batch of tasks on one cluster: close connections, repair sessions, record receipts.

Every step can be repeated, because what has been ended is not found again. An error affects only the plan that met it,
unless the cluster or the store cannot be reached at all. Uses the store and the cluster only through ``TaskStore`` and
``ClusterActions``; what must end is decided in ``plans`` and ``checks``.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

import structlog

from authbackend.enforcement.checks import Checker, SessionQueue, fits
from authbackend.enforcement.clusters import Actions, ClusterActions, Paused, Violation, inspect_session
from authbackend.enforcement.inventory import Inventory
from authbackend.enforcement.management_api import Binding, ClusterUnreachable
from authbackend.enforcement.plans import (
    Plan,
    PlansByOwner,
    common_receipt,
    crl_states,
    grouped,
    nodes_awaiting_crl,
    receipt,
    unseen_nodes,
)
from authbackend.enforcement.plans import plan as make_plan
from authbackend.enforcement.tasks import ReplicaConfirmation, Task, TaskStore, TaskStoreError
from authbackend.errors import AuthbackendError, Unavailable
from authbackend.policy.decide import DecisionSettings
from authbackend.registry.store import Reader

log = structlog.get_logger(__name__)

CHUNK = 200
"""How many plans are closed, repaired and recorded together, and computed before other asyncio tasks may run."""

UNVERIFIED_S = 5.0
"""How long until another look if a node or a replica is silent."""

OLDEST_COPY_S = 30.0
"""The registry copy may be this old; nothing is ended by an older one."""

LONGEST_BACK_OFF_S = 30.0
_CONFIRMATION_POLL_S = 0.01

T = TypeVar("T")


class EnforcerObserver(Protocol):
    """Receives what enforcement does, for metrics."""

    def ended(self, actions: Actions) -> None:
        """Count closed connections, deleted queues and removed subscriptions."""

    def enforced(self, causes: frozenset[str], seconds: float) -> None:
        """Count a finished plan; ``seconds`` from the change to the end of the last connection."""

    def enforcement_failed(self, tasks: int) -> None:
        """Count tasks that failed and were postponed."""


class Enforcer:
    """
    What the batches of one lane on one cluster share: store, cluster, registry and clock.

    Args:
        registry: A reader that nothing else uses.
        confirm_s: How long to wait for the replicas to confirm. After that, connections are closed anyway; the receipt
            names the missing replicas, and the task stays open until they confirm.
    """

    def __init__(
        self,
        store: TaskStore,
        actions: ClusterActions,
        registry: Reader,
        observer: EnforcerObserver,
        settings: DecisionSettings,
        confirm_s: float,
    ) -> None:
        self.store = store
        self.actions = actions
        self.observer = observer
        self._registry = registry
        self._settings = settings
        self._confirm_s = confirm_s

    def check(self, inspect: Callable[[Checker], T]) -> T:
        """
        Return the result of a function that inspects the registry as it is now.

        While the function runs, the reader stays at one version and nothing else may use it; so it is not a coroutine.

        Raises:
            Unavailable: The copy is too old, or not loaded yet; every user would look unknown.
        """
        with self._registry as registry:
            if registry.age_s > OLDEST_COPY_S:
                raise Unavailable(
                    f"the copy of the registry is {registry.age_s:.0f} s old: nothing is ended until it is up to date"
                )
            return inspect(Checker(registry, registry.now, self._settings))

    async def check_each(self, items: Sequence[T], inspect: Callable[[Checker, T], Any]) -> list[Any]:
        """Return the result of a function for each item, letting other asyncio tasks run after each chunk."""
        results: list[Any] = []
        for chunk in chunks(items):
            results += self.check(lambda checker, chunk=chunk: [inspect(checker, item) for item in chunk])  # type: ignore[misc]
            await asyncio.sleep(0)
        return results

    def now(self) -> float:
        """Return the database's clock, seconds since the epoch; do not call this inside :meth:`check`."""
        with self._registry as registry:
            return registry.now

    def now_as_text(self) -> str:
        """Return the database's clock as ISO 8601."""
        return datetime.fromtimestamp(self.now(), UTC).isoformat(timespec="milliseconds")

    async def wait_for_confirmation(self, versions: set[str]) -> ReplicaConfirmation:
        """Wait, for up to ``confirm_s``, until no more replica is expected to confirm soon; return which have."""
        deadline = time.monotonic() + self._confirm_s
        while True:
            confirmation = await self.store.confirmation(versions)
            if not confirmation.awaited or time.monotonic() >= deadline:
                return confirmation
            await asyncio.sleep(_CONFIRMATION_POLL_S)

    async def postpone(self, tasks: Iterable[Task], fault: str) -> None:
        """Postpone tasks because of a fault, each according to its attempts so far; save their receipts."""
        postponed = {
            task.id: (
                task.receipt or None,
                min(LONGEST_BACK_OFF_S, 0.5 * 2 ** min(task.attempts, 10)) * random.uniform(0.5, 1.0),
            )
            for task in tasks
        }
        if postponed:
            self.observer.enforcement_failed(len(postponed))
            log.warning("enforcement.failed", cluster=self.actions.name, fault=fault, tasks=len(postponed))
            await self.store.failed(postponed, fault)


class Batch:
    """
    One batch of tasks about devices, accounts and certificates.

    Args:
        before_chunk: Called before each chunk of plans; if it returns False, the remaining plans are left for later.
    """

    def __init__(
        self, enforcer: Enforcer, inventory: Inventory, before_chunk: Callable[[], Awaitable[bool]] | None = None
    ) -> None:
        self._enforcer = enforcer
        self._store = enforcer.store
        self._actions = enforcer.actions
        self._inventory = inventory
        self._before_chunk = before_chunk
        self._confirmation = ReplicaConfirmation([], [])
        self._nodes: dict[str, dict[str, bool]] = {}
        self._unreachable: ClusterUnreachable | None = None
        self._paused = False
        self._recorded: set[int] = set()
        self._plans_to_end: list[Plan] = []
        self._all_sessions: dict[Plan, list[SessionQueue]] | None = None

    def unrecorded(self, tasks: Iterable[Task]) -> list[Task]:
        """Return those of some tasks for which nothing has been recorded."""
        return [task for task in tasks if task.id not in self._recorded]

    async def enforce(self, tasks: list[Task], confirmation: ReplicaConfirmation, nodes: dict[str, bool]) -> None:
        """
        Carry out all tasks, those whose users are connected first.

        Args:
            confirmation: Which replicas decide by the versions of all these tasks.
            nodes: The cluster's nodes, and whether each is seen running.
        Raises:
            TaskStoreError: The store cannot be used.
            AuthbackendError: The cluster cannot be reached, or a list failed; the tasks in :meth:`unrecorded` remain.
        """
        self._confirmation = confirmation
        self._nodes = {self._actions.name: nodes}
        plans: list[Plan] = await self._enforcer.check_each(grouped(tasks), make_plan)
        for plan in plans:
            plan.confirmed = not confirmation.missing
            plan.database_time = self._enforcer.now
        await self._read_crl_states([plan for plan in plans if plan.certificate is not None])
        await self._record([plan for plan in plans if plan.superseded])
        await self._record([plan for plan in plans if not plan.superseded and not (plan.users or plan.sessions)])
        self._plans_to_end = [plan for plan in plans if not plan.superseded and (plan.users or plan.sessions)]
        connected = await self._inventory.connected(user for plan in self._plans_to_end for user in plan.users)
        if await self._end([plan for plan in self._plans_to_end if not plan.users.isdisjoint(connected)]):
            await self._end_unconnected([plan for plan in self._plans_to_end if plan.users.isdisjoint(connected)])

    async def _may_continue(self) -> bool:
        """Return whether to start the next chunk; the lane may do small changes first."""
        return not self._paused and (self._before_chunk is None or await self._before_chunk())

    async def _read_crl_states(self, plans: Sequence[Plan]) -> None:
        """
        Read which nodes have the CRL that lists each plan's certificate.

        This comes before connections are read: a client that logs in before its node has the CRL is then seen by a
        later look, because this one counts the node as behind.
        """
        (nodes,) = self._nodes.values()
        for chunk in chunks(plans):
            keys = {plan: (str(plan.certificate["issuer"]), plan.task.name) for plan in chunk if plan.certificate}
            listed = await self._store.lists_of(list(keys.values()))
            for plan, key in keys.items():
                plan.crls = crl_states(nodes, listed[key])

    async def _end_unconnected(self, plans: list[Plan]) -> None:
        """Repair the sessions of plans whose users are not connected; record those without sessions together."""
        if not plans or self._paused:
            return
        sessions = await self._sessions_of(plans)
        if not await self._end([plan for plan in plans if sessions.get(plan)]) or self._paused:
            return
        for chunk in chunks([plan for plan in plans if plan.crls and not sessions.get(plan)]):
            await self._record(chunk)
        for chunk in chunks([plan for plan in plans if not plan.crls and not sessions.get(plan)], 10 * CHUNK):
            await self._record_nothing_found(chunk)

    async def _end(self, plans: Sequence[Plan]) -> bool:
        """
        Close, repair and record plans, chunk by chunk; return False if the rest must be left for later.

        While one chunk is repaired and recorded, the connections of the next chunk are closed already. Chunks are
        recorded in order, each after the one before.
        """
        repairing: asyncio.Task[None] | None = None
        try:
            for chunk in chunks(plans):
                if not await self._may_continue():
                    return False
                first_looks = [plan for plan in chunk if plan.first_look and not plan.confirmed_before]
                await self._hold([plan for plan in first_looks if plan.held])
                await self._for_each(chunk, self._close)
                previous, repairing = repairing, asyncio.create_task(self._repair_and_record(chunk, after=repairing))
                if previous is not None:
                    await previous
            return True
        except asyncio.CancelledError:
            if repairing is not None:
                repairing.cancel()
            raise
        finally:
            if repairing is not None:  # closed connections must be recorded, even if an earlier chunk failed
                await repairing

    async def _repair_and_record(self, plans: Sequence[Plan], after: asyncio.Task[None] | None) -> None:
        """Repair the sessions of a chunk and record it, once the previous chunk is recorded."""
        if after is not None:
            await asyncio.wait([after])
        with_sessions = [plan for plan in plans if plan.sessions and not plan.fault]
        if self._paused:
            for plan in with_sessions:
                plan.interrupted = True  # its sessions have not been inspected
            with_sessions = []
        try:
            sessions = await self._sessions_of(with_sessions)
            await self._repair({plan: sessions[plan] for plan in with_sessions if sessions.get(plan)})
        except TaskStoreError:
            raise
        except AuthbackendError as error:  # queues could not be listed; the closed connections must be recorded anyway
            for plan in plans:
                plan.fault = plan.fault or error.detail
        await self._record([plan for plan in plans if not plan.interrupted])
        await self._record_interrupted([plan for plan in plans if plan.interrupted])
        if self._unreachable is not None:
            raise self._unreachable

    async def _for_each(self, plans: Iterable[Plan], step: Callable[[Plan], Awaitable[None]]) -> None:
        """
        Run a step concurrently for all plans without a fault; its errors become faults of their plans.

        Once the cluster is unreachable, the remaining plans get that as their fault and are not tried.
        """

        async def run_step(plan: Plan) -> None:
            if plan.fault is None and self._unreachable is not None:
                plan.fault = self._unreachable.detail
            if plan.fault is not None:
                return
            try:
                await step(plan)
            except Paused:
                self._paused = plan.interrupted = True
            except ClusterUnreachable as error:
                self._unreachable = error
                plan.fault = error.detail
            except AuthbackendError as error:
                plan.fault = error.detail
            except Exception as error:  # a bug in authbackend must neither lose the task nor stop the other plans
                log.exception("enforcement.crashed", kind=plan.task.kind, name=plan.task.name)
                plan.fault = f"{type(error).__name__} in authbackend, see its log"

        async with asyncio.TaskGroup() as group:
            for plan in plans:
                group.create_task(run_step(plan))

    async def _hold(self, plans: list[Plan]) -> None:
        """Hold the logins of the plans' devices, and wait for the replicas to deny them."""
        if not plans:
            return
        try:
            version = await self._store.hold([plan.task.name for plan in plans])
        except TaskStoreError:
            raise
        except AuthbackendError as error:
            if len(plans) > 1:  # one device's hold is locked; find out which, and hold the others
                for plan in plans:
                    await self._hold([plan])
            else:
                plans[0].fault = error.detail
            return
        holding = await self._enforcer.wait_for_confirmation({version})
        missing = sorted({*self._confirmation.missing, *holding.missing})
        self._confirmation = ReplicaConfirmation(self._confirmation.by, missing, self._confirmation.awaited)

    async def _close(self, plan: Plan) -> None:
        """Close the connections of a plan's users, and count them by node."""
        for user in sorted(plan.users):
            listed = self._inventory.listed(user)

            def permitted(user: str = user) -> bool:
                return self._is_reactivated(plan, user)

            # At a later look, a permitted user may have logged in again with the new rights: only old connections end.
            later_look = plan.confirmed_before or not plan.first_look
            if plan.selective or (later_look and self._is_permitted(user)):
                await self._actions.close_where(user, plan.ends, plan.done)
            elif listed is not None:
                await self._actions.close_listed(listed, permitted, plan.done)
            else:
                closed = await self._actions.close_user(user, permitted)
                plan.done.closed.update(connection.node for connection in closed)

    def _is_permitted(self, user: str) -> bool:
        return self._enforcer.check(lambda checker: checker.permitted(user))

    def _is_reactivated(self, plan: Plan, user: str) -> bool:
        """Return whether the registry has come to permit a plan's user again; then the tasks must be planned again."""
        if plan.undone_by_activation and plan.confirmed and self._is_permitted(user):
            plan.plan_again = True
        return plan.plan_again

    async def _sessions_of(self, plans: Sequence[Plan]) -> dict[Plan, list[SessionQueue]]:
        """
        Return each plan's sessions.

        An inventory that lists everything is sorted only once, for all plans of the batch.
        """
        if self._all_sessions is not None:
            return self._all_sessions
        wanted = self._plans_to_end if self._inventory.lists_everything else plans
        owners = [owner for plan in wanted for owner in plan.sessions]
        sessions = await self._inventory.sessions(owners) if owners else []
        by_owner = PlansByOwner(wanted)
        owning_plans = await self._enforcer.check_each(
            sessions, lambda checker, session: by_owner.of(checker, session.client_id)
        )
        sessions_by_plan: dict[Plan, list[SessionQueue]] = {}
        for session, plan in zip(sessions, owning_plans, strict=True):
            if plan is not None:
                sessions_by_plan.setdefault(plan, []).append(session)
        if self._inventory.lists_everything:
            self._all_sessions = sessions_by_plan
        return sessions_by_plan

    async def _repair(self, sessions: dict[Plan, list[SessionQueue]]) -> None:
        async def repair(plan: Plan) -> None:
            for session in sessions[plan]:
                bindings = await self._inventory.bindings(session)
                violation = self._enforcer.check(lambda checker: _violation(checker, plan, session, bindings))  # noqa: B023
                if violation is None:
                    plan.done.kept += 1
                else:
                    await self._actions.repair_session(violation, plan.done)

        await self._for_each(sessions, repair)

    async def _record(self, plans: Sequence[Plan]) -> None:
        """Finish the plans that need no other look, schedule another look for the rest, postpone those with a fault."""
        self._recorded.update(_task_ids(plans))
        postponed: dict[str, list[Task]] = {}  # by fault
        looks: dict[float, dict[int, dict[str, Any]]] = {}  # by seconds until the next look
        finished: dict[str, dict[int, dict[str, Any]]] = {"done": {}, "superseded": {}}
        released: list[str] = []
        for plan in plans:
            new_receipt = self._receipt(plan)
            self._report_ended(plan)
            if plan.fault is not None:
                tasks = [replace(plan.task, id=id_, receipt=new_receipt) for id_ in plan.ids]
                postponed.setdefault(plan.fault, []).extend(tasks)
            elif (after_s := self._next_look_s(plan, new_receipt)) is not None:
                looks.setdefault(after_s, {}).update(dict.fromkeys(plan.ids, new_receipt))
            else:
                finished[self._finish(plan, new_receipt)].update(dict.fromkeys(plan.ids, new_receipt))
                released += [plan.task.name] if plan.task.kind == "device" else []
        for fault, tasks in postponed.items():
            await self._enforcer.postpone(tasks, fault)
        for after_s, receipts in looks.items():
            await self._store.check_later(receipts, after_s)
        for state, receipts in finished.items():
            await self._store.finish(receipts, state)
        # Only now: a hold is kept while its device has open tasks.
        await self._store.release(released, [id_ for receipts in finished.values() for id_ in receipts])

    def _finish(self, plan: Plan, new_receipt: dict[str, Any]) -> str:
        """Complete the receipt of a finished plan, and return its state."""
        if plan.superseded:
            new_receipt["superseded"] = plan.superseded
            return "superseded"
        new_receipt["checked_at"] = self._enforcer.now_as_text()
        self._enforcer.observer.enforced(plan.task.causes, new_receipt["took_s"])
        return "done"

    async def _record_interrupted(self, plans: Sequence[Plan]) -> None:
        """Save what was done before a pause; after it the plans start over, with a new hold if they need one."""
        started = [plan for plan in plans if plan.done.ended_anything]
        for plan in started:
            new_receipt = {**self._receipt(plan), "confirmed_at": None}
            self._report_ended(plan)
            await self._store.failed(dict.fromkeys(plan.ids, (new_receipt, 0.0)), "paused before it was finished")
        self._recorded.update(_task_ids(started))

    def _receipt(self, plan: Plan) -> dict[str, Any]:
        return receipt(plan, self._confirmation.by, self._confirmation.missing, self._nodes)

    def _next_look_s(self, plan: Plan, new_receipt: dict[str, Any]) -> float | None:
        """
        Return in how many seconds to look again; None if the plan is finished.

        It is finished when this look ended nothing and saw all nodes, and replicas and CRLs were confirmed before it.
        """
        if plan.superseded:
            return None
        if plan.plan_again:
            return 0.0
        if plan.done.ended_anything or plan.done.not_listed_yet:
            return self._inventory.look_again_s
        if plan.first_look and (plan.users or plan.sessions):
            return self._inventory.look_again_s
        looks = float(new_receipt["looks"])
        if self._confirmation.missing or new_receipt["unseen_nodes"]:
            return min(LONGEST_BACK_OFF_S, UNVERIFIED_S * looks)
        if nodes_awaiting_crl(plan.crls):
            return min(LONGEST_BACK_OFF_S, self._inventory.look_again_s * looks)
        return self._inventory.look_again_s if plan.unconfirmed_before or plan.crl_awaited_before else None

    def _report_ended(self, plan: Plan) -> None:
        """Count and log what was ended in this look, if anything."""
        if plan.done.ended_anything:
            self._enforcer.observer.ended(plan.done)
            log.info(
                "enforcement.ended",
                cluster=self._actions.name,
                kind=plan.task.kind,
                name=plan.task.name,
                connections=sum(plan.done.closed.values()),
                queues=len(plan.done.deleted),
            )

    async def _record_nothing_found(self, plans: Sequence[Plan]) -> None:
        """Record plans without connections and sessions, in few statements: in a mass change, these are most plans."""
        self._recorded.update(_task_ids(plans))
        common = common_receipt(self._confirmation.by, self._confirmation.missing, self._nodes, self._enforcer.now())
        verified = not (self._confirmation.missing or unseen_nodes(self._nodes))
        may_have_missed = [plan for plan in plans if plan.first_look or (plan.unconfirmed_before and verified)]
        checked = [plan for plan in plans if not (plan.first_look or (plan.unconfirmed_before and verified))]
        await self._store.nothing_found(_task_ids(may_have_missed), common, self._inventory.look_again_for_absent_s())
        if not verified:
            await self._store.nothing_found(_task_ids(checked), common, UNVERIFIED_S)
            return
        final = {**common, "checked_at": self._enforcer.now_as_text()}
        await self._store.nothing_found(_task_ids(checked), final, None)
        for plan in checked:
            self._enforcer.observer.enforced(plan.task.causes, plan.task.receipt.get("took_s") or 0.0)
        released = [plan.task.name for plan in checked if plan.task.kind == "device"]
        await self._store.release(released, _task_ids(checked))


def _violation(checker: Checker, plan: Plan, session: SessionQueue, bindings: list[Binding]) -> Violation | None:
    """
    Return what a plan must end of a session, or None.

    If the session's client id passed from one device to another, the session is the former owner's and is deleted,
    though the new owner would be permitted to have it.
    """
    if plan.moved:
        belongs_to_former_owner = plan.first_look or checker.is_moving(session.client_id)
        return Violation(session, "client_id_owner") if belongs_to_former_owner else None
    former_patterns = plan.task.details["former_client_ids"]
    gained = former_patterns is None or not fits(session.client_id, plan.task.name, former_patterns)
    if "client_id_owner" in plan.task.causes and plan.first_look and gained:
        return Violation(session, "client_id_owner")
    violation = inspect_session(checker, session, bindings)
    if violation is None and session.will and "publish" in plan.narrowed:
        return Violation(session, "rules")  # its topic is unknown, and may no longer be allowed
    return violation


def _task_ids(plans: Iterable[Plan]) -> list[int]:
    return [id_ for plan in plans for id_ in plan.ids]


def chunks(items: Sequence[T], size: int = CHUNK) -> Iterable[Sequence[T]]:
    """Split a list into chunks."""
    return (items[start : start + size] for start in range(0, len(items), size))
