"""The listener without login, for load balancers, RabbitMQ hosts and Prometheus: health, CRLs, metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from aiohttp import web

from authbackend.api.server import show_errors
from authbackend.certificates.crl_endpoint import PublishedCrls
from authbackend.service.health import Health

EXPOSITION_TYPE = "text/plain; version=0.0.4; charset=utf-8"
METRICS_SHARE = 0.2
"""Largest share of the process's time spent on metrics, however many clients ask: health checks must not wait for them."""


class Exposition:
    """
    The metrics endpoint: one rendering answers all waiting requests, and nothing is rendered in advance.

    Args:
        render: Reads the files of all processes; blocks the event loop for milliseconds.
    """

    def __init__(self, render: Callable[[], bytes]) -> None:
        self._render = render
        self._next_render_at = 0.0
        self._next: asyncio.Task[bytes] | None = None

    async def show(self, _: web.Request) -> web.Response:
        """Return the metrics in Prometheus' text format."""
        if self._next is None:
            self._next = asyncio.create_task(self._render_when_due())
        text = await asyncio.shield(self._next)  # other requests may wait for it
        return web.Response(body=text, headers={"Content-Type": EXPOSITION_TYPE})

    async def _render_when_due(self) -> bytes:
        await asyncio.sleep(self._next_render_at - time.monotonic())
        self._next = None
        began = time.monotonic()
        try:
            return self._render()
        finally:
            ended = time.monotonic()
            self._next_render_at = ended + (ended - began) * (1 / METRICS_SHARE - 1)


def health_application(render: Callable[[], bytes], health: Health, lists: PublishedCrls) -> web.Application:
    """
    Build the application of the health listener.

    Args:
        render: Returns the metrics.
        lists: The CRLs, which are public.
    """
    app = web.Application(middlewares=[show_errors])
    app.router.add_get("/metrics", Exposition(render).show)
    app.router.add_get("/health/live", health.live)
    app.router.add_get("/health/ready", health.ready)
    app.router.add_get("/crl/{name}.crl", lists.show)
    app.on_shutdown.append(lists.close)
    return app
