"""What deciding needs to look up."""

from __future__ import annotations

from typing import Protocol

from authbackend.policy.rules import Account, Device, DeviceType


class Registry(Protocol):
    """The lookups that deciding needs, all at one version of the registry."""

    @property
    def age_s(self) -> float:
        """How long ago this was known to be the newest version, in seconds."""

    def device_by_name(self, common_name: str) -> Device | None:
        """Return the device with this common name, in any status."""

    def device_by_id(self, device_id: str) -> Device | None:
        """Return the device with this id, in any status."""

    def device_type(self, name: str) -> DeviceType | None:
        """Return a device type."""

    def account(self, name: str) -> Account | None:
        """Return an account."""
