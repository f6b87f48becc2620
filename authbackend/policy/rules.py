"""Topic rules: what one says, and how it is compared with a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

from authbackend.policy.topics import (
    MANY,
    MANY_NOT_LAST,
    MOST_WORDS_WITH_MANY,
    ONE,
    Pattern,
    contains,
    match,
    overlaps,
    placeholders_of,
    substitute,
    topic_filter_fault,
)

_UNUSABLE_CHARACTERS = frozenset("./+#*")


class Effect(StrEnum):
    """Whether a matching rule allows or denies."""

    ALLOW = "allow"
    DENY = "deny"


class Permission(StrEnum):
    """RabbitMQ's topic permissions; policy files call them publish and subscribe."""

    WRITE = "write"
    READ = "read"


def usable(value: object) -> bool:
    """Return whether a placeholder's value is one literal word; any other value must never widen access."""
    return isinstance(value, str) and value != "" and _UNUSABLE_CHARACTERS.isdisjoint(value)


class Values:
    """Placeholder values for one request."""

    __slots__ = ("_attributes", "_known", "_values")

    def __init__(self, values: Mapping[str, str | None], attributes: Mapping[str, str] | None = None) -> None:
        self._values = values
        self._attributes = {} if attributes is None else attributes
        self._known: dict[str, str | None] = {}

    def get(self, name: str) -> str | None:
        """Return the value of a placeholder, or None if it is missing or unusable."""
        try:
            return self._known[name]
        except KeyError:
            value = self._attributes.get(name[5:]) if name.startswith("attr.") else self._values.get(name)
            known = self._known[name] = value if usable(value) else None
            return known


Expected = tuple[str, bool] | None
"""``(word, False)``, ``(placeholder name, True)``, or None for any word."""


class TopicRule:
    """
    One rule of a device type, a device or an account.

    Args:
        rule_id: The row's id in the registry, to show to people.
        topic: An MQTT topic filter with placeholders. If it is malformed, an allow rule matches nothing and a deny
            rule everything.
        exchange: Accounts only: the topic exchange that the rule is for; None is the MQTT exchange.
    """

    __slots__ = (
        *("_levels", "_names", "_static", "_valueless"),
        *("effect", "exchange", "expected", "has_tail", "owner", "permission", "rule_id", "topic"),
    )

    def __init__(
        self,
        effect: Effect,
        permission: Permission,
        topic: str,
        *,
        rule_id: int = 0,
        owner: str = "",
        exchange: str | None = None,
    ) -> None:
        self.effect = effect
        self.permission = permission
        self.topic = topic
        self.rule_id = rule_id
        self.owner = owner
        self.exchange = exchange
        fault = topic_filter_fault(topic)
        if fault not in (None, MANY_NOT_LAST):
            self._names: tuple[str, ...] = ()
            self._static: Pattern | None = Pattern((MANY,)) if effect is Effect.DENY else None
            self.expected: tuple[Expected, ...] | None = None
            self.has_tail = False
            return
        self._levels = tuple((level, placeholders_of(level) if "{" in level else ()) for level in topic.split("/"))
        self._valueless: Pattern | None = None
        self._names = tuple(dict.fromkeys(name for _, names in self._levels for name in names))
        self._static = None if self._names else Pattern(self._words({}))
        self.expected, self.has_tail = self._word_by_word()

    @property
    def placeholders(self) -> tuple[str, ...]:
        """Placeholder names in the topic filter, for example ``attr.site``."""
        return self._names

    def pattern(self, values: Values) -> Pattern | None:
        """Return the topic pattern with placeholders replaced, or None if it matches nothing."""
        if not self._names:
            return self._static
        known: dict[str, str] = {}
        for name in self._names:
            value = values.get(name)
            if value is not None:
                known[name] = value
            elif self.effect is Effect.ALLOW:
                return None
        if not known:
            if self._valueless is None:
                self._valueless = Pattern(self._words({}))
            return self._valueless
        if self.expected is None or len(known) < len(self._names):
            return Pattern(self._words(known))
        words = [ONE if one is None else known[one[0]] if one[1] else one[0] for one in self.expected]
        return Pattern([*words, MANY] if self.has_tail else words)

    def matches(self, values: Values, words: Sequence[str]) -> bool:
        """
        Return whether the rule matches a routing key.

        Nearly all rules are compared word by word, which avoids building a pattern.
        """
        if self.expected is None or (self.effect is Effect.DENY and any(values.get(n) is None for n in self._names)):
            if len(words) > MOST_WORDS_WITH_MANY and self._widened(values):
                return True  # no real topic is that deep: a client that sends one is trying to waste CPU time
            pattern = self.pattern(values)
            return pattern is not None and match(pattern, words)
        if len(words) < len(self.expected) or (not self.has_tail and len(words) != len(self.expected)):
            return False
        for expected, word in zip(self.expected, words, strict=False):
            if expected is None:
                continue
            text, is_placeholder = expected
            if (values.get(text) if is_placeholder else text) != word:
                return False
        return True

    def _widened(self, values: Values) -> bool:
        """Return whether this is a deny rule that covers more than its own words, because a value is missing."""
        return self.effect is Effect.DENY and any(values.get(name) is None for name in self._names)

    def _word_by_word(self) -> tuple[tuple[Expected, ...] | None, bool]:
        """Return the expected words and whether ``#`` follows them; None for the words if a level is not simple."""
        levels = self._levels[:-1] if self._levels[-1][0] == MANY else self._levels
        words: list[Expected] = []
        for level, names in levels:
            if level == MANY or (names and level != f"{{{names[0]}}}"):
                return None, False
            if names:
                words.append((names[0], True))
            elif level == "+":
                words.append(None)
            elif "." in level:
                words.extend((word, False) for word in level.split("."))
            else:
                words.append((level, False))
        return tuple(words), len(levels) < len(self._levels)

    def _words(self, known: dict[str, str]) -> list[str]:
        words: list[str] = []
        for level, names in self._levels:
            if level == "+":
                words.append(ONE)
            elif level == MANY or any(name not in known for name in names):
                words.append(MANY)
            else:
                words.extend((substitute(level, known) if names else level).split("."))
        return words

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TopicRule) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[object, ...]:
        return (self.rule_id, self.owner, self.effect, self.permission, self.topic, self.exchange)

    def __repr__(self) -> str:
        return f"<TopicRule {self.rule_id} {self.effect} {self.permission} {self.topic!r}>"


def applies(rule: TopicRule, values: Values, words: Sequence[str]) -> bool:
    """
    Return whether a rule applies to a request.

    A write rule applies if it matches the routing key. For a read filter, an allow rule must contain it; a deny rule
    only has to overlap it.
    """
    if rule.permission is Permission.WRITE:
        return rule.matches(values, words)
    pattern = rule.pattern(values)
    if pattern is None:
        return False
    if rule.effect is Effect.ALLOW:
        return contains(pattern.words, words)
    return overlaps(pattern, words)
