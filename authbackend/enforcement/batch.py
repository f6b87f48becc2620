"""
Does a batch of tasks on one cluster: wait until replicas deny, close, repair sessions, record what was done.

Every step may be repeated: what has been ended already is not found again. A fault stays with the plan that met it, unless
the cluster itself cannot be reached.
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
    awaited_lists,
    common_receipt,
    grouped,
    lists_on,
    plan,
    receipt,
    unseen,
)
from authbackend.enforcement.tasks import ReplicaConfirmation, Task, TaskStore, TaskStoreError
from authbackend.errors import AuthbackendError, Unavailable
from authbackend.policy.decide import DecisionSettings
from authbackend.registry.store import Reader

log = structlog.get_logger(__name__)

CHUNK = 200
"""Plans that are ended, repaired and recorded together; also how many are worked out before other tasks get a turn."""

UNVERIFIED_S = 5.0
"""How soon what could not be verified, for a node or a replica that is silent, is looked at again."""

OLDEST_COPY_S = 30.0
"""Nobody is ended by a copy of the registry that is older."""

LONGEST_BACK_OFF_S = 30.0
_CONFIRM_EVERY_S = 0.01

T = TypeVar("T")


class EnforcerObserver(Protocol):
    """Is told what happens, for metrics."""

    def ended(self, done: Actions) -> None:
        """Connections were closed, queues deleted, subscriptions removed."""

    def enforced(self, causes: frozenset[str], seconds: float) -> None:
        """A task is done; ``seconds`` from the change to the end of the last connection."""

    def enforcement_failed(self, tasks: int) -> None:
        """Tasks could not be done now."""


class Enforcer:
    """
    Enforces on one cluster for one lane.

    Args:
        registry: A reader of its own.
        confirm_s: How long to wait for the replicas before connections are closed all the same; those that did not
            confirm are named, and the task stays open until they have.
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

    def check(self, judge: Callable[[Checker], T]) -> T:
        """
        Return what a function finds in the registry as it is now; it must not give way to other tasks.

        Raises:
            Unavailable: The copy is too old, or not loaded yet: by it, everybody would be unknown.
        """
        with self._registry as registry:
            if registry.age_s > OLDEST_COPY_S:
                raise Unavailable(f"the copy of the registry is {registry.age_s:.0f} s old: nothing is ended by it")
            return judge(Checker(registry, registry.now, self._settings))

    def now(self) -> float:
        """Return the database's clock, seconds since the epoch; not inside :meth:`check`."""
        with self._registry as registry:
            return registry.now

    def now_as_text(self) -> str:
        """Return the database's clock as ISO 8601."""
        return datetime.fromtimestamp(self.now(), UTC).isoformat(timespec="milliseconds")

    async def in_parts(self, items: Sequence[T], judge: Callable[[Checker, T], Any]) -> list[Any]:
        """Return what a function finds of each item, giving way to other tasks in between."""
        found: list[Any] = []
        for part in chunks(items):
            found += self.check(lambda checker, part=part: [judge(checker, item) for item in part])  # type: ignore[misc]
            await asyncio.sleep(0)
        return found

    async def confirmed(self, versions: set[str]) -> ReplicaConfirmation:
        """Wait for the replicas that will confirm soon, for up to ``confirm_s``; return who confirmed and who did not."""
        deadline = time.monotonic() + self._confirm_s
        while True:
            found = await self.store.confirmation(versions)
            if not found.awaited or time.monotonic() >= deadline:
                return found
            await asyncio.sleep(_CONFIRM_EVERY_S)

    async def failed(self, tasks: Iterable[Task], fault: str) -> None:
        """Put tasks off, each by its own number of attempts, with what has been done nevertheless."""
        put_off = {
            task.id: (
                task.receipt or None,
                min(LONGEST_BACK_OFF_S, 0.5 * 2 ** min(task.attempts, 10)) * random.uniform(0.5, 1.0),
            )
            for task in tasks
        }
        if put_off:
            self.observer.enforcement_failed(len(put_off))
            log.warning("enforcement.failed", cluster=self.actions.name, fault=fault, tasks=len(put_off))
            await self.store.failed(put_off, fault)


