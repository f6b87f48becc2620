"""`policy apply` during other edits: it makes nobody wait, overwrites nothing, and names the session that blocks it."""

import asyncio
import contextlib
import re
import socket

import pytest

from authbackend.errors import Conflict, Unavailable
from authbackend.policy_file.read import read
from authbackend.postgres import lock_waits, locks, policy_apply, policy_file, registry_edits
from authbackend.postgres.connection import Target, connect, translated_errors
from tests.postgres.test_constraints import HASH
from tests.postgres.test_roles import ADMIN, give_roles
from tests.support.postgres import connected, until

BEFORE = f"""
schema: authbackend/1
device_types:
  APM: {{client_ids: ["{{device_id}}"], vhosts: ["/"], rules: [{{effect: allow, action: publish, topic: "a/#", note: one}}]}}
devices:
  - {{device_id: D1, type: APM, attributes: {{site: kiel}}, rules: [{{effect: allow, action: subscribe, topic: "b/#"}}]}}
  - {{device_id: D2, type: APM, attributes: {{site: kiel}}}}
  - {{device_id: D3, type: APM, attributes: {{site: kiel}}}}
  - {{device_id: D4, type: APM, attributes: {{site: kiel}}}}
accounts:
  - {{name: ops, login: password, password_hash: "{HASH}", vhosts: ["/"]}}
"""
MOVED = BEFORE.replace("kiel", "hamburg")
APPLICATION = "the apply"


@pytest.fixture
async def registry(postgres, database, migrated_template):
    """A registry that contains BEFORE, applied and edited with the admin role; returns its target."""
    give_roles(postgres, database)
    target = Target(postgres.dsn(database, ADMIN), application_name=APPLICATION)
    await apply(target, BEFORE)
    return target


@pytest.fixture
async def session(registry):
    """A function that opens further sessions of the admin role."""
    async with contextlib.AsyncExitStack() as stack:

        async def opened(name="somebody"):
            return await stack.enter_async_context(
                connected(registry.dsn, server_settings={"application_name": name}, command_timeout=20)
            )

        yield opened


def document(text):
    found, problems = read(text, "test.yaml")
    assert not [p for p in problems if not p.warning], problems
    return found


async def apply(target, text, *, prune=False, say=lambda _: None):
    return await policy_apply.apply(target, document(text), actor="alice", prune=prune, say=say)


async def waits(connection, application, for_pid=None):
    """Wait until a session of an application waits for a lock, and return its pid."""
    found = None

    async def waiting_now():
        nonlocal found
        found = await connection.fetchval(
            "select l.pid from pg_locks l join pg_stat_activity a using (pid) where not l.granted and a.application_name = $1 "
            "and ($2::int is null or $2 = any (pg_blocking_pids(l.pid)))",
            application,
            for_pid,
        )
        return found is not None

    await until(waiting_now, f"{application} waits for a lock")
    return found


async def state(connection):
    """Return everything that a policy file covers, and how often it was written."""
    return [
        await connection.fetch(f"select {what} from {table} order by 1")
        for table, what in (
            ("device", "device_id, type, status, attributes, common_name"),
            ("device_type", "name, description"),
            ("topic_rule", "topic, note"),
            ("account", "name, vhosts"),
            ("audit", "id"),
        )
    ]


async def begun(connection, holder, target, text, **options):
    """Begin an apply, and return when it has planned and waits for a lock of another session."""
    task = asyncio.create_task(apply(target, text, **options))
    await waits(connection, APPLICATION, holder.get_server_pid())
    return task


# --- somebody changes what the plan saw ----------------------------------------------------------------------------

