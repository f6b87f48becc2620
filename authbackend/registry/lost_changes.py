"""What replicas had served and a database in another life lacks: found after a fail-over, a crash or a restore."""

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
    """Yield what two versions hold differently, and None for each entry that they do not."""
    for entity in ("device_type", "account", "device"):
        for name, record in before.entries(entity):
            yield _key(entity, name, record) if after.record(entity, name) != record else None
        for name, record in after.entries(entity):
            yield _key(entity, name, record) if before.record(entity, name) is None else None


def _key(entity: str, name: str, record: bytes) -> Key:
    return entity, records.device_id_of(name, record) if entity == "device" else name


def report(found: set[Key], later: set[Key] | None) -> int:
    """
    Log which served changes are gone, by name, and return how many.

    What was changed again after that cannot be told from a change that is gone, and is not named.

    Args:
        found: What differs from what was served.
        later: What the database says was changed after that, ``*`` for all of an entity; None: it does not reach back so far.
    """
    if later is None:
        if found:
            log.warning(
                "registry.served_changes_unknown",
                differing=len(found),
                fault="the database is in another life, and its change feed does not reach back to what was served",
            )
        return 0
    gone = sorted(key for key in found if key not in later and (key[0], "*") not in later)
    if gone:
        log.error(
            "registry.served_changes_gone",
            number=len(gone),
            named=[f"{entity} {name}" for entity, name in gone[:NAMED]],
            fault="these were served in a state that the database does not hold any more, and its change feed has no change after "
            "that: it went back behind them (a fail-over, a crash, a restore), or changed them with transaction ids given out "
            "again. What the database holds is decided by now",
            next="look at each, and make the change again",
        )
    return len(gone)
