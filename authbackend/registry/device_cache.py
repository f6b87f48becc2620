"""A cache of compiled devices, for those with rules of their own: compiling 2,000 rules takes 20 ms."""

from __future__ import annotations

from authbackend.policy.model import NO_RULES, Device
from authbackend.registry import records

MOST_RULES = 10_000
"""About 20 MB."""


class CompiledDevices:
    """
    Compiled devices with rules of their own, each valid while its record is unchanged.

    An entry is used only if the record that the caller has just read has exactly the same bytes, so decisions always
    follow the current registry.

    Args:
        most_rules: Above this number, the least recently used devices are dropped, but never the newest one.
    """

    __slots__ = ("_cached", "_most_rules", "rules")

    def __init__(self, most_rules: int = MOST_RULES) -> None:
        self._cached: dict[str, tuple[bytes, Device, int]] = {}
        self._most_rules = most_rules
        self.rules = 0
        """The number of cached rules."""

    def device(self, name: str, record: bytes) -> Device:
        """Return the device that a record describes."""
        cached = self._cached.pop(name, None) if self._cached else None
        if cached is not None:
            if cached[0] == record:
                self._cached[name] = cached  # now the most recently used
                return cached[1]
            self.rules -= cached[2]
        device = records.device(name, record, cached[:2] if cached else None)
        if device.rules is not NO_RULES:
            count = sum(1 for _ in device.rules)
            self._cached[name] = (record, device, count)
            self.rules += count
            while self.rules > self._most_rules and len(self._cached) > 1:
                self.rules -= self._cached.pop(next(iter(self._cached)))[2]
        return device

    def forget(self, name: str) -> None:
        """Drop a device that was removed."""
        if self._cached and (cached := self._cached.pop(name, None)):
            self.rules -= cached[2]
