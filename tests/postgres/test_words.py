"""Every constraint of the tables that people write refuses with a message for people, in psql too."""

from __future__ import annotations

import asyncpg
import pytest

from authbackend.errors import Conflict, InvalidInput
from authbackend.postgres.connection import translated_errors
from tests.postgres.test_constraints import HASH
from tests.support.postgres import Server

TABLES = (
    "device",
    "device_type",
    "account",
    "topic_rule",
    "certificate",
    "authority",
    "crl",
    "crl_listed",
    "device_schedule",
    "brake",
)
FLEET = f"""
delete from brake;
insert into brake (devices) values (100);
insert into device_type (name, client_ids, vhosts) values ('T', '{{"{{device_id}}"}}', '{{/}}'), ('U', '{{}}', '{{}}');
insert into device (device_id, common_name, type) values ('D1', 'A', 'T'), ('D2', 'B', 'T'), ('D3', 'C', 'T'), ('D4', 'D', 'T');
insert into account (name, login, password_hash) values ('ops', 'password', '{HASH}');
insert into topic_rule (id, device_type, effect, action, topic) values (1, 'T', 'allow', 'publish', 'a/#');
insert into authority values ('fleet', 'CN=CA', '-----BEGIN CERTIFICATE-----', '2099-01-01Z');
insert into certificate (fingerprint, serial, issuer, subject, common_name, not_before, not_after)
  values (repeat('a', 64), '1', 'CN=CA', 'CN=A', 'A', '2026-01-01Z', '2099-01-01Z');
insert into crl values ('fleet', 5, '2026-01-01Z', '2099-01-01Z', 'x');
insert into crl_listed values ('CN=CA', '1', 5);
insert into device_schedule (device_id, at, status) values ('D1', '2099-01-01Z', 'revoked');
"""
DEVICE = "insert into device (device_id, type) values "
RULE = "insert into topic_rule (device_type, effect, action, topic) values "
CERTIFICATE = "insert into certificate (fingerprint, serial, issuer, subject, common_name, not_before, not_after, device_id) values "
NEW = "(repeat('b', 64), '2', 'CN=CA', 'CN=A', 'A', '2026-01-01Z', '2099-01-01Z', null)"
PEM = "'-----BEGIN CERTIFICATE-----', '2099-01-01Z'"

