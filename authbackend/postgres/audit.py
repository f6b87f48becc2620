"""Export the audit trail as lines of JSON, from one snapshot."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from authbackend.postgres.connection import Target, connected
from authbackend.postgres.statements import load_statements

FETCH_ROWS = 250
"""Rows held in memory at a time."""


@dataclass(frozen=True, slots=True)
class TrailFilter:
    """
    Which rows of the trail to export; None matches all.

    Args:
        since: Written at this time or later.
        until: Written before this time.
        who: The person (``actor``) or the role that logged in.
        from_version: Written by this transaction or a later one.
    """

    since: datetime | None = None
    until: datetime | None = None
    entities: tuple[str, ...] | None = None
    key: str | None = None
    who: str | None = None
    claimed_by: str | None = None
    operation: str | None = None
    from_version: int | None = None


@dataclass(frozen=True, slots=True)
class TrailEnd:
    """
    Summary of a complete export.

    Args:
        as_of: When the snapshot was taken, by the database's clock.
        next_version: The oldest transaction still open then; pass it as ``from_version`` of the next export.
        absent: Requested entities for which the trail has no rows.
    """

    rows: int
    last_id: int | None
    as_of: datetime
    next_version: str
    absent: list[str]


async def export(target: Target, wanted: TrailFilter, write: Callable[[bytes], object]) -> TrailEnd:
    """
    Write the matching rows as lines of JSON, ordered by ``id``, in constant memory.

    Raises:
        AuthbackendError: The database cannot be reached or refuses; the output is incomplete.
    """
    statements = load_statements("audit")
    rows, last_id = 0, None
    async with (
        connected(target) as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        moment = await connection.fetchrow(statements.export_moment.sql)
        assert moment is not None
        entities = None if wanted.entities is None else list(wanted.entities)
        from_version = None if wanted.from_version is None else str(wanted.from_version)
        matching = connection.cursor(
            statements.exported.sql,
            *(wanted.since, wanted.until, entities, wanted.key, wanted.who, wanted.claimed_by, wanted.operation),
            from_version,
            prefetch=FETCH_ROWS,
        )
        async for row in matching:
            write(_line(row))
            rows, last_id = rows + 1, row["id"]
        absent = await connection.fetch(statements.entities_without_rows.sql, entities or [])
    return TrailEnd(rows, last_id, moment["as_of"], moment["next_version"], [row["asked"] for row in absent])


def _line(row: Any) -> bytes:
    """Return a row as JSON; ``before`` and ``after`` are copied as text, so that no number loses a digit."""
    head = {name: value for name, value in row.items() if name not in ("before", "after")}
    head["at"] = row["at"].isoformat()
    text = json.dumps(head, ensure_ascii=False)
    return f'{text[:-1]}, "before": {row["before"] or "null"}, "after": {row["after"] or "null"}}}\n'.encode()