CONFLICTS = {
    "a device is revoked": (
        MOVED,
        "update device set status = 'revoked' where device_id = 'D3'",
        ['device D3: status: the plan saw "active", now "revoked"'],
    ),
    "the very column is changed": (
        MOVED,
        "update device set attributes = '{\"site\": \"bremen\"}' where device_id = 'D3'",
        ['device D3: attributes: the plan saw {"site": "kiel"}, now {"site": "bremen"}'],
    ),
    "a device is deleted": (
        MOVED,
        "delete from device where device_id = 'D3'",
        ["device D3: the plan saw it, now it is gone"],
    ),
    "a device is inserted": (
        BEFORE.replace("accounts:", "  - {device_id: D9, type: APM}\naccounts:"),
        "insert into device (device_id, type, status) values ('D9', 'APM', 'revoked')",
        ['device D9: the plan saw none, now there is one; status: the file says "active", now "revoked"'],
    ),
    "a device that is to go is edited": (
        BEFORE.replace("  - {device_id: D3, type: APM, attributes: {site: kiel}}\n", ""),
        "update device set status_reason = 'keep it' where device_id = 'D3'",
        ['device D3: status_reason: the plan saw "", now "keep it"'],
    ),
    "a device that is to go gets a rule": (
        BEFORE.replace("  - {device_id: D3, type: APM, attributes: {site: kiel}}\n", ""),
        "insert into topic_rule (device_id, effect, action, topic) values ('D3', 'deny', 'publish', 'x')",
        ["rule device_id D3: deny publish x: the plan saw none, now there is one"],
    ),
    "a type is edited": (
        BEFORE.replace('vhosts: ["/"], rules', 'vhosts: ["/", "b"], rules'),
        "update device_type set description = 'by hand' where name = 'APM'",
        ['device_type APM: description: the plan saw "", now "by hand"'],
    ),
    "a password is changed": (
        BEFORE.replace('vhosts: ["/"]}\n', 'vhosts: ["b"]}\n'),
        f"update account set password_hash = '{HASH.replace('m=65536', 'm=4096')}' where name = 'ops'",
        ['account ops: password_hash: the plan saw "set", now "changed"'],
    ),
    "a rule's note is changed": (
        BEFORE.replace("note: one", "note: two"),
        "update topic_rule set note = 'three' where topic = 'a/#'",
        ['rule device_type APM: allow publish a/#: note: the plan saw "one", now "three"'],
    ),
    "a rule is changed": (
        BEFORE.replace("note: one", "note: two"),
        "update topic_rule set topic = 'c/#' where topic = 'a/#'",
        ['rule device_type APM: allow publish a/#: topic: the plan saw "a/#", now "c/#"'],
    ),
    "a rule is deleted": (
        BEFORE.replace("note: one", "note: two"),
        "delete from topic_rule where topic = 'a/#'",
        ["rule device_type APM: allow publish a/#: the plan saw it, now it is gone"],
    ),
    "a rule that is to go is edited": (
        BEFORE.replace(', rules: [{effect: allow, action: subscribe, topic: "b/#"}]', ""),
        "update topic_rule set effect = 'deny' where topic = 'b/#'",
        ['rule device_id D1: allow subscribe b/#: effect: the plan saw "allow", now "deny"'],
    ),
    "a rule is inserted": (
        BEFORE.replace('topic: "b/#"}', 'topic: "b/#"}, {effect: deny, action: publish, topic: "n", note: file}'),
        "insert into topic_rule (device_id, effect, action, topic, note) values ('D1', 'deny', 'publish', 'n', 'hand')",
        [
            'rule device_id D1: deny publish n: the plan saw none, now there is one; note: the file says "file", now "hand"'
        ],
    ),
}


@pytest.mark.parametrize("case", CONFLICTS)
async def test_an_edit_after_the_plan_is_never_overwritten(registry, session, connection, case):
    text, edit, told = CONFLICTS[case]
    editing = await session()
    async with editing.transaction():
        await editing.execute(edit)
        task = await begun(connection, editing, registry, text, prune=True)
        theirs = await state(editing)
    with pytest.raises(Conflict) as caught:
        await task
    assert caught.value.detail.splitlines()[1:-1] == [f"  {line}" for line in told]
    assert caught.value.detail.startswith(
        "nothing was changed: somebody else changed these rows after the plan was made:"
    )
    assert "argon2id" not in caught.value.detail
    assert await state(connection) == theirs


