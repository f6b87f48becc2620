"""The database itself refuses invalid rows, whoever writes them, with a message that says what is wrong."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from authbackend.policy import names, topics
from tests.support.postgres import Server, connected, run, until

HASH = "$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHRzb21lc2FsdA$RdescudvJCsgt3ub+b2dWRWJTmaaVQFpDDEkEXAMPLE"


async def refused(connection: asyncpg.Connection, sql: str, *arguments: Any) -> str:
    """Run a statement that a constraint must refuse, and return the message."""
    with pytest.raises(asyncpg.IntegrityConstraintViolationError) as caught:
        async with connection.transaction():
            await connection.execute(sql, *arguments)
    return str(caught.value.args[0])


async def add_type(connection: asyncpg.Connection, name: str = "agv", *client_ids: str) -> None:
    await connection.execute("insert into device_type (name, client_ids) values ($1, $2)", name, list(client_ids))


async def add_device(connection: asyncpg.Connection, device_id: str, common_name: str | None = None) -> None:
    await connection.execute(
        "insert into device (device_id, common_name, type) values ($1, $2, 'agv')", device_id, common_name
    )


async def add_account(connection: asyncpg.Connection, name: str, *client_ids: str) -> None:
    await connection.execute(
        "insert into account (name, login, client_ids) values ($1, 'certificate', $2)", name, list(client_ids)
    )


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device_id", ["", "a b", "a.b", "a/b", "a+b", "a#", "a:b", "a,b", "ä", "a\n", "\na", "{device_id}", "x" * 65]
)
async def test_a_device_id_that_could_be_mistaken_is_refused(scratch: asyncpg.Connection, device_id: str) -> None:
    await add_type(scratch)
    message = await refused(scratch, "insert into device (device_id, type) values ($1, 'agv')", device_id)
    assert 'letters, digits, "_" and "-"' in message
    await add_device(scratch, "good")
    assert message == await refused(scratch, "update device set device_id = $1, common_name = 'n'", device_id)
    with pytest.raises(asyncpg.CheckViolationError, match="letters, digits"):
        async with scratch.transaction():
            await scratch.copy_records_to_table(
                "device",
                records=[("fine", "fine", "agv"), (device_id, "n", "agv")],
                columns=("device_id", "common_name", "type"),
            )


@pytest.mark.parametrize("device_id", ["a", "APM0001", "-", "_", "x" * 64, "0"])
async def test_a_device_id_of_letters_digits_underscores_and_hyphens_is_taken(
    scratch: asyncpg.Connection, device_id: str
) -> None:
    await add_type(scratch)
    await add_device(scratch, device_id)
    assert await scratch.fetchval("select common_name from device") == device_id


COMMON_NAMES = [
    ("", "it is empty"),
    ("a,b", '"," is not possible'),
    ("vhost:a", '":" is not possible'),
    ("a\x01", "control character"),
    ("a\nb", "control character"),
    ("a\x7f", "control character"),
    ("a\x85b", "control character"),
    ("a\u2028b", "control character"),
    (" a", "white space at an end"),
    ("a ", "white space at an end"),
    ("a\u00a0", "white space at an end"),
    ("\u3000a", "white space at an end"),
    ("x" * 129, "it has 129 bytes; at most 128"),
    ("ä" * 65, "it has 130 bytes; at most 128"),
]


@pytest.mark.parametrize(("name", "fault"), COMMON_NAMES)
async def test_a_common_name_that_rabbitmq_would_take_apart_is_refused(
    scratch: asyncpg.Connection, name: str, fault: str
) -> None:
    await add_type(scratch)
    message = await refused(scratch, "insert into device (device_id, common_name, type) values ('d1', $1, 'agv')", name)
    assert fault in message
    assert "d1" in message
    await add_device(scratch, "d1")
    assert fault in await refused(scratch, "update device set common_name = $1", name)
    with pytest.raises(asyncpg.CheckViolationError, match=re.escape(fault)):
        async with scratch.transaction():
            await scratch.copy_records_to_table(
                "device", records=[("d2", name, "agv")], columns=("device_id", "common_name", "type")
            )
    assert fault in await refused(scratch, "insert into account (name, login) values ($1, 'certificate')", name)


@pytest.mark.parametrize("name", ["AGV 7", "agv.example.com", "Gerät/7", "x" * 128, "a@b", "🚜"])
async def test_a_common_name_may_hold_anything_else(scratch: asyncpg.Connection, name: str) -> None:
    await add_type(scratch)
    await add_device(scratch, "d1", name)
    assert await scratch.fetchval("select common_name from device") == name


async def test_two_devices_never_share_a_common_name(scratch: asyncpg.Connection) -> None:
    await add_type(scratch)
    await add_device(scratch, "d1", "n")
    assert "common_name_is_taken" in await refused(
        scratch, "insert into device (device_id, common_name, type) values ('d2', 'n', 'agv')"
    )


@pytest.mark.parametrize("name", ["", "1a", "a b", "a.b", "x" * 64])
async def test_the_name_of_a_device_type_is_a_short_word(scratch: asyncpg.Connection, name: str) -> None:
    assert "a name is a letter" in await refused(scratch, "insert into device_type (name) values ($1)", name)
    await add_type(scratch)
    assert "a name is a letter" in await refused(scratch, "update device_type set name = $1", name)


async def test_a_device_has_a_known_type_and_status(scratch: asyncpg.Connection) -> None:
    await add_type(scratch)
    await refused(scratch, "insert into device (device_id, type) values ('d1', 'nosuch')")
    message = await refused(scratch, "insert into device (device_id, type, status) values ('d1', 'agv', 'broken')")
    assert "pending, active, suspended and revoked" in message
    await add_device(scratch, "d1")
    await refused(scratch, "update device set status = 'deleted'")
    await refused(scratch, "delete from device_type")


async def test_the_time_of_a_status_follows_the_status(scratch: asyncpg.Connection) -> None:
    await add_type(scratch)
    await scratch.execute("insert into device (device_id, type, status_changed_at) values ('d1', 'agv', '2020-01-01')")
    await scratch.execute('update device set attributes = \'{"a": "b"}\'')
    assert await scratch.fetchval("select status_changed_at = '2020-01-01' from device")
    await scratch.execute("update device set status = 'revoked', status_reason = 'stolen'")
    assert await scratch.fetchval("select status_changed_at = now() from device")


# --- topic filters -------------------------------------------------------------------------------------------------

FILTERS = [
    ("", 'it is empty; write "#" for every topic'),
    ("fleet/*/x", '"*" is not possible in a rule'),
    ("*", '"*" is not possible in a rule'),
    ("a*b", '"*" is not possible in a rule'),
    ("fleet/a+/x", "wildcards only as a whole level, not inside a+"),
    ("fleet/++/x", "wildcards only as a whole level, not inside ++"),
    ("fleet/a#", "wildcards only as a whole level, not inside a#"),
    ("fleet/{device_id}#", "wildcards only as a whole level"),
    ("#/", '"#" is possible only as the last level'),
    ("fleet/#/x", '"#" is possible only as the last level'),
    ("#/#", '"#" is possible only as the last level'),
    ("fleet/{}/x", "the placeholder {} is empty"),
    ("fleet/{device}/x", "the placeholder {device} is unknown"),
    ("fleet/{DEVICE_ID}/x", "the placeholder {DEVICE_ID} is unknown"),
    ("fleet/{attr.}/x", "the placeholder {attr.} is unknown"),
    ("fleet/{attr.a.b}/x", "the placeholder {attr.a.b} is unknown"),
    ("fleet/{attr.1a}/x", "the placeholder {attr.1a} is unknown"),
    ("fleet/{device_id/x", "a brace is unbalanced"),
    ("fleet/device_id}/x", "a brace is unbalanced"),
    ("fleet/{{device_id}}/x", "double braces are another product's"),
    ("fleet/}{/x", "a brace is unbalanced"),
    ("x" * 1025, "it has 1025 bytes; at most 1024"),
]


@pytest.mark.parametrize(("topic", "fault"), FILTERS)
async def test_a_topic_filter_outside_the_grammar_is_refused_by_insert_update_and_copy(
    scratch: asyncpg.Connection, topic: str, fault: str
) -> None:
    await add_type(scratch)
    insert = "insert into topic_rule (device_type, effect, action, topic) values ('agv', 'allow', 'publish', $1)"
    message = await refused(scratch, insert, topic)
    assert message.startswith("topic filter '")
    assert fault in message
    await scratch.execute(insert, "fine")
    assert fault in await refused(scratch, "update topic_rule set topic = $1", topic)
    with pytest.raises(asyncpg.CheckViolationError, match=re.escape(fault)):
        async with scratch.transaction():
            await scratch.copy_records_to_table(
                "topic_rule",
                records=[("agv", "deny", "subscribe", topic)],
                columns=("device_type", "effect", "action", "topic"),
            )
    assert [row["topic"] for row in await scratch.fetch("select topic from topic_rule")] == ["fine"]


@pytest.mark.parametrize(
    "topic",
    [
        "#",
        "+",
        "+/+/#",
        "/",
        "a//b",
        "a.b/c",
        "fleet/{device_id}/#",
        "dev-{device_id}",
        "{device_id}{client_id}",
        "$SYS/x",
    ]
    + ["{vhost}/{device_type}/{attr.site}/{attr._a-1}", " ", "ä/🚜", "x" * 1024],
)
async def test_a_topic_filter_inside_the_grammar_is_taken(scratch: asyncpg.Connection, topic: str) -> None:
    await add_type(scratch)
    await scratch.execute(
        "insert into topic_rule (device_type, effect, action, topic) values ('agv', 'deny', 'subscribe', $1)", topic
    )


async def test_a_rule_belongs_to_exactly_one_owner_and_says_what_it_does(scratch: asyncpg.Connection) -> None:
    await add_type(scratch)
    await add_device(scratch, "d1")
    await add_account(scratch, "robot")
    columns = "insert into topic_rule (device_type, device_id, account, effect, action, topic, exchange) values "
    one_owner = "belongs to exactly one device type, device or account"
    assert one_owner in await refused(scratch, columns + "(null, null, null, 'allow', 'publish', '#', null)")
    assert one_owner in await refused(scratch, columns + "('agv', 'd1', null, 'allow', 'publish', '#', null)")
    assert "allow and deny" in await refused(scratch, columns + "('agv', null, null, 'maybe', 'publish', '#', null)")
    assert "publish and subscribe" in await refused(
        scratch, columns + "('agv', null, null, 'allow', 'write', '#', null)"
    )
    for_accounts = "only the rule of an account can name one"
    assert for_accounts in await refused(scratch, columns + "('agv', null, null, 'allow', 'publish', '#', 'x')")
    assert for_accounts in await refused(scratch, columns + "(null, 'd1', null, 'allow', 'publish', '#', 'x')")
    assert for_accounts in await refused(scratch, columns + "(null, null, 'robot', 'allow', 'publish', '#', '')")
    await scratch.execute(columns + "(null, null, 'robot', 'allow', 'publish', '#', 'x')")
    await scratch.execute(columns + "(null, 'd1', null, 'allow', 'publish', '#', null)")
    assert "topic_rule_exists" in await refused(scratch, columns + "(null, 'd1', null, 'allow', 'publish', '#', null)")
    await refused(scratch, columns + "(null, 'nosuch', null, 'allow', 'publish', '#', null)")


# --- client ids ----------------------------------------------------------------------------------------------------

PATTERNS = [
    ("", "it must begin with {device_id}"),
    ("*", "it must begin with {device_id}"),
    ("x-{device_id}", "it must begin with {device_id}"),
    ("{client_id}", "it must begin with {device_id}"),
    ("{device_id}*", "after {device_id} comes a separator"),
    ("{device_id}x", "after {device_id} comes a separator"),
    ("{device_id}x*", '"*" is possible only straight after a separator'),
    ("{device_id}-x*", '"*" is possible only straight after a separator'),
    ("{device_id}-*-x", '"*" is possible only at the end'),
    ("{device_id}-**", '"*" is possible only at the end'),
    ("{device_id}-", "it must be {device_id}, optionally followed"),
    ("{device_id}-ä", "it must be {device_id}, optionally followed"),
    ("{device_id}-{device_id}", "it must be {device_id}, optionally followed"),
    ("{device_id}-x\n", "it must be {device_id}, optionally followed"),
]


@pytest.mark.parametrize(("pattern", "fault"), PATTERNS)
async def test_a_client_id_pattern_that_devices_could_share_is_refused(
    scratch: asyncpg.Connection, pattern: str, fault: str
) -> None:
    insert = "insert into device_type (name, client_ids) values ('agv', $1)"
    wanted = fault if pattern else "an entry is empty"
    message = await refused(scratch, insert, ["{device_id}", pattern])
    assert fault in message or wanted in message
    await add_type(scratch, "agv", "{device_id}")
    message = await refused(scratch, "update device_type set client_ids = $1", [pattern])
    assert fault in message or wanted in message
    with pytest.raises(asyncpg.CheckViolationError, match=f"{re.escape(fault)}|{re.escape(wanted)}"):
        async with scratch.transaction():
            await scratch.copy_records_to_table(
                "device_type", records=[("apm", [pattern])], columns=("name", "client_ids")
            )


@pytest.mark.parametrize(
    "pattern", ["{device_id}", "{device_id}-*", "{device_id}_pub", "{device_id}/a.b:c@d/*", "{device_id}.x_*"]
)
async def test_a_client_id_pattern_bound_to_the_device_is_taken(scratch: asyncpg.Connection, pattern: str) -> None:
    await add_type(scratch, "agv", pattern)


@pytest.mark.parametrize(
    ("client_ids", "fault"),
    [
        ("null", "the list is null; write {} for none"),
        ("array[null]::text[]", "an entry is null"),
        ("array['{device_id}', '{device_id}']", "duplicate entry"),
        ("array[array['{device_id}'], array['{device_id}-a']]", "more than one dimension"),
        ("array['{device_id}-' || repeat('x', 128)]", "longer than 128 bytes"),
    ],
)
async def test_a_list_is_a_plain_list_of_different_names(
    scratch: asyncpg.Connection, client_ids: str, fault: str
) -> None:
    # A null list is refused by the column itself; both messages name the column.
    message = await refused(scratch, f"insert into device_type (name, client_ids) values ('agv', {client_ids})")
    assert fault in message or (client_ids == "null" and "client_ids is null" in message)


# --- accounts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value", "fault"),
    [
        ("tags", ["root"], "tag 'root' is not one of RabbitMQ's"),
        ("tags", ["Administrator"], "is not one of RabbitMQ's"),
        ("tags", ["monitoring", "monitoring"], "tags: duplicate entry"),
        ("tags", [None], "tags: an entry is null"),
        ("tags", None, "tags: the list is null"),
        ("vhosts", [""], "vhosts: an entry is empty"),
        ("vhosts", ["x" * 256], "vhosts: an entry is longer than 255 bytes"),
        ("client_ids", ["a*"], "an account lists exact client ids"),
        ("client_ids", ["a#"], "an account lists exact client ids"),
        ("client_ids", ["+"], "an account lists exact client ids"),
        ("client_ids", ["{device_id}"], "an account lists exact client ids"),
        ("client_ids", ["a\x01"], "an account lists exact client ids"),
        ("client_ids", [""], "client ids: an entry is empty"),
        ("configure", [""], "configure: an entry is empty"),
        ("write", [None], "write: an entry is null"),
        ("read", ["a", "a"], "read: duplicate entry"),
        ("login", "both", "login must be password or certificate"),
        ("login", None, "login must be password or certificate"),
        ("unchecked_dead_lettering", None, "unchecked_dead_lettering must be true or false"),
        ("password_hash", "secret", "the password hash is not argon2id in PHC form"),
        ("password_hash", HASH.replace("argon2id", "argon2i"), "the password hash is not argon2id"),
        ("password_hash", HASH.replace("m=65536", "m=999999"), "the password hash costs too much"),
        ("password_hash", HASH.replace("t=3", "t=17"), "the password hash costs too much"),
        ("password_hash", HASH.replace("p=4", "p=0"), "the password hash costs too much"),
        ("password_hash", "$2b$12$R9h/cIPz0gi.URNNX3kh2OPST9/PgBkqquzi.Ss7KIUgO2t0jWMUW", "is not argon2id"),
    ],
)
async def test_an_account_with_something_wrong_is_refused(
    scratch: asyncpg.Connection, column: str, value: object, fault: str
) -> None:
    await scratch.execute("insert into account (name, login) values ('robot', 'password')")
    message = await refused(scratch, f"update account set {column} = $1", value)
    assert message.startswith("account 'robot': ")
    assert fault in message
    entry = {"name": "robot2", "login": "password", column: value}
    with pytest.raises(asyncpg.CheckViolationError, match=re.escape(fault)):
        async with scratch.transaction():
            await scratch.copy_records_to_table("account", records=[tuple(entry.values())], columns=list(entry))


async def test_an_account_that_logs_in_by_certificate_has_no_password(scratch: asyncpg.Connection) -> None:
    insert = "insert into account (name, login, password_hash) values ('robot', $1, $2)"
    assert "has no password" in await refused(scratch, insert, "certificate", HASH)
    await scratch.execute(insert, "password", HASH)
    assert "has no password" in await refused(scratch, "update account set login = 'certificate'")


@pytest.mark.parametrize(
    ("sql", "arguments"),
    [
        ("insert into account (name, login, password_hash) values ('robot', 'certificate', $1)", [HASH]),
        ("insert into account (name, login, password_hash) values ('ro,bot', 'password', $1)", [HASH]),
        ("insert into account (name, login, password_hash) values (null, 'password', $1)", [HASH]),
        ("insert into account (name, login, password_hash) values ('robot', null, $1)", [HASH]),
        ("insert into account (name, login, password_hash) values ('there', 'password', $1)", [HASH]),
        ("insert into account (name, login, password_hash, tags) values ('robot', 'password', $1, '{x}')", [HASH]),
        ("insert into account (name, login, password_hash, tags) values ('robot', 'password', $1, null)", [HASH]),
        ("insert into account (name, login, password_hash, read) values ('robot', 'password', $1, null)", [HASH]),
        ("insert into account (name, login, password_hash) values ('d1', 'password', $1)", [HASH]),
        (
            "insert into account (name, login, password_hash) values ('robot', 'password', $1)",
            [HASH.replace("t=3", "t=99")],
        ),
        ("update account set password_hash = $1 where name = 'there'", [HASH.replace("argon2id", "argon2d")]),
        ("update account set login = 'certificate' where name = 'there'", []),
        ("update account set unchecked_dead_lettering = null where name = 'there'", []),
        ("update account set name = 'd1' where name = 'there'", []),
        ("update account set configure = '{q}', write = '{*}' where name = 'there'", []),
    ],
)
async def test_no_refusal_prints_a_password_hash(scratch: asyncpg.Connection, sql: str, arguments: list[str]) -> None:
    await add_type(scratch)
    await add_device(scratch, "d1")
    await scratch.execute("insert into account (name, login, password_hash) values ('there', 'password', $1)", HASH)
    with pytest.raises(asyncpg.IntegrityConstraintViolationError) as caught:
        async with scratch.transaction():
            await scratch.execute(sql, *arguments)
    everything = json.dumps(caught.value.as_dict())
    assert "RdescudvJCsgt3ub" not in everything
    assert "c29tZXNhbHRzb21lc2FsdA" not in everything


async def test_a_refusal_in_the_servers_log_has_no_hash_when_it_came_as_a_parameter(
    postgres: Server, connection: asyncpg.Connection
) -> None:
    secret = HASH.replace("RdescudvJCsgt3ub", "NeverInAnyLogFile")[:-1]
    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute(
            "insert into account (name, login, password_hash) values ('logged', 'certificate', $1)", secret
        )
    assert "account 'logged': an account that logs in by certificate" in postgres.log_text()
    assert "NeverInAnyLogFile" not in postgres.log_text()


# --- who owns a name -----------------------------------------------------------------------------------------------


async def test_an_account_is_never_named_like_a_device(scratch: asyncpg.Connection) -> None:
    await add_type(scratch)
    await add_device(scratch, "d1", "Device 1")
    insert = "insert into account (name, login) values ($1, 'certificate')"
    assert "account 'd1' has the id of device 'd1'" in await refused(scratch, insert, "d1")
    assert "account 'Device 1' has the common name of device 'd1'" in await refused(scratch, insert, "Device 1")
    await scratch.execute(insert, "robot")
    assert "has the id of device" in await refused(scratch, "update account set name = 'd1'")
    with pytest.raises(asyncpg.CheckViolationError, match="has the id of device"):
        async with scratch.transaction():
            await scratch.copy_records_to_table(
                "account", records=[("other", "password"), ("d1", "password")], columns=("name", "login")
            )


async def test_a_device_is_never_named_like_an_account(scratch: asyncpg.Connection) -> None:
    await add_type(scratch)
    await add_account(scratch, "robot")
    insert = "insert into device (device_id, common_name, type) values ($1, $2, 'agv')"
    assert "account 'robot' has the id of device" in await refused(scratch, insert, "robot", "n")
    assert "account 'robot' has the common name of device" in await refused(scratch, insert, "d1", "robot")
    await scratch.execute(insert, "d1", "n1")
    assert "has the common name" in await refused(scratch, "update device set common_name = 'robot'")
    assert "has the id" in await refused(scratch, "update device set device_id = 'robot'")
    with pytest.raises(asyncpg.CheckViolationError, match="has the common name"):
        async with scratch.transaction():
            await scratch.copy_records_to_table(
                "device", records=[("d2", "robot", "agv")], columns=("device_id", "common_name", "type")
            )


async def test_an_account_cannot_list_a_client_id_that_fits_a_device(scratch: asyncpg.Connection) -> None:
    await add_type(scratch, "agv", "{device_id}", "{device_id}-*")
    await add_device(scratch, "d1")
    insert = "insert into account (name, login, client_ids) values ('robot', 'certificate', $1)"
    assert "client id 'd1' of account 'robot' belongs to device 'd1'" in await refused(scratch, insert, ["d1"])
    assert "client id 'd1-x'" in await refused(scratch, insert, ["fine", "d1-x"])
    await scratch.execute(insert, ["d1-", "d1_x", "d2", "d2-x"])  # none of these belongs to the existing device
    assert "client id 'd1-x'" in await refused(scratch, "update account set client_ids = '{d1-x}'")


async def test_a_device_with_no_patterns_still_owns_the_client_id_that_equals_its_id(
    scratch: asyncpg.Connection,
) -> None:
    await add_type(scratch)
    await add_device(scratch, "d1")
    insert = "insert into account (name, login, client_ids) values ('robot', 'certificate', '{d1}')"
    assert "belongs to device 'd1'" in await refused(scratch, insert)


async def test_a_revoked_device_keeps_its_client_ids(scratch: asyncpg.Connection) -> None:
    await add_type(scratch, "agv", "{device_id}-*")
    await scratch.execute("insert into device (device_id, type, status) values ('d1', 'agv', 'revoked')")
    insert = "insert into account (name, login, client_ids) values ('robot', 'certificate', '{d1-x}')"
    assert "belongs to device 'd1'" in await refused(scratch, insert)


async def test_a_device_that_would_own_an_accounts_client_id_is_refused_later(scratch: asyncpg.Connection) -> None:
    await add_type(scratch, "agv", "{device_id}-*")
    await add_type(scratch, "plain")
    await add_account(scratch, "robot", "d1-x", "d2")
    insert = "insert into device (device_id, common_name, type) values ($1, $2, $3)"
    assert "client id 'd1-x' of account 'robot' belongs to device 'd1'" in await refused(
        scratch, insert, "d1", "n", "agv"
    )
    assert "client id 'd2'" in await refused(scratch, insert, "d2", "n", "plain")
    await scratch.execute(insert, "d1", "n", "plain")
    assert "client id 'd1-x'" in await refused(scratch, "update device set type = 'agv' where device_id = 'd1'")
    await scratch.execute(insert, "d3", "n3", "agv")
    assert "client id 'd2'" in await refused(scratch, "update device set device_id = 'd2' where device_id = 'd3'")


async def test_a_pattern_that_would_reach_an_accounts_client_id_is_refused_later(scratch: asyncpg.Connection) -> None:
    await add_type(scratch, "agv", "{device_id}")
    await add_device(scratch, "d1")
    await add_account(scratch, "robot", "d1-x")
    message = await refused(scratch, "update device_type set client_ids = '{\"{device_id}-*\"}'")
    assert "client id 'd1-x' of account 'robot' belongs to device 'd1'" in message
    await scratch.execute("update device_type set client_ids = '{\"{device_id}_*\"}'")


# --- the same with two concurrent writers ----------------------------------------------------------------------------

DEVICE_NAMED = "insert into device (device_id, common_name, type) values ('d1', 'contested', 'agv')"
DEVICE_WITH_ID = "insert into device (device_id, common_name, type) values ('contested', 'n', 'agv')"
ACCOUNT_NAMED = "insert into account (name, login) values ('contested', 'certificate')"
ACCOUNT_CLIENT_ID = "insert into account (name, login, client_ids) values ('robot', 'certificate', '{contested-x}')"
WIDER_PATTERN = "update device_type set client_ids = '{\"{device_id}-*\"}' where name = 'narrow'"
NARROW_DEVICE = "insert into device (device_id, type) values ('contested', 'narrow')"

RACES = [
    (DEVICE_NAMED, ACCOUNT_NAMED),
    (ACCOUNT_NAMED, DEVICE_NAMED),
    (DEVICE_WITH_ID, ACCOUNT_NAMED),
    (ACCOUNT_NAMED, DEVICE_WITH_ID),
    (DEVICE_WITH_ID, ACCOUNT_CLIENT_ID),
    (ACCOUNT_CLIENT_ID, DEVICE_WITH_ID),
]


async def blocked(admin: asyncpg.Connection, waiting: asyncpg.Connection) -> None:
    """Wait until the session is waiting for a lock."""

    async def waits() -> bool:
        return bool(await admin.fetchval("select cardinality(pg_blocking_pids($1)) > 0", waiting.get_server_pid()))

    await until(waits, "the second writer waits for the first")


async def prepare_race(connection: asyncpg.Connection) -> None:
    await add_type(connection, "agv", "{device_id}-*")
    await add_type(connection, "narrow")


@pytest.mark.parametrize(("first", "second"), RACES)
async def test_of_two_writers_racing_for_a_name_one_is_refused(
    dsn: str, connection: asyncpg.Connection, first: str, second: str
) -> None:
    await prepare_race(connection)
    async with connected(dsn) as one, connected(dsn) as two:
        transaction = one.transaction()
        await transaction.start()
        await one.execute(first)
        racing = asyncio.create_task(two.execute(second))
        await blocked(connection, two)
        await transaction.commit()
        with pytest.raises(asyncpg.CheckViolationError, match="contested"):
            await racing


@pytest.mark.parametrize(("first", "second"), RACES)
async def test_the_second_writer_wins_when_the_first_rolls_back(
    dsn: str, connection: asyncpg.Connection, first: str, second: str
) -> None:
    await prepare_race(connection)
    async with connected(dsn) as one, connected(dsn) as two:
        transaction = one.transaction()
        await transaction.start()
        await one.execute(first)
        racing = asyncio.create_task(two.execute(second))
        await blocked(connection, two)
        await transaction.rollback()
        assert await racing == "INSERT 0 1"


async def test_a_pattern_and_an_account_racing_for_a_client_id(dsn: str, connection: asyncpg.Connection) -> None:
    await prepare_race(connection)
    await connection.execute(NARROW_DEVICE)
    for first, second in ((WIDER_PATTERN, ACCOUNT_CLIENT_ID), (ACCOUNT_CLIENT_ID, WIDER_PATTERN)):
        async with connected(dsn) as one, connected(dsn) as two:
            transaction = one.transaction()
            await transaction.start()
            await one.execute(first)
            racing = asyncio.create_task(two.execute(second))
            await blocked(connection, two)
            await transaction.commit()
            with pytest.raises(asyncpg.CheckViolationError, match="client id 'contested-x'"):
                await racing
            await connection.execute("delete from account")
            await connection.execute("update device_type set client_ids = '{}' where name = 'narrow'")


@pytest.mark.parametrize("isolation", ["repeatable_read", "serializable"])
async def test_a_device_in_a_snapshot_older_than_the_account_is_refused(
    dsn: str, connection: asyncpg.Connection, isolation: Any
) -> None:
    await prepare_race(connection)
    async with connected(dsn) as old:
        with pytest.raises(asyncpg.SerializationError):
            async with old.transaction(isolation=isolation):
                await old.fetchval("select count(*) from account")  # takes the snapshot
                await connection.execute(ACCOUNT_NAMED)
                await old.execute(DEVICE_NAMED)
    assert await connection.fetchval("select count(*) from device") == 0


@pytest.mark.parametrize("isolation", ["repeatable_read", "serializable"])
@pytest.mark.parametrize("statement", [ACCOUNT_NAMED, WIDER_PATTERN])
async def test_accounts_and_types_are_changed_only_where_their_check_sees_everything(
    dsn: str, connection: asyncpg.Connection, isolation: Any, statement: str
) -> None:
    await prepare_race(connection)
    with pytest.raises(asyncpg.FeatureNotSupportedError, match="only in a READ COMMITTED transaction"):
        async with connection.transaction(isolation=isolation):
            await connection.execute(statement)


async def test_devices_do_not_wait_for_each_other(dsn: str, connection: asyncpg.Connection) -> None:
    await prepare_race(connection)
    async with connected(dsn) as one, connected(dsn, command_timeout=10) as two:
        transaction = one.transaction()
        await transaction.start()
        await one.execute("insert into device (device_id, type) values ('d1', 'agv')")
        await two.execute("insert into device (device_id, type) values ('d2', 'agv')")
        await transaction.rollback()
    assert [row[0] for row in await connection.fetch("select device_id from device")] == ["d2"]


# --- dead-lettering, networks, attributes, expiry ------------------------------------------------------------------


@pytest.mark.parametrize("write", ["*", "amq.topic", "amq.*", "a*c"])
async def test_an_account_that_could_publish_anywhere_by_dead_lettering_is_refused(
    scratch: asyncpg.Connection, write: str
) -> None:
    insert = "insert into account (name, login, configure, write, unchecked_dead_lettering) values ('robot', 'certificate', '{q}', $1, $2)"
    message = await refused(scratch, insert, [write], False)
    assert "account 'robot' may configure queues and write to the topic exchange 'amq.topic'" in message
    await scratch.execute(insert, [write], True)
    assert "dead-letter" in await refused(scratch, "update account set unchecked_dead_lettering = false")


async def test_dead_lettering_to_an_exchange_that_a_rule_names_is_refused_from_both_sides(
    scratch: asyncpg.Connection,
) -> None:
    await scratch.execute(
        "insert into account (name, login, configure, write) values ('robot', 'certificate', '{q}', '{plant_%.*}')"
    )
    rule = "insert into topic_rule (account, effect, action, topic, exchange) values ('robot', 'allow', 'publish', 'x', $1)"
    await scratch.execute(rule, "plantXY.topic")  # "_" and "%" in a permission are literal
    assert "topic exchange 'plant_%.topic'" in await refused(scratch, rule, "plant_%.topic")
    assert "dead-letter" in await refused(scratch, "update topic_rule set exchange = 'plant_%.x'")
    await scratch.execute("update account set write = '{}'")
    await scratch.execute(rule, "plant_%.topic")
    assert "dead-letter" in await refused(scratch, "update account set write = '{plant_%.topic}'")
    await scratch.execute("update account set write = '{plant_%.topic}', configure = '{}'")


@pytest.mark.parametrize(
    ("networks", "fault"),
    [
        ("'{}'", "an empty list would fit no address"),
        ("array[null]::cidr[]", "an entry is null"),
        ("array[array['10.0.0.0/8'], array['10.0.0.0/8']]::cidr[]", "the list has more than one dimension"),
    ],
)
async def test_networks_are_any_address_or_a_list_of_some(
    scratch: asyncpg.Connection, networks: str, fault: str
) -> None:
    message = await refused(scratch, f"insert into device_type (name, networks) values ('agv', {networks})")
    assert f"networks of device type 'agv': {fault}" in message
    await scratch.execute("insert into account (name, login) values ('robot', 'certificate')")
    assert f"networks: {fault}" in await refused(scratch, f"update account set networks = {networks}")
    await scratch.execute("update account set networks = '{10.0.0.0/8, ::1/128, 192.168.1.7/32}'")


async def test_a_network_with_host_bits_or_garbage_is_refused(scratch: asyncpg.Connection) -> None:
    for text in ("{10.0.0.1/8}", "{unknown}", "{10.0.0.0/33}"):
        with pytest.raises(asyncpg.InvalidTextRepresentationError):
            async with scratch.transaction():
                await scratch.execute(f"insert into device_type (name, networks) values ('agv', '{text}')")


@pytest.mark.parametrize(
    ("attributes", "fault"),
    [
        ("[]", "they must be a JSON object"),
        ('"x"', "they must be a JSON object"),
        ("null", "they must be a JSON object"),
        ('{"a b": "x"}', 'the name "a b" is not possible'),
        ('{"": "x"}', 'the name "" is not possible'),
        ('{"1a": "x"}', 'the name "1a" is not possible'),
        ('{"site": 7}', 'the value of "site" must be a string'),
        ('{"site": null}', 'the value of "site" must be a string'),
        ('{"site": ["x"]}', 'the value of "site" must be a string'),
        (json.dumps({"site": "x" * 1025}), 'the value of "site" has more than 1024 bytes'),
        (json.dumps({"good": "x", "x" * 64: "x"}), "is not possible; names are a letter or _"),
    ],
)
async def test_attributes_are_named_strings(scratch: asyncpg.Connection, attributes: str, fault: str) -> None:
    await add_type(scratch)
    insert = "insert into device (device_id, type, attributes) values ('d1', 'agv', $1)"
    message = await refused(scratch, insert, attributes)
    assert message.startswith("attributes of device 'd1': ")
    assert fault in message
    await scratch.execute(insert, '{"site": "Hall 4", "_a-1": ""}')
    assert fault in await refused(scratch, "update device set attributes = $1", attributes)


@pytest.mark.parametrize("when", ["infinity", "-infinity", "20000-01-01", "0044-03-15 BC"])
async def test_an_expiry_that_no_calendar_of_the_tools_holds_is_refused(scratch: asyncpg.Connection, when: str) -> None:
    await add_type(scratch)
    insert = f"insert into device (device_id, type, expires_at) values ('d1', 'agv', '{when}')"
    assert "expiry of device 'd1': possible are the years 1970 to 9999; null is never" in await refused(scratch, insert)
    await add_device(scratch, "d1")
    assert "null is never" in await refused(scratch, f"update device set expires_at = '{when}'")


async def test_an_expiry_is_optional_and_may_be_past(scratch: asyncpg.Connection) -> None:
    await add_type(scratch)
    await add_device(scratch, "d1")
    await scratch.execute("update device set expires_at = '2001-01-01'")
    await scratch.execute("update device set expires_at = '9999-12-30 12:00Z'")
    await scratch.execute("update device set expires_at = null")


async def test_the_constraints_hold_in_a_session_that_applies_changes_like_a_replica(
    scratch: asyncpg.Connection,
) -> None:
    await add_type(scratch)
    await add_account(scratch, "robot")
    await scratch.execute("set local session_replication_role = replica")
    await refused(
        scratch, "insert into topic_rule (device_type, effect, action, topic) values ('agv', 'allow', 'publish', 'a*')"
    )
    assert "account 'robot' has" in await refused(
        scratch, "insert into device (device_id, type) values ('robot', 'agv')"
    )
    assert "not one of RabbitMQ's" in await refused(scratch, "update account set tags = '{root}'")
    assert "must begin with" in await refused(scratch, "update device_type set client_ids = '{x}'")
    assert "dead-letter" in await refused(scratch, "update account set configure = '{q}', write = '{*}'")


# --- Python and the database agree ---------------------------------------------------------------------------------

# PostgreSQL's text can contain everything but NUL and lone surrogates.
anything = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=140)
pieces = st.sampled_from(
    [
        "{device_id}",
        "{client_id}",
        "{device_type}",
        "{vhost}",
        "{attr.a}",
        "{attr.}",
        "{attr.a.b}",
        "{}",
        "{x}",
        "{",
        "}",
    ]
    + [
        "/",
        "/",
        "+",
        "#",
        "*",
        "a",
        "ab",
        "A1",
        "-",
        "_",
        ".",
        ":",
        "@",
        ",",
        " ",
        "\t",
        "\n",
        "\xa0",
        "\x85",
        "\u2028",
    ]
    + ["\u2007", "\u3000", "\ufeff", "ä", "🚜", "\x1f", "\x7f"]
)
composed = st.lists(pieces, max_size=9).map("".join)
texts = st.one_of(composed, anything, st.builds(lambda text, n: text * n, composed, st.integers(1, 200)))
patterns = st.one_of(composed, anything).map("{device_id}".__add__)


def holds(database: str, sql: str, python: Callable[..., Any], *strategies: st.SearchStrategy[Any]) -> None:
    """Compare a Python function with its counterpart in the database, on generated arguments."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        connection = runner.run(asyncpg.connect(database))
        try:

            @settings(max_examples=200, deadline=None)
            @given(st.tuples(*strategies))
            def same(arguments: tuple[Any, ...]) -> None:
                assert runner.run(connection.fetchval(sql, *arguments)) == python(*arguments)

            same()
        finally:
            runner.run(connection.close())


