"""
Topic pattern matching for rules: match, contains, overlaps.

A routing key is split on ``.``: the empty string has no words; otherwise every piece is a word, even an empty one.
In a pattern, the word ``*`` matches exactly one word and the word ``#`` any number of words. Words are compared byte
by byte.

Source: RabbitMQ's topic exchange, which the MQTT plugin binds with ``/`` translated to ``.`` and ``+`` to ``*``;
checked against RabbitMQ 4.0.5 and 4.3.6 by binding and publishing.

Cost: no regular expressions and no backtracking. A request's words are indexed once, however many patterns they are
compared with; a comparison then takes at most one step per pattern word. See docs/decisions/0004-topic-algebra.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

ONE = "*"
MANY = "#"

MOST_MANY_IN_A_FILTER = 2
"""RabbitMQ 4.3.5 and later refuse a binding key with more ``#`` than this; older brokers stall on it."""

MOST_WORDS_WITH_MANY = 4096
"""A filter with ``#`` and more words than this is denied unread: no topic is that deep, and each rule would walk it."""

LONGEST_FILTER_BYTES = 1024
MANY_NOT_LAST = '"#" is possible only as the last level'
_PLACEHOLDER = re.compile(r"\{(device_id|client_id|device_type|vhost|attr\.[A-Za-z_][A-Za-z0-9_-]{0,62})\}")
_ANY_BRACES = re.compile(r"\{[^{}]*\}")
_STEP_BUDGET = 50_000


def split(key: str) -> list[str]:
    """Split a routing key or pattern into words; the empty string has none."""
    return key.split(".") if key else []


def to_routing_key(topic: str) -> str:
    """Translate an MQTT topic or filter as RabbitMQ's MQTT plugin does: only ``/`` to ``.`` and ``+`` to ``*``."""
    return topic.replace("/", ".").replace("+", "*")


def topic_filter_fault(topic_filter: str) -> str | None:
    """Return what is wrong with a rule's MQTT topic filter, or None."""
    if not topic_filter:
        return 'it is empty; write "#" for every topic'
    size = len(topic_filter.encode("utf-8", "surrogatepass"))
    if size > LONGEST_FILTER_BYTES:
        return f"it has {size} bytes; at most {LONGEST_FILTER_BYTES} are possible"
    shape = _PLACEHOLDER.sub("x", topic_filter)
    if "{" in shape or "}" in shape:
        return _brace_fault(topic_filter)
    if ONE in shape:
        return '"*" is not possible in a rule; a level "+" is any one level, a final level "#" any number of levels'
    levels = shape.split("/")
    for level in levels:
        if level not in ("+", MANY) and ("+" in level or MANY in level):
            return f'"+" and "#" are wildcards only as a whole level, not inside {level}'
    if MANY in levels[:-1]:
        return MANY_NOT_LAST
    return None


def _brace_fault(topic_filter: str) -> str:
    if "{{" in topic_filter or "}}" in topic_filter:
        return "double braces are another product's; placeholders are written {device_id}"
    rest = _PLACEHOLDER.sub("", topic_filter)
    braces = _ANY_BRACES.search(rest)
    if braces is None:
        return "a brace is unbalanced; placeholders are written {device_id}"
    if braces.group() == "{}":
        return "the placeholder {} is empty"
    return (
        f"the placeholder {braces.group()} is unknown; there are {{device_id}}, {{client_id}}, {{device_type}}, "
        "{vhost} and {attr.NAME}"
    )


def placeholders_of(text: str) -> tuple[str, ...]:
    """Return the placeholder names in one level of a rule, in order (``device_id``, ``attr.site``)."""
    return tuple(_PLACEHOLDER.findall(text))


def substitute(text: str, values: dict[str, str]) -> str:
    """Replace all placeholders in one pass, so that a value that looks like a placeholder stays text."""
    return _PLACEHOLDER.sub(lambda placeholder: values[placeholder.group(1)], text)


class Pattern:
    """
    A pattern, split at each ``#``.

    Args:
        words: As :func:`split` returns them.
    """

    __slots__ = ("before", "behind", "between", "words")

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self.before = self.behind = self.words
        self.between: tuple[tuple[str, ...], ...] | None = None
        """Runs of words between two ``#``; None if there is no ``#`` at all."""
        if MANY in self.words:
            runs: list[list[str]] = [[]]
            for word in self.words:
                if word == MANY:
                    runs.append([])
                else:
                    runs[-1].append(word)
            self.before, self.behind = tuple(runs[0]), tuple(runs[-1])
            self.between = tuple(tuple(run) for run in runs[1:-1] if run)


