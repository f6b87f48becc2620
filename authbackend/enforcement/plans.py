"""What tasks come to: whose connections must end, whose sessions are looked at, and what the receipt says. Pure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from authbackend.enforcement.checks import Checker, fits, narrowed_actions, shows_certificate
from authbackend.enforcement.clusters import Actions
from authbackend.enforcement.management_api import LiveConnection
from authbackend.enforcement.tasks import Listed, Task
from authbackend.policy.model import Device, RuleSet
from authbackend.policy.names import possible_owners
from authbackend.policy.rules import Effect, Permission

_ACTIONS = {Permission.WRITE: "publish", Permission.READ: "subscribe"}
CLOCKS_S = 2.0
"""How far the clocks of brokers and of the database may be apart."""

_BOTH = frozenset({"publish", "subscribe"})
_UNDONE_BY_ACTIVE = frozenset({"pending", "suspended", "revoked", "expired"})
"""Causes that are no longer true of a device that is active again."""


@dataclass(eq=False)
class Plan:
    """
    What the open tasks about one device, account or certificate come to.

    Args:
        task: What changed; several tasks about the same are one here.
        ids: Of the tasks.
        superseded: Why nothing is to be done any more; None if something is.
        users: User names whose connections must end.
        held: True if the device's logins are held until this is done.
        actions: Which rules narrowed.
        sessions: Device ids and client ids whose sessions are looked at.
        certificate: The record of a revoked certificate: only connections with it end.
        lists: Of a revoked certificate: what is known of the lists on the nodes; see :func:`lists_on`.
        moved: Client ids that have passed to the device: only connections of its users with them end.
        confirmed: True if every replica decides by the change by now.
        now: Returns the database's clock, seconds since the epoch: what is noted must not hang on the clock of a replica.
        fault: Why it could not be done this time.
        interrupted: True if a pause began before all of it was done.
        again_at_once: True if it must be planned anew: meanwhile the registry allows again what it is about.
    """

    task: Task
    ids: list[int]
    superseded: str | None = None
    users: set[str] = field(default_factory=set)
    held: bool = False
    actions: frozenset[str] = frozenset()
    sessions: list[str] = field(default_factory=list)
    certificate: dict[str, Any] | None = None
    lists: dict[str, Any] = field(default_factory=dict)
    moved: frozenset[str] = frozenset()
    confirmed: bool = False
    now: Callable[[], float] = time.time
    fault: str | None = None
    interrupted: bool = False
    again_at_once: bool = False
    done: Actions = field(default_factory=Actions)

    @property
    def about(self) -> tuple[str, str]:
        """Kind and name."""
        return self.task.kind, self.task.name

    @property
    def first_look(self) -> bool:
        """True if nothing has been ended for it yet."""
        return self.task.state == "waiting"

    @property
    def closed_before(self) -> bool:
        """True if its connections were closed at an earlier look, when all replicas decided by the change."""
        return bool(self.task.receipt.get("confirmed_at"))

    @property
    def just_confirmed(self) -> bool:
        """True if at the look before, a replica could still let somebody in: what came since may not be seen yet."""
        return bool(self.task.receipt) and not self.task.receipt.get("confirmed_at")

    @property
    def just_listed(self) -> bool:
        """True if at the look before, the list was not on every node that reports: what came since may not be seen yet."""
        return bool(awaited_lists(self.task.receipt.get("lists") or {}))

    @property
    def selective(self) -> bool:
        """True if not all connections of its users end, also at the first look."""
        return self.certificate is not None or bool(self.moved)

    @property
    def ends_with_activation(self) -> bool:
        """True if it is about a device that may not be connected, and about nothing else."""
        return self.task.kind == "device" and self.task.causes <= _UNDONE_BY_ACTIVE

    def ends(self, connection: LiveConnection) -> bool | None:
        """
        Return whether a connection of its users ends, where not all of them do; None if that cannot be told.

        Who may be connected may have logged in anew: then only what is older than the moment at which every replica had
        confirmed ends. Until then nothing more: a replica that is silent for long must not have everybody thrown out
        again and again.
        """
        if self.certificate is not None:
            return shows_certificate(connection, self.certificate)
        if self.moved:
            return None if connection.client_id is None else connection.client_id in self.moved
        since_ = self.task.receipt.get("confirmed_at")
        if not since_ and not self.confirmed:
            return False
        return connection.connected_at <= (since_ or self.now()) + CLOCKS_S


def grouped(tasks: Iterable[Task]) -> list[list[Task]]:
    """Return tasks about devices, accounts and certificates, those about the same together."""

    def about(task: Task) -> tuple[str, str, str]:
        """Certificates of two authorities may have the same number."""
        return task.kind, task.name, str(task.details.get("issuer", "")) + str(sorted(task.details.get("moved", ())))

    return [list(group) for _, group in groupby(sorted(tasks, key=about), key=about)]


def plan(checker: Checker, same: list[Task]) -> Plan:
    """Return what the tasks about one device, account or certificate come to."""
    task = _merged(same)
    made = _PLANS[task.kind](checker, task)
    made.ids = [each.id for each in same]
    return made


def _merged(same: list[Task]) -> Task:
    """Return one task for several about the same; it waits for its first look if one of them does."""
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
            "moved": sorted({client_id for each in details for client_id in each.get("moved", ())}),
            "former_users": sorted({name for each in details for name in each.get("users", ())}),
            "certificate": {name: details[0].get(name) for name in ("issuer", "subject", "not_before", "not_after")},
            "former_client_ids": next((x["former_client_ids"] for x in details if "former_client_ids" in x), None),
        },
        state="waiting" if waiting else "checking",
        receipt=_merged_receipt(same),
    )


def _merged_receipt(same: list[Task]) -> dict[str, Any]:
    """Return what has been done so far; replicas have confirmed several changes when they have confirmed the last one."""
    made = dict(next((task.receipt for task in same if task.receipt), {}))
    confirmed = [task.receipt.get("confirmed_at") or 0.0 for task in same]
    if made:
        made["confirmed_at"] = max(confirmed) if all(confirmed) else None
    return made


def _device_plan(checker: Checker, task: Task) -> Plan:
    if moved := task.details["moved"]:
        return Plan(task, [], users=set(task.details["former_users"]), moved=frozenset(moved), sessions=moved)
    device = checker.registry.device_by_id(task.name)
    users = {*task.details["users"], *([device.common_name] if device else [])}
    if not task.active:
        return Plan(task, [], users=users, sessions=[task.name])
    if task.causes <= _UNDONE_BY_ACTIVE:
        return Plan(task, [], superseded="the device is active again")
    actions = narrowed(checker, task)
    if not actions:
        return Plan(task, [])  # what is still allowed covers what went
    return Plan(task, [], users=users, held=True, actions=actions, sessions=[task.name])


def _account_plan(checker: Checker, task: Task) -> Plan:
    account = checker.registry.account(task.name)
    actions = narrowed(checker, task)
    if account is not None and not actions:
        return Plan(task, [])
    sessions = sorted({*task.details["client_ids"], *(account.client_ids if account else ())})
    return Plan(task, [], users={task.name}, actions=actions, sessions=sessions)


def _certificate_plan(checker: Checker, task: Task) -> Plan:
    del checker  # whoever it is now: the certificate must not be in use
    return Plan(
        task, [], users=set(task.details["users"]), certificate={"serial": task.name, **task.details["certificate"]}
    )


_PLANS = {"device": _device_plan, "account": _account_plan, "certificate": _certificate_plan}


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
    present = [
        (_ACTIONS[r.permission], r.topic, r.exchange) for each in rules for r in each if r.effect is Effect.ALLOW
    ]
    return frozenset(narrowed_actions(task.details.get("rules", []), present, checker.mqtt_exchange))


class PlansByOwner:
    """Finds the plan that a session belongs to: its owner's, or without one, that of who may have owned it before."""

    def __init__(self, plans: Iterable[Plan]) -> None:
        listed = list(plans)
        self._plans = {one.about: one for one in listed if not one.moved}
        self._moved = {client_id: one for one in listed for client_id in one.moved}
        self._by_client_id = {
            client_id: one for one in listed if one.task.kind == "account" for client_id in one.sessions
        }

    def of(self, checker: Checker, client_id: str) -> Plan | None:
        """Return the plan of a session with this client id, None if it is nobody's here."""
        if client_id in self._moved:
            return self._moved[client_id]
        owner = checker.owner(client_id)
        if owner is not None:
            about = ("device", owner.device_id) if isinstance(owner, Device) else ("account", owner.name)
            return self._plans.get(about)
        for device_id in possible_owners(client_id):
            one = self._plans.get(("device", device_id))
            if one is not None and fits(client_id, device_id, one.task.details["client_ids"]):
                return one
        return self._by_client_id.get(client_id)


