"""Device types, devices and accounts, with their rules, as decisions read them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from authbackend.policy.names import DeviceId
from authbackend.policy.networks import Networks
from authbackend.policy.rule_index import RuleIndex
from authbackend.policy.rules import Effect, Permission, TopicRule, Values, applies
from authbackend.policy.topics import (
    Words,
)


class Status(StrEnum):
    """Where a device is in its life cycle; only active ones may connect."""

    PENDING = "pending"
    ACTIVE = "active"
    SUSPENDED = "suspended"
    REVOKED = "revoked"


_FEW_RULES = 2


class RuleSet:
    """Rules grouped by effect and permission; their order never matters."""

    __slots__ = ("_allow", "_by_exchange", "_deny", "_indexes")

    def __init__(self, rules: Iterable[TopicRule] = ()) -> None:
        allow: dict[Permission, list[TopicRule]] = {}
        deny: dict[Permission, list[TopicRule]] = {}
        for rule in rules:
            (allow if rule.effect is Effect.ALLOW else deny).setdefault(rule.permission, []).append(rule)
        self._allow = {permission: tuple(group) for permission, group in allow.items()}
        self._deny = {permission: tuple(group) for permission, group in deny.items()}
        self._by_exchange: dict[str | None, RuleSet] | None = None
        self._indexes: dict[Effect, RuleIndex] = {}

    def on_exchange(self, exchange: str | None) -> RuleSet:
        """Return the rules for this exchange; None is the MQTT exchange."""
        if self._by_exchange is None:
            groups: dict[str | None, list[TopicRule]] = {}
            for rule in self:
                groups.setdefault(rule.exchange, []).append(rule)
            self._by_exchange = {name: RuleSet(rules) for name, rules in groups.items()}
        return self._by_exchange.get(exchange, NO_RULES)

    def exchanges(self) -> set[str]:
        """Return the exchanges that the rules name."""
        return {rule.exchange for rule in self if rule.exchange is not None}

    def allowing(self, permission: Permission) -> tuple[TopicRule, ...]:
        """Return the allow rules with this permission."""
        return self._allow.get(permission, ())

    def first(self, effect: Effect, permission: Permission, values: Values, words: Sequence[str]) -> TopicRule | None:
        """
        Return a rule with this effect that applies to a request, or None.

        Args:
            words: Pass :class:`Words` to share work when several rule sets are checked.
        """
        words = Words.of(words)
        rules = (self._allow if effect is Effect.ALLOW else self._deny).get(permission, ())
        if len(rules) > _FEW_RULES and permission is Permission.WRITE:
            index = self._indexes.get(effect)
            if index is None:
                index = self._indexes[effect] = RuleIndex(rules, deny=effect is Effect.DENY)
            return index.first(values, words)
        for rule in rules:
            if applies(rule, values, words):
                return rule
        return None

    def __iter__(self) -> Iterator[TopicRule]:
        for rules in (*self._allow.values(), *self._deny.values()):
            yield from rules

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RuleSet) and set(self) == set(other)

    def __hash__(self) -> int:
        return hash(frozenset(self))


NO_RULES = RuleSet()


@dataclass(frozen=True, slots=True)
class ClientIdMove:
    """
    Client ids that a type's devices gain from other devices because the type's patterns were widened.

    Args:
        former: The patterns before the change.
        held: The client ids that former owners still use; None if not known yet.
        until: Seconds since the epoch.
    """

    former: tuple[str, ...]
    held: frozenset[str] | None
    until: float


@dataclass(frozen=True, slots=True)
class DeviceType:
    """
    What the devices of a type have in common.

    Args:
        move: Set while client ids that its devices gained are being taken from their former owners.
        max_staleness_s: Deny its devices while the copy of the registry is older than this; None sets no limit here.
    """

    name: str
    client_ids: tuple[str, ...] = ()
    vhosts: tuple[str, ...] = ()
    networks: Networks | None = None
    rules: RuleSet = NO_RULES
    max_staleness_s: float | None = None
    require_known_certificate: bool = False
    move: ClientIdMove | None = None


@dataclass(slots=True)
class Device:
    """
    A device; it speaks MQTT and authenticates by certificate only.

    Treat it as immutable. It is not frozen because one is created for each request, which would take three times as
    long.

    Args:
        expires_at: Seconds since the epoch, None for never.
        held_until: No login until then, in seconds since the epoch, while its sessions are being repaired.
    """

    device_id: DeviceId
    common_name: str
    type: str
    status: Status = Status.ACTIVE
    attributes: Mapping[str, str] | None = None
    expires_at: float | None = None
    rules: RuleSet = NO_RULES
    held_until: float | None = None


class Login(StrEnum):
    """How an account authenticates."""

    PASSWORD = "password"
    CERTIFICATE = "certificate"


@dataclass(frozen=True, slots=True)
class Account:
    """A service, a person, or a machine that speaks AMQP; never an MQTT device."""

    name: str
    login: Login
    password_hash: str | None = field(default=None, repr=False)
    tags: tuple[str, ...] = ()
    vhosts: tuple[str, ...] = ()
    networks: Networks | None = None
    client_ids: tuple[str, ...] = ()
    configure: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    unchecked_dead_lettering: bool = False
    rules: RuleSet = NO_RULES

    def resource_patterns(self, permission: str) -> tuple[str, ...]:
        """Return the name patterns that it may configure, write or read; none for any other permission."""
        match permission:
            case "configure":
                return self.configure
            case "write":
                return self.write
            case "read":
                return self.read
        return ()


DEFAULT_EXCHANGE = "amq.default"


_RESERVED_PREFIXES = ("mqtt-subscription-", "mqtt-will-")


def resource_matches(pattern: str, name: str) -> bool:
    """
    Return whether a resource pattern matches a queue or exchange name; ``*`` matches any run of characters.

    A wildcard never matches the default exchange, which can write to every queue by name. It matches the queues of MQTT
    sessions and delayed wills only if their prefix is written out.
    """
    if "*" not in pattern:
        return pattern == name
    if name in ("", DEFAULT_EXCHANGE):
        return False
    first, *rest = pattern.split("*")
    if any(name.startswith(prefix) and not first.startswith(prefix) for prefix in _RESERVED_PREFIXES):
        return False
    if not name.startswith(first):
        return False
    position = len(first)
    for part in rest[:-1]:
        start = name.find(part, position)
        if start < 0:
            return False
        position = start + len(part)
    return len(name) - len(rest[-1]) >= position and name.endswith(rest[-1])
