"""Measures how long revocations wait during a ``policy apply`` that changes the whole fleet, and if any is undone."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg

from authbackend.errors import AuthbackendError
from authbackend.postgres import registry_edits
from authbackend.postgres.connection import Target
from authbackend.postgres.statements import SQL
from benchmarks.fixtures import REPOSITORY, BenchmarkError
from tests.support.postgres import Server

ROLE = "authbackend_admin"
DATABASE = "applied"
BYSTANDERS = 1000
"""Number of devices that are not in the policy."""
BURST = 10
"""Revocations of each kind in a round; those of devices in the policy are concurrent: the first ends the apply."""

Say = Callable[[str], None]


def measure(server: Server, template: str, devices: int, rounds: int, say: Say) -> dict[str, Any]:
    """Apply a change of every device, once without and then ``rounds`` times with concurrent revocations."""
    server.psql("postgres", f"create database {DATABASE} template {template}")
    server.psql(DATABASE, (SQL / "roles.sql").read_text(encoding="utf-8"))
    server.psql(DATABASE, f"alter role {ROLE} login")
    server.psql(
        DATABASE,
        f"insert into device (device_id, type) select 'x' || lpad(n::text, 7, '0'), 'T20' from generate_series(0, {BYSTANDERS - 1}) n",
    )
    logged = len(server.log_text())
    with tempfile.TemporaryDirectory(prefix="bench-apply-") as folder:
        result = asyncio.run(_Moves(str(server.dsn(DATABASE, ROLE)), devices, Path(folder), say).run(rounds))
    return {**result, "deadlocks": server.log_text()[logged:].count("deadlock detected")}


class _Moves:
    """Moves the fleet between two sites; each device is revoked at most once, in random order."""

    def __init__(self, dsn: str, devices: int, folder: Path, say: Say) -> None:
        self._dsn = dsn
        self._devices = devices
        self._folder = folder
        self._say = say
        self._waited_ms: dict[str, list[float]] = {}
        self._outcomes: dict[str, int] = {}
        self._faults: list[str] = []
        self._rounds = 0
        self._revoked: list[str] = []
        order = random.Random(1)
        self._named = iter([f"d{n:07d}" for n in order.sample(range(2000, devices), min(10_000, devices - 2000))])
        self._others = iter([f"x{n:07d}" for n in order.sample(range(BYSTANDERS), BYSTANDERS)])

    async def run(self, rounds: int) -> dict[str, Any]:
        """Measure everything."""
        psqls = [await asyncpg.connect(self._dsn) for _ in range(BURST)]
        await self._write_files(psqls[0])
        for _ in range(rounds):
            await self._revoke(psqls, "quiet")
        began, held_s = time.monotonic(), 0.0
        async with self._applying("alone") as (ended, wait_for_lock):
            if await wait_for_lock(psqls[0]):
                locked_at = time.monotonic()
                code, text = await ended()
                held_s = time.monotonic() - locked_at
        whole_s = time.monotonic() - began
        if code:
            raise BenchmarkError(f"policy apply without revocations failed: {text[-500:]}")
        self._say(f"alone: {whole_s:.1f} s, with rows locked for {held_s:.1f} s")
        site = "moved"
        while self._rounds < rounds:
            async with self._applying(site) as (ended, wait_for_lock):
                touched: list[str] = []
                if await wait_for_lock(psqls[0]):
                    await asyncio.sleep(random.uniform(0, held_s / 2))
                    if await wait_for_lock(psqls[0]):
                        touched = await self._revoke(psqls, "meanwhile")
                        self._rounds += 1
                if self._record_outcome(*await ended(), touched) == "applied":
                    site = "alone" if site == "moved" else "moved"
            self._say(f"round {self._rounds}: {self._outcomes}, {self._p99_ms()}")
        undone = await psqls[0].fetchval(
            "select count(*) from device where device_id = any ($1) and status <> 'revoked'", self._revoked
        )
        for psql in psqls:
            await psql.close()
        return {
            "devices": self._devices,
            "alone_s": round(whole_s, 1),
            "held_s": round(held_s, 1),
            "waited_ms": self._waited_ms,
            "p99_ms": self._p99_ms(),
            "outcomes": self._outcomes,
            "revoked": len(self._revoked),
            "undone": undone,
            "faults": self._faults,
        }

    def _p99_ms(self) -> dict[str, float]:
        return {name: sorted(took)[int(0.99 * len(took))] for name, took in self._waited_ms.items()}

    async def _write_files(self, connection: asyncpg.Connection) -> None:
        for site in ("alone", "moved"):
            (self._folder / f"{site}.yaml").write_text("schema: authbackend/1\n", encoding="utf-8")
            await connection.copy_from_query(
                f"select device_id, common_name, type, attributes ->> 'line' as \"attr.line\", '{site}' as \"attr.site\" "
                "from device where device_id like 'd%'",
                output=self._folder / f"{site}.csv",
                format="csv",
                header=True,
            )

    @asynccontextmanager
    async def _applying(
        self, site: str
    ) -> AsyncIterator[
        tuple[Callable[[], Awaitable[tuple[int, str]]], Callable[[asyncpg.Connection], Awaitable[bool]]]
    ]:
        command = ["policy", "apply", f"{site}.yaml", "--devices", f"{site}.csv"]
        with (self._folder / "changes").open("wb") as changes:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "authbackend", *command),
                cwd=self._folder,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), "AUTHBACKEND_DATABASE__DSN": self._dsn},
                stdout=changes,
                stderr=asyncio.subprocess.PIPE,
            )

        async def ended() -> tuple[int, str]:
            return await process.wait(), (await errors).decode()

        async def wait_for_lock(connection: asyncpg.Connection) -> bool:
            """Wait until the first device's row is locked; return False if the command ended before."""
            while process.returncode is None:
                if not await connection.fetch("select from device where device_id = 'd0000000' for update skip locked"):
                    return True
                await asyncio.sleep(0.02)
            return False

        assert process.stderr is not None
        errors = asyncio.create_task(process.stderr.read())
        try:
            yield ended, wait_for_lock
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            await errors

    async def _revoke(self, psqls: list[asyncpg.Connection], when: str) -> list[str]:
        """Revoke devices in both ways: those not in the policy one by one, those in it concurrently."""
        for psql in psqls:
            await self._one(f"{when}, not named, psql", next(self._others), psql)
            await self._one(f"{when}, not named, device revoke", next(self._others), None)
        touched = [next(self._named) for _ in range(2 * BURST)]
        await asyncio.gather(
            *(self._one(f"{when}, named, psql", name, psql) for name, psql in zip(touched, psqls, strict=False)),
            *(self._one(f"{when}, named, device revoke", name, None) for name in touched[BURST:]),
        )
        return touched

    async def _one(self, kind: str, device_id: str, psql: asyncpg.Connection | None) -> None:
        began = time.monotonic()
        try:
            if psql is not None:
                await psql.execute("update device set status = 'revoked' where device_id = $1", device_id)
            else:
                target = Target(self._dsn, application_name="revoking")
                await registry_edits.set_device_status(target, "bench", device_id, "revoked", "stolen")
        except (AuthbackendError, asyncpg.PostgresError) as error:
            self._faults.append(f"{kind}: {error}")
        else:
            self._waited_ms.setdefault(kind, []).append(round(1000 * (time.monotonic() - began), 1))
            self._revoked.append(device_id)

    def _record_outcome(self, code: int, text: str, touched: list[str]) -> str:
        if code == 0:
            outcome = "applied"
        elif code == 4 and any(f"device {name}: " in text for name in touched):
            outcome = "refused, revoked devices named"
        else:
            outcome = f"exit status {code}"
            self._faults.append(text[-1000:])
        self._outcomes[outcome] = self._outcomes.get(outcome, 0) + 1
        return outcome
