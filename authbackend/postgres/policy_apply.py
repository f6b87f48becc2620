"""
Makes the registry as a policy file says: planned without a lock, written in one transaction that gives way.

To plan it is to write it, too, in a transaction that is rolled back: only then the impact is exactly what the brake of
the database counts.

The rows that the plan changes or removes are locked first, in the order of tables and keys, and compared with what the
plan saw. Only then is anything written. As soon as somebody waits for this transaction it is rolled back and tried
again, against the same plan. Told in docs/decisions/0010-applying-a-policy.md.
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
"""Before each further attempt, when the last one gave way."""
TURN_S = 600.0
CONFLICTS_SHOWN = 20
ANY_NUMBER = 2**63 - 1

Say = Callable[[str], None]
T = TypeVar("T")


class _Changed(Exception):
    """A row is not what the plan saw."""


async def plan(target: Target, document: Document, *, prune: bool = False, say: Say = lambda _: None) -> Planned:
    """
    Return the exact difference between the registry and a document, and its impact; nothing is changed.

    Args:
        say: As for :func:`apply`.
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
    Make the registry as the document says, all or nothing; nobody waits for it.

    Args:
        accept_impact: From so many devices, accounts and certificates something may be taken; None: as the brake allows.
        say: Told what an operator would wonder about: for whom this waits, and to whom it gave way.
    Raises:
        InvalidInput: A constraint refused a row, or it would touch more than is accepted; nothing was changed.
        Conflict: Somebody else changed a row meanwhile, or a name is taken or still referred to; nothing was changed.
        Unavailable: There is no connection; a row was held for too long by somebody else; or others wanted the rows
            again and again. Nothing was changed.
        Forbidden: The role lacks a right.
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
    """Wait for other applies, in steps, because a session that waits holds the server's cleaning back."""
    end = time.monotonic() + TURN_S
    told = False
    while True:
        try:
            await connection.execute("select pg_advisory_lock($1)", APPLY)
        except asyncpg.LockNotAvailableError:
            holder = await watch.holder_of(APPLY)
            if time.monotonic() > end:
                raise Unavailable(
                    f"nothing was changed: another policy is being applied by {holder}, for longer than {TURN_S:g} s"
                ) from None
            if not told:
                say(f"waiting for another policy, which is being applied by {holder}")
                told = True
        else:
            return


class _Plan:
    """The differences that were worked out, in temporary tables of the connection."""

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
        Write everything and return the registry version that serves it.

        Raises:
            InvalidInput: The brake refused it; the error has the impact of all, not only of what was written by then.
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
        """Write everything, roll it back, and return what the brake has counted."""
        return await self._persist(self._rehearsal)

    async def _persist(self, attempt: Callable[[], Awaitable[T]]) -> T:
        for table in self._tables:
            for row in await self._connection.fetch(f"select operation, count(*) from {table.planned} group by 1"):
                self._planned[table.name, row["operation"]] = row["count"]
        for pause_s in (*PAUSES_S, None):
            try:
                return await attempt()
            except _Changed:
                if found := await self._conflicts():
                    raise Conflict(_told(found)) from None
                why = "rows that were changed and changed back"
            except GaveWay as gave_way:
                why = gave_way.waiter
            if pause_s is not None:
                self._say(f"nothing was changed yet: gave way to {why}; trying again in {pause_s:g} s")
                await asyncio.sleep(pause_s)
        raise Unavailable(
            f"nothing was changed: others wanted what this was changing, {len(PAUSES_S) + 1} times, the last one {why}. "
            "Try again when fewer edit the registry, or with smaller files"
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
        """Execute and return how many rows were touched."""
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
        """Remove first, so that names become free; types last, when no device has them any more."""
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
        """Name only columns that differ: to name others wakes triggers that lock what is not needed."""
        if not self._planned[table.name, "change"]:
            return
        differ = ", ".join(f"bool_or((before).{name} is distinct from (after).{name})" for name in table.copied)
        found = await self._connection.fetchrow(f"select {differ} from {table.planned} where operation = 'change'")
        assert found is not None
        values = ", ".join(
            f"{name} = (p.after).{name}" for name, differs in zip(table.copied, found, strict=True) if differs
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
        """Return what is not as the plan saw it, in words; somewhat more than is shown."""
        found = []
        for table in self._tables:
            queries = [(table, query) for query in _conflict_queries(table)]
            if table is not RULES:
                queries.append((RULES, _strays(table)))
            for of, query in queries:
                rows = await self._connection.fetch(f"""
                    select key, to_jsonb(before) as before, to_jsonb(after) as after, to_jsonb(now) as now
                    from ({query}) as q order by n limit {CONFLICTS_SHOWN + 1}""")
                found += [_conflict(of, row) for row in rows]
        return found


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
    """Return the query for rules that would go with an owner that is removed, and that the plan did not see."""
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
    said = "the plan saw" if before else "the file says"
    differ = change_of(table.name, one.key, before or row["after"], now).fields
    fields = [f"{name}: {said} {shown(old)}, now {shown(new)}" for name, (old, new) in differ.items()]
    return f"{what}: " + "; ".join(fields if before else ["the plan saw none, now there is one", *fields])


def _told(conflicts: list[str]) -> str:
    more = ["..."] if len(conflicts) > CONFLICTS_SHOWN else []
    lines = "\n".join(f"  {line}" for line in [*conflicts[:CONFLICTS_SHOWN], *more])
    return (
        f"nothing was changed: somebody else changed what the plan saw, after it looked:\n{lines}\n"
        "Look at these, put into the file what is to stay, and apply again"
    )
