"""The index of rules answers as asking each rule does, whatever the rules, the values and the key."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

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


@given(st.lists(TOPICS, max_size=12), VALUES, KEYS, st.sampled_from(list(Effect)))
def test_it_finds_a_rule_exactly_when_one_matches(topics: list[str], values: Values, key: str, effect: Effect) -> None:
    rules = [TopicRule(effect, Permission.WRITE, topic, rule_id=n) for n, topic in enumerate(topics)]
    words = split(key)
    found = RuleIndex(rules, deny=effect is Effect.DENY).first(values, words)
    matching = [rule for rule in rules if rule.matches(values, words)]
    assert (found is not None) == bool(matching)
    assert found is None or found in matching


def test_a_key_of_many_words_visits_each_node_once() -> None:
    """Rules with many wildcards at the beginning share their way; no key makes the walk branch without end."""
    rules = [TopicRule(Effect.ALLOW, Permission.WRITE, "/".join(["+", "a"] * 12 + [f"e{n}"])) for n in range(50)]
    rules += [TopicRule(Effect.ALLOW, Permission.WRITE, "/".join(["a", "+"] * 12 + [f"e{n}"])) for n in range(50)]
    index = RuleIndex(rules, deny=False)

    class Counting(Values):
        asked = 0

    words = ["a"] * 24
    assert index.first(Counting({}), [*words, "nothing"]) is None
    assert index.first(Counting({}), [*words, "e49"]) is not None
    assert index.first(Counting({}), ["a"] * 20_000) is None
