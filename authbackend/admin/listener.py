"""The listener for people and Prometheus: metrics, health, revocation lists, and explanations on loopback."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

from aiohttp import web

from authbackend.admin.crl import PublishedLists
from authbackend.admin.explanations import as_json, read_attempt
from authbackend.admin.health import Health
from authbackend.errors import AuthbackendError, NotFound, Unavailable
from authbackend.policy import decide
from authbackend.policy.explain import explain
from authbackend.registry.store import Reader

EXPOSITION_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
_STATUS = {2: 400, 3: 404, 5: 503}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(
    reader: Reader,
    exposition: Callable[[], bytes],
    health: Health,
    settings: decide.DecisionSettings,
    lists: PublishedLists,
    *,
    loopback: bool,
) -> web.Application:
    """
    Build the application.

    Args:
        exposition: Returns the metrics.
        lists: The revocation lists; public by nature.
        loopback: Whether it is reachable from this host only; else it shows no policy, since nobody logs in.
    """

    async def show_metrics(_: web.Request) -> web.Response:
        return web.Response(body=exposition(), headers={"Content-Type": EXPOSITION_TYPE})

    async def show_explanation(request: web.Request) -> web.Response:
        name, attempt = read_attempt(request.query)
        with reader as registry:
            if registry.state is None:
                raise Unavailable("the registry has not been loaded yet")
            device = registry.device_by_id(name) or registry.device_by_name(name)
            if device is None:
                raise NotFound(f"no device has the id or common name {name!r}")
            explanation = explain(registry, device, attempt, registry.now, settings)
        return web.json_response(as_json(device, attempt, explanation), dumps=_dumps)

    app = web.Application(middlewares=[_errors])
    app.router.add_get("/metrics", show_metrics)
    app.router.add_get("/health/live", health.live)
    app.router.add_get("/health/ready", health.ready)
    app.router.add_get("/crl/{name}.crl", lists.show)
    app.on_shutdown.append(lists.close)
    if loopback:
        app.router.add_get("/api/explain", _for_this_host(show_explanation))
    return app


def _dumps(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _for_this_host(handler: Handler) -> Handler:
    """Refuse a request whose Host is another name: a web page could have pointed that name at this host."""

    async def guarded(request: web.Request) -> web.StreamResponse:
        if request.host.rpartition(":")[0] not in _LOOPBACK_NAMES and request.host not in _LOOPBACK_NAMES:
            return web.Response(status=421, text="this listener answers to 127.0.0.1, localhost and [::1] only\n")
        return await handler(request)

    return guarded


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except AuthbackendError as error:
        problem = {"title": type(error).__name__, "detail": error.detail}
        return web.json_response(
            problem, status=_STATUS.get(error.exit_code, 500), content_type="application/problem+json", dumps=_dumps
        )
