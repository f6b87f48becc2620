"""Differences between a policy file and the registry, and their impact."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from authbackend.errors import AuthbackendError

shown = partial(json.dumps, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Change:
    """
    One difference between the file and the registry.

    Args:
        operation: ``add``, ``change`` or ``remove``.
        fields: For a change, the old and new value by column. A password hash is never shown, only that it changed.
    """

    operation: str
    entity: str
    key: str
    fields: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        sign = {"add": "+", "change": "~", "remove": "-"}[self.operation]
        what = ", ".join(f"{name}: {shown(old)} -> {shown(new)}" for name, (old, new) in self.fields.items())
        return f"{sign} {self.entity} {self.key}" + (f": {what}" if what else "")


@dataclass(frozen=True, slots=True)
class Impact:
    """
    How many devices, accounts and certificates lose something, as the database's brake counts them.

    Args:
        touched: How many lose something, each counted once.
        registered: Number of all devices.
        devices: The brake refuses more than this number that is also more than ``percent`` of all devices, unless
            the impact is accepted.
        beyond_limit: Whether both limits are exceeded.
        causes: Counts by kind and cause, each with the first few names.
        told: The causes as text.
    """

    touched: int
    registered: int
    devices: int
    percent: float
    beyond_limit: bool
    causes: list[dict[str, Any]]
    told: str

    def __str__(self) -> str:
        if not self.touched:
            return "impact: nothing is taken from anybody"
        limit = f"the limit is {self.devices}, or {self.percent:g} % of {self.registered} devices"
        return f"impact: something is taken from {self.touched} devices, accounts or certificates: {self.told}; {limit}"

    @property
    def way_on(self) -> str:
        """What to do if the brake refuses the changes."""
        return f"more than the limit is refused unless it is meant: policy apply with --accept-impact {self.touched}"

    def as_json(self) -> dict[str, Any]:
        """Return the values for JSON output, without the text for people."""
        values = asdict(self)
        del values["told"]
        return values


@dataclass(frozen=True, slots=True)
class Planned:
    """
    The changes that an apply would make.

    Args:
        impact: None if there is nothing to change, or if the impact is unknown.
        fault: Why the impact is unknown: the database would refuse the changes, another transaction was in the way, or
            the role may only read.
    """

    changes: list[Change]
    impact: Impact | None
    fault: AuthbackendError | None = None


@dataclass(frozen=True, slots=True)
class Applied:
    """
    The changes that an apply made.

    Args:
        version: The registry version with these changes; None if nothing was changed.
        impact: None if nothing was changed.
    """

    changes: list[Change]
    version: str | None
    impact: Impact | None = None


def change_of(entity: str, key: str, old: str | None, new: str | None) -> Change:
    """Compare two rows given as JSON text; None means that there is no row."""
    if old is None or new is None:
        return Change("add" if old is None else "remove", entity, key)
    before, after = json.loads(old), json.loads(new)
    fields = {name: (before[name], after[name]) for name in after if before[name] != after[name]}
    if "password_hash" in fields:
        fields["password_hash"] = ("set" if before["password_hash"] else None, "changed")
    return Change("change", entity, key, fields)


def rule_change(old: dict[str, Any] | None, new: dict[str, Any] | None) -> Change:
    """Compare two rules; None means that there is no rule."""
    rule = new or old
    assert rule is not None
    owner = next(f"{column} {rule[column]}" for column in ("device_type", "device_id", "account") if rule[column])
    key = f"{owner}: {rule['effect']} {rule['action']} {rule['topic']}"
    if rule["exchange"]:
        key += f" on {rule['exchange']}"
    if old is None or new is None:
        return Change("add" if old is None else "remove", "rule", key)
    return Change("change", "rule", key, {"note": (old["note"], new["note"])})
