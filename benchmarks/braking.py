"""Measures the cost of the brake: changes of a whole fleet with and without its triggers, in turn, in one run."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import asyncpg

from authbackend.policy_file.model import DeviceEntry, Document
from authbackend.postgres import policy_apply
from authbackend.postgres.connection import Target
from benchmarks import fixtures
from tests.support.postgres import Server

Say = Callable[[str], None]
TABLES = ("device", "device_type", "topic_rule", "account", "certificate", "device_schedule")
STATEMENTS = {
    "insert": "insert into device (device_id, type, attributes) select 'n' || n, 'T20', '{\"site\": \"x\"}' from generate_series(1, {devices}) n",
    "update that takes nothing": "update device set status_reason = 'checked'",
    "update that suspends all": "update device set status = 'suspended'",
    "delete": "delete from device",
}


def measure(server: Server, devices: int, rounds: int, say: Say) -> dict[str, Any]:
    """Change a whole fleet with each statement, rolled back each time, and by applying a policy."""
    dsn = fixtures.registry(server, devices)
    took: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds + 1):
        for braked in (True, False) if number % 2 else (False, True):
            with _triggers(server, f"fleet_{devices}", braked):
                seconds_of = asyncio.run(_round(dsn, devices, number))
            for name, seconds in seconds_of.items() if number else ():
                took.setdefault(name, {}).setdefault("with" if braked else "without", []).append(round(seconds, 3))
        if number:
            say(
                f"round {number}: "
                + ", ".join(f"{name} {one['with'][-1] / one['without'][-1]:.2f}" for name, one in took.items())
            )
    return {
        "devices": devices,
        "took_s": took,
        "ratio": {
            name: round(statistics.median(a / b for a, b in zip(one["with"], one["without"], strict=True)), 3)
            for name, one in took.items()
        },
    }


@contextmanager
def _triggers(server: Server, database: str, braked: bool) -> Iterator[None]:
    """Disable the brake's triggers for the duration of the block, unless ``braked``."""

    def switch(how: str) -> None:
        for row in server.psql(
            database,
            "select format('alter table %s ' || '"
            + how
            + "' || ' trigger %I', tgrelid::regclass, tgname) from pg_trigger "
            f"where tgname like 'brake\\_%' and tgrelid = any ('{{{','.join(TABLES)}}}'::regclass[])",
        ).splitlines():
            server.psql(database, row)
        server.psql(database, "vacuum")

    if not braked:
        switch("disable")
    try:
        yield
    finally:
        if not braked:
            switch("enable always")


async def _round(dsn: str, devices: int, number: int) -> dict[str, float]:
    seconds = {}
    connection = await asyncpg.connect(dsn)
    for name, statement in STATEMENTS.items():
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("select accept_impact(1000000000)")
        began = time.monotonic()
        await connection.execute(statement.replace("{devices}", str(devices)), timeout=600)
        await connection.execute("set constraints all immediate")
        seconds[name] = time.monotonic() - began
        await transaction.rollback()
        await connection.execute("vacuum device", timeout=600)
    await connection.close()
    site = f"moved {number}, {time.monotonic()}"
    entries = {
        f"d{n:07d}": DeviceEntry(f"d{n:07d}", f"d{n:07d}", fixtures.type_of(n), attributes=(("site", site),))
        for n in range(devices)
    }
    document = Document(devices=entries, speaks_of_device_rules=False)
    began = time.monotonic()
    await policy_apply.apply(Target(dsn), document, actor="bench", accept_impact=1_000_000_000)
    seconds["policy apply that changes all"] = time.monotonic() - began
    return seconds
