"""The index of rules gives the same answer as checking each rule, for any rules, values and key."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from authbackend.policy import model, rule_index
from authbackend.policy.model import RuleSet
from authbackend.policy.rule_index import RuleIndex
from authbackend.policy.rules import Effect, Permission, TopicRule, Values
from authbackend.policy.topics import split

WORDS = st.sampled_from(["a", "b", "c", "x", ""])
LEVELS = st.one_of(
    WORDS,
    st.sampled_from(
        ["+", "#", "a.b", "{device_id}", "{client_id}", "{attr.site}", "p{device_id}", "{device_id}-{vhost}"]
    ),
)
TOPICS = st.lists(LEVELS, min_size=1, max_size=4).map("/".join)
KEYS = st.lists(st.sampled_from(["a", "b", "c", "x", "D", "pD", "D-a", "site", ""]), max_size=5).map(".".join)
VALUES = st.builds(
    Values,
    st.fixed_dictionaries(
        {
            "device_id": st.sampled_from(["D", "a"]),
            "client_id": st.sampled_from([None, "D", "a/b", "x"]),
            "vhost": st.sampled_from(["a", "/"]),
        }
    ),
    st.sampled_from([None, {"site": "site"}, {"site": "a"}, {"site": "+"}]),
)


@settings(deadline=None)
@given(st.lists(TOPICS, max_size=12), VALUES, KEYS, st.sampled_from(list(Effect)))
def test_it_finds_a_rule_exactly_when_one_matches(topics: list[str], values: Values, key: str, effect: Effect) -> None:
    rules = [TopicRule(effect, Permission.WRITE, topic, rule_id=n) for n, topic in enumerate(topics)]
    words = split(key)
    first = RuleIndex(rules, deny=effect is Effect.DENY).first(values, words)
    matching = [rule for rule in rules if rule.matches(values, words)]
    assert (first is not None) == bool(matching)
    assert first is None or first in matching


def test_a_key_of_many_words_visits_each_node_once() -> None:
    """Rules that begin with many wildcards share nodes; no key makes the search exponential."""
    rules = [TopicRule(Effect.ALLOW, Permission.WRITE, "/".join(["+", "a"] * 12 + [f"e{n}"])) for n in range(50)]
    rules += [TopicRule(Effect.ALLOW, Permission.WRITE, "/".join(["a", "+"] * 12 + [f"e{n}"])) for n in range(50)]
    index = RuleIndex(rules, deny=False)

    class Counting(Values):
        asked = 0

    words = ["a"] * 24
    assert index.first(Counting({}), [*words, "nothing"]) is None
    assert index.first(Counting({}), [*words, "e49"]) is not None
    assert index.first(Counting({}), ["a"] * 20_000) is None


def test_a_key_sorts_out_no_more_rules_than_it_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the first request after a change waits as little as possible."""
    made = []

    class Counted(rule_index._Node):
        def __init__(self, depth: int) -> None:
            made.append(depth)
            super().__init__(depth)

    monkeypatch.setattr(rule_index, "_Node", Counted)
    rules = [TopicRule(Effect.ALLOW, Permission.WRITE, f"{n % 4}/{n}/a/b/c", rule_id=n) for n in range(400)]
    index = RuleIndex(rules, deny=False)
    assert index.first(Values({}), ["1", "5", "a", "b", "c"]) is rules[5]
    assert made == [0, *[1] * 4, *[2] * 100, 3, 4, 5]
    made.clear()
    assert index.first(Values({}), ["1", "5", "a", "b", "c"]) is rules[5]
    assert made == []


MANY_RULES = [
    "a/b",
    "a/+/c",
    "+/b/d",
    "{device_id}/x",
    "{client_id}/x/y",
    "a/{client_id}/z",
    "t/#",
    "t/u",
    "t/#",
    "p-{device_id}/x",
    "p-{client_id}/x",
]


