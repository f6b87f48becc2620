"""The cost of a request's topic, in comparisons of words: linear in the words of the topic and the rules."""

import pytest

from authbackend.policy import decide
from authbackend.policy.model import RuleSet
from authbackend.policy.rules import Effect, Permission, TopicRule, Values
from authbackend.policy.topics import split

RULES = 200
LONG = 32_000
DEEP = 4_096
"""As many words as a filter with "#" may have."""


class Word(str):
    """A word that counts how often it is compared or looked up."""

    __slots__ = ()
    count = 0

    def __eq__(self, other):
        Word.count += 1
        return str.__eq__(self, other)

    def __ne__(self, other):
        Word.count += 1
        return str.__ne__(self, other)

    def __hash__(self):
        Word.count += 1
        return str.__hash__(self)


DENIED = [
    "fleet/{client_id}/secret/{n}",
    "{client_id}/{n}",
    "{client_id}/a/{n}/{client_id}/b",
    "+/{client_id}/+/a/{client_id}/a/a/{n}/{client_id}/#",
    "dev-{client_id}/{n}/#",
    "{n}/#",
    "a/a/a/a/{n}",
    "a/+/a/+/{client_id}/a/+/+/{n}",
]
"""A deny rule with a value that is missing has "#" in the middle; {n} is another word in each rule."""
ALLOWED = ["#", "+/+", "a/#", "a/{client_id}/#", "+/+/{n}", "{n}", "a/a/a", "p-{client_id}/#"]


@pytest.fixture
def counted(monkeypatch):
    """Return the words of a request as counting words."""
    monkeypatch.setattr(decide, "split", lambda key: [Word(word) for word in split(key)])
    Word.count = 0
    return Word


def several(effect, permission, topics):
    return [
        TopicRule(effect, permission, topic.replace("{n}", f"n{n}"), rule_id=n)
        for n in range(RULES // len(topics))
        for topic in topics
    ]


@pytest.mark.parametrize("client_id", [None, "c1", "a", "#", "a/b"])
@pytest.mark.parametrize(
    ("permission", "key"),
    [
        (Permission.READ, ".".join(["a"] * LONG)),
        (Permission.READ, ".".join(["*"] * LONG)),
        (Permission.READ, ".".join(f"w{n}" for n in range(LONG // 4))),
        (Permission.READ, ".".join(["a", "b"] * (LONG // 2))),
        (Permission.READ, ".".join(["a"] * (DEEP - 1) + ["#"])),
        (Permission.READ, ".".join(["#"] + ["a"] * (DEEP - 1))),
        (Permission.READ, ".".join(["a", "*", "#"] + ["a"] * (DEEP - 4) + ["#"])),
        (Permission.READ, "a.#.b"),
        (Permission.WRITE, ".".join(["a"] * LONG)),
        (Permission.WRITE, ".".join(["a"] * DEEP)),
        (Permission.WRITE, ".".join(["a", "b"] * (DEEP // 2))),
        (Permission.WRITE, "a.a.a"),
    ],
    ids=lambda value: value if len(value) < 20 else f"{value[:12]}-{len(value)}",
)
def test_comparisons_grow_with_words_plus_rules(counted, permission, key, client_id):
    """For any topic and client id that a client can choose, and any deny rules."""
    deny = several(Effect.DENY, permission, DENIED)
    everything = [TopicRule(Effect.ALLOW, permission, "#")]
    of_rules = sum(2 + len(rule.topic.split("/")) for rule in deny)
    decide.by_rules((RuleSet(deny + everything),), Values({"client_id": client_id}), permission, key)
    assert counted.count <= 6 * len(split(key)) + 6 * of_rules


@pytest.mark.parametrize("client_id", [None, "c1"])
@pytest.mark.parametrize("permission", list(Permission))
@pytest.mark.parametrize("key", [".".join(["a"] * LONG), ".".join(["b"] * DEEP), "a.a.x"], ids=len)
def test_allow_rules_cost_no_more(counted, permission, key, client_id):
    allow = [rule for rule in several(Effect.ALLOW, permission, ALLOWED) if rule.topic != "#"]
    of_rules = sum(2 + len(rule.topic.split("/")) for rule in allow)
    decide.by_rules((RuleSet(allow),), Values({"client_id": client_id}), permission, key)
    assert counted.count <= 6 * len(split(key)) + 6 * of_rules


def test_a_final_many_reads_no_further(counted):
    """For a topic of 65,000 bytes, a rule ``a/#`` compares only the first words."""
    words = decide.split(".".join(["a"] * LONG))
    counted.count = 0
    rules = RuleSet([TopicRule(Effect.ALLOW, Permission.WRITE, "a/a/#")])
    assert rules.first(Effect.ALLOW, Permission.WRITE, Values({}), words)
    assert 0 < counted.count <= 4
