"""Reads passwords from the files that the settings name, and never shows them in errors."""

from __future__ import annotations

from urllib.parse import quote, urlsplit, urlunsplit

from authbackend.errors import ConfigurationError
from authbackend.settings import Database, Enforcement


def read_password(enforcement: Enforcement) -> str:
    """
    Return the password for the management API.

    Raises:
        ConfigurationError: No file is set, or it cannot be read.
    """
    if enforcement.password_file is None:
        raise ConfigurationError(
            "enforcement.clusters needs enforcement.password_file: a file with the password of enforcement.username"
        )
    try:
        return enforcement.password_file.read_text(encoding="utf-8-sig").removesuffix("\n")
    except OSError as error:
        raise ConfigurationError(
            f"cannot read enforcement.password_file {enforcement.password_file}: {error.strerror}"
        ) from error
    except UnicodeDecodeError:  # the exception's text contains bytes of the password
        raise ConfigurationError(f"enforcement.password_file {enforcement.password_file} is not UTF-8") from None


def read_dsn(database: Database) -> str:
    """
    Return the connection URI, with the password from ``password_file`` if that is set.

    Raises:
        ConfigurationError: No URI is set, it names no role for the password, or the file cannot be read.
    """
    if database.dsn is None:
        raise ConfigurationError(
            "no database is set: set AUTHBACKEND_DATABASE__DSN (for example postgresql://user@host/authbackend), "
            "or start with --embedded DIRECTORY for a PostgreSQL of its own"
        )
    dsn = database.dsn.get_secret_value()
    if database.password_file is None:
        return dsn
    try:
        password = database.password_file.read_text(encoding="utf-8-sig").removesuffix("\n")
    except OSError as error:
        raise ConfigurationError(
            f"cannot read database.password_file {database.password_file}: {error.strerror}"
        ) from error
    except UnicodeDecodeError:
        raise ConfigurationError(f"database.password_file {database.password_file} is not UTF-8") from None
    parts = urlsplit(dsn)
    user, at, rest = parts.netloc.rpartition("@")
    user = user.partition(":")[0]
    if not at or not user:
        raise ConfigurationError(
            "database.password_file needs a connection URI that names its role: postgresql://role@host/database"
        )
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{rest}"))