# For each constraint: a statement, the message, and the hint or detail if the message alone does not say what to do.
WORDS = {
    "device.device_attributes": ("update device set attributes = '{\"floor\": 3}' where device_id = 'D1'", "attributes of device 'D1': the value of \"floor\" must be a string: write {\"floor\": \"3\"}", ""),
    "device.device_common_name": ("update device set common_name = '' where device_id = 'D1'", "common name '' of device 'D1': it is empty", ""),
    "device.device_expires_at": ("update device set expires_at = '1900-01-01'", "expiry of device 'D1': possible are the years 1970 to 9999; null is never", ""),
    "device.device_id_form": (DEVICE + "('a b', 'T')", "device id 'a b': 1 to 64 letters, digits, \"_\" and \"-\" are possible, nothing else", ""),
    "device.device_status": ("update device set status = 'off'", "status 'off' of device 'D1': possible are pending, active, suspended and revoked", ""),
    "device.device_status_changed_at": ("update device set status_changed_at = '1900-01-01'", "time of the status of device 'D1': possible are the years 1970 to 9999", ""),
    "device.device_type_fkey": (DEVICE + "('N', 'APN')", "type 'APN' of device 'N': there is no such device type", "There are: T, U. A new one is added before its devices."),
    "device.device_id_is_taken": (DEVICE + "('D1', 'T')", 'duplicate key value violates unique constraint "device_id_is_taken"', "Key (device_id)=(D1) already exists."),
    "device.common_name_is_taken": (DEVICE + "('A', 'T')", 'duplicate key value violates unique constraint "common_name_is_taken"', "Key (common_name)=(A) already exists."),
    "device_type.device_type_client_ids": ("update device_type set client_ids = array['{device_id}', '{device_id}'] where name = 'T'", "client ids of device type 'T': duplicate entry", ""),
    "device_type.device_type_max_staleness": ("update device_type set max_staleness_s = 0 where name = 'T'", "max_staleness_s of device type 'T': possible are seconds above 0; null is as long as the replicas allow", ""),
    "device_type.device_type_name": ("insert into device_type (name) values ('1')", "device type '1': a name is a letter, then at most 62 letters, digits, \"_\" and \"-\"", ""),
    "device_type.device_type_networks": ("update device_type set networks = '{}' where name = 'T'", "networks of device type 'T': an empty list would fit no address; write null for any address", ""),
    "device_type.device_type_vhosts": ("update device_type set vhosts = '{/,/}' where name = 'T'", "vhosts of device type 'T': duplicate entry", ""),
    "device_type.device_type_exists": ("insert into device_type (name) values ('T')", 'duplicate key value violates unique constraint "device_type_exists"', "Key (name)=(T) already exists."),
    "account.account_exists": ("insert into account (name, login) values ('ops', 'certificate')", 'duplicate key value violates unique constraint "account_exists"', "Key (name)=(ops) already exists."),
    "topic_rule.topic_rule_action": (RULE + "('T', 'allow', 'write', 'x')", "action 'write': possible are publish and subscribe", ""),
    "topic_rule.topic_rule_effect": (RULE + "('T', 'permit', 'publish', 'x')", "effect 'permit': possible are allow and deny", ""),
    "topic_rule.topic_rule_exchange": ("update topic_rule set exchange = 'x'", "exchange 'x': only the rule of an account can name one, with 1 to 255 bytes", ""),
    "topic_rule.topic_rule_owner": ("update topic_rule set device_id = 'D1'", "a topic rule belongs to exactly one device type, device or account", ""),
    "topic_rule.topic_rule_topic": (RULE + "('T', 'allow', 'publish', '{device}/x')", "topic filter '{device}/x': the placeholder {device} is unknown; there are {device_id}, {client_id}, {device_type}, {vhost} and {attr.NAME}", ""),
    "topic_rule.topic_rule_exists": (RULE + "('T', 'allow', 'publish', 'a/#')", 'duplicate key value violates unique constraint "topic_rule_exists"', "Key (device_type, device_id, account, effect, action, topic, exchange)=(T, null, null, allow, publish, a/#, null) already exists."),
    "topic_rule.topic_rule_id_is_taken": ("insert into topic_rule (id, device_type, effect, action, topic) values (1, 'T', 'deny', 'publish', 'x')", 'duplicate key value violates unique constraint "topic_rule_id_is_taken"', "Key (id)=(1) already exists."),
    "topic_rule.topic_rule_device_type_fkey": (RULE + "('APN', 'allow', 'publish', 'x')", "rule for topic 'x': there is no device type 'APN'", "There are: T, U."),
    "topic_rule.topic_rule_device_id_fkey": ("update topic_rule set device_type = null, device_id = 'A'", "rule for topic 'a/#': there is no device with the id 'A'", "A rule names a device by its device_id, which may differ from its common name; the device is added before its rules."),
    "topic_rule.topic_rule_account_fkey": ("update topic_rule set device_type = null, account = 'x'", "rule for topic 'a/#': there is no account 'x'", "An account is added before its rules."),
    "certificate.certificate_fingerprint": (CERTIFICATE + NEW.replace("repeat('b', 64)", "'AA:BB'"), "fingerprint 'AA:BB': it is the SHA-256 of the certificate as 64 lower-case hexadecimal digits", ""),
    "certificate.certificate_names": ("update certificate set subject = repeat('x', 3000)", "certificate 1: issuer (not empty) and subject have at most 2048 bytes, the common name at most 1024", ""),
    "certificate.certificate_reason": ("update certificate set reason = 'certificateHold'", "reason 'certificateHold' of certificate 1: a revocation is final here; to deny a device for now, suspend the device", ""),
    "certificate.certificate_revoked_at": ("update certificate set revoked_at = now()", "certificate 1: revoked_at goes with the state revoked", ""),
    "certificate.certificate_revoked_at_range": ("update certificate set state = 'revoked', revoked_at = '1900-01-01'", "certificate 1: revoked_at is in the years 1950 to 9999", ""),
    "certificate.certificate_serial": (CERTIFICATE + NEW.replace("'2'", "'02'"), "serial number '02': it is written without leading zeros", ""),
    "certificate.certificate_state": ("update certificate set state = 'off'", "state 'off' of certificate 1: possible are active and revoked", ""),
    "certificate.certificate_validity": (CERTIFICATE + NEW.replace("2026", "2199"), "certificate 2: its validity must begin before it ends, in the years 1950 to 9999", ""),
    "certificate.certificate_device_id_fkey": (CERTIFICATE + NEW.replace("null", "'A'"), "certificate: there is no device with the id 'A'", "A device is named by its device_id, which may differ from its common name."),
    "certificate.certificate_is_on_record": (CERTIFICATE + NEW.replace("'b'", "'a'"), 'duplicate key value violates unique constraint "certificate_is_on_record"', "already exists."),
    "certificate.serial_number_of_issuer_is_on_record": (CERTIFICATE + NEW.replace("'2'", "'1'"), 'duplicate key value violates unique constraint "serial_number_of_issuer_is_on_record"', "Key (issuer, serial)=(CN=CA, 1) already exists."),
    "authority.authority_certificate_pem": ("insert into authority values ('x', 'CN=X', 'PRIVATE KEY', '2099-01-01Z')", "certificate of authority 'x': it is one PEM certificate, and never a private key", ""),
    "authority.authority_name": (f"insert into authority values ('a b', 'CN=X', {PEM})", "authority 'a b': a name is 1 to 64 letters, digits, \"_\" and \"-\"", ""),
    "authority.authority_exists": (f"insert into authority values ('fleet', 'CN=X', {PEM})", 'duplicate key value violates unique constraint "authority_exists"', "Key (name)=(fleet) already exists."),
    "authority.authority_with_this_subject_exists": (f"insert into authority values ('x', 'CN=CA', {PEM})", 'duplicate key value violates unique constraint "authority_with_this_subject_exists"', "Key (subject)=(CN=CA) already exists."),
    "crl.crl_next_update": ("update crl set next_update = '2020-01-01'", "revocation list of authority 'fleet': nextUpdate must be after thisUpdate", ""),
    "crl.crl_number": ("update crl set number = -1", "revocation list of authority 'fleet': number -1 is older than number 5, which its lists have reached", ""),
    "crl.crl_authority_fkey": ("insert into crl values ('x', 5, '2026-01-01Z', '2099-01-01Z', 'x')", "revocation list: there is no authority 'x'", "There are: fleet."),
    "crl.authority_has_a_revocation_list": ("insert into crl values ('fleet', 6, '2026-01-01Z', '2099-01-01Z', 'y')", 'duplicate key value violates unique constraint "authority_has_a_revocation_list"', "Key (authority)=(fleet) already exists."),
    "crl_listed.serial_number_is_listed": ("insert into crl_listed values ('CN=CA', '1', 6)", 'duplicate key value violates unique constraint "serial_number_is_listed"', "Key (issuer, serial)=(CN=CA, 1) already exists."),
    "device_schedule.device_schedule_at": ("update device_schedule set at = '1900-01-01'", "scheduled time of device 'D1': possible are the years 1970 to 9999", ""),
    "device_schedule.device_schedule_status": ("update device_schedule set status = 'pending'", "scheduled status 'pending' of device 'D1': possible are active, suspended and revoked", ""),
    "device_schedule.device_schedule_device_id_fkey": ("insert into device_schedule (device_id, at, status) values ('A', '2099-01-01Z', 'revoked')", "schedule: there is no device with the id 'A'", "A device is named by its device_id, which may differ from its common name."),
    "device_schedule.device_has_something_scheduled_then": ("insert into device_schedule (device_id, at, status) values ('D1', '2099-01-01Z', 'active')", 'duplicate key value violates unique constraint "device_has_something_scheduled_then"', "already exists."),
    "brake.brake_one": ("insert into brake (one) values (false)", 'the brake has one row of limits: leave the column "one" out', ""),
    "brake.brake_devices": ("update brake set devices = -1", "limit of the brake: -1 devices are not possible; 0 or more are", ""),
    "brake.brake_percent": ("update brake set percent = 101", "limit of the brake: 101 percent are not possible; 0 to 100 are", ""),
    "brake.brake_has_its_limits": ("insert into brake (devices) values (5)", 'duplicate key value violates unique constraint "brake_has_its_limits"', "Key (one)=(t) already exists."),
}  # fmt: skip


