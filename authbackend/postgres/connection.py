"""Connections and the translation of driver errors."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import asyncpg

from authbackend.errors import Conflict, Forbidden, InvalidInput, Unavailable

Connection = asyncpg.Connection


@dataclass(frozen=True, slots=True)
class Target:
    """Where the database is; the URI may hold a password and is never shown."""

    dsn: str = field(repr=False)
    connect_timeout_s: float = 5.0
    statement_timeout_s: float = 30.0
    application_name: str = "authbackend"


@contextlib.contextmanager
def translated_errors() -> Iterator[None]:
    """
    Turn what asyncpg raises into this project's errors.

    Raises:
        InvalidInput: A constraint refused a row; the detail is the database's own message.
        Conflict: Something of that name exists, or is still referred to.
        Forbidden: The role lacks the right.
        Unavailable: No connection, the server is stopping, or something took too long, each in words of its own;
            nothing of the URI is shown.
    """
    try:
        yield
    except (asyncpg.CheckViolationError, asyncpg.NotNullViolationError, asyncpg.DataError) as error:
        raise InvalidInput(error.args[0]) from error
    except (asyncpg.UniqueViolationError, asyncpg.ForeignKeyViolationError) as error:
        raise Conflict(f"{error.args[0]}: {getattr(error, 'detail', '') or ''}".rstrip(": ")) from error
    except asyncpg.InsufficientPrivilegeError as error:
        raise Forbidden(f"the database role may not do this: {error.args[0]}") from error
    except asyncpg.SerializationError as error:
        raise Conflict("somebody else changed the registry at the same time; try again") from error
    except asyncpg.UndefinedTableError as error:
        raise Unavailable("the database has no registry yet; run: authbackend migrate") from error
    except (asyncpg.UndefinedFunctionError, asyncpg.UndefinedColumnError) as error:
        raise Unavailable(
            f"the database has no registry of this version ({error.args[0]}); run: authbackend migrate. If its schema is "
            "newer, upgrade authbackend"
        ) from error
    except (asyncpg.LockNotAvailableError, asyncpg.QueryCanceledError, asyncpg.DeadlockDetectedError) as error:
        raise Unavailable(_waited(error)) from error
    except asyncpg.PostgresError as error:
        raise Unavailable(f"PostgreSQL: {error.args[0]}") from error
    except TimeoutError as error:
        if error.errno is not None:  # the network's own, not that of a statement
            raise Unavailable(f"PostgreSQL cannot be reached: {type(error).__name__}") from error
        raise Unavailable(
            "PostgreSQL did not answer a statement in time (database.statement_timeout_s): it is stuck or overloaded, or the "
            "network lost the answer. Whether the change was made is not known; look before you try again"
        ) from error
    except (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        # The last is what asyncpg makes of a server that says goodbye in the middle of an answer.
        raise Unavailable(f"PostgreSQL cannot be reached: {type(error).__name__}") from error


_WHO = "select pid, application_name, usename, state, xact_start from pg_stat_activity order by xact_start"


def _waited(error: asyncpg.PostgresError) -> str:
    said = error.args[0]
    if isinstance(error, asyncpg.DeadlockDetectedError):
        return (
            f"nothing was changed: this and another transaction waited for each other, and PostgreSQL ended this one ({said}); "
            "try again"
        )
    if isinstance(error, asyncpg.LockNotAvailableError):
        return (
            f"nothing was changed: another transaction holds what this needs and did not end in time ({said}). "
            f"Try again; who holds it is among: {_WHO}"
        )
    return (
        f"nothing was changed: PostgreSQL ended the statement before it was done ({said}). Most often another transaction "
        f"holds what it needs; it is among: {_WHO}. Then try again, or with a longer database.statement_timeout_s"
    )


async def connect(target: Target) -> Connection:
    """
    Open a connection.

    Raises:
        Unavailable: The server cannot be reached or refuses the role.
    """
    with translated_errors():
        try:
            return await asyncpg.connect(
                target.dsn,
                timeout=target.connect_timeout_s,
                command_timeout=target.statement_timeout_s + 1,  # later than the server's own, which says why
                server_settings={
                    "application_name": target.application_name,
                    "statement_timeout": str(int(target.statement_timeout_s * 1000)),
                    "timezone": "UTC",  # the epoch of the change feed holds a timestamp as text
                },
            )
        except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidPasswordError) as error:
            raise Unavailable(f"PostgreSQL refuses the role: {error.args[0]}") from error
        except TimeoutError as error:
            raise Unavailable(
                f"PostgreSQL cannot be reached: no connection within {target.connect_timeout_s:g} s"
            ) from error
        except ValueError as error:
            raise Unavailable(
                "the connection URI is not valid; expected postgresql://role@host:port/database"
            ) from error


async def name_actor(connection: Connection, name: str) -> None:
    """
    Name who acts, until the end of the transaction.

    The audit trail keeps it as ``claimed_by``; its ``actor`` is the role that logged in, unless that role may speak for others.
    """
    await connection.execute("select set_config('authbackend.actor', $1, true)", name)


@contextlib.asynccontextmanager
async def connected(target: Target) -> AsyncIterator[Connection]:
    """Open a connection for the time of the block; errors inside it are translated too."""
    connection = await connect(target)
    try:
        with translated_errors():
            yield connection
    finally:
        with contextlib.suppress(Exception):
            await connection.close(timeout=5)
