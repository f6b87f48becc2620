"""The registry in memory: lookups at one version."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from authbackend.policy.rules import Account, Device, DeviceType

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Mark:
    """
    How far a reader has come.

    Args:
        epoch: The life of the server and its tables, within which transaction ids are not given out twice.
        incarnation: Renewed by every crash recovery.
        snapshot: ``xmin:xmax:xip,...`` of ``pg_current_snapshot()``.
    """

    epoch: str
    incarnation: str
    snapshot: str

    @property
    def xmin(self) -> int:
        """The oldest transaction that was still running."""
        return int(self.snapshot.split(":")[0])

    @property
    def xmax(self) -> int:
        """One past the newest transaction id that was visible or running."""
        return int(self.snapshot.split(":")[1])

    @property
    def running(self) -> list[str]:
        """The transactions between that were not visible."""
        text = self.snapshot.split(":")[2]
        return text.split(",") if text else []

    def serves(self, transaction: int) -> bool:
        """Return whether a change made by this transaction of the same epoch is part of the copy."""
        return transaction < self.xmin or (transaction < self.xmax and str(transaction) not in self.running)


@dataclass(slots=True)
class Patch:
    """What changed between two marks; None in place of a row means that it is gone."""

    device_types: Mapping[str, DeviceType | None] = field(default_factory=dict)
    devices: Mapping[str, Device | None] = field(default_factory=dict)
    accounts: Mapping[str, Account | None] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.device_types) + len(self.devices) + len(self.accounts)


class Snapshot:
    """
    Devices, device types and accounts at one mark.

    A patch is applied without giving way to any other task, so no request sees half a change.

    Cost: two dictionary lookups at most for a device.
    """

    __slots__ = ("_accounts", "_by_id", "_by_name", "_device_types", "mark")

    def __init__(self, mark: Mark | None = None) -> None:
        self.mark = mark
        self._by_name: dict[str, Device] = {}
        self._by_id: dict[str, Device] = {}  # only devices whose common name differs from their id
        self._device_types: dict[str, DeviceType] = {}
        self._accounts: dict[str, Account] = {}

    def device_by_name(self, common_name: str) -> Device | None:
        """Return the device with this common name, in any status."""
        return self._by_name.get(common_name)

    def device_by_id(self, device_id: str) -> Device | None:
        """Return the device with this id, in any status."""
        device = self._by_name.get(device_id)
        if device is not None and device.device_id == device_id:
            return device
        return self._by_id.get(device_id)

    def device_type(self, name: str) -> DeviceType | None:
        """Return a device type."""
        return self._device_types.get(name)

    def account(self, name: str) -> Account | None:
        """Return an account."""
        return self._accounts.get(name)

    def accounts(self) -> Iterator[Account]:
        """Yield the accounts."""
        yield from self._accounts.values()

    def device_types(self) -> Iterator[DeviceType]:
        """Yield the device types."""
        yield from self._device_types.values()

    def sizes(self) -> dict[str, int]:
        """Return how many devices, device types and accounts there are."""
        return {
            "device": len(self._by_name),
            "device_type": len(self._device_types),
            "account": len(self._accounts),
        }

    def add_devices(self, devices: Iterable[Device]) -> None:
        """Add devices that are not there yet."""
        for device in devices:
            self._by_name[device.common_name] = device
            if device.common_name != device.device_id:
                self._by_id[device.device_id] = device

    def apply(self, patch: Patch, mark: Mark) -> None:
        """Apply what changed and move the mark."""
        _replace(self._device_types, patch.device_types)
        _replace(self._accounts, patch.accounts)
        for device_id in patch.devices:  # all of the old first: two devices may have swapped their common names
            self._forget(device_id)
        self.add_devices(device for device in patch.devices.values() if device is not None)
        self.mark = mark

    def _forget(self, device_id: str) -> None:
        device = self.device_by_id(device_id)
        if device is not None:
            del self._by_name[device.common_name]
            self._by_id.pop(device_id, None)


def _replace(rows: dict[str, T], changed: Mapping[str, T | None]) -> None:
    for key, row in changed.items():
        if row is None:
            rows.pop(key, None)
        else:
            rows[key] = row
