"""
Find the differences between a policy file and the registry, inside PostgreSQL.

COPY puts the document into temporary tables, and a join finds the differences, so a file of a million devices costs one
pass over both. Nothing here waits for an edit or makes one wait.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from authbackend.policy_file.changes import Change, change_of, rule_change
from authbackend.policy_file.model import Document
from authbackend.postgres.connection import Connection, Target


@dataclass(frozen=True, slots=True)
class Table:
    """
    One table of the registry and its section of the document.

    Args:
        copied: The columns that COPY fills; ``networks`` and ``attributes`` are copied as text.
        kept: Columns whose value stays if the file gives none: SQL for the new value, from ``w``, the row of the file,
            and ``t``, the current row (all null if there is none).
        conflict: The target of ON CONFLICT by which a new row counts as existing.
        rules_by: The column of ``topic_rule`` that refers to this table.
    """

    name: str
    key: str
    copied: tuple[str, ...]
    conflict: str
    rules_by: str = ""
    kept: dict[str, str] = field(default_factory=dict)

    @property
    def wanted(self) -> str:
        """The temporary table of the document's rows; its row type is also that of ``before`` and ``after``."""
        return f"wanted_{self.name}"

    @property
    def planned(self) -> str:
        """
        The temporary table of the differences: n, operation, key, before, after.

        ``n`` numbers them in the order of keys. A rule to add has no key, because its id is not known yet.
        """
        return f"planned_{self.name}"

    def row(self, alias: str = "t") -> str:
        """Return SQL for a row as a value of the type of ``before`` and ``after``."""
        return f"row({', '.join(f'{alias}.{column}' for column in self.copied)})::{self.wanted}"


TYPES = Table(
    "device_type",
    "name",
    ("name", "description", "client_ids", "vhosts", "networks", "max_staleness_s", "require_known_certificate"),
    "(name)",
    "device_type",
)
DEVICES = Table(
    "device",
    "device_id",
    ("device_id", "common_name", "type", "status", "status_reason", "attributes", "expires_at"),
    "(device_id)",
    "device_id",
    {
        "attributes": "coalesce(w.attributes, t.attributes, '{}')",
        "status": "coalesce(w.status, t.status, 'active')",
        "status_reason": "coalesce(w.status_reason, t.status_reason, '')",
        "expires_at": "coalesce(w.expires_at, t.expires_at)",
    },
)
ACCOUNTS = Table(
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
    "(name)",
    "account",
    # A kept password is dropped when the account no longer logs in by password.
    {"password_hash": "case when w.login <> 'certificate' then coalesce(w.password_hash, t.password_hash) end"},
)
RULE_KEY = ("device_type", "device_id", "account", "effect", "action", "topic", "exchange")
RULES = Table("topic_rule", "id", (*RULE_KEY, "note"), f"({', '.join(RULE_KEY)})")


LONGEST_STATEMENT_S = 3600.0  # a million devices are one statement over a million rows, with their audit rows


def patient(target: Target) -> Target:
    """Return the target with a timeout for statements over the whole registry."""
    return replace(target, statement_timeout_s=LONGEST_STATEMENT_S)


