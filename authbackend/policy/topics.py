"""
The pattern language of topic rules: match, contains, overlaps.

A routing key is split on ``.``; the empty string is zero words, every other piece counts, also empty ones. In a
pattern the whole word ``*`` is exactly one word and the whole word ``#`` is any number of words. Words compare byte
by byte.

Source: RabbitMQ's topic exchange, which the MQTT plugin binds with ``/`` translated to ``.`` and ``+`` to ``*``;
checked against RabbitMQ 4.0.5 and 4.3.6 by binding and publishing.

Cost: no regular expressions and no backtracking; match and overlaps are linear in the words of the request with
one integer operation a word. See docs/decisions/0004-topic-algebra.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ONE = "*"
MANY = "#"

MOST_MANY_IN_A_FILTER = 2
"""RabbitMQ 4.3.5 and later refuse a binding key with more ``#`` than this; older brokers stall on it."""

MOST_WORDS_WITH_MANY = 4096
"""A filter with ``#`` and more words than this is denied unread: no topic is that deep, and each rule costs a walk."""

LONGEST_FILTER_BYTES = 1024
MANY_NOT_LAST = '"#" is possible only as the last level'
_PLACEHOLDER = re.compile(r"\{(device_id|client_id|device_type|vhost|attr\.[A-Za-z_][A-Za-z0-9_-]{0,62})\}")
_ANY_BRACES = re.compile(r"\{[^{}]*\}")
_STEP_BUDGET = 50_000


def split(key: str) -> list[str]:
    """Return the words of a routing key or pattern; the empty string has none."""
    return key.split(".") if key else []


def to_routing_key(topic: str) -> str:
    """Translate an MQTT topic or filter as RabbitMQ's MQTT plugin does: ``/`` to ``.``, ``+`` to ``*``, no more."""
    return topic.replace("/", ".").replace("+", "*")


def topic_filter_fault(topic_filter: str) -> str | None:
    """Return what is wrong with the MQTT topic filter of a rule, or None."""
    if not topic_filter:
        return 'it is empty; write "#" for every topic'
    size = len(topic_filter.encode("utf-8", "surrogatepass"))
    if size > LONGEST_FILTER_BYTES:
        return f"it has {size} bytes; at most {LONGEST_FILTER_BYTES} are possible"
    shape = _PLACEHOLDER.sub("x", topic_filter)
    if "{" in shape or "}" in shape:
        return _brace_fault(shape)
    if ONE in shape:
        return '"*" is not possible in a rule; a level "+" is any one level, a final level "#" any number of levels'
    levels = shape.split("/")
    for level in levels:
        if level not in ("+", MANY) and ("+" in level or MANY in level):
            return f'"+" and "#" are wildcards only as a whole level, not inside {level}'
    if MANY in levels[:-1]:
        return MANY_NOT_LAST
    return None


def _brace_fault(shape: str) -> str:
    braces = _ANY_BRACES.search(shape)
    if braces is None:
        return "a brace is unbalanced; placeholders are written {device_id}"
    if braces.group() == "{}":
        return "the placeholder {} is empty"
    return (
        f"the placeholder {braces.group()} is unknown; there are {{device_id}}, {{client_id}}, {{device_type}}, "
        "{vhost} and {attr.NAME}"
    )


def placeholders_of(text: str) -> tuple[str, ...]:
    """Return the names of the placeholders in one level of a rule, in order (``device_id``, ``attr.site``)."""
    return tuple(_PLACEHOLDER.findall(text))


def substitute(text: str, values: dict[str, str]) -> str:
    """Replace every placeholder by its value in one pass: a value that looks like a placeholder stays text."""
    return _PLACEHOLDER.sub(lambda found: values[found.group(1)], text)


