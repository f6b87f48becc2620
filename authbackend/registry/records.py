"""
The format of the registry's rows in the store: a short text for each device, JSON for types and accounts, which are few.

The database produces these texts (``sql/queries/registry.sql``), so that loading a million devices is little more than
copying bytes, and comparing with the database is comparing bytes.

The key of a device is its common name. Fields are separated by tabs, which JSON never contains::

    aAPM <tab> device id, empty if it is the common name <tab> expiry, seconds <tab> attributes <tab> own rules <tab> hold
    ^ status: pending, active, suspended, revoked                                             end of a hold, seconds ^

The key of a device type or an account is its name, the value a JSON object with the columns of its table and ``rules``.
A rule is ``[id, effect, action, topic, exchange]``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from authbackend.policy.model import NO_RULES, Account, ClientIdMove, Device, DeviceType, Login, RuleSet, Status
from authbackend.policy.names import DeviceId
from authbackend.policy.networks import Networks
from authbackend.policy.rules import Effect, Permission, TopicRule

_STATUSES = {status[0]: status for status in Status}
_PERMISSIONS = {"publish": Permission.WRITE, "subscribe": Permission.READ}
_EFFECTS = {str(effect): effect for effect in Effect}


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """
    A device as the database returns it.

    Args:
        name: The common name, UTF-8.
        record: The value to store.
        other_id: The device id, if it differs from the common name.
    """

    name: bytes
    record: bytes
    other_id: bytes | None = None


@dataclass(slots=True)
class Patch:
    """The changes between two positions, by device id, type name and account name; None means deleted."""

    device_types: Mapping[str, bytes | None] = field(default_factory=dict)
    devices: Mapping[str, DeviceRow | None] = field(default_factory=dict)
    accounts: Mapping[str, bytes | None] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.device_types) + len(self.devices) + len(self.accounts)


class StoredAttributes(Mapping[str, str]):
    """Attributes in their stored form, parsed at the first access: most rules use none."""

    __slots__ = ("_read", "_text")

    def __init__(self, text: str) -> None:
        self._text = text
        self._read: dict[str, str] | None = None

    def _all(self) -> dict[str, str]:
        if self._read is None:
            self._read = json.loads(self._text)
        return self._read

    def __getitem__(self, name: str) -> str:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


def device_id_of(name: str, record: bytes) -> str:
    """Return the device id in a record; ``name`` is its common name."""
    return record.split(b"\t", 2)[1].decode() or name


def device(name: str, record: bytes, previous: tuple[bytes, Device] | None = None) -> Device:
    """
    Parse the record of a device.

    Args:
        previous: The previous record and device with this common name: unchanged rules are reused, and if none has
            changed, everything compiled from them.
    """
    head, device_id, expires_at, attributes, rules, held_until = record.decode().split("\t")
    device_id = device_id or name
    own = before = NO_RULES
    if previous is not None and previous[1].device_id == device_id:
        before = previous[1].rules
    if rules and before is not NO_RULES and previous is not None and _own_rules(previous[0]) == rules:
        own = before
    elif rules:
        own = _rules(json.loads(rules), f"device_id {device_id}", before)
    return Device(
        device_id=DeviceId(device_id),
        common_name=name,
        type=head[1:],
        status=_STATUSES[head[0]],
        attributes=StoredAttributes(attributes) if attributes else None,
        expires_at=float(expires_at) if expires_at else None,
        rules=own,
        held_until=float(held_until) if held_until else None,
    )


def _own_rules(record: bytes) -> str:
    return record.split(b"\t")[4].decode()


def device_type(record: bytes, previous: DeviceType | None = None) -> DeviceType:
    """Parse a device type and compile its rules; rules that the previous version had too are reused."""
    row = json.loads(record)
    return DeviceType(
        name=row["name"],
        client_ids=tuple(row["client_ids"]),
        vhosts=tuple(row["vhosts"]),
        networks=_networks(row["networks"]),
        max_staleness_s=row["max_staleness_s"],
        require_known_certificate=row.get("require_known_certificate", False),
        rules=_rules(row["rules"], f"device_type {row['name']}", previous.rules if previous else NO_RULES),
        move=_move(*row["move"]) if row.get("move") else None,
    )


def account(record: bytes) -> Account:
    """Parse an account and compile its rules."""
    row = json.loads(record)
    return Account(
        name=row["name"],
        login=Login(row["login"]),
        password_hash=row["password_hash"],
        tags=tuple(row["tags"]),
        vhosts=tuple(row["vhosts"]),
        networks=_networks(row["networks"]),
        client_ids=tuple(row["client_ids"]),
        configure=tuple(row["configure"]),
        write=tuple(row["write"]),
        read=tuple(row["read"]),
        unchecked_dead_lettering=row["unchecked_dead_lettering"],
        rules=_rules(row["rules"], f"account {row['name']}"),
    )


def _rules(rows: list[list[Any]] | None, owner: str, previous: RuleSet = NO_RULES) -> RuleSet:
    if not rows:
        return NO_RULES
    reusable = {(rule.rule_id, rule.effect, rule.permission, rule.topic, rule.exchange): rule for rule in previous}
    rules = []
    for rule_id, effect, action, topic, exchange in rows:
        key = (rule_id, _EFFECTS[effect], _PERMISSIONS[action], topic, exchange)
        rule = reusable.get(key)
        if rule is None:
            rule = TopicRule(key[1], key[2], topic, rule_id=rule_id, owner=owner, exchange=exchange)
        rules.append(rule)
    return RuleSet(rules)


def _move(former: list[str], held: list[str] | None, until: str) -> ClientIdMove:
    return ClientIdMove(tuple(former), None if held is None else frozenset(held), float(until))


def _networks(texts: list[str] | None) -> Networks | None:
    return None if texts is None else Networks.parse(texts)
