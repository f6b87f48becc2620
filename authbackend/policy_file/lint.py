"""Warnings about what is valid in a policy file but probably a mistake."""

from __future__ import annotations

import re
from collections.abc import Iterator

from authbackend.policy.rules import Effect, Permission, TopicRule, Values
from authbackend.policy.topics import contains, placeholders_of
from authbackend.policy_file.model import Document, Problem, RuleEntry

_PERMISSIONS = {"publish": Permission.WRITE, "subscribe": Permission.READ}


_FOREIGN = re.compile(r"%[a-z](?![a-z0-9])|<[a-z_][a-z0-9_.-]*>|\$\{?[a-z_]+", re.IGNORECASE)
_FOREIGN_LEVEL = re.compile(r"[:@][a-z_][a-z0-9_]*|>", re.IGNORECASE)
_REGULAR_EXPRESSION = re.compile(r"^\^|\$$|\\|[\[\]|]|^\.[*+]$")

Warned = tuple[tuple[str, ...], str]
"""What the warning is about (a key of ``Document.places``), and its text."""


def lint(document: Document, file: str = "") -> list[Problem]:
    """Return the warnings for a document that has no errors, each with its position in the file."""
    warned = [*_types(document), *_devices(document), *_accounts(document)]
    return [Problem(file, *_place(document, key), message, warning=True) for key, message in warned]


def _place(document: Document, key: tuple[str, ...]) -> tuple[int, int]:
    return document.places.get(key) or document.places.get(key[:1]) or (1, 1)


def _rule(where: str, rule: RuleEntry) -> tuple[str, ...]:
    return (where, "rule", rule.effect, rule.action, rule.topic, rule.exchange or "")


def _foreign(where: str, rules: tuple[RuleEntry, ...]) -> Iterator[Warned]:
    for rule in rules:
        levels = rule.topic.split("/")
        if levels[0] == "$share":
            yield (
                _rule(where, rule),
                f"{where}: {rule.topic}: RabbitMQ has no shared subscriptions; $share is a topic level like any other",
            )
        rest = "/".join(levels[1:] if levels[0].startswith("$") else levels)
        foreign = [*_FOREIGN.findall(rest), *(level for level in levels if _FOREIGN_LEVEL.fullmatch(level))]
        for text in dict.fromkeys(foreign):
            yield (
                _rule(where, rule),
                f"{where}: {text} in {rule.topic} is a placeholder or wildcard of another product, and plain text here; write placeholders as {{device_id}}",
            )


def _vhosts(where: str, vhosts: tuple[str, ...]) -> Iterator[Warned]:
    for name in vhosts:
        if "*" in name or _REGULAR_EXPRESSION.search(name):
            yield (
                (where, name),
                f"{where}: vhost {name!r} is taken as an exact name; wildcards and regular expressions do not work here",
            )


def _permissions(where: str, names: tuple[str, ...]) -> Iterator[Warned]:
    for name in dict.fromkeys(names):
        if _REGULAR_EXPRESSION.search(name):
            yield (
                (where, name),
                f"{where}: name {name!r} looks like a regular expression; here * matches any run of characters, and everything else is literal",
            )


def _types(document: Document) -> Iterator[Warned]:
    for name, entry in (document.device_types or {}).items():
        where = f"device type {name}"
        if not entry.client_ids:
            yield (where,), f"{where} lists no client_ids: its devices cannot connect"
        if not entry.vhosts:
            yield (where,), f"{where} lists no vhosts: its devices cannot connect"
        for pattern in entry.client_ids:
            if _FOREIGN.search(pattern) or pattern.startswith(("^", ".*")):
                yield (
                    (where, pattern),
                    f"{where}: client id pattern {pattern!r} uses another product's syntax; write {{device_id}} and *",
                )
        yield from _vhosts(where, entry.vhosts)
        yield from _rules(where, entry.rules)
        for rule in entry.rules:
            if rule.effect == "allow" and rule.topic.split("/")[0] in ("#", "+"):
                yield (
                    _rule(where, rule),
                    f"{where}: allow {rule.action} {rule.topic} reaches the topics of every other device",
                )


def _devices(document: Document) -> Iterator[Warned]:
    types = document.device_types
    for device_id, entry in (document.devices or {}).items():
        yield from _rules(f"device {device_id}", entry.rules)
        if types is None or entry.type not in types:
            continue
        given = {name for name, _ in entry.attributes or ()}
        where = f"device {device_id}"
        if (where,) not in document.places:  # the devices are in another file
            where = f"device type {entry.type}"
        for rule in types[entry.type].rules:
            for placeholder in placeholders_of(rule.topic):
                if placeholder.startswith("attr.") and placeholder[5:] not in given:
                    yield (
                        (where,),
                        f"device {device_id} has no attribute {placeholder[5:]}, which the rule {rule.effect} {rule.action} {rule.topic} of its type uses",
                    )


def _accounts(document: Document) -> Iterator[Warned]:
    devices = document.devices or {}
    for name, entry in (document.accounts or {}).items():
        where = f"account {name}"
        yield from _rules(where, entry.rules)
        yield from _vhosts(where, entry.vhosts)
        yield from _permissions(where, (*entry.configure, *entry.write, *entry.read))
        if not entry.vhosts and not entry.tags:
            yield (where,), f"account {name} has neither vhosts nor tags: it can do nothing"
        for rule in entry.rules:
            for placeholder in placeholders_of(rule.topic):
                if placeholder in ("device_id", "device_type") or placeholder.startswith("attr."):
                    yield _rule(where, rule), f"account {name}: {{{placeholder}}} has no value for an account"
        if name in devices:
            yield (where,), f"account {name} is named like a device; the registry will refuse it"


def _rules(where: str, rules: tuple[RuleEntry, ...]) -> Iterator[Warned]:
    yield from _foreign(where, rules)
    compiled = [
        TopicRule(Effect(rule.effect), _PERMISSIONS[rule.action], rule.topic, exchange=rule.exchange) for rule in rules
    ]
    nothing = Values({})
    for rule, entry in zip(compiled, rules, strict=True):
        if rule.effect is not Effect.ALLOW or rule.placeholders:
            continue
        for other, denying in zip(compiled, rules, strict=True):
            if other.effect is Effect.DENY and (other.permission, other.exchange) == (rule.permission, rule.exchange):
                inner, outer = rule.pattern(nothing), other.pattern(nothing)
                if inner and outer and not other.placeholders and contains(outer.words, inner.words):
                    yield (
                        _rule(where, entry),
                        f"{where}: allow {entry.action} {entry.topic} has no effect, deny {denying.topic} covers it",
                    )
