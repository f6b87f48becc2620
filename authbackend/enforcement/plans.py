"""
Turn tasks into plans (whose connections end, whose sessions are inspected) and into receipts. Pure.

A plan is carried out in several looks at the cluster, which its receipt counts in ``looks``: the first ends what it
finds, the later ones make sure that nothing is left. Uses ``checks`` and ``policy``.
"""

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
"""How far the clocks of the brokers and of the database may differ."""

_BOTH = frozenset({"publish", "subscribe"})
_UNDONE_BY_ACTIVE = frozenset({"pending", "suspended", "revoked", "expired"})
"""Causes that no longer hold once a device is active again."""


@dataclass(eq=False)
class Plan:
    """
    What must be done for all open tasks about one device, account or certificate.

    Args:
        task: The tasks, merged into one.
        ids: The ids of the tasks.
        superseded: Why nothing needs to be done any more; None otherwise.
        users: User names whose connections end.
        held: Whether the device's logins are held until this is done.
        narrowed: Which of ``publish`` and ``subscribe`` lost something.
        sessions: Device ids and client ids whose sessions are inspected.
        certificate: The record of a revoked certificate; then only connections that use it end.
        crls: The state of the revoked certificate's CRL on the nodes; see :func:`crl_states`.
        moved: Client ids that passed to the device from ``users``; then only connections with these client ids end.
        confirmed: Whether every replica decides by the change now.
        database_time: Returns the database's clock, seconds since the epoch; receipts must not depend on the clock of
            a replica.
        fault: Why it could not be done in this look.
        interrupted: Whether a pause began before everything was done.
        plan_again: Whether the tasks must be planned again, because the registry has come to allow what they ended.
        done: What was done in this look.
    """

    task: Task
    ids: list[int]
    superseded: str | None = None
    users: set[str] = field(default_factory=set)
    held: bool = False
    narrowed: frozenset[str] = frozenset()
    sessions: list[str] = field(default_factory=list)
    certificate: dict[str, Any] | None = None
    crls: dict[str, Any] = field(default_factory=dict)
    moved: frozenset[str] = frozenset()
    confirmed: bool = False
    database_time: Callable[[], float] = time.time
    fault: str | None = None
    interrupted: bool = False
    plan_again: bool = False
    done: Actions = field(default_factory=Actions)

    @property
    def subject(self) -> tuple[str, str]:
        """Kind and name of what it is about."""
        return self.task.kind, self.task.name

    @property
    def first_look(self) -> bool:
        """Whether at least one of its tasks is waiting for its first look."""
        return self.task.state == "waiting"

    @property
    def confirmed_before(self) -> bool:
        """Whether all replicas decided by the change at an earlier look; its users may have logged in again since."""
        return bool(self.task.receipt.get("confirmed_at"))

    @property
    def unconfirmed_before(self) -> bool:
        """Whether a replica could still let clients in at the last look; it may have missed the newest connections."""
        return bool(self.task.receipt) and not self.task.receipt.get("confirmed_at")

    @property
    def crl_awaited_before(self) -> bool:
        """Whether a node could still accept the certificate at the last look, which may have missed new connections."""
        return bool(nodes_awaiting_crl(self.task.receipt.get("lists") or {}))

    @property
    def selective(self) -> bool:
        """Whether only some of its users' connections end, at the first look as well."""
        return self.certificate is not None or bool(self.moved)

    @property
    def undone_by_activation(self) -> bool:
        """Whether nothing remains to be done once the device is active again."""
        return self.task.kind == "device" and self.task.causes <= _UNDONE_BY_ACTIVE

    def ends(self, connection: LiveConnection) -> bool | None:
        """
        Return whether a connection of its users ends, in a plan where not all of them do; None if that is unknown.

        A user who is still permitted may have logged in again after being closed. So until every replica has confirmed,
        later looks close nothing, and afterwards only connections that are older than the confirmation: otherwise one
        silent replica would have its clients closed at every look.
        """
        if self.certificate is not None:
            return shows_certificate(connection, self.certificate)
        if self.moved:
            return None if connection.client_id is None else connection.client_id in self.moved
        confirmed_at = self.task.receipt.get("confirmed_at")
        if not confirmed_at and not self.confirmed:
            return False
        return connection.connected_at <= (confirmed_at or self.database_time()) + CLOCKS_S


