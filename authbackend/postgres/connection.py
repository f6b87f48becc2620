"""Connections and the translation of driver errors."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import asyncpg

from authbackend.errors import AuthbackendError, Conflict, Forbidden, InvalidInput, Unavailable, Unwritable
from authbackend.postgres.connection_errors import connection_fault
from authbackend.postgres.pooling import check_pooling
from authbackend.postgres.uri import ConnectionURI, parse, tls_context

Connection = asyncpg.Connection


@dataclass(frozen=True, slots=True)
class Target:
    """
    Where the database is; the URI may hold a password and is never shown.

    Args:
        connect_timeout_s: For each host, unless the URI says another.
        read_dsn: Returns the URI with the password as its file has it now, asked for each connection; None: it is in ``dsn``.
    """

    dsn: str = field(repr=False)
    connect_timeout_s: float = 5.0
    statement_timeout_s: float = 30.0
    application_name: str = "authbackend"
    read_dsn: Callable[[], str] | None = field(default=None, repr=False, compare=False)


@contextlib.contextmanager
def translated_errors() -> Iterator[None]:
    """
    Turn what asyncpg raises into this project's errors.

    Raises:
        InvalidInput: A constraint refused a row; the detail is the database's own message.
        Conflict: Something of that name exists, or is still referred to.
        Forbidden: The role lacks the right.
        Unwritable: The database is read-only or its disk is full.
        Unavailable: No connection, the server is stopping, or something took too long, each in words of its own;
            nothing of the URI is shown.
    """
    try:
        yield
    except (asyncpg.CheckViolationError, asyncpg.NotNullViolationError, asyncpg.DataError) as error:
        raise InvalidInput(_refused(error)) from error
    except (asyncpg.UniqueViolationError, asyncpg.ForeignKeyViolationError) as error:
        raise Conflict(_refused(error)) from error
    except asyncpg.InsufficientPrivilegeError as error:
        raise Forbidden(f"the database role may not do this: {error.args[0]}") from error
    except asyncpg.SerializationError as error:
        raise Conflict("somebody else changed the registry at the same time; try again") from error
    except (asyncpg.UndefinedTableError, asyncpg.UndefinedFunctionError, asyncpg.UndefinedColumnError) as error:
        raise Unavailable(_unfit(error)) from error
    except (asyncpg.LockNotAvailableError, asyncpg.QueryCanceledError, asyncpg.DeadlockDetectedError) as error:
        raise Unavailable(_waited(error)) from error
    except (asyncpg.ReadOnlySQLTransactionError, asyncpg.DiskFullError) as error:
        raise Unwritable(_unwritable(error)) from error
    except asyncpg.ConnectionDoesNotExistError as error:
        raise Unavailable(connection_fault(error)) from error
    except asyncpg.PostgresError as error:
        raise Unavailable(f"PostgreSQL: {error.args[0]}") from error
    except TimeoutError as error:
        if error.errno is not None:  # the network's own, not that of a statement
            raise Unavailable(connection_fault(error)) from error
        raise Unavailable(
            "PostgreSQL did not answer a statement in time (database.statement_timeout_s): it is stuck or overloaded, or the "
            "network lost the answer. Whether the change was made is not known; look before you try again"
        ) from error
    except (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        # The last is what asyncpg makes of a server that says goodbye in the middle of an answer.
        raise Unavailable(connection_fault(error)) from error


def _refused(error: asyncpg.PostgresError) -> str:
    told = str(error.args[0])
    # Not of a check: there PostgreSQL's detail has the row, and the row may have a password hash.
    if isinstance(error, (asyncpg.UniqueViolationError, asyncpg.ForeignKeyViolationError)):
        told = f"{told}: {getattr(error, 'detail', '') or ''}".rstrip(": ")
    hint = getattr(error, "hint", None)
    return f"{told}. {hint}" if hint else told


def _unfit(error: asyncpg.PostgresError) -> str:
    if isinstance(error, asyncpg.UndefinedTableError):
        return "the database has no registry yet; run: authbackend migrate"
    return (
        f"the database has no registry of this version ({error.args[0]}); run: authbackend migrate. If its schema is newer, "
        "upgrade authbackend"
    )


def _unwritable(error: asyncpg.PostgresError) -> str:
    if isinstance(error, asyncpg.DiskFullError):
        return f"nothing was changed: the disk of the database is full ({error.args[0]}). Make room there; who can read goes on"
    return (
        f"nothing was changed: the database is read-only ({error.args[0]}). It is a standby or was demoted, or "
        "default_transaction_read_only is on, which some providers set when its disk is full. Connect to the primary, "
        "or end that; who can read goes on"
    )


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


NEXT_HOST_S = 0.5
"""How long a host may be silent before the next of the URI is tried beside it."""


async def connect(target: Target) -> Connection:
    """
    Open a connection, to the first host of the URI that answers and is what ``target_session_attrs`` asks for.

    Raises:
        ConfigurationError: The URI is not valid, its password file cannot be read, or it leads to a pooler that does not
            keep a session together.
        Unavailable: No server can be reached, or each refuses; each cause in words of its own.
    """
    if target.read_dsn is not None:
        target = replace(target, dsn=target.read_dsn())
    uri = parse(target.dsn)
    options: dict[str, Any] = {}
    if context := tls_context(uri):
        options["ssl"] = context
    if len(uri.hosts) <= 1:
        where = dict(zip(("host", "port"), uri.hosts[0], strict=True)) if uri.hosts else {}
        return await _connect_one(target, uri, {**options, **where})
    return await _connect_any(target, uri, options)


async def _connect_any(target: Target, uri: ConnectionURI, options: dict[str, Any]) -> Connection:
    faults: dict[str, str] = {}
    opening: dict[asyncio.Task[Connection], str] = {}
    left = list(uri.hosts)
    try:
        while left or opening:
            if left:
                host, port = left.pop(0)
                task = asyncio.create_task(_connect_one(target, uri, {**options, "host": host, "port": port}))
                opening[task] = f"{host}:{port}"
            done, _ = await asyncio.wait(
                opening, timeout=NEXT_HOST_S if left else None, return_when=asyncio.FIRST_COMPLETED
            )
            for task in [task for task in opening if task in done]:  # in the order of the URI
                error = task.exception()
                if error is None:
                    del opening[task]
                    return task.result()
                if not isinstance(error, AuthbackendError):
                    raise error
                faults[opening.pop(task)] = error.detail
    finally:
        for task in opening:
            task.cancel()
            task.add_done_callback(_drop)
    named = "; ".join(f"{host}: {fault}" for host, fault in faults.items())
    raise Unavailable(f"no host of the connection URI can be used: {named}")


def _drop(task: asyncio.Task[Connection]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().terminate()


async def _connect_one(target: Target, uri: ConnectionURI, options: dict[str, Any]) -> Connection:
    connection = await _open(target, uri, options)
    try:
        with translated_errors():
            if await check_pooling(connection, target.dsn, lambda: _open(target, uri, options)):
                # A pooler passes no such setting on when a session begins.
                await connection.execute(f"set statement_timeout = {_statement_timeout_ms(target)}")
    except BaseException:
        connection.terminate()
        raise
    _set_socket_options(connection, uri.socket_options)
    return connection


def _statement_timeout_ms(target: Target) -> int:
    return int(target.statement_timeout_s * 1000)


async def _open(target: Target, uri: ConnectionURI, options: dict[str, Any]) -> Connection:
    timeout_s = uri.connect_timeout_s or target.connect_timeout_s
    if uri.session is not None:
        options = {**options, "target_session_attrs": uri.session}
    named = f"{uri.application_name} ({target.application_name})" if uri.application_name else target.application_name
    settings = {
        "application_name": named,
        "statement_timeout": str(_statement_timeout_ms(target)),
        "timezone": "UTC",  # the epoch of the change feed holds a timestamp as text
    }
    if uri.options:
        settings["options"] = uri.options
    with translated_errors():
        try:
            return await _asyncpg_connection(target, uri, timeout_s, settings, options)
        except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidPasswordError) as error:
            raise Unavailable(f"PostgreSQL refuses the role: {error.args[0]}") from error
        except TimeoutError as error:
            if error.errno is not None:
                raise
            raise Unavailable(f"PostgreSQL cannot be reached: no connection within {timeout_s:g} s") from error
        except OSError:  # also those of TLS that are ValueErrors
            raise
        except ValueError as error:
            raise Unavailable(
                "the connection URI is not valid; expected postgresql://role@host:port/database"
            ) from error


async def _asyncpg_connection(
    target: Target, uri: ConnectionURI, timeout_s: float, settings: dict[str, str], options: dict[str, Any]
) -> Connection:
    async def attempt(settings: dict[str, str]) -> Connection:
        found: Connection = await asyncpg.connect(
            uri.dsn,
            timeout=timeout_s,
            command_timeout=target.statement_timeout_s + 1,  # later than the server's own, which says why
            server_settings=settings,
            **options,
        )
        return found

    try:
        return await attempt(settings)
    except asyncpg.ProtocolViolationError as error:
        if "startup parameter: statement_timeout" not in error.args[0]:
            raise
        # PgBouncer, without ignore_startup_parameters.
        return await attempt({name: value for name, value in settings.items() if name != "statement_timeout"})


def _set_socket_options(connection: Connection, options: tuple[tuple[int, int, int], ...]) -> None:
    found = connection._transport.get_extra_info("socket") if options else None  # type: ignore[attr-defined]  # noqa: SLF001 - asyncpg does not give its socket away
    if found is not None and found.family != socket.AF_UNIX:
        for option in options:
            found.setsockopt(*option)


async def name_actor(connection: Connection, name: str) -> None:
    """
    Name who acts, until the end of the transaction.

    The audit trail keeps it as ``claimed_by``; its ``actor`` is the role that logged in, unless that role may speak for others.
    """
    await connection.execute("select set_config('authbackend.actor', $1, true)", name)


async def database_time(connection: Connection) -> datetime:
    """Return the database's time, by which records are made and compared."""
    now: datetime = await connection.fetchval("select clock_timestamp()")
    return now


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