class Words(list[str]):
    """The words of a request, with cached indexes that all patterns they are compared with share."""

    __slots__ = ("_as_pattern", "_bits", "_many", "_places")

    def __init__(self, words: Iterable[str]) -> None:
        super().__init__(words)
        self._many: int | None = None
        self._as_pattern: Pattern | None = None
        self._places: dict[str, list[int]] | None = None
        self._bits: dict[str, int] = {}

    @classmethod
    def of(cls, words: Iterable[str]) -> Words:
        """Return ``words`` unchanged if they are already ``Words``, else converted."""
        return words if isinstance(words, Words) else cls(words)

    @property
    def many(self) -> int:
        """Number of ``#`` words."""
        if self._many is None:
            self._many = self.count(MANY)
        return self._many

    @property
    def as_pattern(self) -> Pattern:
        """The same words as a pattern."""
        if self._as_pattern is None:
            self._as_pattern = Pattern(self)
        return self._as_pattern

    def find(self, run: Sequence[str], start: int, end: int, *, wildcards: bool) -> int:
        """
        Return the first position of a run of words and ``*`` between start and end, or -1.

        Args:
            wildcards: Whether ``*`` in these words matches any word, as in a filter.

        Cost: for each word of the run, one lookup and one operation on an integer with one bit per word.
        """
        latest = end - len(run)
        if latest < start:
            return -1
        candidates = ((1 << (latest + 1)) - 1) >> start << start
        for offset, word in enumerate(run):
            if word != ONE:
                places = self._bits_of(word) | (self._bits_of(ONE) if wildcards else 0)
                candidates &= places >> offset
                if not candidates:
                    return -1
        return (candidates & -candidates).bit_length() - 1

    def _bits_of(self, word: str) -> int:
        """Return an integer with a bit set for each position of a word."""
        bits = self._bits.get(word)
        if bits is None:
            if self._places is None:
                self._places = {}
                for position, each in enumerate(self):
                    self._places.setdefault(each, []).append(position)
            field = bytearray(len(self) // 8 + 1)
            for position in self._places.get(word, ()):
                field[position >> 3] |= 1 << (position & 7)
            bits = self._bits[word] = int.from_bytes(field, "little")
        return bits


def match(pattern: Pattern, key: Sequence[str]) -> bool:
    """Return whether a pattern matches a routing key, in which ``*`` and ``#`` are plain words."""
    return _lies_in(pattern, Words.of(key), wildcards=False)


def overlaps(pattern: Pattern, other: Sequence[str]) -> bool:
    """Return whether at least one routing key matches both patterns."""
    words = Words.of(other)
    if not words.many:
        return _lies_in(pattern, words, wildcards=True)
    if pattern.between is None:
        return len(words) - words.many <= len(pattern.words) and _lies_in(
            words.as_pattern, Words(pattern.words), wildcards=True
        )
    # With "#" in both, the "#" of each can absorb everything in the middle of the other, so that only the words before
    # the first "#" and after the last one have to agree.
    requested = words.as_pattern
    shorter = min(len(pattern.behind), len(requested.behind))
    return _agree(pattern.before, requested.before) and _agree(
        pattern.behind[len(pattern.behind) - shorter :], requested.behind[len(requested.behind) - shorter :]
    )


def _lies_in(pattern: Pattern, words: Words, *, wildcards: bool) -> bool:
    """Return whether the pattern matches words without ``#`` or, with wildcards, at least one key that they match."""
    if pattern.between is None:
        return len(pattern.words) == len(words) and _agree(pattern.words, words, wildcards=wildcards)
    start, end = len(pattern.before), len(words) - len(pattern.behind)
    if end < start or not _agree(pattern.before, words[:start], wildcards=wildcards):
        return False
    if not _agree(pattern.behind, words[end:], wildcards=wildcards):
        return False
    for run in pattern.between:  # placing each run as early as possible leaves the most room for the next
        position = words.find(run, start, end, wildcards=wildcards)
        if position < 0:
            return False
        start = position + len(run)
    return True


def _agree(words: Sequence[str], others: Sequence[str], *, wildcards: bool = True) -> bool:
    """Return whether both sequences can be equal, up to the length of the shorter."""
    for expected, word in zip(words, others, strict=False):
        if expected not in (word, ONE) and not (wildcards and word == ONE):
            return False
    return True


def contains(outer: Sequence[str], inner: Sequence[str]) -> bool:
    """
    Return whether every key that ``inner`` matches is matched by ``outer``.

    Exact and linear if ``outer`` has the shape of a rule (``#`` only at the end). Otherwise also exact, unless that
    takes too many steps; then the answer is False. No input makes this function slow or too permissive.
    """
    if MANY in outer[:-1]:
        return _contains_general(Automaton(outer), inner)
    tail = bool(outer) and outer[-1] == MANY
    prefix = outer[:-1] if tail else outer
    seen_many = False
    for position, expected in enumerate(prefix):  # first, because this rejects most rules immediately
        word = inner[position] if position < len(inner) else None
        seen_many = seen_many or word == MANY
        if expected != ONE and (seen_many or word != expected):
            return False
    many = inner.many if isinstance(inner, Words) else inner.count(MANY)
    if tail:
        return len(inner) - many >= len(prefix)
    return not many and len(inner) == len(prefix)


class Automaton:
    """
    A pattern as a nondeterministic automaton; its set of states is an integer with a bit for each position.

    Position i means that the words before i have been consumed; the last bit accepts.
    """

    __slots__ = ("_accept", "_literals", "_many", "_one")

    def __init__(self, words: Sequence[str]) -> None:
        self._accept = 1 << len(words)
        self._one = 0
        self._many = 0
        self._literals: dict[str | None, int] = {}
        for position, word in enumerate(words):
            bit = 1 << position
            if word == ONE:
                self._one |= bit
            elif word == MANY:
                self._many |= bit
            else:
                self._literals[word] = self._literals.get(word, 0) | bit

    def start(self) -> int:
        """Return the states before the first word."""
        return self._skip(1)

    def accepts(self, states: int) -> bool:
        """Return whether the pattern matches the words read so far."""
        return bool(states & self._accept)

    def after(self, states: int, word: str | None) -> int:
        """Return the states after one more word; None stands for a word that is not in the pattern."""
        named = self._one | self._literals.get(word, 0)
        return self._skip((states & named) << 1 | states & self._many)

    def _skip(self, states: int) -> int:
        """Add the states reached when ``#`` matches no words."""
        reached = states
        while skipped := (reached & self._many) << 1 & ~reached:
            reached |= skipped
        return reached


def _contains_general(outer: Automaton, inner: Sequence[str]) -> bool:
    """
    Run ``inner`` through the automaton of ``outer``.

    A word that is not in ``outer`` leads to the smallest set of states, so it is the only word to try for a wildcard of
    ``inner``; ``*`` itself is such a word.
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