@pytest.fixture(scope="module", params=["C.UTF-8", "C"])
def agreeing(request: pytest.FixtureRequest, postgres: Server, migrated_template: str) -> str:
    """A database whose locale classifies every letter, and one that knows ASCII only."""
    name = f"agreeing_{request.param.replace('.', '_').replace('-', '_').lower()}"
    postgres.psql("postgres", f"drop database if exists {name}")  # the same process may run this file twice
    if request.param == "C.UTF-8":
        postgres.psql("postgres", f"create database {name} template {migrated_template}")
    else:
        from authbackend.postgres.connection import Target
        from authbackend.postgres.migrate import migrate

        postgres.psql("postgres", f"create database {name} template template0 locale 'C' encoding 'UTF8'")
        run(migrate(Target(postgres.dsn(name))))
    return postgres.dsn(name)


def test_common_names_agree(agreeing: str) -> None:
    holds(agreeing, "select common_name_fault($1)", names.common_name_fault, texts)


def test_topic_filters_agree(agreeing: str) -> None:
    holds(agreeing, "select topic_filter_fault($1)", topics.topic_filter_fault, texts)


def test_client_id_patterns_agree(agreeing: str) -> None:
    holds(agreeing, "select client_id_pattern_fault($1)", names.client_id_pattern_fault, st.one_of(patterns, texts))