async def test_an_edit_of_what_the_plan_leaves_alone_is_nobodys_conflict(registry, session, connection):
    text = MOVED.replace(
        "device_id: D4, type: APM, attributes: {site: hamburg}", "device_id: D4, type: APM, attributes: {site: kiel}"
    )
    editing = await session()
    async with editing.transaction():
        await editing.execute("update device set status_reason = 'x' where device_id = 'D3'")
        task = await begun(connection, editing, registry, text)
        other = await session()
        await other.execute("update device set status = 'revoked' where device_id = 'D4'")
        await other.execute("insert into device (device_id, type) values ('D7', 'APM')")
        await editing.execute("update device set status_reason = '' where device_id = 'D3'")
    assert len((await task).changes) == 3
    assert await connection.fetchval("select status from device where device_id = 'D4'") == "revoked"


async def test_many_conflicts_are_not_all_told(registry, session, connection):
    many = "".join(f"  - {{device_id: M{n:02d}, type: APM}}\n" for n in range(30))
    text = BEFORE.replace("accounts:", f"{many}accounts:")
    editing = await session()
    async with editing.transaction():
        await editing.execute(
            "insert into device (device_id, type) select 'M' || lpad(n::text, 2, '0'), 'APM' from generate_series(0, 29) n"
        )
        task = await begun(connection, editing, registry, text)
    with pytest.raises(Conflict) as caught:
        await task
    lines = caught.value.detail.splitlines()
    assert lines[1] == "  device M00: the plan saw none, now there is one"
    assert lines[-3:-1] == ["  device M19: the plan saw none, now there is one", "  ..."]


# --- another session waits -----------------------------------------------------------------------------------------


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(policy_apply, "PAUSES_S", (0.0, 0.0, 0.0))


@pytest.mark.parametrize("way", ["psql", "device revoke"])
async def test_a_revocation_gets_through_while_rows_are_held_and_stays(registry, session, connection, no_pauses, way):
    idle, said = await session("idle"), []
    transaction = idle.transaction()
    await transaction.start()
    await idle.execute("select from device where device_id = 'D2' for update")
    task = await begun(connection, idle, registry, MOVED, say=said.append)  # it holds D1 and waits for D2
    if way == "psql":
        await (await session("psql")).execute("update device set status = 'revoked' where device_id = 'D1'")
    else:
        revoking = Target(registry.dsn, application_name="psql")
        assert await registry_edits.set_device_status(revoking, "bob", "D1", "revoked", "stolen")
    await transaction.rollback()
    with pytest.raises(Conflict, match='device D1: .*status: the plan saw "active", now "revoked"'):
        await task
    assert any(re.search(r'gave way to pid [0-9]+ .application "psql", role authbackend_admin', line) for line in said)
    rows = await connection.fetch("select device_id, status, attributes ->> 'site' as site from device order by 1")
    assert [tuple(row) for row in rows] == [
        ("D1", "revoked", "kiel"),
        *((f"D{n}", "active", "kiel") for n in (2, 3, 4)),
    ]


async def test_after_giving_way_to_one_who_changes_nothing_all_is_applied_once(
    registry, session, connection, no_pauses
):
    idle, waiter, said = await session(), await session(), []
    holding, waiting = idle.transaction(), waiter.transaction()
    await holding.start()
    await idle.execute("select from device where device_id = 'D2' for update")
    task = await begun(connection, idle, registry, MOVED, say=said.append)
    await waiting.start()
    await waiter.execute("update device set status = 'revoked' where device_id = 'D1'")
    await waiting.rollback()
    await holding.rollback()
    applied = await task
    assert len(said) >= 1
    txid = applied.version.split("@")[0]
    trail = await connection.fetch(
        "select key, claimed_by, version::text from audit where version::text = $1 order by id", txid
    )
    assert sorted(tuple(row) for row in trail) == [(f"D{n}", "alice", txid) for n in (1, 2, 3, 4)]
    fed = await connection.fetch("select entity, key from change where txid::text = $1 order by key", txid)
    assert [tuple(row) for row in fed] == [("device", f"D{n}") for n in (1, 2, 3, 4)]
    assert await connection.fetchval("select count(*) from device where attributes ->> 'site' = 'hamburg'") == 4


