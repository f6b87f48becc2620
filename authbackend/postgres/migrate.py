"""
Apply the migrations of ``sql/migrations``, which have dbmate's file format and use its ``schema_migrations`` table.

Format: https://github.com/amacneil/dbmate#usage (file names ``VERSION_name.sql``, ``-- migrate:up``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from authbackend.errors import ConfigurationError, Unavailable
from authbackend.postgres.connection import Connection, Target, connected, translated_errors
from authbackend.postgres.locks import MIGRATE
from authbackend.postgres.statements import SQL

LOCK_TIMEOUT = "4s"
STATEMENT_TIMEOUT = "300s"

_UP = re.compile(r"^--\s*migrate:up\s*$(.*?)(?:^--\s*migrate:down.*)?\Z", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Migration:
    """One migration file: its version (the leading digits of its name) and the statements to run."""

    version: str
    name: str
    statements: str


def migrations(folder: Path = SQL / "migrations") -> list[Migration]:
    """
    Return the migrations of a folder, oldest first.

    Raises:
        ConfigurationError: A file is not in dbmate's format, or the folder has no migrations.
    """
    result = []
    for path in sorted(folder.glob("*.sql")):
        version, _, name = path.stem.partition("_")
        up = _UP.search(path.read_text(encoding="utf-8"))
        if not version.isdigit() or up is None:
            raise ConfigurationError(f"{path}: not a dbmate migration (VERSION_name.sql with a line -- migrate:up)")
        result.append(Migration(version, name, up.group(1)))
    if not result:
        raise ConfigurationError(f"no migrations in {folder}")
    return result


async def migrate(target: Target) -> list[Migration]:
    """
    Apply the missing migrations, each in its own transaction, and return those applied.

    Several processes may call this at once: an advisory lock lets one run while the others wait.

    Raises:
        ConfigurationError: The database's encoding is not UTF-8.
        Unavailable: The server cannot be reached, is older than PostgreSQL 15, or a lock was not free in time.
    """
    applied = []
    async with connected(target) as connection:
        version = connection.get_server_version()
        if version.major < 15:
            raise Unavailable(f"PostgreSQL {version.major} is too old: 15 to 18 are supported")
        encoding = await connection.fetchval("show server_encoding")
        if encoding != "UTF8":
            raise ConfigurationError(
                f"the database's encoding is {encoding}; create it with: ENCODING 'UTF8' TEMPLATE template0"
            )
        await connection.execute("set statement_timeout = 0")
        await connection.execute("select pg_advisory_lock($1)", MIGRATE, timeout=600)
        try:
            await connection.execute(
                "create table if not exists public.schema_migrations (version varchar primary key)"
            )
            done = await _versions(connection)
            for migration in migrations():
                if migration.version not in done:
                    await _apply(connection, migration)
                    applied.append(migration)
        finally:
            await connection.execute("select pg_advisory_unlock($1)", MIGRATE)
    return applied


async def missing(target: Target) -> list[Migration]:
    """Return the migrations not applied to the database yet."""
    async with connected(target) as connection:
        if await connection.fetchval("select to_regclass('public.schema_migrations')") is None:
            return migrations()
        done = await _versions(connection)
        return [migration for migration in migrations() if migration.version not in done]


async def repair_triggers(target: Target) -> int:
    """
    Enable the disabled triggers of the registry, for example after a restore that left them off, and return how many.

    Changes made meanwhile left no change rows: replicas find them at their next comparison, so restart the replicas or
    wait for ``registry.compare_interval_s``. They left no audit rows either, so the trail gets a row that names the triggers.
    """
    async with connected(target) as connection:
        disabled = await connection.fetch(
            "select tgrelid::regclass::text as watched, tgname as name, quote_ident(tgname) as quoted from pg_trigger "
            "where not tgisinternal and tgenabled <> 'A' and (tgrelid = any ($1::regclass[]) or tgrelid in "
            "(select tgrelid from pg_trigger where tgfoid in ('public.change_note'::regproc, 'public.audit_note'::regproc)))",
            ["audit", "enforcement"],
        )
        async with connection.transaction():
            await connection.execute(f"set local lock_timeout = '{LOCK_TIMEOUT}'")
            for row in disabled:
                await connection.execute(f"alter table {row['watched']} enable always trigger {row['quoted']}")
            await connection.execute(
                "insert into audit (operation, entity, before) select 'ENABLE TRIGGER', u.watched, "
                "jsonb_build_object('not_always_on', jsonb_agg(u.name order by u.name)) "
                "from unnest($1::text[], $2::text[]) as u (watched, name) group by u.watched",
                [row["watched"] for row in disabled],
                [row["name"] for row in disabled],
            )
        return len(disabled)


async def _versions(connection: Connection) -> set[str]:
    return {row["version"] for row in await connection.fetch("select version from public.schema_migrations")}


async def _apply(connection: Connection, migration: Migration) -> None:
    with translated_errors():
        async with connection.transaction():
            await connection.execute(f"set local lock_timeout = '{LOCK_TIMEOUT}'")
            await connection.execute(f"set local statement_timeout = '{STATEMENT_TIMEOUT}'")
            await connection.execute(migration.statements, timeout=600)
            await connection.execute("insert into public.schema_migrations (version) values ($1)", migration.version)
