"""Load the part of the registry that decides about one device, to explain decisions without a running service."""

from __future__ import annotations

from dataclasses import dataclass

from authbackend.errors import NotFound
from authbackend.policy.explain import usual_client_id
from authbackend.policy.model import Account, Device, DeviceType
from authbackend.policy.names import possible_owners
from authbackend.postgres.compatibility import require_fit
from authbackend.postgres.connection import Connection, Target, connected
from authbackend.postgres.statements import load_statements
from authbackend.registry import records


@dataclass(frozen=True, slots=True)
class PartialRegistry:
    """Some devices and their types; implements ``policy.lookups.Registry``."""

    devices: dict[str, Device]
    types: dict[str, DeviceType]
    now: float
    """The database's clock, in seconds since the epoch."""
    age_s: float = 0.0

    def device_by_name(self, common_name: str) -> Device | None:
        """Return the device with this common name."""
        return next((device for device in self.devices.values() if device.common_name == common_name), None)

    def device_by_id(self, device_id: str) -> Device | None:
        """Return the device with this id."""
        return self.devices.get(device_id)

    def device_type(self, name: str) -> DeviceType | None:
        """Return a device type."""
        return self.types.get(name)

    def account(self, name: str) -> Account | None:  # noqa: ARG002
        """Return None: decisions about devices need no account."""
        return None


async def load_partial(target: Target, name: str, client_id: str | None) -> tuple[PartialRegistry, Device]:
    """
    Load a device by id or common name, the devices that could own the client id, and the types of all these.

    Args:
        client_id: None for the device's usual one.
    Raises:
        NotFound: There is no such device.
        Unavailable: The database cannot be reached, or its schema needs a newer version of authbackend.
    """
    async with connected(target) as connection, connection.transaction(isolation="repeatable_read", readonly=True):
        require_fit(await connection.fetchval("select registry_oldest_program()"))
        device_id = await connection.fetchval(
            "select device_id from device where device_id = $1 or common_name = $1 order by device_id = $1 desc limit 1",
            name,
        )
        if device_id is None:
            raise NotFound(f"no device has the id or common name {name!r}")
        device = (await _devices(connection, [device_id]))[device_id]
        types = await _types(connection, [device.type])
        client_id = client_id if client_id is not None else usual_client_id(device, types[device.type])
        devices = await _devices(connection, [device_id, *possible_owners(client_id)])
        types = await _types(connection, sorted({owner.type for owner in devices.values()}))
        now = await connection.fetchval("select extract(epoch from clock_timestamp())::float8")
    return PartialRegistry(devices, types, now), device


async def _devices(connection: Connection, device_ids: list[str]) -> dict[str, Device]:
    rows = await connection.fetch(load_statements("registry").devices.sql, device_ids)
    return {row["device_id"]: records.device(row["name"].decode(), row["record"]) for row in rows}


async def _types(connection: Connection, names: list[str]) -> dict[str, DeviceType]:
    rows = await connection.fetch(load_statements("registry").device_types.sql, names)
    return {row["name"]: records.device_type(row["record"]) for row in rows}