def grouped(tasks: Iterable[Task]) -> list[list[Task]]:
    """Group tasks by device, account or certificate; those about moved client ids form groups of their own."""

    def subject(task: Task) -> tuple[str, str, str]:
        issuer = str(task.details.get("issuer", ""))  # certificates of two authorities may have the same serial number
        return task.kind, task.name, issuer + str(sorted(task.details.get("moved", ())))

    return [list(group) for _, group in groupby(sorted(tasks, key=subject), key=subject)]


def plan(checker: Checker, tasks: list[Task]) -> Plan:
    """Return the plan for a group of tasks, by the registry as it is now."""
    task = _merged(tasks)
    result = _PLANS[task.kind](checker, task)
    result.ids = [each.id for each in tasks]
    return result


def _merged(tasks: list[Task]) -> Task:
    """Merge a group of tasks into one, which waits for its first look if any of them does."""
    details = [task.details for task in tasks]
    waiting = any(task.state == "waiting" for task in tasks)
    return replace(
        tasks[0],
        causes=frozenset[str]().union(*(task.causes for task in tasks)),
        details={
            "users": sorted(
                {name for each in details for name in (each.get("common_name"), *each.get("users", ())) if name}
            ),
            "client_ids": sorted({pattern for each in details for pattern in each.get("client_ids") or ()}),
            "rules": [rule for each in details for rule in each.get("rules", ())],
            "moved": sorted({client_id for each in details for client_id in each.get("moved", ())}),
            "former_users": sorted({name for each in details for name in each.get("users", ())}),
            "certificate": {name: details[0].get(name) for name in ("issuer", "subject", "not_before", "not_after")},
            "former_client_ids": next(
                (each["former_client_ids"] for each in details if "former_client_ids" in each), None
            ),
        },
        state="waiting" if waiting else "checking",
        receipt=_merged_receipt(tasks),
    )


def _merged_receipt(tasks: list[Task]) -> dict[str, Any]:
    """Return a group's receipt so far: that of its first task with one, confirmed once all tasks are confirmed."""
    merged = dict(next((task.receipt for task in tasks if task.receipt), {}))
    confirmed_at = [task.receipt.get("confirmed_at") or 0.0 for task in tasks]
    if merged:
        merged["confirmed_at"] = max(confirmed_at) if all(confirmed_at) else None
    return merged


def _device_plan(checker: Checker, task: Task) -> Plan:
    if moved := task.details["moved"]:
        return Plan(task, [], users=set(task.details["former_users"]), moved=frozenset(moved), sessions=moved)
    device = checker.registry.device_by_id(task.name)
    users = {*task.details["users"], *([device.common_name] if device else [])}
    if not task.active:
        return Plan(task, [], users=users, sessions=[task.name])
    if task.causes <= _UNDONE_BY_ACTIVE:
        return Plan(task, [], superseded="the device is active again")
    narrowed = narrowed_by(checker, task)
    if not narrowed:
        return Plan(task, [])  # the remaining rules allow everything that the removed ones did
    return Plan(task, [], users=users, held=True, narrowed=narrowed, sessions=[task.name])


def _account_plan(checker: Checker, task: Task) -> Plan:
    account = checker.registry.account(task.name)
    narrowed = narrowed_by(checker, task)
    if account is not None and not narrowed:
        return Plan(task, [])
    sessions = sorted({*task.details["client_ids"], *(account.client_ids if account else ())})
    return Plan(task, [], users={task.name}, narrowed=narrowed, sessions=sessions)


def _certificate_plan(checker: Checker, task: Task) -> Plan:
    del checker  # nobody may use the certificate, whatever the registry says of its device now
    return Plan(
        task, [], users=set(task.details["users"]), certificate={"serial": task.name, **task.details["certificate"]}
    )


_PLANS = {"device": _device_plan, "account": _account_plan, "certificate": _certificate_plan}


def narrowed_by(checker: Checker, task: Task) -> frozenset[str]:
    """Return which of ``publish`` and ``subscribe`` a change may have narrowed; both, unless only rules changed."""
    if task.causes != {"rules"}:
        return _BOTH
    registry = checker.registry
    rule_sets: list[RuleSet] = []
    if task.kind == "account":
        account = registry.account(task.name)
        rule_sets += [account.rules] if account else []
    else:
        device = registry.device_by_id(task.name) if task.kind == "device" else None
        device_type = registry.device_type(device.type if device else task.name)
        rule_sets += [holder.rules for holder in (device, device_type) if holder is not None]
    allow_rules = [
        (_ACTIONS[rule.permission], rule.topic, rule.exchange)
        for rules in rule_sets
        for rule in rules
        if rule.effect is Effect.ALLOW
    ]
    return frozenset(narrowed_actions(task.details.get("rules", []), allow_rules, checker.mqtt_exchange))


