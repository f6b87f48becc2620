"""A registry in memory, for tests of decisions and checks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from authbackend.policy.model import Account, Device, DeviceType


class MemoryRegistry:
    """Implements ``policy.lookups.Registry`` and ``enforcement.checks.Registry``; a test may set ``age_s``."""

    def __init__(
        self,
        devices: Iterable[Device] = (),
        types: Iterable[DeviceType] = (),
        accounts: Iterable[Account] = (),
        age_s: float = 0.0,
    ) -> None:
        self.age_s = age_s
        listed = list(devices)
        self._by_name = {device.common_name: device for device in listed}
        self._by_id: dict[str, Device] = {device.device_id: device for device in listed}
        self._types = {one.name: one for one in types}
        self._accounts = {one.name: one for one in accounts}

    @property
    def now(self) -> float:
        return time.time()

    def device_by_name(self, common_name: str) -> Device | None:
        return self._by_name.get(common_name)

    def device_by_id(self, device_id: str) -> Device | None:
        return self._by_id.get(device_id)

    def device_type(self, name: str) -> DeviceType | None:
        return self._types.get(name)

    def account(self, name: str) -> Account | None:
        return self._accounts.get(name)

    def accounts(self) -> Iterator[Account]:
        yield from self._accounts.values()