def _sections(document: Document) -> Iterator[tuple[Table, Iterable[tuple[Any, ...]]]]:
    if document.device_types is not None:
        yield (
            TYPES,
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
            DEVICES,
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
            ACCOUNTS,
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


def tables(document: Document) -> list[Table]:
    """Return the tables that a document has sections for, in the order in which they are locked and written."""
    return [*(table for table, _ in _sections(document)), RULES]


async def stage(connection: Connection, document: Document) -> None:
    """Copy the document into temporary tables of this connection."""
    rows: list[tuple[Table, Iterable[tuple[Any, ...]]]] = [*_sections(document), (RULES, _rule_records(document))]
    for table, records in rows:
        await connection.execute(
            f"create temp table {table.wanted} as select {', '.join(table.copied)} from {table.name} with no data"
        )
        for column, kind in (("networks", "text[]"), ("attributes", "text")):
            if column in table.copied:
                await connection.execute(f"alter table {table.wanted} alter column {column} type {kind} using null")
        await connection.copy_records_to_table(table.wanted, records=records, columns=table.copied)
        for column, kind in (("networks", "cidr[]"), ("attributes", "jsonb")):
            if column in table.copied:
                await connection.execute(
                    f"alter table {table.wanted} alter column {column} type {kind} using {column}::{kind}"
                )
        await connection.execute(f"analyze {table.wanted}")


def _rule_records(document: Document) -> Iterator[tuple[Any, ...]]:
    for column, owner, rule in document.rules():
        owners = [owner if name == column else None for name in ("device_type", "device_id", "account")]
        yield (*owners, rule.effect, rule.action, rule.topic, rule.exchange, rule.note)


async def work_out(connection: Connection, document: Document, *, prune: bool) -> list[Change]:
    """Fill the temporary tables of differences from one snapshot of the registry, and return the differences."""
    async with connection.transaction(isolation="repeatable_read"):
        # Lock before the snapshot is taken: a table truncated after it would look empty.
        await connection.execute("lock table device_type, device, account, topic_rule in access share mode")
        for table in tables(document):
            query = _rule_differences(document, prune) if table is RULES else _differences(table, prune)
            await connection.execute(f"create temp table {table.planned} as {query}")
            await connection.execute(f"analyze {table.planned}")
    changes: list[Change] = []
    async with connection.transaction():  # a cursor needs one; it locks nothing of the registry
        for table in tables(document):
            async for row in connection.cursor(
                f"select key, to_jsonb(before) as old, to_jsonb(after) as new from {table.planned} order by n",
                prefetch=1000,
            ):
                changes.append(difference(table, row["key"], row["old"], row["new"]))
    return changes


def difference(table: Table, key: str, old: str | None, new: str | None) -> Change:
    """Return the difference between two rows given as JSON text; None stands for no row."""
    if table is not RULES:
        return change_of(table.name, key, old, new)
    return rule_change(json.loads(old or "null"), json.loads(new or "null"))


_DIFFERENCES = """
    select row_number() over (order by sorted) as n,
           case when before is null then 'add' when after is null then 'remove' else 'change' end as operation,
           key, before, after
    from ({rows}) as d"""


def _differences(table: Table, prune: bool) -> str:
    wanted = ", ".join(table.kept.get(column, f"w.{column}") for column in table.copied)
    t, w = f"t.{table.key}", f"w.{table.key}"
    rows = f"""
        select coalesce({t}, {w}) as sorted, coalesce({t}, {w}) as key,
               case when {t} is not null then {table.row()} end as before,
               case when {w} is not null then row({wanted})::{table.wanted} end as after
        from {table.name} t full join {table.wanted} w on {t} = {w}
        where {w} is not null{" or true" if prune else ""}"""
    return f"{_DIFFERENCES.format(rows=rows)} where before is distinct from after"


def _owned(document: Document, prune: bool) -> str:
    """Return the condition for the rules that a document covers: those of the owners it names or removes."""
    conditions = ["false"]
    for table in tables(document)[:-1]:
        covers_rules = table is not DEVICES or document.speaks_of_device_rules
        if covers_rules and prune:
            conditions.append(f"t.{table.rules_by} is not null")
        else:
            named = (
                f"select {table.key} from {table.wanted}"
                if covers_rules
                else f"select key from {table.planned} where operation = 'remove'"
            )
            conditions.append(f"t.{table.rules_by} in ({named})")
    return " or ".join(conditions)


def rule_identity(row: str) -> str:
    """Return SQL for what identifies a rule, as a value that can be hashed although parts of it may be null."""
    return f"jsonb_build_array({', '.join(f'{row}.{column}' for column in RULE_KEY)})"


def _rule_differences(document: Document, prune: bool) -> str:
    rows = f"""
        select coalesce({rule_identity("t")}, {rule_identity("w")}) as sorted, t.id as key,
               case when t.id is not null then {RULES.row()} end as before,
               case when w.topic is not null then {RULES.row("w")} end as after
        from (select * from topic_rule t where {_owned(document, prune)}) t
        full join {RULES.wanted} w on {rule_identity("t")} = {rule_identity("w")}"""
    return f"{_DIFFERENCES.format(rows=rows)} where before is distinct from after"
