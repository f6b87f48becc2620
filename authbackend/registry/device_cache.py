"""Devices with rules of their own, kept between requests: to compile 2,000 rules takes 20 ms."""

from __future__ import annotations

from authbackend.policy.model import NO_RULES, Device
from authbackend.registry import records

MOST_RULES = 10_000
"""About 20 MB."""


class CompiledDevices:
    """
    Devices with own rules, as long as their records are what they were.

    What is kept is taken only for a record of the very same bytes, which the caller has just read: whatever changes in
    the registry, a device is decided by what is there.

    Args:
        most_rules: Those that were not asked for longest are dropped beyond it, but never the newest one.
    """

    __slots__ = ("_known", "_most_rules", "rules")

    def __init__(self, most_rules: int = MOST_RULES) -> None:
        self._known: dict[str, tuple[bytes, Device, int]] = {}
        self._most_rules = most_rules
        self.rules = 0
        """How many rules are kept."""

    def device(self, name: str, record: bytes) -> Device:
        """Return the device that a record says is kept under a common name."""
        known = self._known.pop(name, None) if self._known else None
        if known is not None:
            if known[0] == record:
                self._known[name] = known  # asked for last
                return known[1]
            self.rules -= known[2]
        device = records.device(name, record, known[:2] if known else None)
        if device.rules is not NO_RULES:
            number = sum(1 for _ in device.rules)
            self._known[name] = (record, device, number)
            self.rules += number
            while self.rules > self._most_rules and len(self._known) > 1:
                self.rules -= self._known.pop(next(iter(self._known)))[2]
        return device

    def forget(self, name: str) -> None:
        """Drop a device that is gone."""
        if self._known and (known := self._known.pop(name, None)):
            self.rules -= known[2]
