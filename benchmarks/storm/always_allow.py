"""
The minimal HTTP backend, which always answers ``allow``: ``python -m benchmarks.storm.always_allow PORT [DIR]``.

With DIR, it uses mutual TLS with certificates made by ``authbackend certs``. Prints ``ready`` when it listens.
"""

from __future__ import annotations

import asyncio
import ssl
import sys
from pathlib import Path

import uvloop
from aiohttp import web


async def _allow(request: web.BaseRequest) -> web.Response:
    await request.read()
    return web.Response(text="allow")


def _tls(directory: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=directory / "internal-ca.pem")
    context.load_cert_chain(directory / "authbackend.pem", directory / "authbackend.key")
    context.verify_mode = ssl.CERT_REQUIRED
    return context


async def serve(port: int, directory: Path | None) -> None:
    """Serve until the process is terminated."""
    server = web.Server(_allow, access_log=None, keepalive_timeout=150)
    tls = None if directory is None else _tls(directory)
    await asyncio.get_running_loop().create_server(server, "127.0.0.1", port, ssl=tls, backlog=4096)
    print("ready", flush=True)  # noqa: T201
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None))
