"""Explanations of why a device may or may not publish or subscribe."""

import pytest

from authbackend.policy.decide import DecisionSettings
from authbackend.policy.explain import Attempt, NearRule, explain, nearest_rules, usual_client_id
from authbackend.policy.model import DeviceType, RuleSet
from authbackend.policy.networks import Networks
from authbackend.policy.reasons import Reason
from authbackend.policy.rules import Effect, Permission, TopicRule, Values
from authbackend.policy.topics import split
from tests.unit.fleet import NOW, account, device, registry

SETTINGS = DecisionSettings()


def rule(topic, effect="allow", permission="write", rule_id=1):
    return TopicRule(Effect(effect), Permission(permission), topic, rule_id=rule_id)


def fleet(*devices, **changes):
    given = {
        "client_ids": ("{device_id}_*", "{device_id}"),
        "vhosts": ("plant", "/"),
        "networks": Networks.parse(["10.20.0.0/16", "::1/128"]),
        "rules": RuleSet([rule("fleet/{device_id}/#"), rule("fleet/{device_id}/raw/#", "deny", rule_id=2)]),
    }
    types = (DeviceType("APM", **{**given, **changes}),)
    return registry(*devices, types=types, accounts=(account("svc"),))


def ask(topic, permission=Permission.WRITE, asked=None, in_fleet=None, settings=SETTINGS, **attempt):
    asked = asked or device("D1", common_name="cn one")
    return explain(in_fleet or fleet(asked), asked, Attempt(permission, topic, **attempt), NOW, settings)


def answers(explanation):
    return [(step.question, step.decision.allowed, str(step.decision.reason)) for step in explanation.steps]


def test_what_is_allowed_is_allowed_at_every_question():
    explanation = ask("fleet/D1/x+")
    assert answers(explanation) == [(question, True, "allowed") for question in ("login", "vhost", "exchange", "topic")]
    assert (explanation.client_id, explanation.vhost, explanation.routing_key) == ("D1_1", "plant", "fleet.D1.x*")
    assert explanation.decision is explanation.steps[-1].decision
    assert explanation.decision.rule.topic == "fleet/{device_id}/#"
    assert explanation.nearest == ()


@pytest.mark.parametrize(
    ("attempt", "question", "reason"),
    [
        ({"client_id": "other"}, "login", Reason.CLIENT_ID_NOT_BOUND),
        ({"client_id": ""}, "login", Reason.CLIENT_ID_NOT_BOUND),  # the given one, not the default
        ({"vhost": "other"}, "vhost", Reason.VHOST_NOT_LISTED),
        ({"ip": "192.0.2.1"}, "vhost", Reason.ADDRESS_NOT_IN_NETWORKS),
        ({"permission": Permission.READ}, "exchange", Reason.NO_RULE_ALLOWS),
        ({"topic": "fleet/D1/raw/x"}, "topic", Reason.RULE_DENIES),
        ({"topic": "fleet/D2/x"}, "topic", Reason.NO_RULE_ALLOWS),
    ],
)
def test_it_ends_at_the_first_question_that_is_denied(attempt, question, reason):
    explanation = ask(**{"topic": "fleet/D1/x", **attempt})
    assert answers(explanation)[-1] == (question, False, reason)
    assert all(allowed for _, allowed, _ in answers(explanation)[:-1])
    assert explanation.decision.reason is reason


def test_what_was_named_is_what_is_asked():
    explanation = ask("fleet/D1/x", client_id="D1", vhost="/", ip="::1")
    assert explanation.decision.allowed
    assert (explanation.client_id, explanation.vhost) == ("D1", "/")


def test_a_device_that_was_held_and_will_expire_is_asked_about_at_every_question():
    asked = device("D1", expires_at=NOW + 1, held_until=NOW - 1)
    assert ask("fleet/D1/x", asked=asked).decision.allowed


def test_the_vhost_is_a_value_at_the_last_two_questions():
    asked = device("D1")
    rules = RuleSet([rule("{vhost}/x")])
    assert ask("plant/x", asked=asked, in_fleet=fleet(asked, rules=rules)).decision.allowed


def test_the_mqtt_exchange_is_the_one_of_the_settings():
    assert ask("fleet/D1/x", settings=DecisionSettings(mqtt_exchange="fleet")).decision.allowed


