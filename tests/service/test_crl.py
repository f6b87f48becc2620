"""CRLs on the health listener: served from memory, and signed by the replica that has the authority."""

import asyncio
import contextlib
import os
import re
import shutil
import sys
import tempfile
from datetime import datetime, timedelta
from pathlib import Path

import aiohttp
import asyncpg
import pytest
from cryptography import x509

from authbackend.certificates import crl_publisher
from authbackend.certificates.crl_endpoint import PublishedCrls
from authbackend.certificates.crl_publisher import open_authority, save_authority, sign
from authbackend.errors import ConfigurationError
from authbackend.pki.ca import AuthorityFolder, create_authority
from authbackend.pki.crl import entries_of
from authbackend.service import components
from authbackend.settings import Pki, load
from tests.service.conftest import until
from tests.support.postgres import connected

PASSPHRASE = "correct horse battery"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("authority")
    create_authority(
        folder / "fleet", "fleet", PASSPHRASE.encode(), b"staple in a vault", root_folder=folder / "offline"
    )
    (folder / "passphrase").write_text(PASSPHRASE + "\n")
    return folder


@pytest.fixture
def authority(made):
    return AuthorityFolder.open(made / "fleet", PASSPHRASE.encode())


@contextlib.asynccontextmanager
async def serving(dsn, made=None):
    """Run a service; if given the folder of an authority, it signs that authority's list."""
    environment = {
        "AUTHBACKEND_DATABASE__DSN": dsn,
        "AUTHBACKEND_BROKER__LISTEN": "127.0.0.1:0",
        "AUTHBACKEND_ADMIN__LISTEN": "127.0.0.1:0",
        "AUTHBACKEND_HEALTH__LISTEN": "127.0.0.1:0",
    }
    if made is not None:
        environment["AUTHBACKEND_PKI__AUTHORITY_DIR"] = str(made / "fleet")
        environment["AUTHBACKEND_PKI__PASSPHRASE_FILE"] = str(made / "passphrase")
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        async with (
            components.service(load(environment), folder) as where,
            aiohttp.ClientSession(where["health"]) as asking,
        ):
            yield asking
    finally:
        shutil.rmtree(folder)


@pytest.fixture
async def revoked(connection, authority):
    """Record the authority and one revoked certificate."""
    await save_authority(connection, authority)
    await add(connection, authority, "a1", "revoked")


async def add(connection, authority, serial, state="active"):
    await connection.execute(
        "insert into certificate (fingerprint, serial, issuer, subject, common_name, not_before, not_after, state)"
        "values ($1, $2, $3, 'CN=x', 'x', now(), now() + interval '5 days', $4)",
        *(serial.rjust(64, "0"), serial, authority.subject, state),
    )


async def ask(asking, path="/crl/fleet.crl", **headers):
    async with asking.get(path, headers=headers) as answer:
        return answer.status, await answer.read(), answer.headers


async def published(asking):
    """Wait for a list and return it."""

    async def is_there():
        status, body, headers = await ask(asking)
        return (body, headers) if status == 200 else None

    return await until(is_there, "a list is served")


def serials(body):
    return {entry.serial for entry in entries_of(body)}


async def test_a_replica_with_the_authority_signs_and_serves(dsn, made, revoked):
    async with serving(dsn, made) as asking:
        body, headers = await published(asking)
        assert serials(body) == {"a1"}
        assert headers["Content-Type"] == "application/pkix-crl"
        assert headers["Cache-Control"] == "no-cache"
        assert "GMT" in headers["Last-Modified"]
        assert (await ask(asking, **{"If-None-Match": headers["ETag"]}))[0] == 304
        status, text, _ = await ask(asking, "/crl/nosuch.crl")
        assert (status, b"nosuch" in text) == (404, True)


