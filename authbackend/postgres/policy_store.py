"""
The policy file against the registry: what differs, and making it so in one transaction.

What is wanted goes into temporary tables by COPY, and PostgreSQL finds the differences, so a file of a million
devices costs one pass over both.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from authbackend.document.changes import Applied, Change, change_of, rule_change
from authbackend.document.model import AccountEntry, DeviceEntry, DeviceTypeEntry, Document, RuleEntry
from authbackend.postgres.connection import Connection, Target, connected


@dataclass(frozen=True, slots=True)
class _Table:
    """
    One table of the registry and its section of the document.

    Args:
        copied: Columns as COPY fills them; ``networks`` and ``attributes`` travel as text.
        kept: Columns that keep their value where the file says nothing; the text is the default of a new row.
    """

    name: str
    key: str
    copied: tuple[str, ...]
    kept: dict[str, str] = field(default_factory=dict)

    @property
    def wanted(self) -> str:
        return f"wanted_{self.name}"


_TYPES = _Table(
    "device_type",
    "name",
    ("name", "description", "client_ids", "vhosts", "networks", "max_staleness_s", "require_known_certificate"),
)
_DEVICES = _Table(
    "device",
    "device_id",
    ("device_id", "common_name", "type", "status", "status_reason", "attributes", "expires_at"),
    {"attributes": "'{}'", "status": "'active'", "status_reason": "''", "expires_at": "null"},
)
_ACCOUNTS = _Table(
    "account",
    "name",
    (
        "name",
        "login",
        "password_hash",
        "tags",
        "vhosts",
        "networks",
        "client_ids",
        "configure",
        "write",
        "read",
        "unchecked_dead_lettering",
    ),
    {"password_hash": "null"},
)
_RULE_KEY = ("device_type", "device_id", "account", "effect", "action", "topic", "exchange")


LONGEST_STATEMENT_S = 3600.0  # a million devices are one statement over a million rows, with their audit rows


async def plan(target: Target, document: Document, *, prune: bool = False) -> list[Change]:
    """
    Return the exact difference between the registry and a document; nothing is changed.

    Raises:
        AuthbackendError: The database cannot be reached or refuses to read.
    """
    async with (
        connected(replace(target, statement_timeout_s=LONGEST_STATEMENT_S)) as connection,
        _rolled_back(connection),
    ):
        await _stage(connection, document)
        return await _differences(connection, document, prune)


async def apply(target: Target, document: Document, *, actor: str, prune: bool = False) -> Applied:
    """
    Make the registry as the document says, all or nothing.

    Raises:
        InvalidInput: A constraint refused a row; nothing was changed.
        Conflict: A name is taken or still referred to; nothing was changed.
        Forbidden, Unavailable: The role lacks a right, or there is no connection.
    """
    async with (
        connected(replace(target, statement_timeout_s=LONGEST_STATEMENT_S)) as connection,
        connection.transaction(),
    ):
        await connection.execute("select set_config('authbackend.actor', $1, true)", actor)
        await connection.execute("lock table device_type, device, account, topic_rule in share row exclusive mode")
        await _stage(connection, document)
        changes = await _differences(connection, document, prune)
        if not changes:
            return Applied([], None)
        await _make_so(connection, document, prune)
        return Applied(changes, str(await connection.fetchval("select registry_version()")))


async def export(target: Target) -> Document:
    """Return the whole registry as a document."""
    patient = replace(target, statement_timeout_s=LONGEST_STATEMENT_S)
    async with connected(patient) as connection, connection.transaction(isolation="repeatable_read", readonly=True):
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


@asynccontextmanager
async def _rolled_back(connection: Connection) -> AsyncIterator[None]:
    transaction = connection.transaction()
    await transaction.start()
    try:
        yield
    finally:
        await transaction.rollback()


def _sections(document: Document) -> Iterator[tuple[_Table, Iterable[tuple[Any, ...]]]]:
    if document.device_types is not None:
        yield (
            _TYPES,
            (
                (
                    *(e.name, e.description, list(e.client_ids), list(e.vhosts), _list(e.networks)),
                    *(e.max_staleness_s, e.require_known_certificate),
                )
                for e in document.device_types.values()
            ),
        )
    if document.devices is not None:
        yield (
            _DEVICES,
            (
                (
                    e.device_id,
                    e.common_name,
                    e.type,
                    e.status,
                    e.status_reason,
                    None if e.attributes is None else json.dumps(dict(e.attributes)),
                    e.expires_at,
                )
                for e in document.devices.values()
            ),
        )
    if document.accounts is not None:
        yield (
            _ACCOUNTS,
            (
                (
                    *(e.name, e.login, e.password_hash, list(e.tags), list(e.vhosts), _list(e.networks)),
                    *(list(e.client_ids), list(e.configure), list(e.write), list(e.read), e.unchecked_dead_lettering),
                )
                for e in document.accounts.values()
            ),
        )


def _list(values: tuple[str, ...] | None) -> list[str] | None:
    return None if values is None else list(values)


async def _stage(connection: Connection, document: Document) -> None:
    """Copy the document into temporary tables and fill in what it leaves alone."""
    for table, records in _sections(document):
        await connection.execute(
            f"create temp table {table.wanted} on commit drop as select {', '.join(table.copied)} from {table.name} with no data"
        )
        for column in ("networks", "attributes"):
            if column in table.copied:
                kind = "text[]" if column == "networks" else "text"
                await connection.execute(f"alter table {table.wanted} alter column {column} type {kind} using null")
        await connection.copy_records_to_table(table.wanted, records=records, columns=table.copied)
        for column, kind in (("networks", "cidr[]"), ("attributes", "jsonb")):
            if column in table.copied:
                await connection.execute(
                    f"alter table {table.wanted} alter column {column} type {kind} using {column}::{kind}"
                )
        await connection.execute(f"create index on {table.wanted} ({table.key})")
        await connection.execute(f"analyze {table.wanted}")
        for column, default in table.kept.items():
            await connection.execute(
                f"update {table.wanted} w set {column} = coalesce(t.{column}, {default}) from {table.wanted} v "
                f"left join {table.name} t using ({table.key}) where v.{table.key} = w.{table.key} and w.{column} is null"
            )
    if document.accounts is not None:  # a password that was kept ends with the login by password
        await connection.execute("update wanted_account set password_hash = null where login = 'certificate'")
    await connection.execute(
        f"create temp table wanted_rule on commit drop as select {', '.join(_RULE_KEY)}, note from topic_rule with no data"
    )
    await connection.copy_records_to_table("wanted_rule", records=_rule_records(document), columns=(*_RULE_KEY, "note"))


def _rule_records(document: Document) -> Iterator[tuple[Any, ...]]:
    for column, owner, rule in document.rules():
        owners = [owner if name == column else None for name in ("device_type", "device_id", "account")]
        yield (*owners, rule.effect, rule.action, rule.topic, rule.exchange, rule.note)


async def _differences(connection: Connection, document: Document, prune: bool) -> list[Change]:
    changes: list[Change] = []
    for table, _ in _sections(document):
        async for row in connection.cursor(_difference_query(table, prune), prefetch=1000):
            changes.append(change_of(table.name, row["key"], row["old"], row["new"]))
    for row in await connection.fetch(_rule_difference_query(document, prune)):
        old = json.loads(row["old"]) if row["old"] else None
        new = json.loads(row["new"]) if row["new"] else None
        changes.append(rule_change(old, new))
    return changes


def _difference_query(table: _Table, prune: bool) -> str:
    others = [column for column in table.copied if column != table.key]
    return f"""
        select coalesce(t.{table.key}, w.{table.key}) as key,
               case when t.{table.key} is not null then (select to_jsonb(x) from (select t.{", t.".join(others)}) x) end as old,
               case when w.{table.key} is not null then (select to_jsonb(x) from (select w.{", w.".join(others)}) x) end as new
        from {table.name} t full join {table.wanted} w on t.{table.key} = w.{table.key}
        where t.{table.key} is null
           or (w.{table.key} is null and {"true" if prune else "false"})
           or (w.{table.key} is not null and (t.{", t.".join(others)}) is distinct from (w.{", w.".join(others)}))
        order by 1"""


def _owned(document: Document, prune: bool) -> str:
    """Return the condition for the rules that a document speaks about: those of the owners it names."""
    conditions = ["false"]
    for table, column in ((_TYPES, "device_type"), (_DEVICES, "device_id"), (_ACCOUNTS, "account")):
        told = table is not _DEVICES or document.speaks_of_device_rules
        if told and any(table is present for present, _ in _sections(document)):
            everybody = " or true" if prune else ""
            conditions.append(
                f"t.{column} is not null and (t.{column} in (select {table.key} from {table.wanted}){everybody})"
            )
    return " or ".join(f"({condition})" for condition in conditions)


def _same_rule(left: str, right: str) -> str:
    return " and ".join(f"{left}.{column} is not distinct from {right}.{column}" for column in _RULE_KEY)


def _rule_difference_query(document: Document, prune: bool) -> str:
    columns = ", ".join((*_RULE_KEY, "note"))
    return f"""
        with present as (select {columns} from topic_rule t where {_owned(document, prune)}),
             only_present as (select {columns} from present except select {columns} from wanted_rule),
             only_wanted as (select {columns} from wanted_rule except select {columns} from present)
        select to_jsonb(p) as old, to_jsonb(w) as new
        from only_present p full join only_wanted w
          on to_jsonb(p) - 'note' = to_jsonb(w) - 'note'
        order by 1, 2"""


async def _make_so(connection: Connection, document: Document, prune: bool) -> None:
    """Remove first, so that names become free; types last, when no device has them any more."""
    sections = [table for table, _ in _sections(document)]
    await connection.execute(f"""
        delete from topic_rule t where ({_owned(document, prune)})
        and not exists (select from wanted_rule w where {_same_rule("t", "w")})""")
    for table in (_ACCOUNTS, _DEVICES):
        if prune and table in sections:
            await connection.execute(_delete(table))
    for table in sections:
        others = [column for column in table.copied if column != table.key]
        await connection.execute(f"""
            update {table.name} t set ({", ".join(others)}) = row(w.{", w.".join(others)})
            from {table.wanted} w where w.{table.key} = t.{table.key}
            and (t.{", t.".join(others)}) is distinct from (w.{", w.".join(others)})""")
        await connection.execute(f"""
            insert into {table.name} ({", ".join(table.copied)}) select {", ".join(table.copied)} from {table.wanted} w
            where not exists (select from {table.name} t where t.{table.key} = w.{table.key})""")
    columns = ", ".join((*_RULE_KEY, "note"))
    await connection.execute(f"""
        update topic_rule t set note = w.note from wanted_rule w where {_same_rule("t", "w")} and t.note <> w.note""")
    await connection.execute(f"""
        insert into topic_rule ({columns}) select {columns} from wanted_rule w
        where not exists (select from topic_rule t where {_same_rule("t", "w")})""")
    if prune and _TYPES in sections:
        await connection.execute(_delete(_TYPES))


def _delete(table: _Table) -> str:
    return f"delete from {table.name} t where not exists (select from {table.wanted} w where w.{table.key} = t.{table.key})"
