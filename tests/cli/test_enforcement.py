"""Scheduled changes, and what the commands report of enforcement."""

import asyncio
import json

import pytest

from tests.cli.test_commands import cli, policy, rows  # noqa: F401 - fixtures
from tests.support.postgres import connected, run


def test_a_suspension_that_ends_by_itself_and_a_revocation_in_the_future(cli, policy, dsn):  # noqa: F811
    said = cli("device", "suspend", "D1", "--reason", "audit", "--until", "2035-01-31T12:00:00Z").stdout
    assert "is suspended" in said
    assert "to be active again at 2035-01-31T12:00:00+00:00" in said
    said = cli("device", "revoke", "D2", "--reason", "contract ends", "--at", "2035-02-01T00:00:00Z").stdout
    assert said.strip() == "device D2 is to be revoked at 2035-02-01T00:00:00+00:00"
    shown = json.loads(cli("device", "show", "D2", "--json").stdout)
    assert shown["status"] == "active"
    assert [(each["status"], each["reason"], each["actor"], each["claimed_by"]) for each in shown["scheduled"]] == [
        ("revoked", "contract ends", "postgres", "alice")
    ]
    assert "revoked at 2035-02-01T00:00:00+00:00, by postgres (says alice)" in cli("device", "show", "D2").stdout
    assert [
        row["claimed_by"] for row in rows(dsn, "select claimed_by from audit where entity = 'device_schedule'")
    ] == ["alice"] * 2


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("revoke", "D1", "--at", "2020-01-01"), 2, "is in the past"),
        (("revoke", "D1", "--at", "soon"), 2, "write it as"),
        (("revoke", "nobody", "--at", "2035-01-01"), 3, "no device has the id"),
        (("suspend", "D1", "--until", "2020-01-01"), 2, "is in the past"),
    ],
)
def test_what_cannot_be_scheduled_changes_nothing(cli, policy, dsn, arguments, status, said):  # noqa: F811
    assert said in cli("device", *arguments, exit_code=status).stderr
    assert rows(dsn, "select count(*) as n from device_schedule")[0]["n"] == 0
    assert json.loads(cli("device", "show", "D1", "--json").stdout)["status"] == "active"


def test_a_change_that_is_late_is_named_with_or_without_a_lock_on_its_row(cli, policy, dsn, execute):  # noqa: F811
    execute(
        "alter table device_schedule disable trigger user;"
        "insert into device_schedule (device_id, at, status) values ('D1', '2026-01-31T12:00:00Z', 'revoked')"
    )
    late = "late: device D1 should have become revoked at 2026-01-31 12:00:00 UTC; "
    assert late + "no lock on its row is seen" in cli("enforcement", "list").stdout.splitlines()

    async def locked():
        async with connected(dsn) as connection, connection.transaction():
            await connection.execute("select from device where device_id = 'D1' for update")
            return await asyncio.to_thread(cli, "enforcement", "list")

    assert f"{late}its row is locked by " in run(locked()).stdout


def test_waiting_says_what_is_not_done_on_the_brokers(cli, policy, dsn):  # noqa: F811
    assert "enforcement is off" in cli("device", "suspend", "D1", "--wait").stderr
    rows(dsn, "insert into enforcement_setup (hold_limit_s) values (30) returning 1")
    rows(dsn, "insert into enforcement_cluster (name) values ('rabbit') returning 1")
    result = cli("device", "revoke", "D1", "--wait", "--timeout", "0.2", exit_code=0)
    assert "enforcement" not in result.stderr  # it was suspended, so nothing of it is connected
    result = cli("device", "revoke", "D2", "--wait", "--timeout", "0.2", exit_code=8)
    assert "is revoked, version" in result.stdout
    assert "not yet confirmed for existing connections" in result.stderr
    assert "device D2" in result.stderr
    listed = json.loads(cli("enforcement", "list", "--state", "open", "--json").stdout)
    assert [(task["name"], task["causes"], task["by"], task["claimed_by"]) for task in listed] == [
        ("D2", ["revoked"], "postgres", "alice")
    ]
    assert "postgres (says alice)" in cli("enforcement", "list").stdout
    assert "by postgres (says alice), version" in cli("enforcement", "show", listed[0]["id"]).stdout
    assert "D2" in cli("enforcement", "list").stdout
    assert "not begun" in cli("enforcement", "show", listed[0]["id"]).stdout
    assert "1 tasks are due now" in cli("enforcement", "retry").stdout
    assert "no enforcement task 999" in cli("enforcement", "show", "999", exit_code=3).stderr
    assert "no sweep has run yet" in cli("enforcement", "sweeps").stdout
    cli("enforcement", "disable")
    cli("device", "reinstate", "D2")
    cli("device", "revoke", "D2")
    assert len(json.loads(cli("enforcement", "list", "--json").stdout)) == 1