def receipt(one: Plan, confirmed: list[str], missing: list[str], nodes: dict[str, dict[str, bool]]) -> dict[str, Any]:
    """
    Return the receipt of a plan: what was done before, and now.

    Args:
        nodes: Of each cluster that was looked at, its nodes and whether each was seen running.
    """
    before, now = one.task.receipt, one.done
    took_s = before.get("took_s")
    if took_s is None or now.closed:
        took_s = since(one.task, one.now())
    closed = dict(before.get("closed", {}))
    for node, number in now.closed.items():
        closed[node] = closed.get(node, 0) + number
    return {
        "took_s": took_s,
        **(common := common_receipt(confirmed, missing, nodes, one.now())),
        "confirmed_at": before.get("confirmed_at") or common["confirmed_at"],
        "closed": closed,
        "queues_deleted": before.get("queues_deleted", []) + now.deleted,
        "subscriptions_removed": before.get("subscriptions_removed", []) + now.unbound,
        "sessions_kept": now.kept,
        "untold": now.untold,
        **({"lists": one.lists} if one.lists else {}),
        "looks": before.get("looks", 0) + 1,
    }


def common_receipt(
    confirmed: list[str], missing: list[str], nodes: dict[str, dict[str, bool]], now: float
) -> dict[str, Any]:
    """Return what the receipts of all plans of one look have in common."""
    return {
        "confirmed_at": None if missing else now,
        "confirmed_by": confirmed,
        "unconfirmed": missing,
        "nodes": nodes,
        "unseen_nodes": unseen(nodes),
    }


def lists_on(nodes: Iterable[str], found: Listed) -> dict[str, Any]:
    """
    Return what is known of the list with a certificate on a cluster's nodes.

    ``installed``: their host reports that list or a later one; ``behind``: it reports another; ``silent``: it has reported one,
    too long ago to know whether it has it still; ``unknown``: it has never reported one.
    """
    states: dict[str, list[str]] = {"installed": [], "behind": [], "silent": [], "unknown": []}
    for node in sorted(nodes):
        states[found.nodes.get(node, "unknown")].append(node)
    return {"number": found.number, **states}


def awaited_lists(lists: dict[str, Any]) -> list[str]:
    """Return the nodes whose host is to report the list with a certificate before its revocation is done."""
    return [*lists.get("behind", ()), *lists.get("silent", ())]


def unseen(nodes: dict[str, dict[str, bool]]) -> list[str]:
    """Return the nodes that were not seen running: what is connected there is not known."""
    return [f"{node} of {cluster}" for cluster, each in nodes.items() for node, up in each.items() if not up]


def since(task: Task, now: float) -> float:
    """Return how long ago a task was noted, in seconds, by the database's clock, which noted it."""
    return round(max(0.0, now - task.noted_at.timestamp()), 3)
