"""The pattern language, checked by the shared vectors and an oracle that implements only the definition."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from authbackend.policy import decide
from authbackend.policy.model import RuleSet
from authbackend.policy.rules import Effect, Permission, TopicRule, Values, applies
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


# The oracle: all keys of a pattern up to a length, from the definition alone.

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


def test_every_pair_of_short_patterns_is_answered_by_the_keys_that_both_match():
    """
    For patterns of up to 3 words, keys of up to 6 words, including a word in neither pattern, decide everything: a
    shortest common key, or one that distinguishes two patterns, has no more words than both together.
    """
    short = [list(one) for length in range(4) for one in itertools.product(("x", "y", "*", "#"), repeat=length)]
    every = [list(key) for length in range(7) for key in itertools.product(("x", "y", "fresh"), repeat=length)]
    matched = {tuple(one): {n for n, key in enumerate(every) if spelled(one, key)} for one in short}
    wrong = []
    for one in short:
        pattern = Pattern(one)
        wrong += [("match", one, key) for n, key in enumerate(every) if match(pattern, key) != (n in matched[*one])]
        for other in short:
            common = matched[*one] & matched[*other]
            if overlaps(pattern, other) != bool(common):
                wrong.append(("overlaps", one, other))
            if contains(one, other) != (common == matched[*other]):
                wrong.append(("contains", one, other))
    assert wrong == []


def common_key(one, other):
    """Return whether both match some key, by following each pair of positions."""
    todo, seen = [(0, 0)], set()
    while todo:
        at = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        left, right = one[at[0] : at[0] + 1], other[at[1] : at[1] + 1]
        if not left and not right:
            return True
        if left == ["#"]:
            todo += [(at[0] + 1, at[1])] + ([(at[0], at[1] + 1)] if right else [])
        if right == ["#"]:
            todo += [(at[0], at[1] + 1)] + ([(at[0] + 1, at[1])] if left else [])
        if left and right and (left == right or "*" in left + right) and "#" not in left + right:
            todo.append((at[0] + 1, at[1] + 1))
    return False


longer = st.lists(st.sampled_from(["x", "x", "y", "*", "#"]), max_size=12)


@given(longer, longer)
@settings(max_examples=4000, deadline=None)
def test_overlaps_of_longer_patterns(one, other):
    assert overlaps(Pattern(one), other) == common_key(one, other)
    assert overlaps(Pattern(other), one) == common_key(one, other)


@given(longer, st.lists(st.sampled_from(["x", "x", "y", "*", "#"]), max_size=40))
@settings(max_examples=4000, deadline=None)
def test_match_of_longer_keys(pattern, key):
    plain = [{"*": "star", "#": "hash"}.get(word, word) for word in key]
    assert match(Pattern(pattern), key) == common_key(pattern, plain)


def test_general_containment_gives_up_as_not_contained():
    """The time is bounded for any input, and a wrong answer can only be a denial."""
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
        ("{{device_id}}", "double braces"),
        ("{attr.}", "unknown"),
        ("{attr.a b}", "unknown"),
        ("x" * 1025, "1025 bytes"),
        ("{last level}", "unknown"),
    ],
)
def test_refused_filters_name_the_fault(topic_filter, fault):
    assert fault in (topic_filter_fault(topic_filter) or "")


@pytest.mark.parametrize(
    ("topic_filter", "fault"),
    [
        ("", 'it is empty; write "#" for every topic'),
        ("x" * 1023 + "é", "it has 1025 bytes; at most 1024 are possible"),
        ("a*", '"*" is not possible in a rule; a level "+" is any one level, a final level "#" any number of levels'),
        ("b/a+", '"+" and "#" are wildcards only as a whole level, not inside a+'),
        ("#a/b", '"+" and "#" are wildcards only as a whole level, not inside #a'),
        ("{device_id}+", '"+" and "#" are wildcards only as a whole level, not inside x+'),
        ("a/#/b", '"#" is possible only as the last level'),
        ("a/{device_id", "a brace is unbalanced; placeholders are written {device_id}"),
        ("{}", "the placeholder {} is empty"),
        (
            "a/{nope}",
            "the placeholder {nope} is unknown; there are {device_id}, {client_id}, {device_type}, {vhost} and {attr.NAME}",
        ),
        ("x" * 1024, None),
        ("x/" * 511 + "{a", "a brace is unbalanced; placeholders are written {device_id}"),
        ("{attr." + "a" * 63 + "}", None),
    ],
)
def test_a_fault_is_told_in_full(topic_filter, fault):
    assert topic_filter_fault(topic_filter) == fault


@pytest.mark.parametrize("size", [64, 200])
def test_the_name_of_an_attribute_has_at_most_63_characters(size):
    assert "is unknown" in topic_filter_fault("{attr." + "a" * size + "}")


@pytest.mark.parametrize(
    "topic_filter", ["#", "+", "a", "a/+/b/#", "a//b", "/", "a.b/c", "dev-{device_id}/{attr.site}/+", "$SYS/#"]
)
def test_good_filters_pass(topic_filter):
    assert topic_filter_fault(topic_filter) is None


@given(st.text(alphabet="ab/+#*{}._-", max_size=12))
@settings(max_examples=1500, deadline=None)
def test_a_filter_met_in_spite_of_its_fault_grants_nothing(text):
    """Except # in the middle, which has its usual meaning."""
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
    """A deny rule covers at least as much with an unusable value as with a usable one."""
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


DEEP = ["x"] * 4097  # one level more than deny rules with a missing value are compared with


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


