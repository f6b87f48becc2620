"""What several changes about one device come to, and which connections end at which look."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from authbackend.enforcement.plans import CLOCKS_S, Plan, plan_of, plans_of, receipt
from authbackend.enforcement.tasks import Task
from authbackend.policy.rules import Effect, Permission, RuleSet, TopicRule
from tests.unit.test_checks import checker, live

RULES = [{"effect": "deny", "action": "subscribe", "topic": "x"}]


def task(name, causes, number=1, kind="device", state="waiting", **more):
    details = {"common_name": name, **more.pop("details", {})}
    return Task(number, "5", kind, name, frozenset(causes), details, datetime.now(UTC), state, 0, **more)


def case(one, confirmed=True):
    (found,) = plans_of(checker(), [one])
    found.confirmed = confirmed
    return found


def ends(found, connected_at):
    condition = found.selects()
    return condition is None or condition(live("A", "A", connected_at=connected_at))


def test_several_changes_about_one_device_are_one_case():
    changes = [
        task("A", ["rules"], 1, details={"rules": RULES}),
        task("A", ["renamed"], 2, details={"common_name": "old"}),
        task("R", ["revoked"], 3),
    ]
    first, second = plans_of(checker(), changes)
    assert (first.ids, first.users, first.held, first.gone) == ([1, 2], {"A", "old"}, True, False)
    assert (second.ids, second.users, second.held, second.gone) == ([3], {"R"}, False, True)


def test_what_still_allows_as_much_makes_nothing_to_do():
    found = checker()
    rules = RuleSet([TopicRule(Effect.ALLOW, Permission.READ, "fleet/{device_id}/#")])
    device = found.registry.device_by_id("A")
    found.registry._by_id["A"] = replace(device, rules=rules)
    went = [{"effect": "allow", "action": "subscribe", "topic": "fleet/{device_id}/x"}]
    (nothing,) = plans_of(found, [task("A", ["rules"], details={"rules": went})])
    assert (nothing.users, nothing.sessions, nothing.held) == (set(), [], False)


def test_the_first_look_ends_everything():
    assert ends(case(task("A", ["retyped"])), 1e12)


@pytest.mark.parametrize(
    ("confirmed_at", "confirmed", "ended"),
    [
        (1000.0, True, [True, True, False]),
        (None, False, [False, False, False]),  # a replica is silent: nobody is thrown out again and again
        (None, True, [True, True, True]),  # it has confirmed just now
    ],
)
def test_a_later_look_ends_what_is_older_than_the_confirmation_by_all(confirmed_at, confirmed, ended):
    found = case(task("A", ["retyped"], state="checking", receipt={"confirmed_at": confirmed_at}), confirmed)
    assert [ends(found, t) for t in (1.0, 1000.0 + CLOCKS_S, 1001.0 + CLOCKS_S)] == ended


def test_who_may_not_be_connected_at_all_is_ended_at_every_look():
    assert ends(case(task("R", ["revoked"], state="checking", receipt={"confirmed_at": 1.0})), 1e12)


def test_only_connections_with_the_revoked_certificate_end():
    found = case(task("ab0c", ["revoked"], kind="certificate", details={"common_name": "A"}))
    condition = found.selects()
    assert found.users == {"A"}
    assert condition(live("A", certificate_serial="00AB0C"))
    assert not condition(live("A", certificate_serial="AB0D"))
    assert not condition(live("A"))


def test_a_session_without_an_owner_belongs_to_who_may_have_had_it():
    deleted = case(task("gone", ["deleted"], details={"client_ids": ["{device_id}_*"]}))
    assert plan_of(checker(), [deleted], "gone_1") is deleted
    assert plan_of(checker(), [deleted], "gone") is deleted
    assert plan_of(checker(), [deleted], "goner") is None
    assert plan_of(checker(), [deleted], "A") is None


def test_a_receipt_adds_up_over_looks():
    found = Plan(
        task("A", ["retyped"], receipt={"closed": {"n": 1}, "looks": 1, "took_s": 0.5, "confirmed_at": 7.0}), [1]
    )
    found.done.closed["n"] += 1
    found.done.closed["m"] += 1
    after = receipt(found, ["x"], [])
    assert (after["closed"], after["looks"], after["confirmed_at"]) == ({"n": 2, "m": 1}, 2, 7.0)
    assert receipt(Plan(task("A", ["x"]), [1]), [], ["silent"])["confirmed_at"] is None