@pytest.fixture
async def sql(scratch: asyncpg.Connection) -> asyncpg.Connection:
    await scratch.execute(FLEET)
    return scratch


async def refused(sql: asyncpg.Connection, statement: str) -> asyncpg.IntegrityConstraintViolationError:
    with pytest.raises(asyncpg.IntegrityConstraintViolationError) as caught:
        async with sql.transaction():
            await sql.execute(statement)
    return caught.value


async def test_every_constraint_has_its_words(sql: asyncpg.Connection) -> None:
    rows = await sql.fetch(
        "select conrelid::regclass || '.' || conname as name from pg_constraint"
        " where conrelid = any ($1::text[]::regclass[]) and contype in ('c', 'f', 'p', 'u', 'x')",
        TABLES,
    )
    assert {row["name"] for row in rows} == set(WORDS)


async def test_the_tables_are_those_that_people_write(sql: asyncpg.Connection) -> None:
    watched = await sql.fetch("select tgrelid::regclass::text as name from pg_trigger where tgname = 'audit_i'")
    kept_by_functions = {"enforcement_setup", "enforcement_cluster", "enforcement_pause", "crl_reporter"}
    assert {row["name"] for row in watched} - kept_by_functions == set(TABLES)


@pytest.mark.parametrize("constraint", WORDS)
async def test_it_is_told_what_is_wrong_and_what_to_do(sql: asyncpg.Connection, constraint: str) -> None:
    statement, message, more = WORDS[constraint]
    error = await refused(sql, statement)
    assert error.args[0] == message
    if message.startswith("duplicate key"):
        assert str(error.detail).endswith(more)
        assert constraint == f"{error.table_name}.{error.constraint_name}"
    else:
        assert (error.hint or "") == more
        assert error.detail is None
    assert HASH not in f"{error.args[0]} {error.detail} {error.hint}"
    with pytest.raises((Conflict, InvalidInput)) as told, translated_errors():
        raise error
    assert message in told.value.detail
    assert more in told.value.detail


