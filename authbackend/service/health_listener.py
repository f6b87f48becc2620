"""The listener for balancers, brokers' hosts and Prometheus, without login: health, revocation lists, metrics."""

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
"""Of the process's time, at most, for metrics, however many ask: who asks for health must not wait for them."""


class Exposition:
    """
    The metrics, rendered for everybody who waits for them at once, never older than a question.

    Args:
        render: Reads the files of all processes; takes milliseconds, in which nobody else is answered.
    """

    def __init__(self, render: Callable[[], bytes]) -> None:
        self._render = render
        self._not_before = 0.0
        self._next: asyncio.Task[bytes] | None = None

    async def show(self, _: web.Request) -> web.Response:
        """Return the metrics in Prometheus' text format."""
        if self._next is None:
            self._next = asyncio.create_task(self._rendered())
        text = await asyncio.shield(self._next)  # others may wait for it
        return web.Response(body=text, headers={"Content-Type": EXPOSITION_TYPE})

    async def _rendered(self) -> bytes:
        await asyncio.sleep(self._not_before - time.monotonic())
        self._next = None
        began = time.monotonic()
        try:
            return self._render()
        finally:
            ended = time.monotonic()
            self._not_before = ended + (ended - began) * (1 / METRICS_SHARE - 1)


def health_application(render: Callable[[], bytes], health: Health, lists: PublishedCrls) -> web.Application:
    """
    Build the application.

    Args:
        render: Returns the metrics.
        lists: The revocation lists; public by nature.
    """
    app = web.Application(middlewares=[show_errors])
    app.router.add_get("/metrics", Exposition(render).show)
    app.router.add_get("/health/live", health.live)
    app.router.add_get("/health/ready", health.ready)
    app.router.add_get("/crl/{name}.crl", lists.show)
    app.on_shutdown.append(lists.close)
    return app