async def test_who_edits_in_another_order_is_not_the_victim_of_a_deadlock(registry, session, connection, no_pauses):
    editing = await session()
    async with editing.transaction():
        await editing.execute("update device set status = 'suspended' where device_id = 'D2'")
        task = await begun(connection, editing, registry, MOVED)  # it holds D1 and waits for D2
        await editing.execute("update device set status = 'suspended' where device_id = 'D1'")
    with pytest.raises(Conflict, match="(?s)device D1: .*device D2: "):
        await task
    assert await connection.fetchval("select count(*) from device where status = 'suspended'") == 2


async def test_who_waits_for_the_guard_of_names_gets_through(registry, session, connection, no_pauses):
    """The inserted device shares the lock of the guard; then the rule has to wait."""
    text = BEFORE.replace('topic: "b/#"}', 'topic: "b/#"}, {effect: deny, action: publish, topic: n}')
    text = text.replace("accounts:", "  - {device_id: D9, type: APM}\naccounts:")
    idle, said = await session(), []
    transaction = idle.transaction()
    await transaction.start()
    await idle.execute(
        "insert into topic_rule (device_id, effect, action, topic) values ('D1', 'deny', 'publish', 'n')"
    )
    task = await begun(connection, idle, registry, text, say=said.append)
    await registry_edits.insert_account(registry, "bob", name="new", login="certificate", password_hash=None, lists={})
    await transaction.rollback()
    applied = await task
    assert said
    assert {change.key for change in applied.changes} == {"D9", "device_id D1: deny publish n"}
    assert await connection.fetchval("select count(*) from account") == 2


async def test_a_plan_that_changes_no_names_needs_no_guard(registry, session):
    editing = await session()
    async with editing.transaction():
        await editing.execute("update account set vhosts = '{x}' where name = 'ops'")
        assert len((await apply(registry, MOVED.split("accounts:")[0])).changes) == 4


async def test_it_gives_way_three_times_and_then_fails_with_nothing_changed(registry, session, connection, no_pauses):
    idle, waiter, said = await session(), await session("nosy"), []
    before = await state(connection)
    async with idle.transaction():
        await idle.execute("select from device where device_id = 'D2' for update")
        task = await begun(connection, idle, registry, MOVED, say=said.append)
        while not task.done():
            async with waiter.transaction():
                await waiter.execute("select from device where device_id = 'D1' for update")
            await asyncio.sleep(0)
        with pytest.raises(
            Unavailable, match=r'this gave way to others 4 times, the last time to pid [0-9]+ .application "nosy"'
        ):
            await task
    assert len(said) == 3
    assert await state(connection) == before


async def test_a_schema_change_that_waits_does_not_hold_up_everybody_behind_it(
    registry, session, connection, no_pauses
):
    idle, said = await session(), []
    transaction = idle.transaction()
    await transaction.start()
    await idle.execute(
        "insert into topic_rule (device_id, effect, action, topic) values ('D1', 'deny', 'publish', 'n')"
    )
    text = MOVED.replace('topic: "b/#"}', 'topic: "b/#"}, {effect: deny, action: publish, topic: n}')
    text = text.replace('vhosts: ["/"]}\n', 'vhosts: ["b"]}\n')
    task = await begun(connection, idle, registry, text, say=said.append)
    await connection.execute("alter table account add column note text")  # the apply has a lock on account
    await transaction.rollback()
    assert len((await task).changes) == 6
    assert said


# --- two applies, and sessions that hold locks ---------------------------------------------------------------------


