"""Check that this program is new enough for the database's schema, which may be newer than the program."""

from __future__ import annotations

import re

from authbackend import __version__
from authbackend.errors import Unavailable

_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")


def require_fit(oldest: str, program: str = __version__) -> None:
    """
    Require that this program is not older than the oldest one that reads the schema correctly.

    Args:
        oldest: What ``registry_oldest_program()`` returns.
    Raises:
        Unavailable: This program is older, or the versions cannot be compared.
    """
    needed, own = _VERSION.match(oldest), _VERSION.match(program)
    if needed is None or own is None:
        raise Unavailable(
            f"the database's schema needs authbackend {oldest!r}, and this is {program!r}: the two cannot be compared. "
            "See the function registry_oldest_program()"
        )
    if tuple(map(int, own.groups())) < tuple(map(int, needed.groups())):
        raise Unavailable(
            f"the database's schema needs authbackend {oldest} or later, and this is {program}, which would misread it. "
            "Upgrade this replica; until then its copy is not refreshed, and once that is stale, it denies everybody"
        )
