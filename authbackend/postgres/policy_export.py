"""Read the whole registry into the document of a policy file."""

from __future__ import annotations

import json
from typing import Any

from authbackend.policy_file.model import AccountEntry, DeviceEntry, DeviceTypeEntry, Document, RuleEntry
from authbackend.postgres.connection import Target, connected
from authbackend.postgres.policy_file import patient


async def export(target: Target) -> Document:
    """Return the whole registry as a document, read in one snapshot."""
    async with (
        connected(patient(target)) as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        rules: dict[tuple[str, str], list[RuleEntry]] = {}
        for row in await connection.fetch("select * from topic_rule order by effect, action, topic, exchange"):
            for column in ("device_type", "device_id", "account"):
                if row[column] is not None:
                    entry = RuleEntry(row["effect"], row["action"], row["topic"], row["exchange"], row["note"])
                    rules.setdefault((column, row[column]), []).append(entry)
        document = Document({}, {}, {})
        assert document.device_types is not None and document.devices is not None and document.accounts is not None
        for row in await connection.fetch("select * from device_type"):
            document.device_types[row["name"]] = _type_entry(row, rules)
        async for row in connection.cursor("select * from device", prefetch=2000):
            document.devices[row["device_id"]] = _device_entry(row, rules)
        for row in await connection.fetch("select * from account"):
            document.accounts[row["name"]] = _account_entry(row, rules)
        return document


def _type_entry(row: Any, rules: dict[tuple[str, str], list[RuleEntry]]) -> DeviceTypeEntry:
    return DeviceTypeEntry(
        row["name"],
        row["description"],
        tuple(row["client_ids"]),
        tuple(row["vhosts"]),
        _networks(row["networks"]),
        row["max_staleness_s"],
        row["require_known_certificate"],
        tuple(rules.get(("device_type", row["name"]), ())),
    )


def _device_entry(row: Any, rules: dict[tuple[str, str], list[RuleEntry]]) -> DeviceEntry:
    return DeviceEntry(
        row["device_id"],
        row["common_name"],
        row["type"],
        row["status"],
        row["status_reason"],
        tuple(sorted(json.loads(row["attributes"]).items())),
        row["expires_at"],
        tuple(rules.get(("device_id", row["device_id"]), ())),
    )


def _account_entry(row: Any, rules: dict[tuple[str, str], list[RuleEntry]]) -> AccountEntry:
    return AccountEntry(
        row["name"],
        row["login"],
        row["password_hash"],
        tags=tuple(row["tags"]),
        vhosts=tuple(row["vhosts"]),
        networks=_networks(row["networks"]),
        client_ids=tuple(row["client_ids"]),
        configure=tuple(row["configure"]),
        write=tuple(row["write"]),
        read=tuple(row["read"]),
        unchecked_dead_lettering=row["unchecked_dead_lettering"],
        rules=tuple(rules.get(("account", row["name"]), ())),
    )


def _networks(networks: list[Any] | None) -> tuple[str, ...] | None:
    return None if networks is None else tuple(str(network) for network in networks)
