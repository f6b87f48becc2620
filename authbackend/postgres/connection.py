"""Open connections to PostgreSQL, and translate the driver's errors into this project's."""

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
    How to connect to the database; the URI may hold a password and is never shown.

    Args:
        connect_timeout_s: Per host, unless the URI has its own.
        read_dsn: Called for each connection; returns the URI with the current password from its file. None: use ``dsn``.
    """

    dsn: str = field(repr=False)
    connect_timeout_s: float = 5.0
    statement_timeout_s: float = 30.0
    application_name: str = "authbackend"
    read_dsn: Callable[[], str] | None = field(default=None, repr=False, compare=False)


@contextlib.contextmanager
def translated_errors() -> Iterator[None]:
    """
    Translate asyncpg's exceptions into this project's errors.

    Raises:
        InvalidInput: A constraint rejected a row; the detail is the database's own message.
        Conflict: The name is taken or still referenced, or another transaction changed the same rows.
        Forbidden: The role lacks the privilege.
        Unwritable: The database is read-only or its disk is full.
        Unavailable: There is no connection, the server is stopping, or something took too long; the detail says
            which, without any part of the URI.
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
        if error.errno is not None:  # a timeout of the network, not of a statement
            raise Unavailable(connection_fault(error)) from error
        raise Unavailable(
            "PostgreSQL did not answer a statement in time (database.statement_timeout_s): it is stuck or overloaded, or the "
            "network lost the answer. It is not known whether the change was made; check before you try again"
        ) from error
    except (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        # InternalClientError: the server closed the connection in the middle of an answer.
        raise Unavailable(connection_fault(error)) from error


def _refused(error: asyncpg.PostgresError) -> str:
    message = str(error.args[0])
    # Not for a check constraint: PostgreSQL's detail shows the row, which may contain a password hash.
    if isinstance(error, (asyncpg.UniqueViolationError, asyncpg.ForeignKeyViolationError)):
        message = f"{message}: {getattr(error, 'detail', '') or ''}".rstrip(": ")
    hint = getattr(error, "hint", None)
    return f"{message}. {hint}" if hint else message


def _unfit(error: asyncpg.PostgresError) -> str:
    if isinstance(error, asyncpg.UndefinedTableError):
        return "the database has no registry yet; run: authbackend migrate"
    return (
        f"the database's schema does not fit this version of authbackend ({error.args[0]}); run: authbackend migrate. If the "
        "schema is newer, upgrade authbackend"
    )


def _unwritable(error: asyncpg.PostgresError) -> str:
    if isinstance(error, asyncpg.DiskFullError):
        return f"nothing was changed: the disk of the database is full ({error.args[0]}). Free space there; reads still work"
    return (
        f"nothing was changed: the database is read-only ({error.args[0]}). It is a standby or was demoted, or "
        "default_transaction_read_only is on, which some providers set when its disk is full. Connect to the primary, "
        "or make it writable again; reads still work"
    )


_FIND_HOLDER = "select pid, application_name, usename, state, xact_start from pg_stat_activity order by xact_start"


def _waited(error: asyncpg.PostgresError) -> str:
    message = error.args[0]
    if isinstance(error, asyncpg.DeadlockDetectedError):
        return (
            f"nothing was changed: this and another transaction waited for each other, and PostgreSQL cancelled this one ({message}); "
            "try again"
        )
    if isinstance(error, asyncpg.LockNotAvailableError):
        return (
            f"nothing was changed: another transaction holds a lock that this needs and did not end in time ({message}). "
            f"Try again; to find that transaction: {_FIND_HOLDER}"
        )
    return (
        f"nothing was changed: PostgreSQL cancelled the statement before it finished ({message}). Most often another transaction "
        f"holds a lock that it needs; to find it: {_FIND_HOLDER}. Then try again, or with a longer database.statement_timeout_s"
    )


NEXT_HOST_S = 0.5
"""After this time without an answer from a host, the next host of the URI is tried in parallel."""


async def connect(target: Target) -> Connection:
    """
    Connect to the first host of the URI that answers and satisfies ``target_session_attrs``.

    Raises:
        ConfigurationError: The URI is not valid, its password file cannot be read, or it leads to a pooler without
            session pooling.
        Unavailable: Every host is unreachable or refuses; the detail names the cause for each.
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
    untried = list(uri.hosts)
    try:
        while untried or opening:
            if untried:
                host, port = untried.pop(0)
                task = asyncio.create_task(_connect_one(target, uri, {**options, "host": host, "port": port}))
                opening[task] = f"{host}:{port}"
            done, _ = await asyncio.wait(
                opening, timeout=NEXT_HOST_S if untried else None, return_when=asyncio.FIRST_COMPLETED
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
    listed = "; ".join(f"{host}: {fault}" for host, fault in faults.items())
    raise Unavailable(f"no host of the connection URI can be used: {listed}")


def _drop(task: asyncio.Task[Connection]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().terminate()


async def _connect_one(target: Target, uri: ConnectionURI, options: dict[str, Any]) -> Connection:
    connection = await _open(target, uri, options)
    try:
        with translated_errors():
            if await check_pooling(connection, target.dsn, lambda: _open(target, uri, options)):
                # A pooler does not pass this startup parameter on.
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
    name = f"{uri.application_name} ({target.application_name})" if uri.application_name else target.application_name
    settings = {
        "application_name": name,
        "statement_timeout": str(_statement_timeout_ms(target)),
        "timezone": "UTC",  # the epoch of the change feed contains a timestamp as text
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
        except OSError:  # some TLS errors are also ValueErrors
            raise
        except ValueError as error:
            raise Unavailable(
                "the connection URI is not valid; expected postgresql://role@host:port/database"
            ) from error


async def _asyncpg_connection(
    target: Target, uri: ConnectionURI, timeout_s: float, settings: dict[str, str], options: dict[str, Any]
) -> Connection:
    async def attempt(settings: dict[str, str]) -> Connection:
        connection: Connection = await asyncpg.connect(
            uri.dsn,
            timeout=timeout_s,
            command_timeout=target.statement_timeout_s
            + 1,  # later than the server's own timeout, whose error says more
            server_settings=settings,
            **options,
        )
        return connection

    try:
        return await attempt(settings)
    except asyncpg.ProtocolViolationError as error:
        if "startup parameter: statement_timeout" not in error.args[0]:
            raise
        # PgBouncer, without ignore_startup_parameters.
        return await attempt({name: value for name, value in settings.items() if name != "statement_timeout"})


def _set_socket_options(connection: Connection, options: tuple[tuple[int, int, int], ...]) -> None:
    own = connection._transport.get_extra_info("socket") if options else None  # type: ignore[attr-defined]  # noqa: SLF001 - asyncpg has no public access to its socket
    if own is not None and own.family != socket.AF_UNIX:
        for option in options:
            own.setsockopt(*option)


async def name_actor(connection: Connection, name: str) -> None:
    """
    Set who acts, until the end of the transaction.

    The audit trail records the name as ``claimed_by``. Its ``actor`` is the role that logged in, unless that role may
    speak for others.
    """
    await connection.execute("select set_config('authbackend.actor', $1, true)", name)


async def database_time(connection: Connection) -> datetime:
    """Return the current time by the database's clock, to compare with times on record."""
    now: datetime = await connection.fetchval("select clock_timestamp()")
    return now


@contextlib.asynccontextmanager
async def connected(target: Target) -> AsyncIterator[Connection]:
    """Open a connection for the duration of the block; errors inside it are translated too."""
    connection = await connect(target)
    try:
        with translated_errors():
            yield connection
    finally:
        with contextlib.suppress(Exception):
            await connection.close(timeout=5)
