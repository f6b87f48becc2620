"""The tables of certificates, authorities and lists reject invalid rows, and notify about changes."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from authbackend.postgres import certificates, crls
from authbackend.postgres.statements import load_statements
from tests.postgres.test_constraints import add_device, add_type, refused
from tests.support.postgres import connected

FINGERPRINT = "ab" * 32
GOOD = {
    "fingerprint": FINGERPRINT,
    "serial": "1f",
    "issuer": "CN=CA",
    "subject": "CN=D1",
    "common_name": "D1",
    "not_before": "2026-01-01Z",
    "not_after": "2099-01-01Z",
}
PEM = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"


def insert(**changes: Any) -> str:
    row = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    values = ", ".join("'" + str(value).replace("'", "''") + "'" for value in row.values())
    return f"insert into certificate ({', '.join(row)}) values ({values})"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"fingerprint": "AB" * 32}, "64 lower-case hexadecimal digits"),
        ({"fingerprint": "ab:cd"}, "64 lower-case hexadecimal digits"),
        ({"fingerprint": FINGERPRINT + "\n"}, "64 lower-case hexadecimal digits"),
        ({"serial": "1F"}, "lower-case hexadecimal digits"),
        ({"serial": "0x1f"}, "lower-case hexadecimal digits"),
        ({"serial": "1:f"}, "lower-case hexadecimal digits"),
        ({"serial": "01f"}, "without leading zeros"),
        ({"serial": "00"}, "without leading zeros"),
        ({"serial": "-0"}, "without leading zeros"),
        ({"serial": "-"}, "lower-case hexadecimal digits"),
        ({"serial": "1-"}, "lower-case hexadecimal digits"),
        ({"serial": ""}, "1 to 256"),
        ({"serial": "f" * 257}, "1 to 256"),
        ({"issuer": ""}, "issuer (not empty)"),
        ({"subject": "x" * 2049}, "at most 2048 bytes"),
        ({"common_name": "x" * 1025}, "at most 1024"),
        ({"not_after": "2025-01-01Z"}, "must begin before it ends"),
        ({"not_after": "infinity"}, "years 1950 to 9999"),
        ({"not_before": "-infinity"}, "years 1950 to 9999"),
        ({"state": "held"}, "possible are active and revoked"),
        ({"state": "revoked", "reason": "certificateHold"}, "a revocation is final here"),
        ({"state": "revoked", "reason": "removeFromCRL"}, "a revocation is final here"),
        ({"reason": "x" * 1025}, "at most 1024 bytes"),
        ({"revoked_at": "2026-01-01Z"}, "revoked_at goes with the state revoked"),
        ({"state": "revoked", "revoked_at": "infinity"}, "years 1950 to 9999"),
    ],
)
async def test_a_wrong_certificate_is_refused_with_the_fault(
    scratch: asyncpg.Connection, changes: dict[str, Any], fault: str
) -> None:
    assert fault in await refused(scratch, insert(**changes))


@pytest.mark.parametrize(
    "serial", ["1", "7" + "f" * 39, "f" * 39, "0", "-1", "-" + "f" * 256, "8" + "0" * 39, "f" * 256]
)
async def test_every_serial_number_that_brokers_let_in_is_taken(scratch: asyncpg.Connection, serial: str) -> None:
    await scratch.execute(insert(serial=serial))


async def test_two_certificates_of_an_issuer_have_two_serial_numbers(scratch: asyncpg.Connection) -> None:
    await scratch.execute(insert())
    assert "serial_number_of_issuer_is_on_record" in await refused(scratch, insert(fingerprint="cd" * 32))
    await scratch.execute(insert(fingerprint="cd" * 32, issuer="CN=Other"))


async def test_a_certificate_finds_its_device_and_follows_it(scratch: asyncpg.Connection) -> None:
    await add_type(scratch)
    await add_device(scratch, "d1", "D1")
    await scratch.execute(insert())
    assert await scratch.fetchval("select device_id from certificate") == "d1"
    await scratch.execute("update device set device_id = 'd2'")
    assert await scratch.fetchval("select device_id from certificate") == "d2"
    assert await scratch.fetchval("select state from certificate") == "active"
    await scratch.execute("delete from device")
    assert "there is no device with the id 'nosuch'" in await refused(
        scratch, insert(fingerprint="cd" * 32, serial="2", device_id="nosuch")
    )


OF = "fingerprint, device_id, state, reason, revoked_at is not null as dated"
REVOKED = (None, "revoked", "cessationOfOperation", True)


async def states(connection: asyncpg.Connection) -> dict[str, tuple[Any, ...]]:
    """Return the certificates on record, by the first two digits of their fingerprints."""
    rows = await connection.fetch(f"select {OF} from certificate")
    return {row["fingerprint"][:2]: tuple(row)[1:] for row in rows}


def numbered(digits: str, **changes: Any) -> str:
    return insert(fingerprint=digits * 32, serial=digits, **changes)


@pytest.mark.parametrize("replication_role", ["origin", "replica"])
async def test_a_deleted_device_takes_its_certificates_with_it(
    scratch: asyncpg.Connection, replication_role: str
) -> None:
    """All that could be used in its name, but none of another device; those revoked before stay as they are."""
    await add_type(scratch)
    await scratch.execute(numbered("a1"))  # not linked to the device, but usable to log in as it
    for device_id in ("d1", "other"):
        await add_device(scratch, device_id, device_id.upper())
    await scratch.execute(numbered("b1"))
    await scratch.execute(numbered("b2", state="revoked", reason="keyCompromise"))
    await scratch.execute(numbered("b3", common_name="renamed since", device_id="d1"))
    await scratch.execute(numbered("c1", common_name="OTHER"))
    await scratch.execute(numbered("c2", common_name="nobody"))
    await scratch.execute(f"set local session_replication_role = {replication_role}")
    await scratch.execute("select set_config('authbackend.actor', 'kim', true)")
    await scratch.execute("delete from device where device_id = 'd1'")
    assert await states(scratch) == {
        "a1": REVOKED,
        "b1": REVOKED,
        "b2": (None, "revoked", "keyCompromise", True),
        "b3": REVOKED,
        "c1": ("other", "active", "", False),
        "c2": (None, "active", "", False),
    }
    told = await scratch.fetch(
        """select left(key, 2) as key, claimed_by, role = session_user as mine, before ->> 'device_id' as device_id,
        before ->> 'state' as before, after ->> 'state' as after from audit
        where entity = 'certificate' and operation = 'UPDATE' order by key"""
    )
    assert [tuple(row) for row in told] == [
        ("a1", "kim", True, None, "active", "revoked"),
        ("b1", "kim", True, "d1", "active", "revoked"),
        ("b2", "kim", True, "d1", "revoked", "revoked"),
        ("b3", "kim", True, "d1", "active", "revoked"),
    ]


async def test_a_later_device_of_that_name_gets_none_of_them(scratch: asyncpg.Connection) -> None:
    """Certificates recorded from now on belong to the new device."""
    await add_type(scratch)
    await add_device(scratch, "d1", "D1")
    await scratch.execute(numbered("b1"))
    await scratch.execute("delete from device")
    await scratch.execute(numbered("b2"))  # while there is no such device
    await add_device(scratch, "d1", "D1")
    await scratch.execute(numbered("b3"))
    mine = ("d1", "active", "", False)
    assert await states(scratch) == {"b1": REVOKED, "b2": (None, "active", "", False), "b3": mine}
    assert await certificates.link_devices(scratch, ["b1" * 32]) == 0
    assert await certificates.link_devices(scratch, ["b2" * 32]) == 1  # recorded again, now linked to it
    assert await states(scratch) == {"b1": REVOKED, "b2": mine, "b3": mine}


async def test_a_certificate_that_is_put_on_record_meanwhile_is_revoked_as_well(dsn: str) -> None:
    """The deletion waits for a transaction that adds a certificate of the device."""
    async with connected(dsn) as one, connected(dsn) as other:
        await add_type(one)
        await add_device(one, "d1", "D1")
        giving = one.transaction()
        await giving.start()
        await one.execute(insert())
        deleting = asyncio.create_task(other.execute("delete from device"))
        async with asyncio.timeout(10):
            while not await one.fetchval("select exists (select from pg_locks where not granted)"):
                await asyncio.sleep(0.01)
        await giving.commit()
        await deleting
        assert await states(one) == {"ab": REVOKED}


@pytest.mark.parametrize(
    "change",
    [
        "update device set device_id = 'd2'",
        "update device set common_name = 'D2'",
        "update device set status = 'revoked'",
        "update certificate set device_id = null",
    ],
)
async def test_other_changes_of_a_device_revoke_nothing(scratch: asyncpg.Connection, change: str) -> None:
    await add_type(scratch)
    await add_device(scratch, "d1", "D1")
    await scratch.execute(insert())
    await scratch.execute(change)
    assert await scratch.fetchval("select state from certificate") == "active"


async def test_whoever_may_delete_devices_revokes_without_a_right_on_certificates(
    scratch: asyncpg.Connection,
) -> None:
    await add_type(scratch)
    await scratch.execute(numbered("a1"))
    await add_device(scratch, "d1", "D1")
    await scratch.execute(numbered("b1"))
    await scratch.execute("create role clerk; grant select, delete on device to clerk; set local role clerk")
    await scratch.execute("delete from device")
    await scratch.execute("reset role")
    assert await states(scratch) == {"a1": REVOKED, "b1": REVOKED}


@pytest.mark.parametrize("statement", ["truncate device cascade", "truncate device_type cascade"])
async def test_emptying_the_table_of_devices_forgets_no_valid_certificate(
    scratch: asyncpg.Connection, statement: str
) -> None:
    await add_type(scratch)
    await add_device(scratch, "d1", "D1")
    await scratch.execute(insert(not_after="2026-02-01Z"))
    await scratch.execute("savepoint before")
    await scratch.execute(statement)
    await scratch.execute("rollback to before")
    await scratch.execute(numbered("b1"))
    assert "DELETE the devices instead" in await refused(scratch, statement)


async def test_deleting_devices_wakes_whoever_signs_the_list_and_enforces(connection: asyncpg.Connection) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    for channel in ("certificate", "enforcement"):
        await connection.add_listener(channel, lambda _c, _p, channel, _x: heard.put_nowait(channel))
    await connection.execute("insert into enforcement_setup (hold_limit_s) values (10)")
    await connection.execute(
        "insert into device_type (name) values ('T'); insert into device (device_id, type) values ('D1', 'T')"
    )
    await connection.execute(insert())
    async with asyncio.timeout(10):
        while {await heard.get(), await heard.get()} != {"certificate", "enforcement"}:
            pass
    await connection.execute("delete from device")
    async with asyncio.timeout(10):
        assert {await heard.get(), await heard.get()} == {"certificate", "enforcement"}
    (revoked,) = await lists_revoked(connection)
    assert revoked == ("1f", "cessationOfOperation")


async def lists_revoked(connection: asyncpg.Connection) -> list[tuple[str, str]]:
    """Return what belongs on the revocation list of the authority."""
    rows = await connection.fetch(load_statements("certificates").revoked.sql, "CN=CA", datetime.now(UTC))
    return [(row["serial"], row["reason"]) for row in rows]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("state = 'active', revoked_at = null", "revoked for good"),
        ("state = null", "revoked for good"),
        ("fingerprint = repeat('cd', 32)", "cannot be changed"),
        ("serial = '2'", "cannot be changed"),
        ("issuer = 'CN=Other'", "cannot be changed"),
        ("not_after = '2026-06-01Z'", "cannot be changed"),
        ("revoked_at = null, reason = ''", None),
    ],
)
async def test_a_revocation_is_for_good(scratch: asyncpg.Connection, change: str, fault: str | None) -> None:
    await scratch.execute(insert(state="revoked", reason="keyCompromise"))
    if fault is None:
        await scratch.execute(f"update certificate set {change}")
        assert await scratch.fetchval("select revoked_at from certificate") is not None
    else:
        assert fault in await refused(scratch, f"update certificate set {change}")
    for enabled in ("origin", "replica"):
        await scratch.execute(f"set local session_replication_role = {enabled}")
        assert "missing from the revocation list" in await refused(scratch, "delete from certificate")


@pytest.mark.parametrize("statement", ["truncate certificate", "truncate device_type cascade"])
async def test_emptying_tables_forgets_no_revocation(scratch: asyncpg.Connection, statement: str) -> None:
    await scratch.execute(insert())
    await scratch.execute(statement)
    await scratch.execute(insert(state="revoked"))
    assert "missing from the revocation list" in await refused(scratch, statement)


async def test_a_revoked_certificate_can_be_forgotten_when_it_has_ended(scratch: asyncpg.Connection) -> None:
    await scratch.execute(insert(state="revoked", not_after="2026-02-01Z"))
    await scratch.execute("delete from certificate")
    await scratch.execute(insert())
    await scratch.execute("delete from certificate")


async def test_psql_needs_to_name_the_state_only(scratch: asyncpg.Connection) -> None:
    await scratch.execute(insert())
    await scratch.execute("update certificate set state = 'revoked'")
    assert await scratch.fetchval("select revoked_at = now() from certificate")


# --- authorities and lists -----------------------------------------------------------------------------------------


async def add_authority(connection: asyncpg.Connection, name: str = "fleet") -> None:
    await connection.execute(
        "insert into authority (name, subject, certificate_pem, not_after) values ($1, 'CN=CA', $2, '2030-01-01Z')",
        *(name, PEM),
    )


@pytest.mark.parametrize(
    ("name", "pem", "fault"),
    [
        ("a/b", PEM, "letters, digits"),
        ("", PEM, "letters, digits"),
        ("fleet", "nothing", "one PEM certificate"),
        ("fleet", PEM + "-----BEGIN PRIVATE KEY-----", "never a private key"),
    ],
)
async def test_a_wrong_authority_is_refused(scratch: asyncpg.Connection, name: str, pem: str, fault: str) -> None:
    statement = (
        "insert into authority (name, subject, certificate_pem, not_after) values ($1, 'CN=CA', $2, '2030-01-01Z')"
    )
    assert fault in await refused(scratch, statement, name, pem)


LIST = "update crl set number = {}, der = '\\x{}', this_update = now()"


async def test_a_list_never_goes_back(scratch: asyncpg.Connection) -> None:
    await add_authority(scratch)
    await scratch.execute(
        "insert into crl values ('fleet', 5, now(), now() + interval '1 day', '\\x01')",
    )
    assert "older than number 5" in await refused(scratch, LIST.format(4, "01"))
    assert "another list with number 5" in await refused(scratch, LIST.format(5, "02"))
    assert "nextUpdate must be after" in await refused(scratch, "update crl set number = 6, next_update = this_update")
    await scratch.execute(LIST.format(5, "01"))
    await scratch.execute(LIST.format(10**47, "02"))
    assert "0 or more" in await refused(
        scratch, "insert into crl values ('other', -1, now(), now() + interval '1 day', '\\x01')"
    )


@pytest.mark.parametrize(
    "change",
    [
        "delete from crl",
        "truncate crl",
        "delete from authority",
        "update authority set name = 'renamed'; delete from crl",
    ],
)
async def test_numbers_go_on_after_a_list_or_its_authority_was_deleted(
    scratch: asyncpg.Connection, change: str
) -> None:
    await add_authority(scratch)
    insert_list = "insert into crl values ('{}', {}, now(), now() + interval '1 day', '\\x{}')"
    await scratch.execute(insert_list.format("fleet", 5, "01"))
    await scratch.execute(change)
    await scratch.execute("delete from authority")
    await add_authority(scratch, "again")
    assert "older than number 5" in await refused(scratch, insert_list.format("again", 4, "01"))
    assert "another list with number 5" in await refused(scratch, insert_list.format("again", 5, "02"))
    assert (await crls.fetch_moment(scratch, "CN=CA")).highest == 5
    await scratch.execute(insert_list.format("again", 6, "02"))


async def test_the_trail_tells_of_lists_without_their_contents(scratch: asyncpg.Connection) -> None:
    await scratch.execute("select set_config('authbackend.actor', 'ann', true)")
    await add_authority(scratch)
    await scratch.execute("insert into crl values ('fleet', 5, now(), now() + interval '1 day', '\\x01')")
    await scratch.execute(LIST.format(6, "02"))
    await scratch.execute(insert())
    await scratch.execute("update certificate set state = 'revoked'")
    rows = await scratch.fetch("select entity, key, operation, claimed_by, before, after from audit order by id")
    told = [(row["entity"], row["key"], row["operation"], row["claimed_by"]) for row in rows]
    assert told == [
        ("authority", "fleet", "INSERT", "ann"),
        ("crl", "fleet", "INSERT", "ann"),
        ("crl", "fleet", "UPDATE", "ann"),
        ("certificate", FINGERPRINT, "INSERT", "ann"),
        ("certificate", FINGERPRINT, "UPDATE", "ann"),
    ]
    before, after = json.loads(rows[2]["before"]), json.loads(rows[2]["after"])
    assert (before["number"], after["number"], "der" in before, "der" in after) == (5, 6, False, False)


@pytest.mark.parametrize(
    ("statement", "channel"),
    [
        (insert(), "certificate"),
        ("truncate certificate", "certificate"),
        (f"insert into authority values ('fleet', 'CN=CA', '{PEM}', now())", "crl"),
    ],
)
async def test_changes_are_told_at_once(connection: asyncpg.Connection, statement: str, channel: str) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    for name in ("certificate", "crl"):
        await connection.add_listener(name, lambda *told: heard.put_nowait(told[2]))
    await connection.execute(statement)
    assert await asyncio.wait_for(heard.get(), 10) == channel
    assert heard.empty()


async def test_a_change_of_certificates_is_no_change_of_the_registry(scratch: asyncpg.Connection) -> None:
    await scratch.execute(insert())
    await scratch.execute("update certificate set state = 'revoked'")
    await add_authority(scratch)
    assert await scratch.fetchval("select count(*) from change where txid = pg_current_xact_id()") == 0


async def test_two_that_sign_at_once_wait_for_each_other(dsn: str) -> None:
    one, two = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
    try:
        first = one.transaction()
        await first.start()
        await crls.lock_list(one, "fleet")
        async with two.transaction():
            waiting = asyncio.create_task(crls.lock_list(two, "fleet"))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(waiting), 0.2)
            await first.rollback()
            await asyncio.wait_for(waiting, 10)
    finally:
        await one.close()
        await two.close()


# --- certificates that expire soon ---------------------------------------------------------------------------------


async def test_what_ends_soon_is_counted_by_type_without_what_has_a_successor(scratch: asyncpg.Connection) -> None:
    await add_type(scratch)
    numbers = iter(range(1, 100))

    async def certificate(name: str, days: float, **changes: Any) -> None:
        number = next(numbers)
        end = await scratch.fetchval(f"select now() + interval '{days} days'")
        await scratch.execute(
            insert(fingerprint=f"{number:064x}", serial=f"{number:x}", common_name=name, not_after=end, **changes)
        )

    for name in ("week", "month", "quarter", "year", "rotated", "expired", "suspended", "revoked"):
        await add_device(scratch, name)
    await scratch.execute("update device set status = 'suspended' where device_id = 'suspended'")
    for name, days in (("week", 5), ("month", 20), ("quarter", 80), ("year", 300), ("expired", -1), ("suspended", 5)):
        await certificate(name, days)
    await certificate("rotated", 5)
    await certificate("rotated", 300)
    await certificate("revoked", 5, state="revoked")
    await certificate("server", 5)
    await certificate("old server", 4)
    await certificate("old server", 300)
    found = await crls.fetch_expiring(scratch)
    assert found.within == {"agv": (1, 2, 3), "unknown": (1, 1, 1)}
    assert (found.expired, found.most_on_a_day) == (1, 2)
