"""Load the named statements of ``sql/queries``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiosql

_PACKAGED = Path(__file__).parent.parent / "sql"
SQL = _PACKAGED if _PACKAGED.is_dir() else _PACKAGED.parent.parent / "sql"
"""The folder ``sql/``: inside the installed package, or beside the package in a checkout."""


def load_statements(name: str) -> Any:
    """Return the statements of ``sql/queries/<name>.sql`` as attributes."""
    return aiosql.from_path(SQL / "queries" / f"{name}.sql", "asyncpg", mandatory_parameters=False)
