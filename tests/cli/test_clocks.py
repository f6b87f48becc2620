"""Certificates go by the database's clock, not by that of the machine on which the command runs."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from authbackend.pki.parsing import read_certificate
from tests.cli.test_certificates import request
from tests.support.clock import set_time_of_day

RIGHT = datetime.now
DAYS = [-400, 400]
MINUTES = timedelta(minutes=10)


@pytest.fixture(params=DAYS)
def wrong_clock(request, monkeypatch):
    set_time_of_day(monkeypatch, timedelta(days=request.param))


def begins_now(path, lifetime_days=398):
    certificate = read_certificate(path.read_bytes())
    assert abs(certificate.not_valid_before_utc - RIGHT(UTC)) < MINUTES
    assert abs(certificate.not_valid_after_utc - RIGHT(UTC) - timedelta(days=lifetime_days)) < MINUTES


def test_what_is_issued_begins_by_the_clock_of_the_database(cli, ca, fleet, execute, tmp_path, wrong_clock):
    (tmp_path / "two.csr").write_bytes(request("two"))
    cli("device", "enroll", "D1", "--ca", ca, "--generate")
    cli("device", "enroll", "D2", "--ca", ca, "--csr", "two.csr")
    cli("ca", "issue-server", ca, "--name", "rabbitmq", "--out", "server")
    cli("ca", "issue-client", ca, "--name", "backend")
    for name in ("D1", "D2", "server", "backend"):
        begins_now(tmp_path / f"{name}.pem")
    cli("ca", "renew", ca, "--server", "server.pem")
    begins_now(tmp_path / "server.pem")
    beginnings = execute("select not_before, added_at from certificate")
    assert len(beginnings) == 5
    assert all(abs(row["not_before"] - row["added_at"]) < MINUTES for row in beginnings)


def test_what_ends_soon_is_told_by_the_clock_of_the_database(cli, fleet, execute, wrong_clock):
    execute(
        "insert into certificate (fingerprint, serial, issuer, subject, common_name, not_before, not_after)"
        " select repeat(n::text, 64), n::text, 'CN=CA', 'CN=x', 'x', now() - interval '2 years', now() + n * interval '1 day' - interval '5 days 1 hour'"
        " from generate_series(1, 9) n"
    )
    listed = json.loads(cli("cert", "list", "--expiring", "3d", "--json").stdout)
    assert [row["serial"] for row in listed] == ["6", "7", "8"]


def test_days_on_which_many_end_are_named_by_the_clock_of_the_database(cli, fleet, execute, wrong_clock):
    execute(
        "insert into certificate (fingerprint, serial, issuer, subject, common_name, not_before, not_after)"
        " select lpad(to_hex(n), 64, '0'), to_hex(n), 'CN=CA', 'CN=n' || n, 'n' || n, now() - interval '1 year', now() + interval '5 days'"
        " from generate_series(1, 60) n"
    )
    assert "many expire on one day: 60" in cli("cert", "list", "--expiring", "30d").stdout


def test_revocations_and_lists_have_the_time_of_the_database(cli, ca, fleet, execute, wrong_clock):
    cli("device", "enroll", "D1", "--ca", ca, "--generate")
    cli("cert", "revoke", "--device", "D1", "--all", "--ca", ca)
    (row,) = execute("select revoked_at from certificate")
    (crl,) = execute("select this_update, next_update from crl")
    assert abs(row["revoked_at"] - RIGHT(UTC)) < MINUTES
    assert abs(crl["this_update"] - RIGHT(UTC)) < MINUTES
    assert "until" in cli("crl", "sign", ca).stdout


def test_an_authority_that_was_made_by_a_clock_that_is_ahead_issues_nothing(cli, fleet, execute, tmp_path, monkeypatch):
    with monkeypatch.context() as wrong:
        set_time_of_day(wrong, timedelta(days=400))
        cli("ca", "init", "early")
    refused = cli("device", "enroll", "D1", "--ca", "early", "--generate", exit_code=2).stderr
    assert "authority early is not valid before" in refused
    assert execute("select * from certificate") == []
    assert not (tmp_path / "D1.pem").exists()


def test_a_clock_that_is_far_ahead_does_not_end_the_authority(cli, ca, fleet, tmp_path, monkeypatch):
    set_time_of_day(monkeypatch, timedelta(days=6 * 365))
    cli("device", "enroll", "D1", "--ca", ca, "--generate")
    begins_now(tmp_path / "D1.pem")


def test_all_but_the_newest_keeps_what_is_valid_now(cli, ca, fleet, execute):
    """A certificate issued earlier, by a clock that was ahead, begins in the future: the device could not log in with it."""
    execute(
        "insert into certificate (fingerprint, serial, issuer, subject, common_name, not_before, not_after)"
        " values (repeat('a', 64), 'a1', 'CN=CA', 'CN=D1', 'D1', now() + interval '400 days', now() + interval '800 days')"
    )
    cli("device", "enroll", "D1", "--ca", ca, "--generate")
    cli("cert", "revoke", "--device", "D1", "--all-but-newest")
    assert [row["serial"] for row in execute("select serial from certificate where state = 'revoked'")] == ["a1"]


@pytest.mark.parametrize("days", DAYS)
def test_without_a_database_the_clock_of_the_machine_is_all_there_is(cli, ca, tmp_path, monkeypatch, days):
    if days < 0:
        set_time_of_day(monkeypatch, timedelta(days=days))
        refused = cli("ca", "issue-server", ca, "--name", "r", "--offline", exit_code=2).stderr
        assert "the clock was wrong when it was created, or is wrong now" in refused
        return
    set_time_of_day(monkeypatch, timedelta(days=days))
    cli("ca", "issue-server", ca, "--name", "r", "--offline")
    certificate = read_certificate((tmp_path / "r.pem").read_bytes())
    assert abs(certificate.not_valid_before_utc - RIGHT(UTC) - timedelta(days=days)) < MINUTES


@pytest.mark.usefixtures("wrong_clock")
def test_what_is_scheduled_is_past_or_not_by_the_clock_of_the_database(cli, fleet, execute):
    (row,) = execute("select now() + interval '1 h' as soon, now() - interval '1 h' as past")
    cli("device", "revoke", "D1", "--at", row["soon"].isoformat())
    assert "is in the past" in cli("device", "revoke", "D2", "--at", row["past"].isoformat(), exit_code=2).stderr
