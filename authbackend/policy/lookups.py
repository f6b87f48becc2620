"""Registry lookups that decisions depend on."""

from __future__ import annotations

from typing import Protocol

from authbackend.policy.model import Account, Device, DeviceType


class Registry(Protocol):
    """Lookups for one decision, all at the same registry version."""

    @property
    def age_s(self) -> float:
        """Seconds since this was last known to be the newest version."""

    def device_by_name(self, common_name: str) -> Device | None:
        """Return the device with this common name, in any status."""

    def device_by_id(self, device_id: str) -> Device | None:
        """Return the device with this id, in any status."""

    def device_type(self, name: str) -> DeviceType | None:
        """Return the device type with this name, or None."""

    def account(self, name: str) -> Account | None:
        """Return the account with this name, or None."""
