"""What is allowed in a policy file but hardly meant."""

from __future__ import annotations

from collections.abc import Iterator

from authbackend.document.model import Document, RuleEntry
from authbackend.policy.rules import Effect, Permission, TopicRule, Values
from authbackend.policy.topics import contains, placeholders_of

_PERMISSIONS = {"publish": Permission.WRITE, "subscribe": Permission.READ}


def lint(document: Document) -> list[str]:
    """Return warnings about a document without errors."""
    return [*_types(document), *_devices(document), *_accounts(document)]


def _types(document: Document) -> Iterator[str]:
    for name, entry in (document.device_types or {}).items():
        where = f"device type {name}"
        if not entry.client_ids:
            yield f"{where} lists no client_ids: its devices can use none, so they cannot connect"
        if not entry.vhosts:
            yield f"{where} lists no vhosts: its devices cannot connect"
        yield from _rules(where, entry.rules)
        for rule in entry.rules:
            if rule.effect == "allow" and rule.topic.split("/")[0] in ("#", "+"):
                yield f"{where}: allow {rule.action} {rule.topic} reaches the topics of every other device"


def _devices(document: Document) -> Iterator[str]:
    types = document.device_types
    for device_id, entry in (document.devices or {}).items():
        yield from _rules(f"device {device_id}", entry.rules)
        if types is None or entry.type not in types:
            continue
        given = {name for name, _ in entry.attributes or ()}
        for rule in types[entry.type].rules:
            for placeholder in placeholders_of(rule.topic):
                if placeholder.startswith("attr.") and placeholder[5:] not in given:
                    yield f"device {device_id} has no attribute {placeholder[5:]}, which the rule {rule.effect} {rule.action} {rule.topic} of its type uses"


def _accounts(document: Document) -> Iterator[str]:
    devices = document.devices or {}
    for name, entry in (document.accounts or {}).items():
        yield from _rules(f"account {name}", entry.rules)
        if not entry.vhosts and not entry.tags:
            yield f"account {name} has neither vhosts nor tags: it can do nothing"
        for rule in entry.rules:
            for placeholder in placeholders_of(rule.topic):
                if placeholder in ("device_id", "device_type") or placeholder.startswith("attr."):
                    yield f"account {name}: {{{placeholder}}} has no value for an account"
        if name in devices:
            yield f"account {name} is named like a device; the registry will refuse it"


def _rules(where: str, rules: tuple[RuleEntry, ...]) -> Iterator[str]:
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
                    yield f"{where}: allow {entry.action} {entry.topic} has no effect, deny {denying.topic} covers it"
