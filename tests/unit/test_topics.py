"""The pattern language: the shared vectors, and an oracle that knows nothing but the definition."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from authbackend.policy import decide
from authbackend.policy.rules import Effect, Permission, RuleSet, TopicRule, Values
from authbackend.policy.topics import (
    MANY_NOT_LAST,
    Pattern,
    contains,
    match,
    overlaps,
    split,
    to_routing_key,
    topic_filter_fault,
)

VECTORS = [
    json.loads(line) for line in (Path(__file__).parent.parent / "cases" / "acl-vectors.jsonl").read_text().splitlines()
]


def answer(vector):
    match_kind = vector["kind"]
    if match_kind == "refuse":
        return topic_filter_fault(vector["filter"]) is not None
    if match_kind == "match":
        return match(Pattern(split(vector["pattern"])), split(vector["key"]))
    if match_kind == "contains":
        return contains(split(vector["outer"]), split(vector["inner"]))
    if match_kind == "overlaps":
        return overlaps(Pattern(split(vector["a"])), split(vector["b"]))
    given_values = vector["placeholders"]
    attributes = {name[5:]: value for name, value in given_values.items() if name.startswith("attr.")}
    rules = RuleSet(
        TopicRule(Effect(rule["effect"]), Permission(rule["permission"]), rule["filter"]) for rule in vector["rules"]
    )
    values = Values(given_values, attributes)
    return decide.by_rules((rules,), values, Permission(vector["permission"]), vector["routing_key"]).allowed


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["id"] for vector in VECTORS])
def test_vector(vector):
    result = answer(vector)
    assert result == vector["expected"] or result == vector.get("also_accepted"), vector.get("note")


def test_there_are_all_vectors():
    assert len(VECTORS) == 198


# The oracle: a pattern's keys up to a length, spelled out by the definition alone.

WORDS = ("x", "y", "")
LONGEST = 6
KEYS = [list(key) for length in range(LONGEST + 1) for key in itertools.product(WORDS, repeat=length)]


def spelled(pattern, key):
    if not pattern:
        return not key
    head, rest = pattern[0], pattern[1:]
    if head == "#":
        return any(spelled(rest, key[skipped:]) for skipped in range(len(key) + 1))
    return bool(key) and (head in ("*", key[0])) and spelled(rest, key[1:])


patterns = st.lists(st.sampled_from(["x", "y", "", "*", "#"]), max_size=3)
keys = st.lists(st.sampled_from(["x", "y", "", "*", "#", "z"]), max_size=6)


@given(patterns, keys)
@settings(max_examples=2000, deadline=None)
def test_match_is_the_definition(pattern, key):
    """In a key, * and # are plain words that only a wildcard of the pattern matches."""
    plain = [{"*": "star", "#": "hash"}.get(word, word) for word in key]
    assert match(Pattern(pattern), key) == spelled(pattern, plain)


@given(patterns, patterns)
@settings(max_examples=1500, deadline=None)
def test_overlaps_is_a_common_key(one, other):
    """A shortest common key has no more words than both patterns together."""
    common = any(spelled(one, key) and spelled(other, key) for key in KEYS)
    assert overlaps(Pattern(one), other) == common
    assert overlaps(Pattern(other), one) == common


FRESH = ("x", "y", "", "fresh")


@given(
    st.lists(st.sampled_from(["x", "y", "*", "#"]), max_size=3), st.lists(st.sampled_from(["x", "*", "#"]), max_size=3)
)
@settings(max_examples=800, deadline=None)
def test_contains_is_every_key(outer, inner):
    """Keys of up to 5 words with a word that neither pattern names tell containment of patterns of up to 3 words."""
    every = [list(key) for length in range(6) for key in itertools.product(("x", "y", "fresh"), repeat=length)]
    assert contains(outer, inner) == all(spelled(outer, key) for key in every if spelled(inner, key))


def test_general_containment_gives_up_as_not_contained():
    """However hard the question is, it costs a bounded time and is never answered too generously."""
    outer = ["*", "#"] * 150 + ["x"]
    inner = ["#", *(["*"] * 300), "#", "x"]
    assert contains(outer, inner)
    hard = ["#", "x", *(["*"] * 200), "#"]
    assert not contains(hard, ["#", *(["*"] * 30_000), "#", "x", *(["*"] * 30_000)])
    assert not contains(["#", "x", *(["*"] * 2000)], ["#", "x", *(["*"] * 1999), "#", "y"])


@pytest.mark.parametrize(
    ("topic", "key"),
    [
        ("a/b", "a.b"),
        ("a/+/c", "a.*.c"),
        ("a.b/c", "a.b.c"),
        ("+", "*"),
        ("a+b", "a*b"),
        ("#", "#"),
        ("", ""),
        ("/", "."),
    ],
)
def test_translation_is_the_brokers(topic, key):
    assert to_routing_key(topic) == key


@pytest.mark.parametrize(
    ("topic_filter", "fault"),
    [
        ("", "empty"),
        ("a/*/c", '"*"'),
        ("*", '"*"'),
        ("a*", '"*"'),
        ("a#", "whole level"),
        ("a/b+", "whole level"),
        ("a/#/b", "last level"),
        ("#/a", "last level"),
        ("a/{nope}/x", "{nope} is unknown"),
        ("a/{}", "is empty"),
        ("a/{device_id", "unbalanced"),
        ("a/device_id}", "unbalanced"),
        ("{{device_id}}", "unknown"),
        ("{attr.}", "unknown"),
        ("{attr.a b}", "unknown"),
        ("x" * 1025, "1025 bytes"),
        ("{last level}", "unknown"),
    ],
)
def test_refused_filters_name_the_fault(topic_filter, fault):
    assert fault in (topic_filter_fault(topic_filter) or "")