async def test_a_row_revoked_with_psql_is_on_the_list_at_once_for_who_waits(dsn, made, revoked, connection, authority):
    await add(connection, authority, "b2")
    async with serving(dsn, made) as asking:
        _, headers = await published(asking)
        waiting = asyncio.create_task(ask(asking, **{"If-None-Match": headers["ETag"], "Prefer": "wait=30"}))
        await connection.execute("update certificate set state = 'revoked' where serial = 'b2'")
        status, body, _ = await asyncio.wait_for(waiting, 30)
        assert (status, serials(body)) == (200, {"a1", "b2"})


async def test_who_waits_is_answered_when_nothing_changes_and_when_the_service_stops(dsn, made, revoked, monkeypatch):
    somebody_waits = asyncio.Event()
    original = PublishedCrls._next

    async def watched(*arguments):
        somebody_waits.set()
        return await original(*arguments)

    monkeypatch.setattr(PublishedCrls, "_next", watched)
    async with contextlib.AsyncExitStack() as stack:
        async with serving(dsn, made) as asking:
            _, headers = await published(asking)
            etag = headers["ETag"]
            assert (await ask(asking, **{"If-None-Match": etag, "Prefer": "respond-async, wait=0"}))[0] == 304
            patient = await stack.enter_async_context(aiohttp.ClientSession(asking._base_url))
            somebody_waits.clear()
            waiting = asyncio.create_task(ask(patient, **{"If-None-Match": etag, "Prefer": "wait=60"}))
            await asyncio.wait_for(somebody_waits.wait(), 30)
        assert (await asyncio.wait_for(waiting, 30))[0] == 304


async def test_one_of_two_replicas_signs(dsn, made, revoked, connection):
    async with serving(dsn, made) as one, serving(dsn, made) as other:
        assert (await published(one))[0] == (await published(other))[0]
        signed = "select count(*) from audit where entity = 'crl'"
        assert await connection.fetchval(signed) == 1


async def test_revocations_at_once_are_all_listed(dsn, revoked, connection, authority):
    serials_of_all = [f"{n:x}" for n in range(0x100, 0x10C)]
    for serial in serials_of_all:
        await add(connection, authority, serial)

    async def revoke(serial):
        async with connected(dsn) as own, own.transaction():
            await own.execute("update certificate set state = 'revoked' where serial = $1", serial)
            assert await sign(own, authority, timedelta(days=7)) is not None

    await asyncio.gather(*map(revoke, serials_of_all))
    assert serials(await connection.fetchval("select der from crl")) == {"a1", *serials_of_all}
    numbers = await connection.fetch("select after->>'number' as number from audit where entity = 'crl' order by id")
    assert len(numbers) == len({row["number"] for row in numbers}) == len(serials_of_all)


async def test_the_command_signs_as_long_as_it_runs(dsn, made, revoked, connection, authority):
    await add(connection, authority, "b2")
    command = [sys.executable, "-m", "authbackend", "crl", "sign", made / "fleet", "--watch"]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("AUTHBACKEND_")},
        "AUTHBACKEND_DATABASE__DSN": dsn,
        "AUTHBACKEND_CA_PASSPHRASE": PASSPHRASE,
    }
    process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=asyncio.subprocess.PIPE)
    try:
        assert b"1 revoked" in await asyncio.wait_for(process.stdout.readline(), 30)
        await connection.execute("update certificate set state = 'revoked' where serial = 'b2'")

        async def listed():
            return serials(await connection.fetchval("select der from crl")) == {"a1", "b2"}

        await until(listed, "it has signed again")
    finally:
        process.terminate()
        await process.wait()
        process._transport.close()