async def test_two_applies_take_turns(registry, session, connection, monkeypatch):
    idle, first_said, said = await session(), [], []
    transaction = idle.transaction()
    await transaction.start()
    await idle.execute("select from device where device_id = 'D2' for update")
    first = await begun(connection, idle, registry, MOVED, say=first_said.append)
    monkeypatch.setattr(lock_waits, "LOCK_TIMEOUT_S", 0.05)
    second = asyncio.create_task(apply(registry, MOVED.replace("hamburg", "bremen"), say=said.append))

    async def told():
        return bool(said)

    await until(told, "the second says for whom it waits")
    await transaction.rollback()
    assert len((await first).changes) == 4
    assert [change.fields["attributes"][0] for change in (await second).changes] == [{"site": "hamburg"}] * 4
    assert re.fullmatch(
        r'waiting for another policy, which is being applied by pid [0-9]+ .application "the apply", .*', said[0]
    )
    assert first_said == []  # the first one gave way to nobody
    assert await connection.fetchval("select count(*) from pg_locks where locktype = 'advisory'") == 0


async def test_a_turn_that_does_not_come_is_told_with_the_one_who_has_it(registry, connection, monkeypatch):
    monkeypatch.setattr(lock_waits, "LOCK_TIMEOUT_S", 0.05)
    monkeypatch.setattr(policy_apply, "TURN_S", 0.0)
    await connection.execute("select pg_advisory_lock($1)", locks.APPLY)
    with pytest.raises(Unavailable, match=f"another policy is being applied by pid {connection.get_server_pid()} "):
        await apply(registry, MOVED)


@pytest.mark.parametrize("role", ["admin", "superuser"])
async def test_an_idle_transaction_in_the_way_is_named(registry, session, connection, dsn, monkeypatch, role):
    monkeypatch.setattr(lock_waits, "LOCK_TIMEOUT_S", 0.2)
    async with connected(dsn, server_settings={"application_name": "forgotten psql"}) as superuser:
        idle = await session("forgotten psql") if role == "admin" else superuser
        async with idle.transaction():
            await idle.execute("update device set status_reason = 'mine' where device_id = 'D2'")
            before = await state(connection)
            with pytest.raises(Unavailable) as caught:
                await apply(registry, MOVED)
            assert await state(connection) == before
    text = caught.value.detail
    name = "authbackend_admin" if role == "admin" else "postgres"
    assert text.startswith(
        f'nothing was changed: pid {idle.get_server_pid()} (application "forgotten psql", role {name}; '
    )
    assert "holds device D2, and did not end within 0.2 s" in text
    seen = r"its transaction began at 20[-0-9: +]+ and is idle in transaction" if role == "admin" else "may not see"
    assert re.search(seen, text)


async def test_a_locked_table_is_named(registry, connection, monkeypatch):
    monkeypatch.setattr(lock_waits, "LOCK_TIMEOUT_S", 0.2)
    async with connection.transaction():
        await connection.execute("lock table device in access exclusive mode")
        with pytest.raises(
            Unavailable, match=f"pid {connection.get_server_pid()} .* holds table device, and did not end"
        ):
            await apply(registry, MOVED)


# --- it ends, and leaves nothing behind ----------------------------------------------------------------------------


async def test_nobody_to_look_who_waits_is_the_end_of_it(registry, session, connection):
    idle = await session()
    async with idle.transaction():
        await idle.execute("select from device where device_id = 'D2' for update")
        task = await begun(connection, idle, registry, MOVED)
        before = await state(connection)
        await connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = $1",
            f"{APPLICATION} looking who waits",
        )
        with pytest.raises(Unavailable, match="the connection that watches for waiting sessions was lost"):
            await task
        assert await state(connection) == before


async def test_interrupted_it_lets_go_of_everything(registry, session, connection):
    idle = await session()
    async with idle.transaction():
        await idle.execute("select from device where device_id = 'D2' for update")
        task = await begun(connection, idle, registry, MOVED)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await (await session()).execute("update device set status = 'revoked' where device_id = 'D1'")
    assert await connection.fetchval("select count(*) from device where attributes ->> 'site' = 'kiel'") == 4


