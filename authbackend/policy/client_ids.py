"""Client id ownership."""

from __future__ import annotations

from authbackend.policy.lookups import Registry
from authbackend.policy.model import Account, Device, DeviceType
from authbackend.policy.names import client_id_fits, possible_owners
from authbackend.policy.reasons import Reason


def client_id_fault(registry: Registry, device: Device, device_type: DeviceType, client_id: str) -> Reason | None:
    """
    Return why a device may not use a client id, or None if it may.

    The client id must match a pattern of the device's type. Devices own their client ids whatever their status: a
    client id equal to a device id belongs to that device alone; one that matches several devices belongs to the one
    with the longest device id.
    """
    if not client_id_fits(client_id, device.device_id, device_type.client_ids):
        return Reason.CLIENT_ID_NOT_BOUND
    if client_id == device.device_id:
        return None  # no longer device id can own it
    for owner_id in possible_owners(client_id):
        if owner_id == device.device_id:
            return None
        if _owns(registry, owner_id, client_id):
            return Reason.CLIENT_ID_OF_ANOTHER_DEVICE
    return None


def owner_of(registry: Registry, client_id: str) -> Device | None:
    """Return the device, in any status, that owns a client id, or None."""
    for owner_id in possible_owners(client_id):
        if _owns(registry, owner_id, client_id):
            return registry.device_by_id(owner_id)
    return None


def former_owner(registry: Registry, device: Device, former: tuple[str, ...], client_id: str) -> Device | None:
    """
    Return the device that owned a client id before this device gained it, or None if no other device did.

    Args:
        former: The previous patterns of this device's type.
    """
    if client_id == device.device_id or client_id_fits(client_id, device.device_id, former):
        return None
    for owner_id in possible_owners(client_id):
        if owner_id != device.device_id and _owns(registry, owner_id, client_id):
            return registry.device_by_id(owner_id)
    return None


def is_moving(registry: Registry, device: Device, client_id: str, now: float) -> bool:
    """Return whether a client id that a device has gained is still being taken from its former owner."""
    device_type = registry.device_type(device.type)
    move = None if device_type is None else device_type.move
    if move is None or now >= move.until or (move.held is not None and client_id not in move.held):
        return False
    return former_owner(registry, device, move.former, client_id) is not None


def _owns(registry: Registry, device_id: str, client_id: str) -> bool:
    """Return whether a device with this id exists and may claim a client id."""
    device = registry.device_by_id(device_id)
    if device is None:
        return False
    if client_id == device_id:
        return True
    device_type = registry.device_type(device.type)
    return device_type is not None and client_id_fits(client_id, device_id, device_type.client_ids)


def account_client_id_fault(registry: Registry, account: Account, client_id: str | None) -> Reason | None:
    """Return why an account may not use a client id, or None: it may use those it lists, but never one of a device."""
    if client_id is None:
        return None
    if client_id not in account.client_ids:
        return Reason.CLIENT_ID_NOT_BOUND
    if any(_owns(registry, owner_id, client_id) for owner_id in possible_owners(client_id)):
        return Reason.CLIENT_ID_OF_ANOTHER_DEVICE
    return None
