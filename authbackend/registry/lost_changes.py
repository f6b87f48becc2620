"""Detects changes that replicas had served and the database has lost, in a fail-over, a crash or a restore."""

from __future__ import annotations

from collections.abc import Iterator

import structlog

from authbackend.registry import records
from authbackend.registry.store import Reader

log = structlog.get_logger(__name__)

NAMED = 50
Key = tuple[str, str]
"""Entity and key, as in the change feed: ``("device", device id)``."""


def differing(before: Reader, after: Reader) -> Iterator[Key | None]:
    """Yield the key of each entry that differs between two versions, and None for each that does not."""
    for entity in ("device_type", "account", "device"):
        for name, record in before.entries(entity):
            yield _key(entity, name, record) if after.record(entity, name) != record else None
        for name, record in after.entries(entity):
            yield _key(entity, name, record) if before.record(entity, name) is None else None


def _key(entity: str, name: str, record: bytes) -> Key:
    return entity, records.device_id_of(name, record) if entity == "device" else name


def report(differing_keys: set[Key], later: set[Key] | None) -> int:
    """
    Log the served changes that are lost, by name, and return how many.

    Entries that were changed again later are not named: they may have lost nothing.

    Args:
        differing_keys: Entries that differ from what was served.
        later: Entries changed after that according to the change feed, ``*`` for all of an entity; None if the feed does
            not reach back that far.
    """
    if later is None:
        if differing_keys:
            log.warning(
                "registry.served_changes_unknown",
                differing=len(differing_keys),
                fault="the database is in a new incarnation, and its change feed does not reach back to the version that was served",
            )
        return 0
    lost = sorted(key for key in differing_keys if key not in later and (key[0], "*") not in later)
    if lost:
        log.error(
            "registry.served_changes_gone",
            number=len(lost),
            named=[f"{entity} {name}" for entity, name in lost[:NAMED]],
            fault="the database no longer has these entries as they were served, and its change feed has no later change of "
            "them: it went back to an earlier state (a fail-over, a crash, a restore), or changed them under reused transaction "
            "ids. Decisions now follow the database",
            next="check each entry, and make the change again if it is still wanted",
        )
    return len(lost)