async def test_every_column_that_must_have_a_value_says_so_and_shows_no_row(sql: asyncpg.Connection) -> None:
    columns = await sql.fetch(
        "select attrelid::regclass::text as table, attname, atthasdef or attidentity <> '' as has_default from pg_attribute"
        " where attrelid = any ($1::text[]::regclass[]) and attnotnull and attnum > 0 and not attisdropped",
        TABLES,
    )
    assert len(columns) > 40
    for column in columns:
        table, name = column["table"], column["attname"]
        error = await refused(sql, f"update {table} set {name} = null")
        assert "null value in column" not in error.args[0], (table, name)
        assert "Failing row" not in str(error.detail), (table, name)
        assert HASH not in f"{error.args[0]} {error.detail} {error.hint}"
        if table not in ("account", "certificate"):  # their own triggers come first, with longer messages
            assert isinstance(error, asyncpg.NotNullViolationError), (table, name)
            assert (error.table_name, error.column_name) == (table, name)
            assert error.args[0].endswith(f": {name} is null")
            assert error.hint == (
                f"Leave {name} out of the statement to get its default."
                if column["has_default"]
                else f"Every {table} needs a value of {name}."
            )


async def test_a_type_that_still_has_devices_is_not_deleted(sql: asyncpg.Connection) -> None:
    error = await refused(sql, "delete from device_type where name = 'T'")
    assert error.args[0] == "device type 'T' still has devices: D1, D2, D3, …"
    assert error.hint == "Move them to another type, or delete them, before the type."
    await sql.execute("with gone as (delete from device) delete from device_type where name = 'T'")


async def test_a_snapshot_has_the_foreign_keys_own_words(dsn: str, connection: asyncpg.Connection) -> None:
    """It sees what others committed since, which the triggers with the messages do not."""
    await connection.execute("insert into device_type (name) values ('T')")
    async with connection.transaction(isolation="repeatable_read"):
        with pytest.raises(asyncpg.ForeignKeyViolationError, match="device_type_fkey"):
            async with connection.transaction():
                await connection.execute("insert into device (device_id, type) values ('D1', 'X')")
        await connection.execute("insert into device (device_id, type) values ('D1', 'T')")


async def test_a_certificate_may_come_before_its_device_where_that_is_deferred(sql: asyncpg.Connection) -> None:
    await sql.execute("set constraints all deferred")
    await sql.execute(CERTIFICATE + NEW.replace("null", "'N1'"))
    await sql.execute("insert into device (device_id, type) values ('N1', 'T')")
    await sql.execute("set constraints all immediate")


def test_psql_shows_the_hint(postgres: Server, dsn: str, database: str) -> None:
    said = postgres.run(
        "psql", "-XAtq", "-d", database, "-c", "insert into device (device_id, type) values ('D1', 'APN')", check=False
    )
    assert said.splitlines()[:2] == [
        "ERROR:  type 'APN' of device 'D1': there is no such device type",
        "HINT:  There is no device type yet. A new one is added before its devices.",
    ]
