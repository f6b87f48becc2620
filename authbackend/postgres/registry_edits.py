"""Read and edit single devices and accounts; each edit is one transaction with its audit row, or fails and changes nothing."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

from authbackend.errors import Conflict, InvalidInput, NotFound
from authbackend.postgres.connection import Connection, Target, connected, name_actor

_DEVICE = (
    "select device_id, common_name, type, status, status_reason, status_changed_at, attributes, expires_at from device"
)


@asynccontextmanager
async def editing(target: Target, actor: str) -> AsyncIterator[Connection]:
    """Open a transaction whose audit rows record ``actor``, as the client claims it."""
    async with connected(target) as connection, connection.transaction():
        await name_actor(connection, actor)
        yield connection


async def _version(connection: Connection) -> str:
    return str(await connection.fetchval("select registry_version()"))


async def present_version(target: Target) -> str:
    """Return a registry version that includes everything committed so far."""
    async with connected(target) as connection:
        return await _version(connection)


def _device(row: Any) -> dict[str, Any]:
    device = dict(row)
    device["attributes"] = json.loads(device["attributes"])
    for name in ("status_changed_at", "expires_at"):
        device[name] = device[name].isoformat() if device[name] else None
    return device


async def list_devices(
    target: Target, *, device_type: str | None = None, status: str | None = None, limit: int = 1000
) -> list[dict[str, Any]]:
    """Return up to ``limit`` devices, ordered by id."""
    async with connected(target) as connection:
        rows = await connection.fetch(
            f"{_DEVICE} where ($1::text is null or type = $1) and ($2::text is null or status = $2) order by device_id limit $3",
            device_type,
            status,
            limit,
        )
        return [_device(row) for row in rows]


async def get_device(target: Target, name: str) -> dict[str, Any]:
    """
    Return a device by id or else by common name, with its own rules, those of its type, and its scheduled changes.

    Raises:
        NotFound: There is no such device.
    """
    async with connected(target) as connection:
        row = await connection.fetchrow(
            f"{_DEVICE} where device_id = $1 or common_name = $1 order by device_id = $1 desc limit 1", name
        )
        if row is None:
            raise NotFound(f"no device has the id or common name {name!r}")
        device = _device(row)
        rules = await connection.fetch(
            "select id, device_type, effect, action, topic, note from topic_rule where device_id = $1 or device_type = $2 order by effect desc, action, topic",
            device["device_id"],
            device["type"],
        )
        scheduled = await connection.fetch(
            "select at, status, reason, actor, claimed_by from device_schedule where device_id = $1 order by at",
            device["device_id"],
        )
        device["scheduled"] = [{**row, "at": row["at"].isoformat()} for row in scheduled]
        device["rules"] = [
            {
                "id": rule["id"],
                "of": "type" if rule["device_type"] else "device",
                **{k: rule[k] for k in ("effect", "action", "topic", "note")},
            }
            for rule in rules
        ]
        return device


async def insert_device(
    target: Target,
    actor: str,
    *,
    device_id: str,
    device_type: str,
    common_name: str | None = None,
    status: str = "active",
    attributes: dict[str, str] | None = None,
    expires_at: datetime | None = None,
) -> str:
    """
    Register a device, and return the registry version with it.

    Raises:
        InvalidInput: A name or the status is not valid.
        Conflict: The id or common name is taken, or there is no such type.
    """
    async with editing(target, actor) as connection:
        await connection.execute(
            "insert into device (device_id, common_name, type, status, attributes, expires_at) values ($1, $2, $3, $4, $5, $6)",
            *(device_id, common_name, device_type, status, json.dumps(attributes or {}), expires_at),
        )
        return await _version(connection)


async def schedule_device_status(
    target: Target, actor: str, device_id: str, status: str, reason: str, at: datetime
) -> str:
    """
    Schedule a change of status, and return the registry version.

    Raises:
        NotFound: There is no such device.
        InvalidInput: The time is in the past, or the status cannot be scheduled.
    """
    async with editing(target, actor) as connection:
        await _schedule(connection, device_id, status, reason, at)
        return await _version(connection)


async def _schedule(connection: Connection, device_id: str, status: str, reason: str, at: datetime) -> None:
    if await connection.fetchval("select $1 <= now()", at):
        raise InvalidInput(f"{at.isoformat()} is in the past")
    if not await connection.fetchval("select exists (select from device where device_id = $1)", device_id):
        raise NotFound(f"no device has the id {device_id!r}")
    await connection.execute(
        "insert into device_schedule (device_id, at, status, reason) values ($1, $2, $3, $4) "
        "on conflict (device_id, at) do update set status = excluded.status, reason = excluded.reason",
        *(device_id, at, status, reason),
    )


async def set_device_status(
    target: Target, actor: str, device_id: str, status: str, reason: str, until: datetime | None = None
) -> str | None:
    """
    Change the status of a device, and return the registry version with it; None if it already had that status.

    Args:
        until: When the device becomes active again by itself; None for never.
    Raises:
        NotFound: There is no such device.
        Conflict: A revoked device can only be reinstated to ``active``.
    """
    async with editing(target, actor) as connection:
        current = await connection.fetchval("select status from device where device_id = $1 for update", device_id)
        if current is None:
            raise NotFound(f"no device has the id {device_id!r}")
        if until is not None:
            await _schedule(connection, device_id, "active", f"end of: {reason}" if reason else "", until)
        if current == status:
            return None if until is None else await _version(connection)
        if current == "revoked" and status == "suspended":
            raise Conflict(f"device {device_id} is revoked and cannot be suspended; nothing was changed")
        await connection.execute(
            "update device set status = $2, status_reason = $3 where device_id = $1", device_id, status, reason
        )
        return await _version(connection)


async def list_accounts(target: Target) -> list[dict[str, Any]]:
    """Return all accounts, ordered by name; of passwords, only whether one is set."""
    async with connected(target) as connection:
        rows = await connection.fetch(
            "select name, login, password_hash is not null as password_set, tags, vhosts, networks::text[] as networks, "
            "client_ids, configure, write, read, unchecked_dead_lettering from account order by name"
        )
        return [dict(row) for row in rows]


async def insert_account(
    target: Target,
    actor: str,
    *,
    name: str,
    login: str,
    password_hash: str | None,
    lists: dict[str, tuple[str, ...]],
) -> str:
    """
    Register an account, and return the registry version with it.

    Args:
        lists: ``tags``, ``vhosts``, ``client_ids``, ``configure``, ``write`` and ``read``.
    Raises:
        InvalidInput: A name, tag, client id or permission is not valid.
        Conflict: The name is taken.
    """
    columns = ("tags", "vhosts", "client_ids", "configure", "write", "read")
    async with editing(target, actor) as connection:
        await connection.execute(
            f"insert into account (name, login, password_hash, {', '.join(columns)}) values ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            *(name, login, password_hash, *(list(lists.get(column, ())) for column in columns)),
        )
        return await _version(connection)


async def set_password(target: Target, actor: str, name: str, password_hash: str) -> str:
    """
    Set an account's password hash, and return the registry version with it.

    Raises:
        NotFound: There is no such account.
        InvalidInput: The account logs in by certificate.
    """
    async with editing(target, actor) as connection:
        login = await connection.fetchval("select login from account where name = $1 for update", name)
        if login is None:
            raise NotFound(f"no account is named {name!r}")
        if login != "password":
            raise InvalidInput(f"account {name} logs in by certificate and has no password")
        await connection.execute("update account set password_hash = $2 where name = $1", name, password_hash)
        return await _version(connection)