@pytest.mark.parametrize(
    ("key", "client_id", "expected"),
    [
        ("a.b", "c", {"a/b"}),
        ("a", "c", set()),  # rules begin with it, none ends with it
        ("", "c", set()),
        ("a.b.c", "c", {"a/+/c"}),  # the literal branch matches nothing
        ("a.b.d", "c", {"+/b/d"}),
        ("a.b.e", "c", set()),
        ("a.c.z", "c", {"a/{client_id}/z"}),
        ("a.c.c", "c", {"a/+/c"}),
        ("a.b.z", "b", {"a/{client_id}/z"}),  # the literal, the "+" and the value are the same word
        ("D.x", "c", {"{device_id}/x"}),
        ("c.x.y", "c", {"{client_id}/x/y"}),
        ("D.x.y", "D", {"{client_id}/x/y"}),  # both values are the same word
        ("D.x", "D", {"{device_id}/x"}),
        ("E.x", "c", set()),
        ("t", "c", {"t/#"}),
        ("t.u", "c", {"t/#", "t/u"}),
        ("t.u.v", "c", {"t/#"}),
        ("p-D.x", "c", {"p-{device_id}/x"}),
        ("p-c.x", "c", {"p-{client_id}/x"}),
        ("p-E.x", "c", set()),
    ],
)
@pytest.mark.parametrize("effect", list(Effect))
def test_a_rule_among_many_is_found_whatever_ways_lead_to_it(key, client_id, expected, effect):
    rules = RuleSet(TopicRule(effect, Permission.WRITE, topic, rule_id=n) for n, topic in enumerate(MANY_RULES))
    rule = rules.first(effect, Permission.WRITE, Values({"device_id": "D", "client_id": client_id}), split(key))
    assert rule is None if not expected else rule.topic in expected


@pytest.mark.parametrize(
    ("key", "client_id", "expected"),
    [
        ("a.anything.z", None, "a/{client_id}/z"),
        ("a.b.c.z", "#", "a/{client_id}/z"),
        ("n.x", None, None),
        ("a.c.z", "c", "a/{client_id}/z"),
        ("a.b.c.z", "c", None),
    ],
)
def test_a_deny_rule_among_many_covers_whatever_a_missing_value_could_have_been(key, client_id, expected):
    topics = ["n/1", "a/{client_id}/z", "n/2"]
    rules = RuleSet(TopicRule(Effect.DENY, Permission.WRITE, topic) for topic in topics)
    rule = rules.first(Effect.DENY, Permission.WRITE, Values({"client_id": client_id}), split(key))
    assert (rule and rule.topic) == expected


def test_of_rules_that_say_the_same_the_first_is_named():
    rules = [
        TopicRule(Effect.ALLOW, Permission.WRITE, topic, rule_id=n) for n, topic in enumerate(["a", "a", "b/#"] * 2)
    ]
    index = RuleIndex(rules, deny=False)
    assert [index.first(Values({}), [word]).rule_id for word in ("a", "b")] == [0, 2]


def test_a_deny_rule_whose_values_are_there_is_not_asked_by_itself():
    class Silent(TopicRule):
        def matches(self, values, words):
            raise AssertionError(f"{self} was asked")

    rules = [Silent(Effect.DENY, Permission.WRITE, topic) for topic in ("a/{client_id}", "b", "c")]
    index = RuleIndex(rules, deny=True)
    assert index.first(Values({"client_id": "x"}), ["a", "x"]) is rules[0]
    assert index.first(Values({"client_id": "x"}), ["a", "y"]) is None


def test_subscriptions_are_asked_of_each_rule():
    """A subscription's filter is not a key: an allow rule must contain it."""
    rules = RuleSet(TopicRule(Effect.ALLOW, Permission.READ, topic) for topic in ("a/+", "b", "c"))
    assert rules.first(Effect.ALLOW, Permission.READ, Values({}), ["a", "#"]) is None
    assert rules.first(Effect.ALLOW, Permission.READ, Values({}), ["a", "*"]).topic == "a/+"


def test_many_rules_are_indexed_once_and_few_are_not(monkeypatch):
    made = []

    class Counted(RuleIndex):
        def __init__(self, rules, *, deny):
            made.append(deny)
            super().__init__(rules, deny=deny)

    monkeypatch.setattr(model, "RuleIndex", Counted)
    topics = ["a", "b", "c"]
    rules = RuleSet(
        [TopicRule(effect, Permission.WRITE, topic) for topic in topics for effect in Effect]
        + [TopicRule(Effect.ALLOW, Permission.READ, topic) for topic in topics[:2]]
    )
    few = RuleSet(TopicRule(Effect.ALLOW, Permission.WRITE, topic) for topic in topics[:2])
    for _ in range(2):
        for effect in Effect:
            for topic in topics:
                assert rules.first(effect, Permission.WRITE, Values({}), [topic]).effect is effect
        assert few.first(Effect.ALLOW, Permission.WRITE, Values({}), ["b"]).topic == "b"
    assert made == [False, True]