@pytest.mark.parametrize("key", ["", "a", "a.b", "d1"])
@pytest.mark.parametrize("topic_filter", ["", "a*", "{", "{nope}", "{}", "a+", "x" * 1025])
@pytest.mark.parametrize("permission", [Permission.WRITE, Permission.READ])
def test_a_malformed_allow_rule_allows_nothing_and_a_malformed_deny_rule_denies_everything(
    permission, topic_filter, key
):
    allow, deny = (TopicRule(effect, permission, topic_filter) for effect in (Effect.ALLOW, Effect.DENY))
    everything = TopicRule(Effect.ALLOW, permission, "#")
    assert not decide.by_rules((RuleSet([allow]),), Values({}), permission, key).allowed
    assert not decide.by_rules((RuleSet([everything, deny]),), Values({}), permission, key).allowed
    assert allow.placeholders == deny.placeholders == ()


PLACEHOLDERS = {"device_id": "d1", "client_id": "c1", "device_type": "APM", "vhost": "v"}


@pytest.mark.parametrize(
    ("topic_filter", "key", "covers"),
    [
        ("a/b", "a.b", True),
        ("a/b", "a", False),
        ("a/b", "a.b.c", False),
        ("a/b", "a.c", False),
        ("a.b/c", "a.b.c", True),
        ("a.b/c", "a.b", False),
        ("+/b", "a.b", True),
        ("+/b", "a.c", False),  # what follows a "+" counts
        ("a/#", "a", True),
        ("a/#", "a.b.c", True),
        ("a/#", "", False),
        ("a/#", "b.c", False),
        ("{device_id}/x", "d1.x", True),
        ("{device_id}/x", "c1.x", False),
        ("{client_id}", "c1", True),
        ("{device_type}", "APM", True),
        ("{vhost}", "v", True),
        ("{attr.site}", "north", True),
        ("{attr.site}", "south", False),
        ("{device_id}{client_id}", "d1c1", True),
        ("dev-{device_id}/a.b", "dev-d1.a.b", True),
        ("dev-{device_id}/a.b", "dev-d2.a.b", False),
        ("#/b", "a.b", True),  # matched in spite of its fault, it has its usual meaning
        ("#/b", "a.c", False),
    ],
)
@pytest.mark.parametrize("effect", list(Effect))
def test_what_a_rule_covers(topic_filter, key, covers, effect):
    values = Values(PLACEHOLDERS, {"site": "north"})
    publish = TopicRule(effect, Permission.WRITE, topic_filter)
    subscribe = TopicRule(effect, Permission.READ, topic_filter)
    words = split(key)
    assert publish.matches(values, words) is covers
    assert applies(publish, values, words) is covers
    assert applies(subscribe, values, words) is covers  # the same for a request without wildcards


def test_whole_levels_are_compared_word_by_word():
    """This takes a third of the time of matching patterns, and is the basis of the index of rules."""
    rule = TopicRule(Effect.ALLOW, Permission.WRITE, "a.b/+/{device_id}/#")
    assert rule.expected == (("a", False), ("b", False), None, ("device_id", True))
    assert rule.has_tail
    assert TopicRule(Effect.ALLOW, Permission.WRITE, "p-{device_id}").expected is None

    class WordByWord(TopicRule):
        def pattern(self, values):
            raise AssertionError(f"{self} was made a pattern")

    for effect in Effect:
        rule = WordByWord(effect, Permission.WRITE, "{device_id}/+/#")
        assert rule.matches(Values(PLACEHOLDERS), ["d1", "x"])


def test_rules_are_the_same_when_everything_a_person_wrote_is():
    def rule(**changes):
        given = {"effect": Effect.ALLOW, "permission": Permission.WRITE, "topic": "a", "rule_id": 1, "owner": "APM"}
        return TopicRule(**{**given, **changes})

    changed = [
        rule(effect=Effect.DENY),
        rule(permission=Permission.READ),
        rule(topic="b"),
        rule(rule_id=2),
        rule(owner="AGV"),
        rule(exchange="events"),
    ]
    assert rule() == rule()
    assert hash(rule()) == hash(rule())
    assert rule() != "a"
    assert len({rule(), rule(), *changed}) == 1 + len(changed)
    assert len({hash(one) for one in changed}) > 1
    assert repr(rule(topic="a/+")) == "<TopicRule 1 allow write 'a/+'>"
    unsaved = TopicRule(Effect.ALLOW, Permission.WRITE, "a")
    assert (unsaved.rule_id, unsaved.owner, unsaved.exchange) == (0, "", None)
    one, other = RuleSet([rule(), changed[0]]), RuleSet([changed[0], rule()])
    assert one == other
    assert hash(one) == hash(other)
    assert hash(one) != hash(RuleSet([rule()]))
    assert one != RuleSet([rule()])
    assert one != "a"


def test_rules_of_accounts_are_sorted_by_exchange():
    def rule(topic, exchange=None, permission=Permission.WRITE):
        return TopicRule(Effect.ALLOW, permission, topic, exchange=exchange)

    rules = RuleSet([rule("a"), rule("b", "events"), rule("c", "events", Permission.READ), rule("d", "other")])
    assert rules.exchanges() == {"events", "other"}
    for _ in range(2):
        assert {one.topic for one in rules.on_exchange("events")} == {"b", "c"}
        assert {one.topic for one in rules.on_exchange(None)} == {"a"}
        assert {one.topic for one in rules.on_exchange("none")} == set()