async def test_the_host_of_a_node_reports_what_it_has_installed_and_whoever_restores_the_database_signs_above_it(
    dsn, made, revoked, connection, tmp_path
):
    await connection.execute("create role host login password 'x'; grant execute on function crl_report to host")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("AUTHBACKEND_")},
        "AUTHBACKEND_DATABASE__DSN": re.sub(r"//[^@/]*@?", "//host:x@", dsn, count=1),
    }
    process = None
    try:
        async with serving(dsn, made) as asking:
            await published(asking)
            number = await connection.fetchval("select number from crl")
            options = ("--ca", made / "fleet" / "ca.pem", "--dir", tmp_path / "crl", "--node", "rabbit@one")
            command = [sys.executable, "-m", "authbackend", "crl", "sync", "--url", asking._base_url / "crl/fleet.crl"]
            process = await asyncio.create_subprocess_exec(*map(str, [*command, *options]), env=environment)

            async def reported():
                return await connection.fetchval("select number from crl_installed where node = 'rabbit@one'")

            await until(reported, "it has reported")
            assert await reported() == number
            assert list((tmp_path / "crl").iterdir())
            assert await connection.fetchval("select role from crl_reporter where node = 'rabbit@one'") == "host"
            counts = await connection.fetchval("select counts_until - reported_at from crl_installed")
            assert abs(counts - timedelta(seconds=220)) < timedelta(seconds=1)  # the clock is read twice
            await connection.execute("update crl_installed set number = $1", number + 10**9)
            await connection.execute("notify crl")

            async def above():
                return await connection.fetchval("select number from crl") > number + 10**9

            await until(above, "the next list is above what the host has")
    finally:
        if process is not None:
            process.terminate()
            await process.wait()
            process._transport.close()
        await connection.execute("drop owned by host; drop role host")


async def test_a_list_half_through_its_lifetime_is_signed_again(dsn, made, revoked, connection):
    async with serving(dsn, made) as asking:
        await published(asking)
    before = await connection.fetchval("select number from crl")
    await connection.execute(
        "update crl set this_update = now() - interval '4 days', next_update = now() + interval '3 days'"
    )
    async with serving(dsn, made):

        async def signed_again():
            return await connection.fetchval("select number from crl") > before

        await until(signed_again, "it is signed again")


async def test_what_a_version_without_that_record_has_listed_is_put_on_record(dsn, made, revoked, connection):
    async with serving(dsn, made) as asking:
        await published(asking)
    await connection.execute("delete from crl_listed")
    async with serving(dsn, made):

        async def on_record():
            return await connection.fetchval("select count(*) from crl_listed") == 1

        await until(on_record, "the entries of the list are recorded")


async def test_a_list_from_a_clock_that_was_ahead_is_signed_again_at_once(dsn, made, revoked, connection):
    async with serving(dsn, made) as asking:
        await published(asking)
    ahead = int((await connection.fetchval("select now() + interval '400 days'")).timestamp() * 1000)
    await connection.execute(
        "update crl set this_update = now() + interval '400 days', next_update = now() + interval '407 days', number = $1, der = der || '\\x00'",
        ahead,
    )
    async with serving(dsn, made):

        async def in_its_time():
            return await connection.fetchval("select this_update <= now() and number = $1 from crl", ahead + 1)

        await until(in_its_time, "it is signed again, with a higher number")


async def test_a_list_is_signed_by_the_clock_of_the_database(connection, authority, revoked, monkeypatch):
    class Ahead(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=400)

    monkeypatch.setattr(crl_publisher, "datetime", Ahead, raising=False)
    async with connection.transaction():
        signed = await sign(connection, authority, timedelta(days=7))
    assert signed.this_update <= await connection.fetchval("select now()")
    assert signed.number <= (await connection.fetchval("select clock_timestamp()")).timestamp() * 1000


