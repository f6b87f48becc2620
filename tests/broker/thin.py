"""Lightweight MQTT connections, for hundreds of them: those of ``authbackend_load``."""

from __future__ import annotations

import asyncio

from authbackend_load.connection import Connection
from authbackend_load.tls import TLS

from .identities import Identity
from .processes import HarnessError


async def connected(identity: Identity, port: int, *, client_id: str = "", clean: bool = True) -> Connection:
    """
    Return a device's connection after login, with MQTT 5; the client id defaults to the common name.

    Raises:
        HarnessError: It was refused.
    """
    tls = TLS(identity.context(), "localhost")
    _, connection = await asyncio.get_running_loop().create_connection(lambda: Connection(tls, 5), "127.0.0.1", port)
    await connection.established
    expiry = 0 if clean else 600
    code = await connection.connect(client_id or identity.name, keep_alive_s=60, clean=clean, session_expiry_s=expiry)
    if code:
        raise HarnessError(f"{identity.name} was refused: 0x{code:02x}")
    return connection
