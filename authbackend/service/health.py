"""Liveness and readiness checks, for the listeners for RabbitMQ and for health."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import structlog
from aiohttp import web

from authbackend.registry.store import Reader
from authbackend.service.heartbeats import WorkerHeartbeats

log = structlog.get_logger(__name__)


class Health:
    """
    ``/health/live``: the process responds. ``/health/ready``: whether the replica can decide, and if not, why.

    Not ready before the first load, when the copy is older than ``registry.max_staleness_s``, when no worker serves, or
    when one hangs, since the kernel still assigns connections to it.

    Args:
        published: Returns what the follower process last published, None if it is not running.
    """

    def __init__(
        self,
        registry: Reader,
        published: Callable[[], dict[str, Any] | None],
        heartbeats: WorkerHeartbeats,
        max_staleness_s: float,
    ) -> None:
        self._registry = registry
        self._published = published
        self._heartbeats = heartbeats
        self._max_staleness_s = max_staleness_s

    async def live(self, _: web.BaseRequest) -> web.Response:
        """Return 200: the process responds."""
        return web.Response(text='{"status": "live"}', content_type="application/json")

    async def ready(self, _: web.BaseRequest) -> web.Response:
        """Return 200, or 503 with the reason."""
        try:
            state = self._state()
        except Exception as error:  # load balancers and people must get a readable answer
            log.exception("health.crashed")
            state = {"status": f"not ready: {type(error).__name__} in authbackend, see its log", "fault": "see the log"}
        return web.Response(
            status=200 if state["status"] == "ready" else 503, text=json.dumps(state), content_type="application/json"
        )

    def _state(self) -> dict[str, Any]:
        workers = self._heartbeats.states()
        with self._registry as registry:
            version, age_s, stale = registry.state, registry.age_s, registry.stale(self._max_staleness_s)
        if version is None:
            fault = (self._published() or {}).get("fault") or "the registry has not been loaded yet"
        else:
            fault = version.fault
        state: dict[str, Any] = {
            "status": "ready",
            "sync_age_s": None if version is None else round(age_s, 3),
            "fault": fault,
            "workers": workers,
        }
        if version is None:
            state["status"] = "not ready: the registry has not been loaded"
        elif stale:
            state["status"] = "not ready: the copy of the registry is stale, everything is denied"
        elif workers["hanging"]:
            state["status"] = f"not ready: {workers['hanging']} of {self._heartbeats.workers} workers hang"
        elif not workers["serving"]:
            state["status"] = "not ready: no worker serves yet"
        return state
