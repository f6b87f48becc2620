"""The impact that a plan shows is what the brake counts when the plan is applied, for every kind of change."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from authbackend.errors import AuthbackendError, Forbidden, InvalidInput, Unavailable
from authbackend.policy_file.changes import Planned
from authbackend.policy_file.model import AccountEntry, DeviceEntry, DeviceTypeEntry, Document, RuleEntry
from authbackend.policy_file.read import read
from authbackend.postgres import policy_apply
from authbackend.postgres.connection import Target
from tests.postgres.test_roles import ADMIN, SERVICE, give_roles
from tests.support.postgres import connected

TIGHT = "delete from brake; insert into brake (devices, percent) values (0, 0)"
RULES = [
    RuleEntry(effect, "publish", topic)
    for effect in ("allow", "deny")
    for topic in ("a/{attr.site}/#", "b/{attr.line}", "c")
]


def some(values: list[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(st.sampled_from(values), unique=True).map(tuple)


networks = st.sampled_from([None, ("10.0.0.0/8",), ("10.0.0.0/8", "::1/128")])


@st.composite
def documents(draw: st.DrawFn) -> Document:
    types = {
        name: DeviceTypeEntry(
            name,
            client_ids=draw(some(["{device_id}", "{device_id}_*"])),
            vhosts=draw(some(["/", "v"])),
            networks=draw(networks),
            max_staleness_s=draw(st.sampled_from([None, 30.0, 60.0])),
            require_known_certificate=draw(st.booleans()),
            rules=draw(some(RULES)),
        )
        for name in ("T", "U")
    }
    ids = [f"D{n}" for n in range(6)]
    names = draw(st.permutations(ids))
    devices = {
        device_id: DeviceEntry(
            device_id,
            name,
            draw(st.sampled_from(["T", "U"])),
            status=draw(st.sampled_from([None, "active", "suspended", "revoked", "pending"])),
            attributes=tuple((key, draw(st.sampled_from("xy"))) for key in ("site", "line")),
            expires_at=draw(
                st.sampled_from([None, datetime(2030, 1, 1, tzinfo=UTC), datetime(2040, 1, 1, tzinfo=UTC)])
            ),
            rules=draw(some(RULES[:3])),
        )
        for device_id, name in zip(ids, names, strict=True)
        if draw(st.integers(0, 4))
    }
    accounts = {
        name: AccountEntry(
            name,
            "certificate",
            tags=draw(some(["monitoring", "management"])),
            vhosts=draw(some(["/", "v"])),
            networks=draw(networks),
            read=draw(some(["q", "r"])),
            rules=draw(some(RULES[2::3])),
        )
        for name in ("ops", "press")
        if draw(st.integers(0, 4))
    }
    return Document(types, devices, accounts)


async def agree(dsn: str, document: Document, prune: bool) -> None:
    """Plan, apply with too low a number, and apply: all three must give the same impact for the same causes."""
    target = Target(dsn)
    planned = await policy_apply.plan(target, document, prune=prune)
    if planned.fault is not None:
        with pytest.raises(type(planned.fault)):
            await policy_apply.apply(target, document, actor="a", prune=prune)
        return
    impact = planned.impact
    assert (impact is None) == (planned.changes == [])
    if impact is None:
        return
    assert impact.beyond_limit == (impact.touched > 0)
    if impact.touched:
        with pytest.raises(InvalidInput) as refused:
            await policy_apply.apply(target, document, actor="a", prune=prune, accept_impact=impact.touched - 1)
        assert f"nothing was changed: {impact}; {impact.touched - 1} were accepted" in refused.value.detail
        assert refused.value.detail.endswith(f"--accept-impact {impact.touched}")
    applied = await policy_apply.apply(target, document, actor="a", prune=prune, accept_impact=impact.touched)
    assert sorted(map(str, applied.changes)) == sorted(map(str, planned.changes))
    assert applied.impact == impact
    async with connected(dsn) as connection:
        noted = await connection.fetchval("select after from audit where operation = 'ACCEPT' order by id desc limit 1")
    assert json.loads(noted) == {"accepted": impact.touched, "touched": impact.touched}
    assert (await policy_apply.plan(target, document, prune=prune)).changes == []


def test_a_plan_an_apply_that_is_refused_and_one_that_is_not_have_the_same_number(dsn: str) -> None:
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:

        async def tighten() -> None:
            async with connected(dsn) as connection:
                await connection.execute(TIGHT)

        runner.run(tighten())

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
        @given(documents(), st.booleans())
        def same(document: Document, prune: bool) -> None:
            runner.run(agree(dsn, document, prune))

        same()


FLEET = """
schema: authbackend/1
device_types:
  T: {client_ids: ["{device_id}"], vhosts: ["/", "v"], rules: [{effect: allow, action: publish, topic: "a/{attr.site}"}]}
  U: {client_ids: ["{device_id}"], vhosts: ["/"]}
devices:
  - {device_id: D1, type: T, attributes: {site: kiel}}
  - {device_id: D2, type: T, attributes: {site: kiel}}
  - {device_id: D3, type: U, attributes: {site: kiel}}
accounts:
  - {name: ops, login: certificate, vhosts: ["/"]}
