"""Finds a rule that matches a concrete key among many, by walking the key's words through a tree of all rules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from authbackend.policy.rules import TopicRule, Values


class _Node:
    """What rules expect after the same beginning."""

    __slots__ = ("any", "ends", "named", "tail", "words")

    def __init__(self) -> None:
        self.words: dict[str, _Node] = {}  # a literal word
        self.named: dict[str, _Node] = {}  # the value of a placeholder
        self.any: _Node | None = None  # any word
        self.ends: TopicRule | None = None  # a rule that ends here
        self.tail: TopicRule | None = None  # a rule that ends here with "#": whatever follows


class RuleIndex:
    """
    Rules of one effect for publishing; the same answers as asking each rule, in time by the key's words.

    A rule that is not word by word, and every deny rule while a placeholder has no usable value, is asked by itself:
    such a deny rule matches more than its words say.
    """

    __slots__ = ("_deny", "_names", "_others", "_root", "_rules")

    def __init__(self, rules: Iterable[TopicRule], *, deny: bool) -> None:
        self._rules = tuple(rules)
        self._deny = deny
        self._root = _Node()
        others = []
        names: dict[str, None] = {}
        for rule in self._rules:
            if rule.expected is None:
                others.append(rule)
            else:
                self._add(rule, rule.expected)
                names.update(dict.fromkeys(rule.placeholders))
        self._others = tuple(others)
        self._names = tuple(names)

    def _add(self, rule: TopicRule, expected: Sequence[tuple[str, bool] | None]) -> None:
        node = self._root
        for one in expected:
            if one is None:
                node.any = node = node.any or _Node()
            else:
                text, is_placeholder = one
                node = (node.named if is_placeholder else node.words).setdefault(text, _Node())
        if rule.has_tail:
            node.tail = node.tail or rule
        else:
            node.ends = node.ends or rule

    def first(self, values: Values, words: Sequence[str]) -> TopicRule | None:
        """Return a rule that matches a concrete key, None if none does."""
        if self._deny and any(values.get(name) is None for name in self._names):
            return next((rule for rule in self._rules if rule.matches(values, words)), None)
        found = self._walk(values, words)
        if found is None and self._others:
            return next((rule for rule in self._others if rule.matches(values, words)), None)
        return found

    def _walk(self, values: Values, words: Sequence[str]) -> TopicRule | None:  # noqa: PLR0912 - calls would cost more than what they did
        """Visit each node at most once: the way to it is the only one."""
        later: list[tuple[_Node, int]] = []
        node, position = self._root, 0
        length = len(words)
        while True:
            if node.tail is not None:
                return node.tail
            after = None
            if position < length:
                word = words[position]
                position += 1
                after = node.words.get(word)
                if node.any is not None:
                    if after is not None:
                        later.append((node.any, position))
                    else:
                        after = node.any
                for name, named in node.named.items():
                    if values.get(name) == word:
                        if after is not None:
                            later.append((named, position))
                        else:
                            after = named
            elif node.ends is not None:
                return node.ends
            if after is not None:
                node = after
            elif later:
                node, position = later.pop()
            else:
                return None
