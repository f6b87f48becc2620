"""
Detect connection poolers, and refuse those with transaction or statement pooling.

LISTEN, advisory locks, prepared statements and ``set`` belong to a session. PgBouncer makes up the process id that it
gives a client, which shows that there is a pooler. Its pooling mode can only be found out with a second connection.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

import asyncpg

from authbackend.errors import AuthbackendError, ConfigurationError

_OLDEST = 15
_OTHERS = 2
_PID = "select pg_backend_pid()"
_session_pooling: set[str] = set()

REFUSED = (
    "the connection URI leads to a connection pooler with transaction or statement pooling (PgBouncer: pool_mode). Listening for "
    "changes and advisory locks need one server connection for the whole session: connect to PostgreSQL directly, or to a pool "
    "with pool_mode = session, in pgbouncer.ini for this database alone: NAME = host=... pool_mode=session"
)


async def check_pooling(
    connection: asyncpg.Connection, place: str, another: Callable[[], Awaitable[asyncpg.Connection]]
) -> bool:
    """
    Return whether a connection goes through a pooler.

    Args:
        place: The connection URI; a pooler with session pooling is remembered for it.
        another: Opens one more connection to the same place.
    Raises:
        ConfigurationError: The pooler has transaction or statement pooling.
    """
    if connection.get_server_version().major < _OLDEST:
        return False  # too old; refused elsewhere, with a message of its own
    try:
        pid = await connection.fetchval(_PID)
        if pid == connection.get_server_pid():
            return False
        if place not in _session_pooling:
            await _check_kind(connection, pid, another)
            _session_pooling.add(place)
    except (
        asyncpg.DuplicatePreparedStatementError,  # of another client
        asyncpg.InvalidSQLStatementNameError,
        asyncpg.ProtocolViolationError,
    ) as error:
        raise ConfigurationError(REFUSED) from error
    except asyncpg.ConnectionDoesNotExistError as error:
        if "statement pooling" in str(error):
            raise ConfigurationError(REFUSED) from error
        raise
    return True


async def _check_kind(
    connection: asyncpg.Connection, pid: int, another: Callable[[], Awaitable[asyncpg.Connection]]
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(_OTHERS):
            try:
                other = await another()
            except AuthbackendError:
                return  # the pool is full although the first connection is idle, so that one keeps its server connection
            stack.callback(other.terminate)
            try:
                await other.execute("begin")  # statement pooling does not allow this, and closes the connection
                taken = await other.fetchval(_PID)
            except TimeoutError:
                return
            # While the second is in a transaction, transaction pooling gives the first another server connection.
            if taken == pid or await connection.fetchval(_PID) != pid:
                raise ConfigurationError(REFUSED)