def test_client_ids_that_fit_agree(agreeing: str) -> None:
    ids = st.text("ab1-_", min_size=1, max_size=4)
    rest = st.sampled_from(["", "-*", "_*", "-a", "-a-*", ".b", "/a/*"]).map("{device_id}".__add__)

    def fits(client_id: str, device_id: str, some: list[str]) -> bool:
        return names.client_id_fits(client_id, device_id, tuple(some))

    client_ids = st.one_of(
        st.text("ab1-_./", max_size=7),
        st.builds(lambda i, r: i + r, ids, st.sampled_from(["", "-", "-a", "-a-", "-a-b", "/a/b"])),
    )
    holds(agreeing, "select client_id_fits($1, $2, $3)", fits, client_ids, ids, st.lists(rest, max_size=3))


def test_the_possible_owners_of_a_client_id_agree(agreeing: str) -> None:
    def owners(client_id: str) -> list[str]:
        return sorted(names.possible_owners(client_id))

    sql = 'select coalesce(array_agg(o order by o collate "C"), array[]::text[]) from client_id_owners($1) as o'
    holds(agreeing, sql, owners, st.one_of(texts, st.text("ab-_./", max_size=80)))


def refused_by(agreeing: str, insert: str, python: Callable[[str], str | None]) -> None:
    """Compare what a table accepts with what Python accepts."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        connection = runner.run(asyncpg.connect(agreeing))

        async def taken(text: str) -> str | None:
            transaction = connection.transaction()
            await transaction.start()
            try:
                await connection.execute("insert into device_type (name) values ('agv')")
                await connection.execute(insert, text)
            except asyncpg.CheckViolationError as error:
                return str(error.args[0])
            finally:
                await transaction.rollback()
            return None

        try:

            @settings(max_examples=150, deadline=None)
            @example("a\n")
            @example("ä")
            @example("x" * 64)
            @example("x" * 65)
            @given(st.one_of(st.text("aZ09_-", min_size=1, max_size=66), texts))
            def same(text: str) -> None:
                message, fault = runner.run(taken(text)), python(text)
                assert (message is None) == (fault is None), message
                assert fault is None or str(message).endswith(fault)

            same()
        finally:
            runner.run(connection.close())


def test_device_ids_agree(agreeing: str) -> None:
    insert = "insert into device (device_id, common_name, type) values ($1, 'any', 'agv')"
    refused_by(agreeing, insert, names.device_id_fault)


def test_names_of_device_types_agree(agreeing: str) -> None:
    def fault(name: str) -> str | None:
        return "twice" if name == "agv" else names.device_type_fault(name)

    assert fault("agv") == "twice"
    refused_by(
        agreeing, "insert into device_type (name) values ('X' || $1)", lambda text: names.device_type_fault("X" + text)
    )


async def test_the_tags_agree(scratch: asyncpg.Connection) -> None:
    await scratch.execute(
        "insert into account (name, login, tags) values ('robot', 'certificate', $1)", list(names.RABBITMQ_TAGS)
    )
    message = await refused(scratch, "update account set tags = '{x}'")
    assert message.endswith(": " + ", ".join(names.RABBITMQ_TAGS))
