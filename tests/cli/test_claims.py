"""Commands claim only what was seen to be done; they name the rest and exit with status 8."""

import json

import pytest

NODE = "rabbit@one"
LISTED = {"number": "6", "installed": [NODE], "behind": [], "silent": [], "unknown": []}
RECEIPT = {
    "took_s": 0.1,
    "closed": {NODE: 1},
    "queues_deleted": [],
    "subscriptions_removed": [],
    "untold": 0,
    "lists": LISTED,
    "checked_at": "2026-11-25T00:10:26.951+00:00",
}


@pytest.fixture
def enforcing(execute):
    """Enforcement is on for one cluster, but no replica does its tasks."""
    execute("insert into enforcement_setup (hold_limit_s) values (30)")
    execute("insert into enforcement_cluster (name) values ('rabbit')")


@pytest.fixture
def serial(cli, ca, fleet):
    """The serial number of a certificate of D1."""
    cli("device", "enroll", "D1", "--ca", ca, "--generate")
    return json.loads(cli("cert", "list", "--json").stdout)[0]["serial"]


@pytest.fixture
def finish(execute):
    """Finish all tasks with this receipt, as a replica does."""

    def call(**changes):
        receipt = json.dumps({**RECEIPT, **changes})
        execute(f"update enforcement set state = 'done', finished_at = now(), receipt = '{receipt}'")

    return call


def test_a_certificate_that_was_revoked_before_is_waited_for_as_well(cli, enforcing, serial, finish):
    waiting = ("cert", "revoke", serial, "--wait", "--timeout", "0.2")
    assert "not begun" in cli(*waiting, exit_code=8).stderr
    again = cli(*waiting, exit_code=8)
    assert "revoked already" in again.stdout
    assert "not yet confirmed for existing connections" in again.stderr
    finish()
    told = cli(*waiting).stdout
    assert f"task 1: certificate {serial} (revoked) on rabbit is done" in told
    assert "last look at 2026-11-25T00:10:26.951+00:00: nothing connected with it was found" in told
    assert "is done" in cli("cert", "revoke", "--device", "D1", "--all", "--wait").stdout


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"lists": {**LISTED, "installed": [], "unknown": [NODE]}}, f"{NODE} is not known to check a revocation list"),
        ({"untold": 3}, "3 connections were left open: the brokers report too little"),
    ],
)
def test_a_receipt_that_leaves_something_open_is_no_success(cli, enforcing, serial, finish, changes, fault):
    cli("cert", "revoke", serial)
    finish(**changes)
    assert fault in cli("cert", "revoke", serial, "--wait", exit_code=8).stderr


def test_a_host_that_reports_no_more_is_named(cli, enforcing, serial, execute):
    cli("cert", "revoke", serial)
    lists = json.dumps({"lists": {**LISTED, "installed": [], "silent": [NODE]}})
    execute(f"update enforcement set state = 'checking', receipt = '{lists}'")
    told = cli("cert", "revoke", serial, "--wait", "--timeout", "0.2", exit_code=8)
    assert f"crl sync on the host of {NODE} no longer reports" in told.stderr
    assert f"no longer known to have that list, because crl sync no longer reports: {NODE}" in told.stdout
    assert "no longer reports" in cli("enforcement", "list").stdout


def test_a_revocation_of_which_no_receipt_is_kept_is_not_known_to_be_done(cli, enforcing, serial, execute):
    cli("cert", "revoke", serial)
    execute("delete from enforcement")
    told = cli("cert", "revoke", serial, "--wait", exit_code=8)
    assert f"there is no receipt of the revocation of {serial}" in told.stderr


def test_where_nobody_enforces_a_revoked_certificate_is_not_done(cli, serial):
    told = cli("cert", "revoke", serial, "--wait", exit_code=8).stderr
    assert "existing connections were not checked" in told
    assert "enforcement is off" in cli("cert", "revoke", serial, "--wait", exit_code=8).stderr


def test_what_has_nothing_to_revoke_says_so(cli, fleet):
    assert "nothing to revoke" in cli("cert", "revoke", "--device", "D1", "--all", "--wait").stdout


def test_a_device_that_was_revoked_before_is_waited_for_as_well(cli, enforcing, fleet, finish):
    waiting = ("device", "revoke", "D1", "--wait", "--timeout", "0.2")
    cli(*waiting, exit_code=8)
    again = cli(*waiting, exit_code=8)
    assert "is revoked already; nothing was changed" in again.stdout
    assert "not yet confirmed for existing connections" in again.stderr
    finish(lists={})
    assert "nothing more to end was found" in cli(*waiting).stdout


def test_who_schedules_is_told_when_nobody_makes_scheduled_changes(cli, fleet, execute):
    later = "2035-01-31T12:00:00Z"
    for command in (("suspend", "D1", "--until", later), ("revoke", "D2", "--at", later)):
        assert "scheduled changes are not made: enforcement is off" in cli("device", *command).stderr
    execute("insert into enforcement_setup (hold_limit_s) values (30)")
    assert cli("device", "revoke", "D2", "--at", later).stderr == ""


def test_a_policy_file_that_cannot_be_written_leaves_the_one_before(cli, fleet, tmp_path):
    cli("policy", "export", "-o", "fleet.yaml")
    before = (tmp_path / "fleet.yaml").read_bytes()
    (tmp_path / "folder").mkdir()
    cli("policy", "export", "-o", "nosuch/fleet.yaml", exit_code=2)
    cli("policy", "export", "-o", "fleet.yaml")
    assert (tmp_path / "fleet.yaml").read_bytes() == before
    assert (tmp_path / "fleet.yaml").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
