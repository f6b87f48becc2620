"""Rows of the registry as the policy's values."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable

from asyncpg import Record as Row

from authbackend.policy.names import DeviceId
from authbackend.policy.rules import (
    NO_RULES,
    Account,
    Device,
    DeviceType,
    Effect,
    Login,
    Networks,
    Permission,
    RuleSet,
    Status,
    TopicRule,
)

_PERMISSIONS = {"publish": Permission.WRITE, "subscribe": Permission.READ}
_STATUSES = {str(status): status for status in Status}


class RulesByOwner:
    """The rules of many owners; an owner is ``(column, name)``. An owner's set is compiled when it is asked for."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._rows: defaultdict[tuple[str, str], list[Row]] = defaultdict(list)
        self.add(rows)

    def add(self, rows: Iterable[Row]) -> None:
        """Add more rules."""
        for row in rows:
            for column in ("device_type", "device_id", "account"):
                if row[column] is not None:
                    self._rows[column, row[column]].append(row)

    def of(self, column: str, name: str) -> RuleSet:
        """Return the rules of one owner."""
        found = self._rows.get((column, name))
        return RuleSet(_rule(row, f"{column} {name}") for row in found) if found else NO_RULES


def _rule(row: Row, owner: str) -> TopicRule:
    return TopicRule(
        Effect(row["effect"]),
        _PERMISSIONS[row["action"]],
        row["topic"],
        rule_id=row["id"],
        owner=owner,
        exchange=row["exchange"],
    )


def device_type(row: Row, rules: RulesByOwner) -> DeviceType:
    """Return a device type with its rules compiled."""
    return DeviceType(
        name=row["name"],
        client_ids=tuple(row["client_ids"]),
        vhosts=tuple(row["vhosts"]),
        networks=_networks(row["networks"]),
        rules=rules.of("device_type", row["name"]),
    )


def device(row: Row, rules: RulesByOwner) -> Device:
    """Return a device; names that are equal share their memory."""
    device_id = row["device_id"]
    common_name = row["common_name"]
    attributes = row["attributes"]
    return Device(
        device_id=DeviceId(device_id),
        common_name=device_id if common_name == device_id else common_name,
        type=sys.intern(row["type"]),
        status=_STATUSES[row["status"]],
        attributes=None if attributes == "{}" else json.loads(attributes),
        expires_at=row["expires_at"],
        rules=rules.of("device_id", device_id),
    )


def account(row: Row, rules: RulesByOwner) -> Account:
    """Return an account with its rules compiled."""
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
        rules=rules.of("account", row["name"]),
    )


def _networks(texts: list[str] | None) -> Networks | None:
    return None if texts is None else Networks.parse(texts)
