"""Index of topic rules: find one that matches a routing key by walking the key's words through a tree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from authbackend.policy.rules import Expected, TopicRule, Values


class _Node:
    """
    Rules that share the same leading words.

    Rules are distributed to child nodes only when a key first gets this far: of thousands, few are ever reached.
    """

    __slots__ = ("any", "depth", "ends", "named", "tail", "unsorted", "words")

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.unsorted: list[tuple[TopicRule, tuple[Expected, ...]]] = []
        self.words: dict[str, _Node] = {}  # a literal word
        self.named: dict[str, _Node] = {}  # the value of a placeholder
        self.any: _Node | None = None  # any word
        self.ends: TopicRule | None = None  # a rule that ends here
        self.tail: TopicRule | None = None  # a rule that ends here with "#": matches any rest

    def distribute(self) -> None:
        """Move each rule to the node of its next word; of several that end here, keep the first."""
        unsorted, self.unsorted = self.unsorted, []
        depth = self.depth
        for rule, expected in unsorted:
            if depth == len(expected):
                if rule.has_tail:
                    self.tail = self.tail or rule
                else:
                    self.ends = self.ends or rule
                continue
            one = expected[depth]
            if one is None:
                node = self.any = self.any or _Node(depth + 1)
            else:
                text, is_placeholder = one
                nodes = self.named if is_placeholder else self.words
                node = nodes.get(text) or nodes.setdefault(text, _Node(depth + 1))
            node.unsorted.append((rule, expected))


class RuleIndex:
    """
    Write rules with the same effect; gives the same answers as trying each rule, in time that depends on the key.

    Rules that cannot be compared word by word are tried one by one. So is every deny rule if a placeholder has no
    usable value, because such a rule matches more than its own words.
    """

    __slots__ = ("_deny", "_names", "_others", "_root", "_rules")

    def __init__(self, rules: Iterable[TopicRule], *, deny: bool) -> None:
        self._rules = tuple(rules)
        self._deny = deny
        self._root = _Node(0)
        others = []
        names: dict[str, None] = {}
        for rule in self._rules:
            if rule.expected is None:
                others.append(rule)
            else:
                self._root.unsorted.append((rule, rule.expected))
                for name in rule.placeholders:
                    names[name] = None
        self._others = tuple(others)
        self._names = tuple(names)

    def first(self, values: Values, words: Sequence[str]) -> TopicRule | None:
        """Return a rule that matches a routing key, or None."""
        if self._deny and any(values.get(name) is None for name in self._names):
            return next((rule for rule in self._rules if rule.matches(values, words)), None)
        rule = self._walk(values, words)
        if rule is None and self._others:
            return next((other for other in self._others if other.matches(values, words)), None)
        return rule

    def _walk(self, values: Values, words: Sequence[str]) -> TopicRule | None:  # noqa: PLR0912 - calls would cost more than the work
        """Walk the tree; each node has one parent, so it is visited at most once."""
        later: list[tuple[_Node, int]] = []
        node, position = self._root, 0
        length = len(words)
        while True:
            if node.unsorted:
                node.distribute()
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