class PlansByOwner:
    """Find the plan that a session belongs to: its owner's, or if nobody owns it, that of a possible former owner."""

    def __init__(self, plans: Iterable[Plan]) -> None:
        plans = list(plans)
        self._by_subject = {each.subject: each for each in plans if not each.moved}
        self._by_moved_client_id = {client_id: each for each in plans for client_id in each.moved}
        self._by_account_client_id = {
            client_id: each for each in plans if each.task.kind == "account" for client_id in each.sessions
        }

    def of(self, checker: Checker, client_id: str) -> Plan | None:
        """Return the plan of the session with a client id, or None."""
        if client_id in self._by_moved_client_id:
            return self._by_moved_client_id[client_id]
        owner = checker.owner(client_id)
        if owner is not None:
            subject = ("device", owner.device_id) if isinstance(owner, Device) else ("account", owner.name)
            return self._by_subject.get(subject)
        for device_id in possible_owners(client_id):
            former = self._by_subject.get(("device", device_id))
            if former is not None and fits(client_id, device_id, former.task.details["client_ids"]):
                return former
        return self._by_account_client_id.get(client_id)


def receipt(
    plan: Plan, confirmed_by: list[str], missing: list[str], nodes: dict[str, dict[str, bool]]
) -> dict[str, Any]:
    """
    Return the receipt of a plan: that of earlier looks with this look added.

    Args:
        nodes: By cluster, each node and whether it was seen running.
    """
    earlier, done = plan.task.receipt, plan.done
    took_s = earlier.get("took_s")
    if took_s is None or done.closed:
        took_s = age_s(plan.task, plan.database_time())
    closed = dict(earlier.get("closed", {}))
    for node, number in done.closed.items():
        closed[node] = closed.get(node, 0) + number
    return {
        "took_s": took_s,
        **(common := common_receipt(confirmed_by, missing, nodes, plan.database_time())),
        "confirmed_at": earlier.get("confirmed_at") or common["confirmed_at"],
        "closed": closed,
        "queues_deleted": earlier.get("queues_deleted", []) + done.deleted,
        "subscriptions_removed": earlier.get("subscriptions_removed", []) + done.unbound,
        "sessions_kept": done.kept,
        "untold": done.undecided,
        **({"lists": plan.crls} if plan.crls else {}),
        "looks": earlier.get("looks", 0) + 1,
    }


def common_receipt(
    confirmed_by: list[str], missing: list[str], nodes: dict[str, dict[str, bool]], now: float
) -> dict[str, Any]:
    """Return the fields that the receipts of all plans share in one look."""
    return {
        "confirmed_at": None if missing else now,
        "confirmed_by": confirmed_by,
        "unconfirmed": missing,
        "nodes": nodes,
        "unseen_nodes": unseen_nodes(nodes),
    }


def crl_states(nodes: Iterable[str], listed: Listed) -> dict[str, Any]:
    """
    Sort a cluster's nodes by what is known of the CRL that lists a certificate.

    ``installed``: the node's host reports that CRL or a later one; ``behind``: it reports an earlier one, or no CRL
    lists the certificate yet; ``silent``: its last report is too old to count; ``unknown``: it has never reported one.
    """
    states: dict[str, list[str]] = {"installed": [], "behind": [], "silent": [], "unknown": []}
    for node in sorted(nodes):
        states[listed.nodes.get(node, "unknown")].append(node)
    return {"number": listed.number, **states}


def nodes_awaiting_crl(crls: dict[str, Any]) -> list[str]:
    """Return the nodes whose host must report the CRL before the revocation of a certificate is done."""
    return [*crls.get("behind", ()), *crls.get("silent", ())]


def unseen_nodes(nodes: dict[str, dict[str, bool]]) -> list[str]:
    """Return the nodes that were not seen running, so that their connections are unknown."""
    return [f"{node} of {cluster}" for cluster, each in nodes.items() for node, up in each.items() if not up]


def age_s(task: Task, now: float) -> float:
    """Return how long ago a task was created, in seconds; ``now`` must be the database's clock."""
    return round(max(0.0, now - task.noted_at.timestamp()), 3)
