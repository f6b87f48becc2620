"""The admin listener: explanations, on loopback only."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

import structlog
from aiohttp import web

from authbackend.api.explanations import as_json, read_attempt
from authbackend.errors import AuthbackendError, NotFound, Unavailable
from authbackend.policy import decide
from authbackend.policy.explain import explain
from authbackend.registry.store import Reader

log = structlog.get_logger(__name__)

_LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(reader: Reader, settings: decide.DecisionSettings, *, loopback: bool) -> web.Application:
    """
    Build the application of the admin listener.

    Args:
        loopback: Whether only this host can reach it; if not, it shows no policy, since there is no login.
    """

    async def moved_to_health(request: web.Request) -> web.Response:
        raise NotFound(f"{request.path} is served by another listener: health.listen (port 8082 by default)")

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

    app = web.Application(middlewares=[show_errors])
    for path in ("/metrics", "/health/{name}", "/crl/{name}"):
        app.router.add_get(path, moved_to_health)
    if loopback:
        app.router.add_get("/api/explain", _for_this_host(show_explanation))
    return app


def _dumps(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _for_this_host(handler: Handler) -> Handler:
    """Refuse requests with another Host name: a web page could have pointed that name at this host (DNS rebinding)."""

    async def checked_handler(request: web.Request) -> web.StreamResponse:
        if request.host.rpartition(":")[0] not in _LOOPBACK_NAMES and request.host not in _LOOPBACK_NAMES:
            return web.Response(status=421, text="this listener answers to 127.0.0.1, localhost and [::1] only\n")
        return await handler(request)

    return checked_handler


@web.middleware
async def show_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer errors as problem details (RFC 9457)."""
    try:
        return await handler(request)
    except AuthbackendError as error:
        return _problem(error.http_status, type(error).__name__, error.detail)
    except web.HTTPException:
        raise
    except Exception as error:
        log.exception("request.crashed", path=request.path)
        return _problem(500, "InternalError", f"{type(error).__name__} in authbackend, see its log")


def _problem(status: int, title: str, detail: str) -> web.Response:
    content = {"title": title, "detail": detail}
    return web.json_response(content, status=status, content_type="application/problem+json", dumps=_dumps)
