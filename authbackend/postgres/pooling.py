"""
Connection poolers: one that gives a server connection to each transaction is refused.

Listening, advisory locks, prepared statements and ``set`` belong to a session. PgBouncer makes up the process id that it
tells a client, by which any pooler is seen; which kind it is, only a second client can see.
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
    "the connection URI leads to a connection pooler that gives a server connection to each transaction (PgBouncer: pool_mode = "
    "transaction or statement). Listening for changes and locks need one for the whole session: connect to PostgreSQL directly, "
    "or to a pool with pool_mode = session, in pgbouncer.ini for this database alone: NAME = host=... pool_mode=session"
)


async def check_pooling(
    connection: asyncpg.Connection, place: str, another: Callable[[], Awaitable[asyncpg.Connection]]
) -> bool:
    """
    Return whether a connection goes through a pooler.

    Args:
        place: Where it leads; what is found out is remembered for it.
        another: Opens one more.
    Raises:
        ConfigurationError: It is one that does not keep a session together.
    """
    if connection.get_server_version().major < _OLDEST:
        return False  # refused by name when it is used
    try:
        pid = await connection.fetchval(_PID)
        if pid == connection.get_server_pid():
            return False
        if place not in _session_pooling:
            await _check_kind(connection, pid, another)
            _session_pooling.add(place)
    except (
        asyncpg.DuplicatePreparedStatementError,  # another client's
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
                return  # no room in the pool while the first one is idle: that keeps its server connection
            stack.callback(other.terminate)
            try:
                await other.execute("begin")  # not allowed with statement pooling, where it costs the connection
                taken = await other.fetchval(_PID)
            except TimeoutError:
                return
            # In a transaction meanwhile, so that the first one would get what is left.
            if taken == pid or await connection.fetchval(_PID) != pid:
                raise ConfigurationError(REFUSED)