"""
CHANGES = {
    "a device is revoked": ("D1, type: T,", "D1, type: T, status: revoked,", "1 revoked (D1)"),
    "a type is narrowed": ('"/", "v"', '"/"', "2 of a type that is narrowed (D1, D2)"),
    "a rule is taken away": ('"a/{attr.site}"', '"b"', "2 whose rules are narrowed (D1, D2)"),
    "a device is retyped": ("D3, type: U", "D3, type: T", "1 retyped (D3)"),
    "an attribute of a rule changes": ("{site: kiel}}\n  - {device_id: D2", "{site: ulm}}\n  - {device_id: D2", "1 with other attributes (D1)"),
    "an attribute of no rule changes": ("D3, type: U, attributes: {site: kiel}", "D3, type: U, attributes: {site: ulm}", ""),
    "an account is narrowed": ('name: ops, login: certificate, vhosts: ["/"]', "name: ops, login: certificate, vhosts: []", "1 account narrowed (ops)"),
    "two swap their names": (
        "D1, type: T, attributes: {site: kiel}}\n  - {device_id: D2,",
        "D1, common_name: D2, type: T, attributes: {site: kiel}}\n  - {device_id: D2, common_name: D1,",
        "2 renamed (D1, D2)",
    ),
    "a device is removed": ("  - {device_id: D2, type: T, attributes: {site: kiel}}\n", "", "1 deleted (D2)"),
    "a device is added": ("accounts:", "  - {device_id: D4, type: T}\naccounts:", ""),
}  # fmt: skip


@pytest.fixture
async def registry(dsn: str) -> Target:
    target = Target(dsn)
    await policy_apply.apply(target, document(FLEET), actor="a")
    async with connected(dsn) as connection:
        await connection.execute(TIGHT)
    return target


def document(text: str) -> Document:
    found, problems = read(text, "test.yaml")
    assert not [p for p in problems if not p.warning], problems
    return found


async def planned(target: Target, text: str, *, prune: bool = True) -> Planned:
    return await policy_apply.plan(target, document(text), prune=prune)


async def everything(dsn: str) -> list[Any]:
    async with connected(dsn) as connection:
        return [
            await connection.fetch(f"select * from {table} order by 1")
            for table in ("device", "device_type", "account", "topic_rule", "audit", "change", "enforcement", "brake_acceptance")
        ]  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
async def test_a_plan_names_the_cause_and_leaves_nothing_behind(registry: Target, what: str) -> None:
    before, after, told = CHANGES[what]
    assert FLEET.count(before) == 1
    was = await everything(registry.dsn)
    found = await planned(registry, FLEET.replace(before, after))
    assert found.changes
    assert found.impact is not None
    assert found.impact.told == told
    assert found.impact.beyond_limit == bool(told)
    assert await everything(registry.dsn) == was


async def test_an_apply_that_is_refused_tells_the_impact_of_all_and_not_of_what_came_first(registry: Target) -> None:
    changed = FLEET.replace('"/", "v"', '"/"').replace("D3, type: U,", "D3, type: U, status: revoked,")
    was = await everything(registry.dsn)
    with pytest.raises(InvalidInput) as caught:
        await policy_apply.apply(registry, document(changed), actor="a")
    assert caught.value.detail == (
        "nothing was changed: impact: something is taken from 3 devices, accounts or certificates: "
        "2 of a type that is narrowed (D1, D2), 1 revoked (D3); the limit is 0, or 0 % of 3 devices; "
        "more than the limit is refused unless it is meant: policy apply with --accept-impact 3"
    )
    assert await everything(registry.dsn) == was


async def test_a_plan_says_what_the_database_would_refuse(registry: Target) -> None:
    found = await planned(registry, FLEET.replace("name: ops", "name: D1"))
    assert len(found.changes) == 2
    assert found.impact is None
    assert isinstance(found.fault, InvalidInput)
    assert "account 'D1' has the common name of device 'D1'" in found.fault.detail


async def test_who_may_only_read_plans_without_the_impact(registry: Target, postgres: Any, database: str) -> None:
    give_roles(postgres, database)
    text = FLEET[: FLEET.index("accounts:")].replace("D1, type: T,", "D1, type: T, status: revoked,")
    target = Target(postgres.dsn(database, SERVICE))
    found = await policy_apply.plan(target, document(text))
    assert [str(change) for change in found.changes] == ['~ device D1: status: "active" -> "revoked"']
    assert found.impact is None
    assert isinstance(found.fault, Forbidden)
    admin = await policy_apply.plan(Target(postgres.dsn(database, ADMIN)), document(text))
    assert admin.impact is not None
    assert admin.impact.told == "1 revoked (D1)"


async def test_a_plan_gives_way_and_says_so(
    registry: Target, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("authbackend.postgres.lock_waits.LOCK_TIMEOUT_S", 0.1)
    async with connection.transaction():
        await connection.execute("update device set status_reason = 'x' where device_id = 'D1'")
        found = await planned(registry, FLEET.replace("D1, type: T,", "D1, type: T, status: revoked,"))
    assert len(found.changes) == 1
    assert isinstance(found.fault, Unavailable)
    assert "holds device D1" in found.fault.detail


async def test_a_person_reads_the_impact_so_far_in_psql(registry: Target, connection: asyncpg.Connection) -> None:
    async with connection.transaction():
        assert await connection.fetchval("select touched from impact()") == 0
        await connection.execute("select accept_impact(9)")
        await connection.execute("update device set status = 'suspended' where device_id <> 'D3'")
        await connection.execute("delete from account")
        row = await connection.fetchrow("select * from impact()")
        assert row is not None
        assert dict(row) == {
            "touched": 3,
            "registered": 3,
            "devices": 0,
            "percent": 0,
            "accepted": 9,
            "beyond_limit": True,
            "causes": row["causes"],
            "told": "2 suspended (D1, D2), 1 account deleted (ops)",
        }
        assert json.loads(row["causes"])[1] == {"kind": "account", "cause": "deleted", "number": 1, "names": ["ops"]}
    assert await connection.fetchval("select touched from impact()") == 0
    with pytest.raises(AuthbackendError):  # the accepted number does not carry over to the next transaction
        await policy_apply.apply(registry, document("schema: authbackend/1\ndevices: []\n"), actor="a", prune=True)