async def test_lists_are_served_while_the_database_is_away(postgres, database, dsn, made, revoked):
    async with serving(dsn, made) as asking:
        body, _ = await published(asking)
        async with contextlib.AsyncExitStack() as stack:
            admin = await asyncpg.connect(postgres.dsn("postgres"))
            stack.push_async_callback(admin.close)
            await admin.execute(f"alter database {database} allow_connections false")
            stack.push_async_callback(admin.execute, f"alter database {database} allow_connections true")
            await admin.execute(f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{database}'")

            async def away():
                status, _, _ = await ask(asking, "/metrics")
                _, text, _ = await ask(asking, "/health/ready")
                return status == 200 and b'"fault": null' not in text

            await until(away, "the service has noticed")
            assert (await ask(asking))[1] == body


async def test_an_authority_the_database_does_not_know_is_not_signed_for_and_others_are_served(
    dsn, made, connection, authority, tmp_path
):
    create_authority(
        tmp_path / "fleet", "fleet", PASSPHRASE.encode(), b"staple in a vault", root_folder=tmp_path / "offline"
    )
    await connection.execute(
        "insert into authority values ('other', 'CN=other', '-----BEGIN CERTIFICATE-----', now());"
        "insert into crl values ('other', 1, now(), now() + interval '1 day', '\\x01')"
    )
    async with serving(dsn, made) as asking:

        async def other_is_served():
            return (await ask(asking, "/crl/other.crl"))[0] == 200

        await until(other_is_served, "the other list is served")
        assert (await ask(asking))[0] == 404


async def test_metrics_tell_of_lists_and_of_what_ends(dsn, made, revoked, connection, authority):
    await add(connection, authority, "c3")
    async with serving(dsn, made) as asking:
        await published(asking)

        async def counted():
            text = (await ask(asking, "/metrics"))[1].decode()
            return text if "authbackend_certificates_expired_active 0.0" in text else None

        text = await until(counted, "it has counted")
    assert 'authbackend_certificates_expiring{days="7",device_type="unknown"} 1.0' in text
    assert 'authbackend_authority_not_after_timestamp_seconds{authority="fleet"}' in text
    assert 'authbackend_crl_next_update_timestamp_seconds{authority="fleet"}' in text
    assert 'authbackend_crl_this_update_timestamp_seconds{authority="fleet"}' in text
    assert "authbackend_certificates_expiring_on_one_day 1.0" in text


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"passphrase_file": None}, "needs pki.passphrase_file"),
        ({"passphrase_file": Path("/nonexistent")}, "cannot read the passphrase file"),
        ({"authority_dir": Path("/nonexistent")}, "pki.authority_dir: .*authbackend ca init"),
    ],
)
def test_an_authority_that_cannot_be_taken_up_is_told_before_anything_starts(made, changes, fault):
    values = {"authority_dir": made / "fleet", "passphrase_file": made / "passphrase", **changes}
    with pytest.raises(ConfigurationError, match=fault):
        open_authority(Pki(**values))


async def test_the_authority_is_read_again_when_its_files_change(dsn, made, revoked, connection, authority, tmp_path):
    """A partly written file changes nothing; complete files with another key sign the next list."""
    shutil.copytree(made, tmp_path / "made")
    folder = tmp_path / "made" / "fleet"
    create_authority(
        tmp_path / "new" / "fleet",
        "fleet",
        b"another passphrase",
        b"staple in a vault",
        root_folder=tmp_path / "new" / "offline",
    )
    new = AuthorityFolder.open(tmp_path / "new" / "fleet", b"another passphrase")

    async def signed_by(authority, *wanted):
        async def signed():
            der = await connection.fetchval("select der from crl")
            if serials(der) != {"a1", *wanted}:
                return False
            return x509.load_der_x509_crl(der).is_signature_valid(authority.certificate.public_key())

        await until(signed, f"{wanted} are on a list of the right key")

    async with serving(dsn, tmp_path / "made") as asking:
        await published(asking)
        (folder / "intermediate.key").write_text("-----BEGIN ENCR")
        await add(connection, authority, "b2", "revoked")
        await signed_by(authority, "b2")
        for file in (tmp_path / "new" / "fleet").iterdir():
            shutil.copy(file, folder / file.name)
        (tmp_path / "made" / "passphrase").write_text("another passphrase\n")
        await add(connection, authority, "c3", "revoked")
        await signed_by(new, "b2", "c3")