class Pattern:
    """
    A pattern as a nondeterministic automaton whose set of states is one integer, a bit for each position.

    Position i means that the words before i have been consumed; the last bit accepts.
    """

    __slots__ = ("_accept", "_literals", "_many", "_named", "_one", "words")

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self._accept = 1 << len(self.words)
        self._one = 0
        self._many = 0
        self._named = 0
        self._literals: dict[str | None, int] = {}
        for position, word in enumerate(self.words):
            bit = 1 << position
            if word == ONE:
                self._one |= bit
            elif word == MANY:
                self._many |= bit
            else:
                self._named |= bit
                self._literals[word] = self._literals.get(word, 0) | bit

    def start(self) -> int:
        """Return the states before the first word."""
        return self._skip(1)

    def accepts(self, states: int) -> bool:
        """Return whether the words read so far are a key that the pattern matches."""
        return bool(states & self._accept)

    def accepts_any_rest(self, states: int) -> bool:
        """Return whether a final ``#`` is reached, after which every key is matched."""
        return bool(states & self._many & (self._accept >> 1))

    def after(self, states: int, word: str | None) -> int:
        """Return the states after one more word; None is a word that the pattern does not name."""
        named = self._one | self._literals.get(word, 0)
        return self._skip((states & named) << 1 | states & self._many)

    def after_some_word(self, states: int) -> int:
        """Return every state that some single word leads to."""
        return self._skip((states & (self._one | self._named)) << 1 | states & self._many)

    def after_any_words(self, states: int) -> int:
        """Return every state that some run of words, of any length, leads to: from the first one on, all."""
        return (self._accept << 1) - (states & -states)

    def _skip(self, states: int) -> int:
        """Add the states reached by letting ``#`` stand for no words."""
        reached = states
        while skipped := (reached & self._many) << 1 & ~reached:
            reached |= skipped
        return reached


def match(pattern: Pattern, key: Sequence[str]) -> bool:
    """
    Return whether a pattern matches a concrete key; ``*`` and ``#`` in the key are plain words.

    Cost: with at most one ``#``, one comparison for each word of the pattern; with more, one step for each of the key.
    """
    words = pattern.words
    if words.count(MANY) <= 1:
        return _match_ends(words, key)
    states = pattern.start()
    for word in key:
        if pattern.accepts_any_rest(states):
            return True
        # A key's own "*" and "#" are never in the literals: those words of a pattern are wildcards.
        states = pattern.after(states, word)
        if not states:
            return False
    return pattern.accepts(states)


def _match_ends(words: Sequence[str], key: Sequence[str]) -> bool:
    """Compare what stands before the only ``#`` with the key's begin and what stands behind it with the key's end."""
    if MANY not in words:
        return len(words) == len(key) and _same(words, key)
    before = words.index(MANY)
    behind = len(words) - before - 1
    if len(key) < before + behind:
        return False
    return _same(words[:before], key[:before]) and (not behind or _same(words[-behind:], key[-behind:]))


def _same(words: Sequence[str], key: Sequence[str]) -> bool:
    return all(expected in (ONE, word) for expected, word in zip(words, key, strict=True))


def overlaps(pattern: Pattern, other: Sequence[str]) -> bool:
    """
    Return whether some key is matched by both patterns.

    Cost: one step a word of ``other``.
    """
    states = pattern.start()
    for word in other:
        if pattern.accepts_any_rest(states):
            return True
        if word == MANY:
            states = pattern.after_any_words(states)
        elif word == ONE:
            states = pattern.after_some_word(states)
        else:
            states = pattern.after(states, word)
        if not states:
            return False
    return pattern.accepts(states)


def contains(outer: Sequence[str], inner: Sequence[str]) -> bool:
    """
    Return whether every key that ``inner`` matches is matched by ``outer``.

    Exact and linear for an ``outer`` of a rule's shape (at most a final ``#``). For any other the answer is exact
    too unless it would take too many steps, then it is False: no input makes this function slow or too generous.
    """
    if MANY in outer[:-1]:
        return _contains_general(Pattern(outer), inner)
    tail = bool(outer) and outer[-1] == MANY
    prefix = outer[:-1] if tail else outer
    seen_many = False
    for position, expected in enumerate(prefix):  # first, because it tells most rules apart at once
        word = inner[position] if position < len(inner) else None
        seen_many = seen_many or word == MANY
        if expected != ONE and (seen_many or word != expected):
            return False
    many = inner.count(MANY)
    if tail:
        return len(inner) - many >= len(prefix)
    return not many and len(inner) == len(prefix)


def _contains_general(outer: Pattern, inner: Sequence[str]) -> bool:
    """
    Follow ``inner`` with the set of states of ``outer``.

    A word that ``outer`` does not name leads to the smallest set of states, so for a wildcard of ``inner`` it is
    the only word to try; ``*`` itself is such a word.
    """
    todo = [(0, outer.start())]
    seen = set(todo)
    while todo:
        position, states = todo.pop()
        if position == len(inner):
            if not outer.accepts(states):
                return False
            continue
        word = inner[position]
        if word == MANY:
            following = [(position + 1, states), (position, outer.after(states, None))]
        else:
            following = [(position + 1, outer.after(states, word))]
        for step in following:
            if step not in seen:
                if len(seen) > _STEP_BUDGET:
                    return False
                seen.add(step)
                todo.append(step)
    return True