@pytest.mark.parametrize(
    "topic_filter", ["#", "+", "a", "a/+/b/#", "a//b", "/", "a.b/c", "dev-{device_id}/{attr.site}/+", "$SYS/#"]
)
def test_good_filters_pass(topic_filter):
    assert topic_filter_fault(topic_filter) is None


@given(st.text(alphabet="ab/+#*{}._-", max_size=12))
@settings(max_examples=1500, deadline=None)
def test_a_filter_met_in_spite_of_its_fault_grants_nothing(text):
    """Except # in the middle, which means what it says."""
    fault = topic_filter_fault(text)
    if fault is None or fault == MANY_NOT_LAST:
        return
    for key in ("", "a", "a.b", "b", "a.b.a"):
        values = Values({"device_id": "a"})
        allow = RuleSet([TopicRule(Effect.ALLOW, Permission.WRITE, text)])
        assert not decide.by_rules((allow,), values, Permission.WRITE, key).allowed
        denied = RuleSet(
            [TopicRule(Effect.ALLOW, Permission.WRITE, "#"), TopicRule(Effect.DENY, Permission.WRITE, text)]
        )
        assert not decide.by_rules((denied,), values, Permission.WRITE, key).allowed


values = st.one_of(st.none(), st.sampled_from(["d1", "x", "#", "+", "*", "a.b", "a/b", "", "{client_id}", "d1.#"]))
rule_filters = st.sampled_from(
    [
        "fleet/{device_id}/#",
        "fleet/{client_id}/x",
        "{client_id}/#",
        "dev-{client_id}",
        "{vhost}/#",
        "a/{client_id}/b",
        "x",
    ]
)


@given(rule_filters, values, keys)
@settings(max_examples=1500, deadline=None)
def test_no_value_widens_an_allow_rule(topic_filter, value, key):
    """An allow rule never matches a key that it would not match with the value as one literal word."""
    rule = TopicRule(Effect.ALLOW, Permission.WRITE, topic_filter)
    if decide.by_rules(
        (RuleSet([rule]),),
        Values({"client_id": value, "device_id": "d1", "vhost": value}),
        Permission.WRITE,
        ".".join(key),
    ).allowed:
        wanted = (
            topic_filter.replace("{device_id}", "d1")
            .replace("{client_id}", value or "")
            .replace("{vhost}", value or "")
        )
        assert spelled(
            [{"+": "*"}.get(w, w) for w in wanted.split("/")],
            [{"*": "star", "#": "hash"}.get(w, w) for w in split(".".join(key))],
        )


@given(rule_filters, values, keys)
@settings(max_examples=1500, deadline=None)
def test_no_value_narrows_a_deny_rule(topic_filter, value, key):
    """Whatever a deny rule covers for a good value, it covers for an unusable one too."""
    good = Values({"client_id": "x", "device_id": "d1", "vhost": "x"})
    other = Values({"client_id": value, "device_id": "d1", "vhost": value})
    rules = RuleSet(
        [TopicRule(Effect.ALLOW, Permission.WRITE, "#"), TopicRule(Effect.DENY, Permission.WRITE, topic_filter)]
    )
    routing_key = ".".join(key)
    denied = not decide.by_rules((rules,), good, Permission.WRITE, routing_key).allowed
    if denied and value not in ("d1", "{client_id}"):
        assert value == "x" or not decide.by_rules((rules,), other, Permission.WRITE, routing_key).allowed


@given(
    st.lists(
        st.sampled_from(["x", "+", "{device_id}", "{client_id}", "p-{client_id}", "", "a.b", "#"]),
        min_size=1,
        max_size=5,
    ),
    values,
    st.lists(st.sampled_from(["x", "d1", "", "a", "b", "p-x", "{device_id}", "*", "#"]), max_size=6),
    st.sampled_from(list(Effect)),
)
@settings(max_examples=2000, deadline=None)
def test_comparing_word_by_word_is_matching_the_pattern(levels, client_id, key, effect):
    rule = TopicRule(effect, Permission.WRITE, "/".join(levels) or "x")
    placeholders = Values({"device_id": "d1", "client_id": client_id})
    pattern = rule.pattern(placeholders)
    assert rule.matches(placeholders, key) == (pattern is not None and match(pattern, key))


@pytest.mark.parametrize("topic_filter", ["{last level}", "a/+last level/b", "#last level"])
def test_no_text_of_a_filter_passes_for_a_lesser_fault(topic_filter):
    rules = RuleSet([TopicRule(Effect.ALLOW, Permission.WRITE, topic_filter)])
    key = to_routing_key(topic_filter)
    assert not decide.by_rules((rules,), Values({}), Permission.WRITE, key).allowed


DEEP = ["x"] * 4097  # one level more than a deny rule is compared with, once a value is missing


@pytest.mark.parametrize(
    ("topic_filter", "client_id", "key", "covers"),
    [
        ("a/{client_id}", None, DEEP, True),  # whatever the value could have been
        ("a/{client_id}", "a#", DEEP, True),
        ("a/{client_id}", None, DEEP[1:], False),
        ("a/{client_id}", "c", DEEP, False),
        ("p-{client_id}", "c", DEEP, False),
        ("#/a", "c", DEEP, False),
        ("a", "c", DEEP, False),
    ],
)
def test_a_deny_rule_covers_every_topic_that_is_too_deep_only_while_a_value_is_missing(
    topic_filter, client_id, key, covers
):
    rule = TopicRule(Effect.DENY, Permission.WRITE, topic_filter)
    assert rule.matches(Values({"client_id": client_id}), key) is covers
    allow = TopicRule(Effect.ALLOW, Permission.WRITE, topic_filter)
    assert not allow.matches(Values({"client_id": client_id}), key)