def test_where_the_type_says_nothing_the_usual_is_taken():
    asked = device("D1")
    bare = fleet(asked, client_ids=(), vhosts=(), networks=None)
    explanation = ask("x", asked=asked, in_fleet=bare)
    assert (explanation.client_id, explanation.vhost) == ("D1", "/")
    open_to_all = fleet(asked, networks=None)
    assert ask("fleet/D1/x", asked=asked, in_fleet=open_to_all).decision.allowed
    local = fleet(asked, networks=Networks.parse(["127.0.0.1/32"]))
    assert ask("fleet/D1/x", asked=asked, in_fleet=local).decision.allowed
    nowhere = fleet(asked, networks=Networks.parse([]))
    assert ask("fleet/D1/x", asked=asked, in_fleet=nowhere).decision.reason is Reason.ADDRESS_NOT_IN_NETWORKS


def test_a_device_of_an_unknown_type_is_told_that():
    asked = device("D1", "GONE")
    explanation = ask("x", asked=asked)
    assert answers(explanation) == [("login", False, "device_type_unknown")]
    assert (explanation.client_id, explanation.vhost) == ("D1", "/")
    assert usual_client_id(asked, None) == "D1"


def test_the_nearest_rules_are_of_the_type_and_of_the_device():
    asked = device("D1", rules=RuleSet([rule("own/{client_id}/{vhost}/x", rule_id=9)]))
    explanation = ask("own/D1_1/plant/y", asked=asked)
    assert [(near.rule.rule_id, near.missing) for near in explanation.nearest] == [
        (9, 'level 4 is "y", the rule wants "x"'),
        (1, 'level 1 is "own", the rule wants "fleet"'),
    ]
    assert all(isinstance(near, NearRule) for near in explanation.nearest)


VALUES = Values({"device_id": "d1", "client_id": None}, {})


@pytest.mark.parametrize(
    ("topic", "key", "missing"),
    [
        ("a/b", "a.c", 'level 2 is "c", the rule wants "b"'),
        ("a/+/c", "a.b.d", 'level 3 is "d", the rule wants "c"'),
        ("a/b", "a.b.c", "the topic goes on after level 2, the rule does not"),
        ("+", "a.b", "the topic goes on after level 1, the rule does not"),
        ("a/b/c", "a.b", "the topic has 2 levels, the rule wants 3"),
        ("a/b/#", "a", "the topic has 1 levels, the rule wants 2"),
        ("a/{client_id}/{attr.x}", "a.b", "{client_id} has no value that is one topic level"),
        ("{device_id}/{attr.x}", "a.b", "{attr.x} has no value that is one topic level"),
        ("a*", "a", "its filter is malformed, so it grants nothing"),
        ("#/b", "a", "the topic goes on after level 0, the rule does not"),
    ],
)
def test_what_a_rule_lacks_for_a_publish(topic, key, missing):
    (near,) = nearest_rules([rule(topic)], VALUES, Permission.WRITE, split(key))
    assert near == NearRule(rule(topic), missing)


@pytest.mark.parametrize(
    ("topic", "key", "missing"),
    [
        ("a/b", "a.*", 'level 2 asks for a wildcard "+", the rule covers only "b" there'),
        ("a/b", "#", 'level 1 asks for a wildcard "#", the rule covers only "a" there'),
        ("+/b", "#.b", 'level 1 asks for a wildcard "#", the rule covers only "+" there'),
        ("+/b", "*.c", 'level 2 is "c", the rule wants "b"'),
    ],
)
def test_what_a_rule_lacks_for_a_subscription(topic, key, missing):
    (near,) = nearest_rules([rule(topic, permission="read")], VALUES, Permission.READ, split(key))
    assert near.missing == missing


def test_at_most_three_rules_are_named_the_one_that_agrees_longest_first():
    rules = [
        rule("{client_id}", rule_id=1),
        rule("x", rule_id=2),
        rule("a/x", rule_id=5),
        rule("a/y", rule_id=4),
        rule("a/b/x", rule_id=6),
        rule("a/b/x", "deny", rule_id=7),
        rule("a/b/x", permission="read", rule_id=8),
    ]
    nearest = nearest_rules(rules, VALUES, Permission.WRITE, split("a.b.c"))
    assert [near.rule.rule_id for near in nearest] == [6, 4, 5]
    assert [near.rule.rule_id for near in nearest_rules(rules[:2], VALUES, Permission.WRITE, ["a"])] == [2, 1]


def test_rules_that_cannot_allow_come_last_the_older_first():
    rules = [
        rule("a*", rule_id=1),
        rule("{client_id}", rule_id=2),
        rule("b*", rule_id=3),
        rule("x", rule_id=4),
        rule("y", rule_id=4),
    ]
    for given, expected in ((rules, [4, 4, 1]), (rules[:3], [1, 2, 3]), (rules[1:3], [2, 3])):
        nearest = nearest_rules(given, VALUES, Permission.WRITE, ["a"])
        assert [near.rule.rule_id for near in nearest] == expected
