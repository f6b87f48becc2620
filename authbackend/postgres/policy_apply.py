"""
Make the registry match a policy file: plan without locks, then write in one transaction that gives way to others.

A plan also writes everything, in a transaction that is rolled back, so that its impact is exactly what the brake in the
database counts.

Before anything is written, the rows that the plan changes or removes are locked, in the order of tables and keys, and
compared with what the plan read. As soon as another session waits for this transaction, it is rolled back and tried again
with the same plan. See docs/decisions/0010-applying-a-policy.md.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import asyncpg

from authbackend.errors import AuthbackendError, Conflict, InvalidInput, Unavailable
from authbackend.policy_file.changes import Applied, Impact, Planned, change_of, shown
from authbackend.policy_file.model import Document
from authbackend.postgres.connection import Connection, Target, connected, name_actor, translated_errors
from authbackend.postgres.lock_waits import GaveWay, Watch, watching
from authbackend.postgres.locks import APPLY
from authbackend.postgres.policy_file import (
    RULES,
    TYPES,
    Table,
    difference,
    patient,
    rule_identity,
    stage,
    tables,
    work_out,
)

PAUSES_S = (0.5, 1.0, 2.0)
"""Pauses before the further attempts, after one gave way."""
TURN_S = 600.0
CONFLICTS_SHOWN = 20
ANY_NUMBER = 2**63 - 1

Say = Callable[[str], None]
T = TypeVar("T")


class _Changed(Exception):
    """A row is no longer as the plan read it."""


async def plan(target: Target, document: Document, *, prune: bool = False, say: Say = lambda _: None) -> Planned:
    """
    Return the exact difference between the registry and a document, and its impact; nothing is changed.

    Args:
        say: See :func:`apply`.
    Raises:
        AuthbackendError: The database cannot be reached or refuses to read.
    """
    async with connected(patient(target)) as connection, watching(target, connection) as watch:
        await _take_turn(connection, watch, say)
        async with watch.over(gives_way=False):
            await stage(connection, document)
            changes = await work_out(connection, document, prune=prune)
        if not changes:
            return Planned([], None)
        try:
            with translated_errors():
                return Planned(changes, await _Plan(connection, watch, document, None, say).rehearse())
        except AuthbackendError as error:
            return Planned(changes, None, error)


async def apply(
    target: Target,
    document: Document,
    *,
    actor: str,
    prune: bool = False,
    accept_impact: int | None = None,
    say: Say = lambda _: None,
) -> Applied:
    """
    Make the registry match a document, all or nothing; no other session has to wait for it.

    Args:
        accept_impact: How many devices, accounts and certificates it may take something from; None: the brake's limits.
        say: Called with progress for the operator: which session it waits for, or gave way to.
    Raises:
        InvalidInput: A constraint rejected a row, or the impact is more than accepted; nothing was changed.
        Conflict: Somebody else changed a row meanwhile, or a name is taken or still referenced; nothing was changed.
        Unavailable: There is no connection, another session held a row for too long, or it gave way too often; nothing
            was changed.
        Forbidden: The role lacks a privilege.
    """
    async with connected(patient(target)) as connection, watching(target, connection) as watch:
        await _take_turn(connection, watch, say)
        async with watch.over(gives_way=False):
            await stage(connection, document)
            changes = await work_out(connection, document, prune=prune)
        if not changes:
            return Applied([], None)
        version, impact = await _Plan(connection, watch, document, actor, say).carry_out(accept_impact)
        return Applied(changes, version, impact)


async def _take_turn(connection: Connection, watch: Watch, say: Say) -> None:
    """Wait for other applies, in steps, because one long wait would hold back vacuum on the server."""
    deadline = time.monotonic() + TURN_S
    announced = False
    while True:
        try:
            await connection.execute("select pg_advisory_lock($1)", APPLY)
        except asyncpg.LockNotAvailableError:
            holder = await watch.holder_of(APPLY)
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"nothing was changed: another policy is being applied by {holder} and was not finished within {TURN_S:g} s"
                ) from None
            if not announced:
                say(f"waiting for another policy, which is being applied by {holder}")
                announced = True
        else:
            return


class _Plan:
    """The planned changes, held in temporary tables of the connection."""

    def __init__(
        self,
        connection: Connection,
        watch: Watch,
        document: Document,
        actor: str | None,
        say: Say,
    ) -> None:
        self._connection = connection
        self._watch = watch
        self._tables = tables(document)
        self._actor = actor
        self._say = say
        self._planned: Counter[tuple[str, str]] = Counter()

    async def carry_out(self, accept_impact: int | None) -> tuple[str, Impact]:
        """
        Write everything, and return the registry version with the changes.

        Raises:
            InvalidInput: The brake refused it; the error has the impact of the whole plan, not only of what was written.
        """
        try:
            return await self._persist(lambda: self._attempt(accept_impact))
        except asyncpg.CheckViolationError as error:
            if getattr(error, "constraint_name", None) != "brake":
                raise
            impact = await self.rehearse()
            accepted = "" if accept_impact is None else f"; {accept_impact} were accepted"
            raise InvalidInput(f"nothing was changed: {impact}{accepted}; {impact.way_on}") from error

    async def rehearse(self) -> Impact:
        """Write everything, roll it back, and return the impact that the brake counted."""
        return await self._persist(self._rehearsal)

    async def _persist(self, attempt: Callable[[], Awaitable[T]]) -> T:
        for table in self._tables:
            for row in await self._connection.fetch(f"select operation, count(*) from {table.planned} group by 1"):
                self._planned[table.name, row["operation"]] = row["count"]
        for pause_s in (*PAUSES_S, None):
            try:
                return await attempt()
            except _Changed:
                if conflicts := await self._conflicts():
                    raise Conflict(_conflict_message(conflicts)) from None
                why = "edits that were undone again"
            except GaveWay as gave_way:
                why = gave_way.waiter
            if pause_s is not None:
                self._say(f"nothing was changed yet: gave way to {why}; trying again in {pause_s:g} s")
                await asyncio.sleep(pause_s)
        raise Unavailable(
            f"nothing was changed: this gave way to others {len(PAUSES_S) + 1} times, the last time to {why}. "
            "Try again when fewer people edit the registry, or with smaller files"
        )

    async def _attempt(self, accept_impact: int | None) -> tuple[str, Impact]:
        async with self._connection.transaction(), self._watch.over(gives_way=True):
            impact = await self._lock_and_write(accept_impact)
            version = str(await self._fetchval("select registry_version()"))
            self._watch.check()
            return version, impact

    async def _rehearsal(self) -> Impact:
        transaction = self._connection.transaction()
        await transaction.start()
        try:
            async with self._watch.over(gives_way=True):
                return await self._lock_and_write(ANY_NUMBER)
        finally:
            await transaction.rollback()

    async def _lock_and_write(self, accept_impact: int | None) -> Impact:
        self._watch.check()
        if self._actor is not None:
            await name_actor(self._connection, self._actor)
        await self._lock_and_compare()
        if accept_impact is not None:
            await self._execute("select accept_impact($1)", accept_impact)
        await self._write()
        self._watch.check()
        row = await self._connection.fetchrow("select * from impact()")
        assert row is not None
        return Impact(
            row["touched"],
            row["registered"],
            row["devices"],
            float(row["percent"]),
            row["beyond_limit"],
            json.loads(row["causes"]),
            row["told"],
        )

    async def _execute(self, statement: str, *arguments: Any) -> int:
        """Execute a statement, and return how many rows it wrote."""
        self._watch.check()
        count = str(await self._connection.execute(statement, *arguments)).rpartition(" ")[2]
        return int(count) if count.isdigit() else 0

    async def _fetchval(self, statement: str) -> Any:
        self._watch.check()
        return await self._connection.fetchval(statement)

    async def _lock_and_compare(self) -> None:
        for table in self._tables:
            for operation, strength in (("remove", "update"), ("change", "no key update")):
                if not self._planned[table.name, operation]:
                    continue
                locked = await self._fetchval(f"""
                    select count(*) from (
                      select 1 from {table.planned} p join {table.name} t on t.{table.key} = p.key
                      where p.operation = '{operation}' and {table.row()} is not distinct from p.before
                      order by p.n for {strength} of t) as locked""")
                if locked != self._planned[table.name, operation]:
                    raise _Changed
        for table in self._tables[:-1]:
            if await self._fetchval(f"select exists ({_strays(table)})"):
                raise _Changed

    async def _write(self) -> None:
        """Remove rows first, so that names become free, but types last, when no device has them any more."""
        for table in reversed(self._tables):
            if table is not TYPES:
                await self._remove(table)
        for table in self._tables:
            await self._change(table)
            await self._add(table)
        if TYPES in self._tables:
            await self._remove(TYPES)

    async def _remove(self, table: Table) -> None:
        if self._planned[table.name, "remove"]:
            await self._execute(f"""
                delete from {table.name} t using {table.planned} p
                where p.operation = 'remove' and t.{table.key} = p.key""")

    async def _change(self, table: Table) -> None:
        """Update only columns that differ: naming others would fire triggers that take more locks."""
        if not self._planned[table.name, "change"]:
            return
        differ = ", ".join(f"bool_or((before).{name} is distinct from (after).{name})" for name in table.copied)
        row = await self._connection.fetchrow(f"select {differ} from {table.planned} where operation = 'change'")
        assert row is not None
        values = ", ".join(
            f"{name} = (p.after).{name}" for name, differs in zip(table.copied, row, strict=True) if differs
        )
        await self._execute(f"""
            update {table.name} t set {values} from {table.planned} p
            where p.operation = 'change' and t.{table.key} = p.key""")

    async def _add(self, table: Table) -> None:
        if not self._planned[table.name, "add"]:
            return
        values = ", ".join(f"(after).{name}" for name in table.copied)
        added = await self._execute(f"""
            insert into {table.name} ({", ".join(table.copied)})
            select {values} from {table.planned} where operation = 'add' order by n
            on conflict {table.conflict} do nothing""")
        if added != self._planned[table.name, "add"]:
            raise _Changed

    async def _conflicts(self) -> list[str]:
        """Describe the rows that are no longer as the plan read them; some more of them than are shown."""
        conflicts = []
        for table in self._tables:
            queries = [(table, query) for query in _conflict_queries(table)]
            if table is not RULES:
                queries.append((RULES, _strays(table)))
            for of, query in queries:
                rows = await self._connection.fetch(f"""
                    select key, to_jsonb(before) as before, to_jsonb(after) as after, to_jsonb(now) as now
                    from ({query}) as q order by n limit {CONFLICTS_SHOWN + 1}""")
                conflicts += [_conflict(of, row) for row in rows]
        return conflicts


def _conflict_queries(table: Table) -> tuple[str, str]:
    """Return the queries for rows that were changed or removed, and for rows that were added."""
    now = f"case when t.{table.key} is not null then {table.row()} end"
    key = f"t.{table.key} = p.key" if table is not RULES else f"{rule_identity('t')} = {rule_identity('(p.after)')}"
    changed = f"""
        select p.n, p.key, p.before, p.after, {now} as now
        from {table.planned} p left join {table.name} t on t.{table.key} = p.key
        where p.operation <> 'add' and p.before is distinct from {now}"""
    added = f"""
        select p.n, p.key, p.before, p.after, {table.row()} as now
        from {table.planned} p join {table.name} t on {key} where p.operation = 'add'"""
    return changed, added


def _strays(table: Table) -> str:
    """Return the query for rules that would be deleted with a removed owner although the plan did not read them."""
    return f"""
        select 0 as n, t.id as key, null::{RULES.wanted} as before, null::{RULES.wanted} as after, {RULES.row()} as now
        from {table.planned} p join topic_rule t on t.{table.rules_by} = p.key
        where p.operation = 'remove'
          and not exists (select from {RULES.planned} r where r.operation = 'remove' and r.key = t.id)"""


def _conflict(table: Table, row: Any) -> str:
    before, now = row["before"], row["now"]
    one = difference(table, row["key"], before, None) if before else difference(table, row["key"], None, now)
    what = f"{one.entity} {one.key}"
    if now is None:
        return f"{what}: the plan saw it, now it is gone"
    source = "the plan saw" if before else "the file says"
    differ = change_of(table.name, one.key, before or row["after"], now).fields
    fields = [f"{name}: {source} {shown(old)}, now {shown(new)}" for name, (old, new) in differ.items()]
    return f"{what}: " + "; ".join(fields if before else ["the plan saw none, now there is one", *fields])


def _conflict_message(conflicts: list[str]) -> str:
    more = ["..."] if len(conflicts) > CONFLICTS_SHOWN else []
    lines = "\n".join(f"  {line}" for line in [*conflicts[:CONFLICTS_SHOWN], *more])
    return (
        f"nothing was changed: somebody else changed these rows after the plan was made:\n{lines}\n"
        "Check them, put into the file what should stay, and apply again"
    )
