"""The audit trail as lines of JSON: fields, filters, constant memory; a truncated export never looks complete."""

import json
import os
import subprocess
import sys
from datetime import datetime, timedelta

import pytest

from authbackend.postgres import audit
from authbackend.postgres.connection import Target
from tests.postgres.test_constraints import HASH
from tests.support.postgres import connected, run


@pytest.fixture
def exported(cli):
    """Export with options; return the rows and the last line."""

    def call(*options, **changed):
        lines = [json.loads(line) for line in cli("audit", "export", *options, **changed).stdout.splitlines()]
        assert lines[-1]["end"] is True
        assert lines[-1]["rows"] == len(lines) - 1
        return lines[:-1], lines[-1]

    return call


def environment(dsn, **more):
    keep = {name: value for name, value in os.environ.items() if not name.startswith("AUTHBACKEND_")}
    return {**keep, "AUTHBACKEND_DATABASE__DSN": dsn, **more}


def command(*options):
    return [sys.executable, "-m", "authbackend", "audit", "export", *map(str, options)]


def test_a_row_has_every_field_of_the_trail(exported, execute, fleet):
    execute(
        "begin; set local authbackend.actor = 'ann@ops1';"
        "update device set attributes = '{\"site\": \"x\"}' where device_id = 'D1'; commit"
    )
    row = exported()[0][-1]
    (kept,) = execute("select *, version::text as transaction from audit order by id desc limit 1")
    assert set(row) == set(kept) - {"transaction"}
    assert (row["id"], row["version"]) == (kept["id"], kept["transaction"])
    assert datetime.fromisoformat(row["at"]) == kept["at"]
    assert (row["role"], row["actor"], row["claimed_by"]) == ("postgres", "postgres", "ann@ops1")
    assert (row["operation"], row["entity"], row["key"]) == ("UPDATE", "device", "D1")
    assert (row["before"]["attributes"], row["after"]["status"]) == ({}, "active")


def test_numbers_keep_their_digits(cli, execute, fleet):
    execute(
        "insert into audit (operation, entity, after) values ('X', 'x', '{\"n\": 1.10, \"big\": 123456789012345678901.5}')"
    )
    line = cli("audit", "export").stdout.splitlines()[-2]
    assert '"n": 1.10' in line
    assert "123456789012345678901.5" in line


def test_no_hash_of_a_password_is_exported(cli, execute):
    execute(f"insert into account (name, login, password_hash) values ('robot', 'password', '{HASH}')")
    execute(f"update account set password_hash = '{HASH[:-4]}AAAA'")
    execute("delete from account")
    text = cli("audit", "export").stdout
    assert "argon2" not in text
    came, changed, went = map(json.loads, text.splitlines()[-4:-1])
    assert came["after"]["password_hash"] == changed["after"]["password_hash"] == "changed"
    assert changed["before"]["password_hash"] == went["before"]["password_hash"] == "set"


def test_rows_come_by_id_and_the_last_line_says_how_many(exported, execute, fleet):
    execute("update device set status_reason = 'x'")
    rows, end = exported()
    ids = [row["id"] for row in rows]
    assert ids == sorted(ids)
    assert end["last_id"] == ids[-1]
    assert len(ids) == execute("select count(*) as n from audit")[0]["n"]
    nothing, end = exported("--key", "nobody")
    assert (nothing, end["rows"], end["last_id"]) == ([], 0, None)


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        (("--table", "device"), ["D1", "D2", "D1", "D2"]),
        (("--table", "device", "--key", "D1"), ["D1", "D1"]),
        (("--table", "device", "--table", "device_type"), ["APM", "D1", "D2", "D1", "D2"]),
        (("--operation", "UPDATE"), ["D1"]),
        (("--operation", "DELETE"), ["D2"]),
        (("--claimed-by", "ben"), ["D1"]),
        (("--who", "postgres", "--operation", "DELETE"), ["D2"]),
        (("--who", "nobody"), []),
        (("--since", "2999-01-01"), []),
        (("--until", "1999-01-01"), []),
        (("--from-version", "99999999999"), []),
    ],
)
def test_filters(exported, execute, fleet, options, keys):
    execute(
        "begin; set local authbackend.actor = 'ben'; update device set status = 'revoked' where device_id = 'D1'; commit"
    )
    execute("delete from device where device_id = 'D2'")
    rows, end = exported(*options)
    assert [row["key"] for row in rows] == keys
    asked = {option[2:].replace("-", "_").replace("table", "entities") for option in options[::2]}
    assert set(end["filter"]) == asked


