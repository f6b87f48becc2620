"""What tasks come to: whose connections must end, whose sessions are looked at, and what the receipt says. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from authbackend.enforcement.checks import Checker, fits, narrowed_actions, serial
from authbackend.enforcement.clusters import Actions
from authbackend.enforcement.management_api import LiveConnection
from authbackend.enforcement.tasks import Task
from authbackend.policy.rules import Device, Effect, Permission, RuleSet

_ACTIONS = {Permission.WRITE: "publish", Permission.READ: "subscribe"}
CLOCKS_S = 2.0
"""How far the clocks of brokers and of this service may be apart."""

_BOTH = frozenset({"publish", "subscribe"})


@dataclass
class Plan:
    """
    What the open tasks about one device or account come to.

    Args:
        task: What changed; several tasks about the same are one here.
        ids: Of the tasks.
        device: The device as it is now; None if it is gone, or for accounts.
        users: User names whose connections must end.
        gone: True if nobody may be connected by these names, also not anew.
        held: True if the device's logins are held until this is done.
        actions: Which rules narrowed.
        sessions: Device ids and client ids whose sessions are looked at.
        serial: Of a revoked certificate: only connections with it end.
        confirmed: True if every replica decides by the change by now.
    """

    task: Task
    ids: list[int]
    device: Device | None = None
    users: set[str] = field(default_factory=set)
    gone: bool = False
    held: bool = False
    actions: frozenset[str] = frozenset()
    sessions: list[str] = field(default_factory=list)
    serial: str | None = None
    confirmed: bool = False
    done: Actions = field(default_factory=Actions)

    def selects(self) -> Callable[[LiveConnection], bool] | None:
        """
        Return which of the users' connections end; None for all of them.

        At a later look, who may be connected may have logged in anew: then only what is older than the moment at which
        every replica had confirmed ends. Until then nothing more: a replica that is silent for long must not have
        everybody thrown out again and again.
        """
        if self.serial is not None:
            return lambda live: live.certificate_serial is not None and serial(live.certificate_serial) == self.serial
        if self.task.state == "checking" and not self.gone:
            since_ = self.task.receipt.get("confirmed_at")
            latest = (since_ or datetime.now(UTC).timestamp()) + CLOCKS_S if since_ or self.confirmed else 0.0
            return lambda live: live.connected_at <= latest
        return None


def plans_of(checker: Checker, tasks: Iterable[Task]) -> list[Plan]:
    """Return the plans of tasks about devices and accounts."""
    found = []
    ordered = sorted(tasks, key=lambda task: (task.kind, task.name, task.id))
    for (kind, _), group in groupby(ordered, key=lambda task: (task.kind, task.name)):
        same = list(group)
        task = _merged(same)
        case = _CASES[kind](checker, task)
        case.ids = [each.id for each in same]
        found.append(case)
    return found


def _merged(same: list[Task]) -> Task:
    """Return one task for several about the same; it waits for its first attempt if one of them does."""
    details = [task.details for task in same]
    waiting = any(task.state == "waiting" for task in same)
    return replace(
        same[0],
        causes=frozenset[str]().union(*(task.causes for task in same)),
        details={
            "users": sorted(
                {name for each in details for name in (each.get("common_name"), *each.get("users", ())) if name}
            ),
            "client_ids": sorted({pattern for each in details for pattern in each.get("client_ids") or ()}),
            "rules": [rule for each in details for rule in each.get("rules", ())],
        },
        state="waiting" if waiting else "checking",
        receipt=next((task.receipt for task in same if task.receipt), {}),
    )


def _device_case(checker: Checker, task: Task) -> Plan:
    device = checker.registry.device_by_id(task.name)
    users = {*task.details["users"], *([device.common_name] if device else [])}
    if checker.ended(device) is not None:
        return Plan(task, [], device, users, gone=True, sessions=[task.name])
    actions = narrowed(checker, task)
    if not actions:
        return Plan(task, [], device)  # what is still allowed covers what went
    return Plan(task, [], device, users, held=True, actions=actions, sessions=[task.name])


def _account_case(checker: Checker, task: Task) -> Plan:
    account = checker.registry.account(task.name)
    actions = narrowed(checker, task)
    if account is not None and not actions:
        return Plan(task, [])
    sessions = sorted({*task.details["client_ids"], *(account.client_ids if account else ())})
    return Plan(task, [], None, {task.name}, gone=account is None, actions=actions, sessions=sessions)


def _certificate_case(checker: Checker, task: Task) -> Plan:
    del checker  # whoever it is now: the certificate must not be in use
    return Plan(task, [], None, set(task.details["users"]), serial=task.name)


_CASES = {"device": _device_case, "account": _account_case, "certificate": _certificate_case}


def narrowed(checker: Checker, task: Task) -> frozenset[str]:
    """Return which of ``publish`` and ``subscribe`` a change may have narrowed; both, unless only rules changed."""
    if task.causes != {"rules"}:
        return _BOTH
    registry = checker.registry
    rules: list[RuleSet] = []
    if task.kind == "account":
        account = registry.account(task.name)
        rules += [account.rules] if account else []
    else:
        device = registry.device_by_id(task.name) if task.kind == "device" else None
        device_type = registry.device_type(device.type if device else task.name)
        rules += [holder.rules for holder in (device, device_type) if holder is not None]
    present = [(_ACTIONS[r.permission], r.topic) for each in rules for r in each if r.effect is Effect.ALLOW]
    return frozenset(narrowed_actions(task.details.get("rules", []), present))


def plan_of(checker: Checker, plans: Iterable[Plan], client_id: str) -> Plan | None:
    """Return the case that a session belongs to: its owner's, or without one, that of who may have owned it before."""
    owner = checker.owner(client_id)
    if owner is None:
        for case in plans:
            if client_id in case.sessions or fits(client_id, case.task.name, case.task.details["client_ids"]):
                return case
        return None
    mine = ("device", owner.device_id) if isinstance(owner, Device) else ("account", owner.name)
    return next((case for case in plans if (case.task.kind, case.task.name) == mine), None)


def receipt(case: Plan, confirmed: list[str], missing: list[str]) -> dict[str, Any]:
    """Return the receipt of a case: what was done before, and now."""
    before, now = case.task.receipt, case.done
    took_s = before.get("took_s")
    if took_s is None or now.closed:
        took_s = since(case.task)
    closed = dict(before.get("closed", {}))
    for node, number in now.closed.items():
        closed[node] = closed.get(node, 0) + number
    return {
        "took_s": took_s,
        "confirmed_at": before.get("confirmed_at") or (None if missing else datetime.now(UTC).timestamp()),
        "confirmed_by": confirmed,
        "unconfirmed": missing,
        "nodes": now.nodes,
        "unseen_nodes": now.unseen,
        "closed": closed,
        "queues_deleted": before.get("queues_deleted", []) + now.deleted,
        "subscriptions_removed": before.get("subscriptions_removed", []) + now.unbound,
        "sessions_kept": now.kept,
        "looks": before.get("looks", 0) + 1,
    }


def since(task: Task) -> float:
    """Return how long ago a task was noted, in seconds."""
    return round((datetime.now(UTC) - task.noted_at).total_seconds(), 3)
