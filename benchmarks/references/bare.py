"""
The minimal aiohttp server for RabbitMQ: parses the form and answers ``allow``. Run as
``python -m benchmarks.references.bare PORT``.

No routing, no access log, uvloop: the same foundation as the service, without the service.
"""

from __future__ import annotations

import asyncio
import sys
from urllib.parse import parse_qsl

import uvloop
from aiohttp import web


async def _allow(request: web.BaseRequest) -> web.Response:
    dict(parse_qsl((await request.read()).decode(), keep_blank_values=True))
    return web.Response(text="allow")


async def serve(port: int) -> None:
    """Serve until the process is terminated."""
    server = web.Server(_allow, access_log=None, keepalive_timeout=150)
    await asyncio.get_running_loop().create_server(server, "127.0.0.1", port, backlog=4096)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