async def test_to_plan_locks_nothing_against_anybody(registry, session, postgres, database, connection):
    planning = await session()
    async with planning.transaction(isolation="repeatable_read"):
        await policy_file.stage(planning, document(MOVED))
        assert len(await policy_file.work_out(planning, document(MOVED), prune=True)) == 4
        held = await connection.fetch(
            "select distinct mode from pg_locks where pid = $1 and relation = any ($2::regclass[])",
            planning.get_server_pid(),
            ["device", "device_type", "account", "topic_rule", "identity_guard"],
        )
        assert [row["mode"] for row in held] == ["AccessShareLock"]
    editing = await session()
    async with editing.transaction():  # the plan waits for no edit
        await editing.execute("update device set status = 'revoked'")
        await editing.execute("update account set vhosts = '{x}'")
        planned = await policy_apply.plan(Target(postgres.dsn(database, ADMIN)), document(MOVED))
        assert len(planned.changes) == 4
        assert planned.impact is None
        assert isinstance(planned.fault, Unavailable)


async def test_devices_from_a_list_are_removed_with_rules_that_the_plan_names(registry, connection):
    text = document("schema: authbackend/1\n")
    text.devices, text.speaks_of_device_rules = {}, False
    applied = await policy_apply.apply(registry, text, actor="alice", prune=True)
    assert [str(change) for change in applied.changes] == [
        *(f"- device D{n}" for n in (1, 2, 3, 4)),
        "- rule device_id D1: allow subscribe b/#",
    ]
    assert await connection.fetchval("select count(*) from topic_rule") == 1


# --- messages ------------------------------------------------------------------------------------------------------


async def test_a_statement_that_waited_too_long_is_not_told_as_no_connection(registry, session):
    idle = await session()
    async with idle.transaction():
        await idle.execute("select from device where device_id = 'D1' for update")
        hasty = Target(registry.dsn, statement_timeout_s=0.2)
        with pytest.raises(Unavailable) as caught:
            await registry_edits.set_device_status(hasty, "bob", "D1", "revoked", "")
    assert caught.value.detail.startswith(
        "nothing was changed: PostgreSQL cancelled the statement before it finished (canceling statement due to statement timeout). "
        "Most often another transaction holds a lock that it needs; to find it: select pid"
    )
    assert "database.statement_timeout_s" in caught.value.detail


async def test_a_lock_that_was_not_free_in_time_has_words_of_its_own(registry, session):
    idle, other = await session(), await session()
    async with idle.transaction():
        await idle.execute("select from device where device_id = 'D1' for update")
        with pytest.raises(
            Unavailable,
            match=r"^nothing was changed: another transaction holds a lock that this needs and did not end in time",
        ):
            with translated_errors():
                await other.execute("set lock_timeout = 50; select from device where device_id = 'D1' for update")


async def test_a_deadlock_has_words_of_its_own(registry, session):
    one, other = await session(), await session()

    async def both(connection, first, second):
        async with connection.transaction():
            await connection.execute("select from device where device_id = $1 for update", first)
            locked.release()
            await both_locked.wait()
            await connection.execute("select from device where device_id = $1 for update", second)

    locked, both_locked = asyncio.Semaphore(0), asyncio.Event()

    async def translated(*arguments):
        with translated_errors():
            await both(*arguments)

    tasks = [asyncio.create_task(translated(one, "D1", "D2")), asyncio.create_task(translated(other, "D2", "D1"))]
    await locked.acquire()
    await locked.acquire()
    both_locked.set()
    faults = [found for found in await asyncio.gather(*tasks, return_exceptions=True) if found is not None]
    assert [type(fault) for fault in faults] == [Unavailable]
    assert faults[0].detail.startswith("nothing was changed: this and another transaction waited for each other")


async def test_an_answer_that_does_not_come_is_not_told_as_no_connection(registry, session):
    one = await session()
    with pytest.raises(
        Unavailable, match=r"did not answer a statement in time .*It is not known whether the change was made"
    ):
        with translated_errors():
            await one.execute("select pg_sleep(10)", timeout=0.05)


async def test_no_connection_in_time_and_a_dead_network_are_told_as_such():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(Unavailable, match=r"^PostgreSQL cannot be reached: no connection within 0.05 s$"):
            await connect(Target(f"postgresql://u@127.0.0.1:{port}/x", connect_timeout_s=0.05))
    with pytest.raises(Unavailable, match="cannot be reached"):
        with translated_errors():
            raise TimeoutError(110, "Connection timed out")