def test_a_time_is_compared_with_that_of_the_row(exported, execute, fleet):
    (row,) = execute("select at from audit where key = 'D1'")
    at, later = row["at"], row["at"] + timedelta(microseconds=1)
    assert [one["key"] for one in exported("--since", at.isoformat(), "--until", later.isoformat())[0]] == ["D1"]
    assert "D1" not in [one["key"] for one in exported("--since", later.isoformat())[0]]


def test_what_was_open_during_an_export_comes_with_the_next_one(dsn, exported, execute, fleet):
    """Rows of a transaction that was open have lower ids and earlier times than rows of the first export."""

    async def overlapping():
        async with connected(dsn) as slow, connected(dsn) as quick:
            await slow.execute("begin")
            await slow.execute("update device set status = 'revoked' where device_id = 'D1'")
            await quick.execute("update device set status = 'suspended' where device_id = 'D2'")
            lines: list[bytes] = []
            end = await audit.export(Target(dsn), audit.TrailFilter(), lines.append)
            await slow.execute("commit")
            return [json.loads(line) for line in lines], end

    first, end = run(overlapping())
    assert first[-1]["key"] == "D2"
    rows, _ = exported("--from-version", end.next_version)
    assert "D1" in [row["key"] for row in rows if row["operation"] == "UPDATE"]
    assert min(row["id"] for row in rows) < end.last_id


def test_a_file_appears_when_it_is_whole_and_is_for_its_owner(cli, fleet, tmp_path):
    assert cli("audit", "export", "--out", "trail.jsonl").stdout == ""
    lines = (tmp_path / "trail.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["rows"] == len(lines) - 1 > 0
    assert (tmp_path / "trail.jsonl").stat().st_mode & 0o777 == 0o600
    assert "already exists" in cli("audit", "export", "--out", "trail.jsonl", exit_code=2).stderr
    assert (tmp_path / "trail.jsonl").read_text().splitlines() == lines


def test_a_database_that_goes_away_leaves_no_end_and_no_file(
    cli, execute, fleet, tmp_path, monkeypatch, postgres, database
):
    """The database session is ended after the first rows."""
    execute("insert into device (device_id, type) select 'N' || n, 'APM' from generate_series(1, 2000) n")
    made = audit._line
    ended = []

    def line(row):
        if not ended:
            ending = f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{database}'"
            ended.append(postgres.psql("postgres", ending))
        return made(row)

    monkeypatch.setattr(audit, "_line", line)
    cut = cli("audit", "export", exit_code=5)
    assert '"end"' not in cut.stdout
    assert 0 < len(cut.stdout.splitlines()) < 2000
    assert f"the export is truncated after {len(cut.stdout.splitlines())} rows" in cut.stderr
    ended.clear()
    cli("audit", "export", "--out", "trail.jsonl", exit_code=5)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_no_success(dsn, execute, fleet):
    execute("insert into device (device_id, type) select 'N' || n, 'APM' from generate_series(1, 100) n")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command(), env=environment(dsn), stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode != 0
    assert b"No space left on device; the export is truncated" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_reader_that_leaves_is_no_success(dsn, execute, fleet):
    execute("insert into device (device_id, type) select 'N' || n, 'APM' from generate_series(1, 2000) n")
    process = subprocess.Popen(command(), env=environment(dsn), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    told = process.stderr.read()
    process.stderr.close()
    assert process.wait() != 0
    assert b"Traceback" not in told
    assert b"Broken pipe; the export is truncated" in told


def test_a_table_that_the_trail_does_not_know_is_named(cli, fleet):
    told = cli("audit", "export", "--table", "devcie", "--table", "device")
    assert "the trail has no row about a table devcie" in told.stderr
    assert "table device\n" not in told.stderr


def test_a_wrong_time_is_told(cli):
    assert "write it as" in cli("audit", "export", "--since", "yesterday", exit_code=2).stderr


def test_memory_does_not_grow_with_the_trail(dsn, execute, fleet, tmp_path):
    """Peak memory of the process: with a few rows, then with 50,000 of half a kilobyte."""

    def peak():
        script = (
            "import resource, sys; from authbackend.cli import main\n"
            "try: main(['audit', 'export', '--out', sys.argv[1]], standalone_mode=False)\n"
            "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        done = subprocess.run(
            [sys.executable, "-c", script, out], env=environment(dsn), capture_output=True, text=True, check=True
        )
        return int(done.stdout), out.read_bytes().count(b"\n")

    small, few = peak()
    execute(
        "insert into audit (operation, entity, key, after) select 'UPDATE', 'device', 'd' || n,"
        " jsonb_build_object('status_reason', repeat('x', 500)) from generate_series(1, 50000) n"
    )
    large, many = peak()
    assert many - few == 50_000
    assert large - small < 12_000, "kilobytes"
