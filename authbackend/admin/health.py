"""Liveness and readiness, for both listeners."""

from __future__ import annotations

import json

from aiohttp import web

from authbackend.registry.sync import RegistryCopy


class Health:
    """
    ``/health/live``: the process answers. ``/health/ready``: it can decide, and why not.

    Not ready before the first load and when the copy is older than ``registry.max_staleness_s``.
    """

    def __init__(self, copy: RegistryCopy) -> None:
        self._copy = copy

    async def live(self, _: web.BaseRequest) -> web.Response:
        """Return 200."""
        return web.Response(text='{"status": "live"}', content_type="application/json")

    async def ready(self, _: web.BaseRequest) -> web.Response:
        """Return 200, or 503 with the reason."""
        copy = self._copy
        state = {
            "status": "ready",
            "sync_age_s": None if copy.age_s is None else round(copy.age_s, 3),
            "fault": copy.fault,
        }
        if copy.snapshot is None:
            state["status"] = "not ready: the registry has not been loaded"
        elif copy.stale:
            state["status"] = "not ready: the copy of the registry is stale, everything is denied"
        return web.Response(
            status=200 if state["status"] == "ready" else 503, text=json.dumps(state), content_type="application/json"
        )