class Batch:
    """
    One batch of tasks about devices, accounts and certificates.

    Args:
        between: Called between two parts of the work; when it returns False, the rest is left for later.
    """

    def __init__(
        self, enforcer: Enforcer, inventory: Inventory, between: Callable[[], Awaitable[bool]] | None = None
    ) -> None:
        self._enforcer = enforcer
        self._store = enforcer.store
        self._actions = enforcer.actions
        self._inventory = inventory
        self._between = between
        self._confirmed = ReplicaConfirmation([], [])
        self._nodes: dict[str, dict[str, bool]] = {}
        self._unreachable: ClusterUnreachable | None = None
        self._paused = False
        self._recorded: set[int] = set()
        self._present: list[Plan] = []
        self._owned: dict[Plan, list[SessionQueue]] | None = None

    def left(self, tasks: Iterable[Task]) -> list[Task]:
        """Return those of these tasks of which nothing has been recorded."""
        return [task for task in tasks if task.id not in self._recorded]

    async def enforce(self, tasks: list[Task], confirmed: ReplicaConfirmation, nodes: dict[str, bool]) -> None:
        """
        Do all of them, those that are connected first.

        Args:
            confirmed: Who decides by all of their versions.
            nodes: Of the cluster, and whether each is seen running.
        Raises:
            TaskStoreError: The store cannot be used.
            AuthbackendError: The cluster cannot be reached or does not list what is asked for; see :meth:`left`.
        """
        self._confirmed = confirmed
        self._nodes = {self._actions.name: nodes}
        plans: list[Plan] = await self._enforcer.in_parts(grouped(tasks), plan)
        for one in plans:
            one.confirmed = not self._confirmed.missing
            one.now = self._enforcer.now
        await self._look_at_lists([one for one in plans if one.certificate is not None])
        overtaken = [one for one in plans if one.superseded]
        await self._record(overtaken)
        await self._record([one for one in plans if not one.superseded and not (one.users or one.sessions)])
        self._present = [one for one in plans if not one.superseded and (one.users or one.sessions)]
        listed = await self._inventory.connected(user for one in self._present for user in one.users)
        if await self._end([one for one in self._present if not one.users.isdisjoint(listed)]):
            await self._rest([one for one in self._present if one.users.isdisjoint(listed)])

    async def _go_on(self) -> bool:
        """Return whether to begin with the next part; other tasks may be done before it."""
        return not self._paused and (self._between is None or await self._between())

    async def _look_at_lists(self, plans: Sequence[Plan]) -> None:
        """Before connections are looked at: who came before the list was on a node is seen by a look after that."""
        (nodes,) = self._nodes.values()
        for part in chunks(plans):
            keys = {one: (str(one.certificate["issuer"]), one.task.name) for one in part if one.certificate}
            found = await self._store.lists_of(list(keys.values()))
            for one, key in keys.items():
                one.lists = lists_on(nodes, found[key])

    async def _rest(self, plans: list[Plan]) -> None:
        """Repair the sessions of those that are not connected, and record all that have none together."""
        if not plans or self._paused:
            return
        sessions = await self._sessions_of(plans)
        if not await self._end([one for one in plans if sessions.get(one)]) or self._paused:
            return
        for part in chunks([one for one in plans if one.lists and not sessions.get(one)]):
            await self._record(part)
        nothing = [one for one in plans if not sessions.get(one) and not one.lists]
        for part in chunks(nothing, 10 * CHUNK):
            await self._nothing_found(part)

    async def _end(self, plans: Sequence[Plan]) -> bool:
        """
        End what some plans end, part by part; return False if other work has to come first.

        While the sessions of one part are repaired and its receipts written, the connections of the next are closed.
        """
        repairing: asyncio.Task[None] | None = None
        try:
            for part in chunks(plans):
                if not await self._go_on():
                    return False
                await self._hold([one for one in part if one.held and one.first_look and not one.closed_before])
                await self._each(part, self._close)
                earlier, repairing = repairing, asyncio.create_task(self._repair_and_record(part, repairing))
                if earlier is not None:
                    await earlier
            return True
        except asyncio.CancelledError:
            if repairing is not None:
                repairing.cancel()
            raise
        finally:
            if repairing is not None:  # what has been closed must be recorded, whatever the part before met
                await repairing

    async def _repair_and_record(self, plans: Sequence[Plan], after: asyncio.Task[None] | None) -> None:
        if after is not None:
            await asyncio.wait([after])
        with_sessions = [one for one in plans if one.sessions and not one.fault]
        if self._paused:
            for one in with_sessions:
                one.interrupted = True  # what they have stored has not been looked at
            with_sessions = []
        try:
            sessions = await self._sessions_of(with_sessions)
            await self._repair({one: sessions[one] for one in with_sessions if sessions.get(one)})
        except TaskStoreError:
            raise
        except AuthbackendError as error:  # the lists; what has been closed must be recorded all the same
            for one in plans:
                one.fault = one.fault or error.detail
        await self._record([one for one in plans if not one.interrupted])
        await self._interrupt([one for one in plans if one.interrupted])
        if self._unreachable is not None:
            raise self._unreachable

    async def _each(self, plans: Iterable[Plan], step: Callable[[Plan], Awaitable[None]]) -> None:
        """Do something for each plan that has not failed; a fault stays with its plan."""

        async def one(each: Plan) -> None:
            if each.fault is None and self._unreachable is not None:
                each.fault = self._unreachable.detail
            if each.fault is not None:
                return
            try:
                await step(each)
            except Paused:
                self._paused = each.interrupted = True
            except ClusterUnreachable as error:
                self._unreachable = error
                each.fault = error.detail
            except AuthbackendError as error:
                each.fault = error.detail
            except Exception as error:  # a bug must neither lose the work nor keep the other plans from being done
                log.exception("enforcement.crashed", kind=each.task.kind, name=each.task.name)
                each.fault = f"{type(error).__name__} in the service, see its log"

        async with asyncio.TaskGroup() as group:
            for each in plans:
                group.create_task(one(each))

    async def _hold(self, plans: list[Plan]) -> None:
        if not plans:
            return
        try:
            version = await self._store.hold([one.task.name for one in plans])
        except TaskStoreError:
            raise
        except AuthbackendError as error:
            if len(plans) > 1:  # one of them is in the way
                for one in plans:
                    await self._hold([one])
            else:
                plans[0].fault = error.detail
            return
        holding = await self._enforcer.confirmed({version})
        self._confirmed = ReplicaConfirmation(
            self._confirmed.by, sorted({*self._confirmed.missing, *holding.missing}), self._confirmed.awaited
        )

    async def _close(self, one: Plan) -> None:
        """Close the connections of a plan's users, and note where they were."""
        for user in sorted(one.users):
            listed = self._inventory.listed(user)

            def permitted(user: str = user) -> bool:
                return self._reactivated(one, user)

            again = one.closed_before or not one.first_look
            if one.selective or (again and self._permitted(user)):
                await self._actions.close_where(user, one.ends, one.done)
            elif listed is not None:
                await self._actions.close_listed(listed, permitted, one.done)
            else:
                closed = await self._actions.close_user(user, permitted)
                one.done.closed.update(connection.node for connection in closed)

    def _permitted(self, user: str) -> bool:
        return self._enforcer.check(lambda checker: checker.permitted(user))

    def _reactivated(self, one: Plan, user: str) -> bool:
        """Return whether the registry has come to allow again what a plan is about; then it is planned anew."""
        if one.ends_with_activation and one.confirmed and self._permitted(user):
            one.again_at_once = True
        return one.again_at_once

    async def _sessions_of(self, plans: Sequence[Plan]) -> dict[Plan, list[SessionQueue]]:
        """Return the sessions that belong to each plan; where everything is listed, they are sorted out once for all plans."""
        if self._owned is not None:
            return self._owned
        about = self._present if self._inventory.lists else plans
        owners = [owner for one in about for owner in one.sessions]
        sessions = await self._inventory.sessions(owners) if owners else []
        by_owner = PlansByOwner(about)
        found: dict[Plan, list[SessionQueue]] = {}
        owned = await self._enforcer.in_parts(sessions, lambda checker, each: by_owner.of(checker, each.client_id))
        for session, one in zip(sessions, owned, strict=True):
            if one is not None:
                found.setdefault(one, []).append(session)
        if self._inventory.lists:
            self._owned = found
        return found

    async def _repair(self, sessions: dict[Plan, list[SessionQueue]]) -> None:
        """Repair the sessions of each plan."""

        async def repair(one: Plan) -> None:
            for session in sessions[one]:
                bound = await self._inventory.bindings(session)
                violation = self._enforcer.check(lambda checker: _violation(checker, one, session, bound))  # noqa: B023
                if violation is None:
                    one.done.kept += 1
                else:
                    await self._actions.repair_session(violation, one.done)

        await self._each(sessions, repair)

    async def _record(self, plans: Sequence[Plan]) -> None:
        """Finish what a later look found nothing left of, and keep the rest for another look."""
        by, missing = self._confirmed.by, self._confirmed.missing
        self._recorded.update(_ids(plans))
        later: dict[float, dict[int, dict[str, Any]]] = {}
        finished: dict[str, dict[int, dict[str, Any]]] = {"done": {}, "superseded": {}}
        released: list[str] = []
        put_off: dict[str, list[Task]] = {}
        for one in plans:
            made = receipt(one, by, missing, self._nodes)
            if one.fault is not None:
                put_off.setdefault(one.fault, []).extend(replace(one.task, id=id_, receipt=made) for id_ in one.ids)
                self._tell(one, made, finished=False)
                continue
            after_s = self._look_again_s(one, made)
            if after_s is not None:
                later.setdefault(after_s, {}).update(dict.fromkeys(one.ids, made))
            else:
                made |= (
                    {"superseded": one.superseded} if one.superseded else {"checked_at": self._enforcer.now_as_text()}
                )
                finished["superseded" if one.superseded else "done"].update(dict.fromkeys(one.ids, made))
                released += [one.task.name] if one.task.kind == "device" else []
            self._tell(one, made, finished=after_s is None)
        for fault, tasks in put_off.items():
            await self._enforcer.failed(tasks, fault)
        for after_s, receipts in later.items():
            await self._store.check_later(receipts, after_s)
        for state, receipts in finished.items():
            await self._store.finish(receipts, state)
        await self._store.release(released, [id_ for receipts in finished.values() for id_ in receipts])

    async def _interrupt(self, plans: Sequence[Plan]) -> None:
        """Keep what was done until a pause began; when it ends, they are begun anew, with a hold where one is needed."""
        begun = [one for one in plans if one.done.anything]
        for one in begun:
            made = receipt(one, self._confirmed.by, self._confirmed.missing, self._nodes)
            self._tell(one, made, finished=False)
            kept = {**made, "confirmed_at": None}
            await self._store.failed(dict.fromkeys(one.ids, (kept, 0.0)), "paused before all of it was done")
        self._recorded.update(_ids(begun))

    def _look_again_s(self, one: Plan, made: dict[str, Any]) -> float | None:
        """Return when to look at a plan again, None if it is finished."""
        if one.superseded:
            return None
        if one.again_at_once:
            return 0.0
        if one.done.anything or one.done.late:
            return self._inventory.look_again_s
        if one.first_look and (one.users or one.sessions):
            return self._inventory.look_again_s
        if self._confirmed.missing or made["unseen_nodes"]:
            return min(LONGEST_BACK_OFF_S, UNVERIFIED_S * float(made["looks"]))
        if awaited_lists(one.lists):
            return min(LONGEST_BACK_OFF_S, self._inventory.look_again_s * float(made["looks"]))
        return self._inventory.look_again_s if one.just_confirmed or one.just_listed else None

    def _tell(self, one: Plan, made: dict[str, Any], *, finished: bool) -> None:
        if finished and not one.superseded:
            self._enforcer.observer.enforced(one.task.causes, made["took_s"])
        if one.done.anything:
            self._enforcer.observer.ended(one.done)
            closed, deleted = sum(one.done.closed.values()), len(one.done.deleted)
            log.info(
                "enforcement.ended",
                cluster=self._actions.name,
                kind=one.task.kind,
                name=one.task.name,
                connections=closed,
                queues=deleted,
            )

    async def _nothing_found(self, plans: Sequence[Plan]) -> None:
        """Record plans for which nothing was connected and nothing stored, together."""
        self._recorded.update(_ids(plans))
        common = common_receipt(self._confirmed.by, self._confirmed.missing, self._nodes, self._enforcer.now())
        unverified = bool(self._confirmed.missing or unseen(self._nodes))
        first = [one for one in plans if one.first_look or (one.just_confirmed and not unverified)]
        again = [one for one in plans if not (one.first_look or (one.just_confirmed and not unverified))]
        await self._store.nothing_found(_ids(first), common, self._inventory.look_again_for_absent_s())
        if unverified:
            await self._store.nothing_found(_ids(again), common, UNVERIFIED_S)
            return
        await self._store.nothing_found(_ids(again), {**common, "checked_at": self._enforcer.now_as_text()}, None)
        for one in again:
            self._enforcer.observer.enforced(one.task.causes, one.task.receipt.get("took_s") or 0.0)
        await self._store.release([one.task.name for one in again if one.task.kind == "device"], _ids(again))


def _violation(checker: Checker, one: Plan, session: SessionQueue, bound: list[Binding]) -> Violation | None:
    if one.moved:
        gone = one.first_look or checker.is_moving(session.client_id)
        return Violation(session, "client_id_owner") if gone else None
    former = one.task.details["former_client_ids"]
    taken = former is None or not fits(session.client_id, one.task.name, former)
    if "client_id_owner" in one.task.causes and one.first_look and taken:
        return Violation(session, "client_id_owner")  # who had the id before had the session
    violation = inspect_session(checker, session, bound)
    if violation is None and session.will and "publish" in one.actions:
        return Violation(session, "rules")
    return violation


def _ids(plans: Iterable[Plan]) -> list[int]:
    return [id_ for one in plans for id_ in one.ids]


def chunks(items: Sequence[T], size: int = CHUNK) -> Iterable[Sequence[T]]:
    """Yield a list in parts."""
    return (items[start : start + size] for start in range(0, len(items), size))
