"""Contents of a policy file. A section that is absent is None and leaves the registry alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

SCHEMA = "authbackend/1"


@dataclass(frozen=True, slots=True)
class RuleEntry:
    """A topic rule; only rules of accounts have an ``exchange``."""

    effect: str
    action: str
    topic: str
    exchange: str | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class DeviceTypeEntry:
    """
    A device type; ``networks`` None allows any address.

    Args:
        max_staleness_s: In seconds; None means as long as the replicas allow.
        require_known_certificate: Whether a sweep closes connections whose certificate is not on record.
    """

    name: str
    description: str = ""
    client_ids: tuple[str, ...] = ()
    vhosts: tuple[str, ...] = ()
    networks: tuple[str, ...] | None = None
    max_staleness_s: float | None = None
    require_known_certificate: bool = False
    rules: tuple[RuleEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class DeviceEntry:
    """
    A device; ``status``, ``attributes`` and ``expires_at`` None leave those of an existing device unchanged.

    Args:
        status: None makes a new device active. An existing one keeps its status, so that a file that does not mention
            it cannot reinstate a revoked device.
    """

    device_id: str
    common_name: str
    type: str
    status: str | None = None
    status_reason: str | None = None
    attributes: tuple[tuple[str, str], ...] | None = ()
    expires_at: datetime | None = None
    rules: tuple[RuleEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class AccountEntry:
    """An account; ``password_hash`` None leaves the password unchanged."""

    name: str
    login: str
    password_hash: str | None = field(default=None, repr=False)
    tags: tuple[str, ...] = ()
    vhosts: tuple[str, ...] = ()
    networks: tuple[str, ...] | None = None
    client_ids: tuple[str, ...] = ()
    configure: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    unchecked_dead_lettering: bool = False
    rules: tuple[RuleEntry, ...] = ()


@dataclass(slots=True)
class Document:
    """
    A parsed policy file; names are unique within a section.

    Args:
        speaks_of_device_rules: False if the devices come from a format without rules; their rules are left alone.
        places: Line and column, from 1, of what a warning can be about: ("device type T",), ("device type T", value),
            ("device type T", "rule", effect, action, topic, exchange), the same for devices and accounts, and ("devices",).
    """

    device_types: dict[str, DeviceTypeEntry] | None = None
    devices: dict[str, DeviceEntry] | None = None
    accounts: dict[str, AccountEntry] | None = None
    speaks_of_device_rules: bool = True
    places: dict[tuple[str, ...], tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)

    def rules(self) -> Iterator[tuple[str, str, RuleEntry]]:
        """Yield (column of the owner, owner, rule)."""
        for column, entries in (
            ("device_type", self.device_types),
            ("device_id", self.devices),
            ("account", self.accounts),
        ):
            for owner, entry in (entries or {}).items():
                for rule in entry.rules:
                    yield column, owner, rule


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """
    An error or warning about a file; a warning does not stop an apply.

    Args:
        line: From 1, as is the column.
    """

    file: str
    line: int
    column: int
    message: str
    warning: bool = False

    def __str__(self) -> str:
        level = "warning" if self.warning else "error"
        return f"{self.file}:{self.line}:{self.column}: {level}: {self.message}"
