"""How tasks for one device are merged into a plan, and which connections each check ends."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from authbackend.enforcement.plans import CLOCKS_S, Plan, PlansByOwner, grouped, plan, receipt
from authbackend.enforcement.tasks import Task
from authbackend.policy.model import RuleSet
from authbackend.policy.rules import Effect, Permission, TopicRule
from tests.unit.test_checks import checker, live

RULES = [{"effect": "deny", "action": "subscribe", "topic": "x"}]


def task(name, causes, number=1, kind="device", state="waiting", **more):
    details = {"common_name": name, **more.pop("details", {})}
    return Task(number, "5", kind, name, frozenset(causes), details, datetime.now(UTC), state, 0, **more)


def planned(one, confirmed=True):
    result = plan(checker(), one if isinstance(one, list) else [one])
    result.confirmed = confirmed
    return result


def test_several_changes_about_one_device_are_one_plan():
    changes = [
        task("A", ["rules"], 1, details={"rules": RULES}, active=True),
        task("A", ["renamed"], 2, details={"common_name": "old"}, active=True),
        task("R", ["revoked"], 3),
    ]
    first, second = map(planned, grouped(changes))
    assert (first.ids, first.users, first.held, first.sessions) == ([1, 2], {"A", "old"}, True, ["A"])
    assert (second.ids, second.users, second.held, second.sessions) == ([3], {"R"}, False, ["R"])


def test_what_still_allows_as_much_makes_nothing_to_do():
    checks = checker()
    rules = RuleSet([TopicRule(Effect.ALLOW, Permission.READ, "fleet/{device_id}/#")])
    device = checks.registry.device_by_id("A")
    checks.registry._by_id["A"] = replace(device, rules=rules)
    went = [{"effect": "allow", "action": "subscribe", "topic": "fleet/{device_id}/x"}]
    nothing = plan(checks, [task("A", ["rules"], details={"rules": went}, active=True)])
    assert (nothing.users, nothing.sessions, nothing.held) == (set(), [], False)


@pytest.mark.parametrize("cause", ["revoked", "suspended", "pending", "expired"])
def test_what_a_device_is_active_again_after_is_superseded(cause):
    assert planned(task("A", [cause], active=True)).superseded
    assert not planned(task("A", [cause])).superseded


@pytest.mark.parametrize("causes", [["deleted"], ["revoked", "rules"], ["renamed"]])
def test_what_activation_does_not_undo_is_not_superseded(causes):
    merged = planned(task("A", causes, active=True))
    assert not merged.superseded
    assert merged.users == {"A"}


@pytest.mark.parametrize(
    ("confirmed_at", "confirmed", "ended"),
    [
        (1000.0, True, [True, True, False]),
        (None, False, [False, False, False]),  # a replica is silent: no device is disconnected repeatedly
        (None, True, [True, True, True]),  # it has just confirmed
    ],
)
def test_a_later_look_ends_what_is_older_than_the_confirmation_by_all(confirmed_at, confirmed, ended):
    merged = planned(
        task("A", ["retyped"], state="checking", receipt={"confirmed_at": confirmed_at}, active=True), confirmed
    )
    assert [merged.ends(live("A", "A", connected_at=t)) for t in (1.0, 1000.0 + CLOCKS_S, 1001.0 + CLOCKS_S)] == ended


def test_only_connections_with_the_revoked_certificate_end():
    record = {"common_name": "A", "issuer": "CN=ca", "subject": "CN=A", "not_before": None, "not_after": None}
    merged = planned(task("ab0c", ["revoked"], kind="certificate", details=record))
    assert merged.users == {"A"}
    shown = {"certificate_issuer": "CN=ca", "certificate_subject": "CN=A"}
    assert merged.ends(live("A", certificate_serial="00AB0C", **shown)) is True
    assert merged.ends(live("A", certificate_serial="AB0D", **shown)) is False
    assert merged.ends(live("A", certificate_serial="AB0C", certificate_issuer="CN=forged")) is False
    assert merged.ends(live("A", **shown)) is None


def test_a_session_without_an_owner_belongs_to_who_may_have_had_it():
    deleted = planned(task("gone", ["deleted"], details={"client_ids": ["{device_id}_*"]}))
    account = planned(task("left", ["deleted"], kind="account", details={"client_ids": ["one"]}))
    owners = PlansByOwner([deleted, account])
    plans = {name: owners.of(checker(), name) for name in ("gone_1", "gone", "one", "goner", "A")}
    assert plans == {"gone_1": deleted, "gone": deleted, "one": account, "goner": None, "A": None}


def test_a_receipt_adds_up_over_looks():
    merged = Plan(
        task("A", ["retyped"], receipt={"closed": {"n": 1}, "looks": 1, "took_s": 0.5, "confirmed_at": 7.0}), [1]
    )
    merged.done.closed["n"] += 1
    merged.done.closed["m"] += 1
    after = receipt(merged, ["x"], [], {"c": {"n": True, "m": False}})
    assert (after["closed"], after["looks"], after["confirmed_at"]) == ({"n": 2, "m": 1}, 2, 7.0)
    assert after["unseen_nodes"] == ["m of c"]
    assert receipt(Plan(task("A", ["x"]), [1]), [], ["silent"], {})["confirmed_at"] is None
